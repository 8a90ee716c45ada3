"""The main job, end to end: the real helper and server processes on a simulated node, as the kubelet sees them."""

import asyncio
import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
from collections import Counter

import pytest

from qat_server.observability.status_format import Status, decode
from qat_simulation.kubelet.kubelet import AdmissionError
from qat_simulation.node.description import LoneVf, Node, OtherDevice, Pf, demo_node
from qat_simulation.running_node import RunningNode, command, running_node
from support.conditions import until

CY, DC, GENERIC = "qat.intel.com/cy", "qat.intel.com/dc", "qat.intel.com/generic"
ONE_PF = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),))
QUICK = ("--health-interval=100ms",)


def all_bound(status: Status, driver: str = "vfio-pci") -> bool:
    return status.ready and bool(status.vfs) and all(vf.driver == driver for vf in status.vfs)


async def start(node: RunningNode, expected: dict[str, int], driver: str = "vfio-pci") -> Status:
    """Both processes up, every VF bound, and the kubelet told of exactly `expected`."""
    node.start_helper()
    node.start_server()
    status = await node.until_status("every VF is bound", lambda status: all_bound(status, driver))
    await node.until(f"allocatable is {expected}", lambda: node.kubelet.allocatable() == expected)
    return status


async def test_the_demo_node_from_start_to_pods_and_the_audit_log() -> None:
    options = ("--kernel-vf-drivers=4xxxvf,c6xxvf", "--allocation-policy=balanced")
    async with running_node(demo_node(), options) as node:
        for pf in demo_node().pfs:
            node.kernel.set_numvfs(pf.address, pf.total_vfs)
        await start(node, {CY: 16, DC: 8, GENERIC: 4})
        assert node.kubelet.capacity() == {CY: 16, DC: 8, GENERIC: 4}
        pod = await node.kubelet.allocate("crypto", [("main", CY, 2), ("side", DC, 1)])
        main, side = pod.containers["main"], pod.containers["side"]
        assert main.envs == {"QAT0": "0000:6b:00.1", "QAT1": "0000:70:00.1"}, "one of each PF"
        assert list(side.envs) == ["QAT0"], "each container counts for itself"
        groups = [node.kernel.snapshot()[device].iommu_group for device in sorted(node.kernel.snapshot())]
        assert len(set(groups)) == len(groups)
        by_text = {str(address): state for address, state in node.kernel.snapshot().items()}
        wanted = {f"/dev/vfio/{by_text[vf].iommu_group}" for vf in main.envs.values()} | {"/dev/vfio/vfio"}
        assert set(main.device_nodes) == wanted
        with pytest.raises(AdmissionError):
            await node.kubelet.allocate("greedy", [("main", CY, 15)])
        await node.stop_server()  # it asks who holds devices when it likes: now nothing new begins

        def told(event: str) -> Counter[str]:
            records = map(json.loads, node.audit_lines())
            return Counter(record["operation"] for record in records if record["event"] == event)

        await node.until("each operation has its two lines", lambda: told("asked") == told("done"))
        assert told("asked")["BindDriver"] == 28
        lines = node.audit_lines()
    for before, after in itertools.pairwise(lines):
        assert json.loads(after)["previous"] == hashlib.sha256(before).hexdigest()


async def test_in_a_vm_there_are_vfs_without_a_pf() -> None:
    vfs = tuple(LoneVf(address=f"0000:00:0{number}.0", device="4941") for number in (5, 6))
    other = OtherDevice(address="0000:00:07.0", vendor="8086", device="1572")
    async with running_node(Node(vfs=vfs, others=(other,))) as node:
        status = await start(node, {GENERIC: 2})
        assert [vf.pf for vf in status.vfs] == ["", ""]


async def test_igb_uio_gives_uio_nodes_and_the_mount() -> None:
    async with running_node(ONE_PF, ("-dpdk-driver", "igb_uio")) as node:
        await start(node, {CY: 4}, driver="igb_uio")
        pod = await node.kubelet.allocate("pod", [("main", CY, 1)])
        main = pod.containers["main"]
        assert [path.startswith("/dev/uio") for path in main.device_nodes] == [True]
        name = main.device_nodes[0].removeprefix("/dev/")
        assert main.mounts == (f"/sys/class/uio/{name}/device",)


async def test_every_domain_and_the_order_of_addresses_cut_by_max_num_devices() -> None:
    pfs = tuple(Pf(address=f"{domain}:6b:00.0", services="dc", total_vfs=4) for domain in ("0000", "0001", "10000"))
    async with running_node(Node(pfs=pfs), ("--max-num-devices=6",)) as node:
        node.start_helper()
        node.start_server()
        await node.until("six devices", lambda: node.kubelet.allocatable() == {DC: 6})
        status = await node.status()
        assert status.cut == ("0001:6b:00.3", "0001:6b:00.4", *(f"10000:6b:00.{n}" for n in (1, 2, 3, 4)))
        assert node.log("server").count("--max-num-devices") == 1
        assert node.kernel.driver("10000:6b:00.1") == "4xxxvf", "what is cut is left alone"


async def test_a_vf_on_somebody_elses_driver_is_left_alone_and_said_once() -> None:
    async with running_node(ONE_PF, ("--resync-interval=50ms",)) as node:
        node.kernel.unbind("0000:6b:00.2")
        node.kernel.set_driver_override("0000:6b:00.2", "igb_uio")
        node.kernel.probe("0000:6b:00.2")
        node.start_helper()
        node.start_server()
        await node.until("the others are served", lambda: node.kubelet.allocatable() == {CY: 3})
        resyncs = 3
        await node.until_status("a few resyncs", lambda _: node.log("server").count("left alone") >= 1)
        for _ in range(resyncs):
            await node.status()
        assert node.kernel.driver("0000:6b:00.2") == "igb_uio"
        assert node.log("server").count("left alone") == 1
        assert '"driver":"igb_uio"' not in node.audit_log.read_text()


@pytest.mark.parametrize(("number", "advice"), [(errno.EBUSY, 0), (errno.EACCES, 1)], ids=["busy", "apparmor"])
async def test_one_vf_that_cannot_be_bound_is_that_vfs_problem_and_is_tried_again(number: int, advice: int) -> None:
    async with running_node(ONE_PF) as node:
        node.kernel.fail_next("0000:6b:00.3", "driver_override", number)
        node.start_helper()
        node.start_server()
        await node.until_status(
            "the failure shows", lambda status: any(vf.address == "0000:6b:00.3" and vf.reason for vf in status.vfs)
        )
        await node.until("all are served in the end", lambda: node.kubelet.allocatable() == {CY: 4})
        assert node.log("server").count("VF not bound") == 1
        assert node.log("server").count("AppArmor") == advice


async def test_a_vf_that_vanishes_becomes_unhealthy_and_the_others_stay() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        pod = await node.kubelet.allocate("pod", [("main", CY, 1)])
        gone = pod.containers["main"].envs["QAT0"]
        node.kernel.unplug(gone)
        await node.until("one less", lambda: node.kubelet.allocatable() == {CY: 3})
        assert node.kubelet.capacity() == {CY: 4}, "an allocated device never leaves the list"
        await node.until_status(
            "it says why, and who has it",
            lambda s: any(vf.address == gone and vf.reason and vf.pod == "default/pod/main" for vf in s.vfs),
        )


async def test_a_registration_says_how_many_devices_there_are() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        await node.kubelet.restart()
        await node.until("registered again", lambda: node.log("server").count('"resource registered"') == 2)
        last = [line for line in node.log("server").splitlines() if '"resource registered"' in line][-1]
        assert "devices=4" in last


async def test_a_new_pf_is_served_without_a_restart() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        node.kernel.add_pf(Pf(address="0000:6b:01.0", services="dc", total_vfs=2))
        await node.until("the new resource", lambda: node.kubelet.allocatable() == {CY: 4, DC: 2})


async def test_a_pf_behind_a_new_host_bridge_is_served_once_the_helper_has_started_again() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        node.kernel.add_pf(Pf(address="0000:70:00.0", services="dc", total_vfs=2))
        await node.until_status(
            "what keeps them from being bound is said",
            lambda status: sum("restart the helper" in vf.reason for vf in status.vfs) == 2,
        )
        assert await node.stop_helper() == 0
        node.start_helper()
        await node.until("the new resource", lambda: node.kubelet.allocatable() == {CY: 4, DC: 2})


async def test_other_services_are_another_resource() -> None:
    async with running_node(ONE_PF, ("--resync-interval=100ms",)) as node:
        await start(node, {CY: 4})
        node.kernel.set_state("0000:6b:00.0", "down")
        await node.until("cy is at 0", lambda: node.kubelet.allocatable()[CY] == 0)
        node.kernel.set_services("0000:6b:00.0", "dc")
        node.kernel.set_numvfs("0000:6b:00.0", 4)
        await node.until("dc instead", lambda: node.kubelet.allocatable() == {CY: 0, DC: 4})


async def test_a_lost_heartbeat_takes_the_pfs_vfs_and_gives_them_back() -> None:
    pfs = (*ONE_PF.pfs, Pf(address="0000:70:00.0", services="sym;asym", total_vfs=4))
    async with running_node(Node(pfs=pfs), QUICK) as node:
        await start(node, {CY: 8})
        node.kernel.set_heartbeat("0000:6b:00.0", -1)
        await node.until("half of them", lambda: node.kubelet.allocatable() == {CY: 4})
        assert node.kubelet.capacity() == {CY: 8}
        node.kernel.set_heartbeat("0000:6b:00.0", 0)
        await node.until("all again", lambda: node.kubelet.allocatable() == {CY: 8})


async def test_in_use_is_what_the_kernel_says() -> None:
    async with running_node(ONE_PF, ("--resync-interval=100ms",)) as node:
        await start(node, {CY: 4})
        with node.kernel.open_vfio("0000:6b:00.1"):
            await node.until_status("one in use", lambda s: [vf.in_use for vf in s.vfs] == [True, False, False, False])
            _, metrics = await node.get("/metrics")
            assert 'qat_plugin_vfs{driver="vfio-pci",use="in_use"} 1.0' in metrics.decode()
        await node.until_status("all idle", lambda s: [vf.in_use for vf in s.vfs] == [False] * 4)


async def test_a_kubelet_restart_is_survived_and_pods_keep_their_devices() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        pod = await node.kubelet.allocate("pod", [("main", CY, 2)])
        await node.kubelet.restart()
        await node.until("registered again", lambda: node.kubelet.allocatable() == {CY: 4})
        assert node.kubelet.devices_of("pod") == set(pod.containers["main"].envs.values())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
async def test_a_server_that_ends_and_starts_again(how: signal.Signals) -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        await node.kubelet.allocate("pod", [("main", CY, 2)])
        status = await node.stop_server(how)
        assert status == (0 if how is signal.SIGTERM else -how)
        await node.until("allocatable is 0", lambda: node.kubelet.allocatable() == {CY: 0})
        node.start_server()
        await node.until("all are back", lambda: node.kubelet.allocatable() == {CY: 4})
        assert node.audit_log.read_text().count('"BindDriver"') == 8, "what is bound is not bound again"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
async def test_a_helper_that_goes_away_and_comes_back(how: signal.Signals) -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        await node.stop_helper(how)
        await node.until_status("the server says so", lambda status: not status.helper.connected)
        status, body = await node.get("/readyz")
        assert status == 503
        assert b"cannot reach the helper" in body or b"closed the connection" in body
        await node.kubelet.allocate("pod", [("main", CY, 2)])
        node.kernel.unbind("0000:6b:00.4")
        await node.until("one less", lambda: node.kubelet.allocatable() == {CY: 3})
        node.start_helper()
        await node.until("bound again", lambda: node.kubelet.allocatable() == {CY: 4})
        await node.until_status("ready again", lambda status: status.ready)
        records = [json.loads(line) for line in node.audit_lines()]
        assert [record["sequence"] for record in records] == list(range(1, len(records) + 1)), "one chain over both"


async def test_without_a_helper_the_server_stays_up_and_says_what_is_missing() -> None:
    async with running_node(ONE_PF) as node:
        node.start_server()
        await until(lambda: "helper" in node.log("server"))
        status, body = await node.get("/readyz")
        assert (status, b"cannot reach the helper" in body) == (503, True)
        assert (await node.get("/healthz"))[0] == 200
        node.start_helper()
        await node.until("it works as soon as there is one", lambda: node.kubelet.allocatable() == {CY: 4})


async def test_one_server_works_at_a_time() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        first, node.server = node.server, None
        node.start_server()
        await until(lambda: "another server is running" in node.log("server"))
        assert len(node.kubelet.registrations) == 1
        assert first is not None
        first.terminate()
        assert first.wait(120) == 0
        await node.until("the second takes over", lambda: len(node.kubelet.registrations) == 2)
        await node.until("all are served", lambda: node.kubelet.allocatable() == {CY: 4})


async def test_a_vf_unbound_by_hand_is_bound_again() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        node.kernel.unbind("0000:6b:00.1")
        node.kernel.set_driver_override("0000:6b:00.1", None)
        node.kernel.probe("0000:6b:00.1")
        await node.until("it is back on vfio-pci", lambda: node.kernel.driver("0000:6b:00.1") == "vfio-pci")
        await node.until("and served", lambda: node.kubelet.allocatable() == {CY: 4})


async def test_nothing_is_left_behind() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        sockets = node.kubelet.directory / "device-plugins" / "qat.intel.com"
        assert "cy.sock" in os.listdir(sockets)
        assert await node.stop_server() == 0
        assert [name for name in os.listdir(sockets) if name.endswith(".sock")] == []
        assert await node.stop_helper() == 0
        assert not node.helper_socket.exists()
        assert node.kernel.defects == []


async def test_status_is_told_on_a_local_socket_without_any_address() -> None:
    async with running_node(ONE_PF) as node:
        await start(node, {CY: 4})
        asked = [*command("qat-plugin"), "status", f"--kubelet-dir={node.kubelet_directory}"]
        told = await asyncio.to_thread(subprocess.run, [*asked, "--json"], capture_output=True, check=True)
        status = decode(told.stdout)
        assert (status.ready, len(status.vfs)) == (True, 4)
        screen = await asyncio.to_thread(subprocess.run, asked, capture_output=True, text=True, check=True)
        assert "qat-plugin" in screen.stdout.splitlines()[0]
        await node.stop_server()
        refused = await asyncio.to_thread(subprocess.run, asked, capture_output=True, text=True, check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "cannot reach the server" in refused.stderr
