"""Provisioning as the kubelet feels it: resources that change at run time, and VFs that pods have."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from kubelet.answers import AdmissionError, KubeletError
from kubelet.measured import Timed
from kubelet.nodes import CY, DC, SYM_DC
from kubelet.production import ProductionNode, production_node
from kubelet.real_kubelet import RealKubelet
from qat_server.kubelet.registration.directories import Registration
from qat_server.kubelet.usage import ADMISSION
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.kubelet.topology import TopologyPolicy
from qat_simulation.node.description import Node, Pf

CRYPTO, COMPRESSION = {"qat.conf": "ServicesEnabled=sym;asym\n"}, {"qat.conf": "ServicesEnabled=dc\n"}
PF0, PF1 = "0000:6b:00.0", "0001:6b:00.0"
EIGHT = tuple(f"{domain}:{bus}:00.0" for domain in ("0000", "0001") for bus in ("6b", "70", "e8", "ed"))


def asked(node: ProductionNode[RealKubelet], operation: str, pf: str = PF0) -> int:
    """How often an operation on a PF was begun."""
    lines = [json.loads(line) for line in node.audit_lines()]
    begun = [line for line in lines if line["event"] == "asked" and line["operation"] == operation]
    return sum(line["arguments"]["address"] == pf for line in begun)


@asynccontextmanager
async def provisioned(
    addresses: Sequence[str] = (PF0, PF1),
    total_vfs: int = 4,
    options: Sequence[str] = (),
    policy: TopologyPolicy = TopologyPolicy.RESTRICTED,
    registration: Registration = Registration.KUBELET_SOCKET,
) -> AsyncIterator[tuple[ProductionNode[RealKubelet], ConfigMap]]:
    """A node as after boot, whose PFs are to be for crypto; nothing is started yet."""
    node = Node(
        pfs=tuple(
            Pf(address=address, services="dc", total_vfs=total_vfs, num_vfs=0, numa_node=number % 2)
            for number, address in enumerate(addresses)
        )
    )
    async with production_node(node, ("--resync-interval=1h", *options), policy, registration) as running:
        config = ConfigMap(running.directory / "config")
        config.write(CRYPTO)
        running.add_server_options(f"--provisioning-config={config.directory}")
        yield running, config


async def test_a_configmap_swap_is_another_resource_without_a_restart(registration: Registration) -> None:
    async with provisioned(registration=registration) as (node, config):
        async with Timed("server's start to allocatable, 2 PFs to be provisioned first", 1, registration) as timed:
            await timed.add(await node.start({CY: 8}))
        async with Timed("ConfigMap swap to the new resource's allocatable", 1, registration) as timed:
            for resource, before, files in (
                (DC, CY, COMPRESSION),
                (SYM_DC, DC, {"qat.conf": "ServicesEnabled = dc ; sym\n"}),
                (CY, SYM_DC, CRYPTO),
            ):
                began = time.monotonic()
                config.write(files)
                await node.wait({resource: 8, before: 0})
                await timed.add(time.monotonic() - began)
        pod = await node.kubelet.allocate("pod", [("main", CY, 2)])
        assert len(set(pod.devices)) == 2


async def test_the_old_resource_is_withdrawn() -> None:
    async with provisioned() as (node, config):
        await node.start({CY: 8})
        config.write(COMPRESSION)
        await node.wait({DC: 8, CY: 0})
        await node.until("cy is withdrawn", lambda: not (node.sockets / "cy.sock").exists(), 30)
        await until_stopped(node, CY)
        assert await node.kubelet.capacity() == {DC: 8}


async def until_stopped(node: ProductionNode[RealKubelet], resource: str) -> None:
    """Until the kubelet has seen the end of a resource's endpoint; it is as old then as one that is forgotten."""
    deadline = time.monotonic() + 20
    while True:
        try:
            await node.kubelet.age(resource)
        except KubeletError as error:
            assert "has not stopped" in error.message
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        else:
            return


@pytest.mark.parametrize("drain", [False, True], ids=["", "drained"])
async def test_a_change_with_pods_running_waits_and_then_happens(drain: bool) -> None:
    options = ("--drain-for-reconfiguration",) if drain else ()
    async with provisioned(options=options, policy=TopologyPolicy.NONE) as (node, config):
        await node.start({CY: 8})
        # As on any node there is another pod: a new kubelet that names none is not believed that there is none.
        await node.kubelet.allocate("other", [("main", "example.com/none", 1)])
        pod = await node.kubelet.allocate("crypto", [("main", CY, 1)])
        assert pod.devices[0].startswith("0000:")
        held_open = node.kernel.open_vfio(pod.devices[0])
        config.write(COMPRESSION)
        await node.wait({DC: 4, CY: 1 if drain else 4})
        status = await node.until_status(
            "it waits for the pod",  # which is named once PodResources has named it
            lambda status: status.provisioning and status.provisioning[0].held_by == ("default/crypto/main",),
        )
        assert (status.provisioning[0].pf, status.provisioning[0].stage) == (PF0, "waiting")
        if drain:
            assert (await node.kubelet.allocatable_free())[CY] == 0
            with pytest.raises(AdmissionError):
                await node.kubelet.allocate("late", [("main", CY, 1)])
            assert (await node.kubelet.status("crypto"))["main"][CY][pod.devices[0]] == "Healthy"
        else:
            late = await node.kubelet.allocate("late", [("main", CY, 1)])
            assert late.devices[0].startswith("0000:")
            await node.kubelet.free("late")
        # A restart of the kubelet, with the pod's containers running, changes nothing about it.
        assert await node.kubelet.restart(kill=True) == ()
        await node.wait({DC: 4, CY: 1 if drain else 4})
        assert await node.kubelet.devices_of("crypto") == set(pod.devices)
        assert asked(node, "SetServices") == 1, "that of the start"
        held_open.close()
        async with Timed("the last pod ends, to the new allocatable", ADMISSION + 1) as timed:
            began = time.monotonic()
            await node.kubelet.free("crypto")
            await node.wait({DC: 8, CY: 0}, 40)
            await timed.add(time.monotonic() - began)


async def test_pods_come_and_go_while_the_services_change() -> None:
    """Whatever the moment in which a pod is admitted: it has its VF, or is refused, and what it has stays."""
    async with provisioned(policy=TopologyPolicy.NONE) as (node, config):
        await node.start({CY: 8})
        running: dict[str, str] = {}
        for number in range(12):
            resource = CY if number % 2 else DC
            config.write(CRYPTO if number % 2 else COMPRESSION)
            for attempt in range(3):
                name = f"pod-{number}-{attempt}"
                try:
                    pod = await node.kubelet.allocate(name, [("main", resource, 1)])
                except AdmissionError:
                    continue
                if pod.devices:
                    running[name] = pod.devices[0]
                else:  # there was no such resource yet, which the device manager lets pass
                    await node.kubelet.free(name)
            assert len(set(running.values())) == len(running)
            for name, device in running.items():
                assert node.kernel.driver(device) == "vfio-pci", f"{name} lost its VF"
        for name in running:
            await node.kubelet.free(name)
        await node.wait({CY: 8}, 60)


async def test_eight_pfs_with_128_vfs() -> None:
    options = ("--max-num-devices=128",)
    async with provisioned(EIGHT, 16, options, TopologyPolicy.NONE) as (node, _):
        # As long as the kernel takes for it, and one after the other that would be eight times as long.
        node.kernel.delay("qat/state", 0.25)
        node.kernel.delay("sriov_numvfs", 0.5)
        async with Timed("server's start to allocatable, 8 PFs and 128 VFs to be provisioned first", 3) as timed:
            await timed.add(await node.start({CY: 128}))
        assert sum(each.stage == "done" for each in (await node.status()).provisioning) == 8
