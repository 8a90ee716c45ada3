"""Provisioning on the real kernel: from a machine as it boots to allocatable, and never against who has a VF open."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from kernel.nodes import PF, SMALL, TWO_PFS, VF
from kernel.real_node import PATIENCE, RealNode, real_node
from kernel.test_in_use import traced_helper
from kubelet.nodes import CY, DC
from qat_shared.messages import ErrorCode, Failure, Provisioned, Service, SetAutoReset, SetNumVfs, SetServices
from qat_shared.pci import PciAddress
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.node.description import Node, Pf

ADDRESS = PciAddress.parse(PF)
AS_BOOTED = Node(pfs=tuple(Pf(address=pf.address, numa_node=pf.numa_node, num_vfs=0) for pf in TWO_PFS.pfs))
"""The driver's first configuration, which is not what is wanted, and no VFs."""


def configured(node: RealNode, services: str) -> ConfigMap:
    """A ConfigMap that the server is started with."""
    config = ConfigMap(node.directory / "config")
    config.write({"qat.conf": f"ServicesEnabled={services}\n"})
    node.add_server_options(f"--provisioning-config={config.directory}")
    return config


def shown(address: str, name: str) -> str:
    return Path(f"/sys/bus/pci/devices/{address}/{name}").read_text().strip()


async def test_as_booted_to_32_allocatable(record_property: Callable[[str, object], None]) -> None:
    async with real_node(AS_BOOTED) as node:
        configured(node, "sym;asym")
        assert {shown(pf.address, "qat/cfg_services") for pf in AS_BOOTED.pfs} == {"sym;asym", "dc"}
        seconds = await node.start({CY: 32})
        record_property("measured", f"as booted to provisioned, 32 VFs bound and allocatable: {seconds:.1f} s")
        await node.until_bound()
        assert {shown(pf.address, "sriov_numvfs") for pf in AS_BOOTED.pfs} == {"16"}
        for operation in ("SetServices", "SetNumVfs", "BindDriver"):
            ended = [line for line in node.audited(operation) if line["event"] == "done"]
            # The time that the kernel takes, and the child process.
            times = [line["duration_ms"] for line in ended if "duration_ms" in line]
            if times:
                record_property("measured", f"{operation}: {min(times):.0f} to {max(times):.0f} ms, of {len(times)}")


async def test_a_pending_change_happens_when_the_client_has_ended() -> None:
    async with real_node(SMALL, ("--resync-interval=1s",)) as node:
        config = configured(node, "sym;asym")
        await node.start({CY: 4})
        await node.until_bound()
        with node.real.open_vfio(VF):
            config.write({"qat.conf": "ServicesEnabled=dc\n"})
            await node.until_status(
                "the change waits", lambda status: any(each.stage == "waiting" for each in status.provisioning)
            )
            assert shown(PF, "qat/cfg_services") == "sym;asym"
            assert shown(PF, "qat/state") == "up"
            assert shown(PF, "sriov_numvfs") == "4"
        await node.wait({DC: 4})
        assert shown(PF, "qat/cfg_services") == "dc"


async def test_nothing_is_written_to_a_pf_in_use(tmp_path: Path) -> None:
    refused = (
        SetNumVfs(id=1, address=ADDRESS, count=0),
        SetServices(id=2, address=ADDRESS, services=(Service.DC,)),
    )
    async with traced_helper(tmp_path / "trace") as (node, client, writes):
        with node.real.open_vfio(VF):
            for request in refused:
                reply = client.ask(request)
                assert isinstance(reply, Failure), reply
                assert reply.code is ErrorCode.BUSY
            assert [line for line in writes() if "qat/" in line or "sriov" in line] == []
            assert isinstance(client.ask(SetAutoReset(id=3, address=ADDRESS, on=True)), Provisioned), "takes nothing"
        began = time.monotonic()
        reply = await asyncio.to_thread(client.ask, refused[0])
        assert isinstance(reply, Provisioned), (reply, time.monotonic() - began)
        assert shown(PF, "sriov_numvfs") == "0"
        assert any("sriov_numvfs" in line for line in writes())


async def test_services_that_the_kernel_refuses_are_undone() -> None:
    async with real_node(SMALL) as node:
        node.start_helper()
        await node.until("the helper listens", node.helper_socket.exists)
        with node.ask() as client:
            three = SetServices(id=1, address=ADDRESS, services=(Service.SYM, Service.ASYM, Service.DC))
            reply = client.ask(three)
            assert isinstance(reply, Failure), reply
            assert (reply.code, reply.errno) == (ErrorCode.KERNEL, 22)
            assert (shown(PF, "qat/cfg_services"), shown(PF, "qat/state")) == ("asym;sym", "up")
            node.real.switch(PF, "busy", 1)  # in reset
            reply = client.ask(SetServices(id=2, address=ADDRESS, services=(Service.DC,)))
            assert isinstance(reply, Failure), reply
            assert (reply.code, reply.errno) == (ErrorCode.KERNEL, 16)
            node.real.switch(PF, "busy", 0)
            assert isinstance(client.ask(SetServices(id=3, address=ADDRESS, services=(Service.DC,))), Provisioned)
            assert shown(PF, "qat/cfg_services") == "dc"


async def resyncs(node: RealNode) -> float:
    """How often the server has looked at everything."""
    lines = (await node.get("/metrics"))[1].decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("qat_plugin_resyncs_total "))


async def test_the_server_answers_while_an_administrators_write_waits() -> None:
    """Whoever reads sriov_numvfs then, or driver_override, waits for the device's lock, and no signal ends that."""
    async with real_node(SMALL, ("--resync-interval=1s",)) as node:
        configured(node, "sym;asym")
        await node.start({CY: 4})
        await node.until_bound()
        with node.real.open_vfio(VF):
            waiting = asyncio.create_task(asyncio.to_thread(node.real.set_numvfs, PF, 0))
            await node.until("the write waits", lambda: node.real.driver(VF) is None)
            await node.wait({CY: 0})
            looks = await resyncs(node) + 3
            async with asyncio.timeout(PATIENCE):
                while await resyncs(node) < looks:
                    assert (await node.get("/healthz"))[0] == 200
                    await asyncio.sleep(0.05)
            assert not waiting.done()
        await waiting
        await node.wait({CY: 4})
