"""The demo's steps once VFs are served: pods, a lost heartbeat, a killed helper, a kubelet restart, new services."""

import signal

from qat_server.devices.naming import name_of_services
from qat_server.observability.status_format import PfStatus, Status, VfStatus
from qat_shared import NAMESPACE
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.running_node import SimulationError


async def allocate(demo: DemoRun) -> None:
    """Admit two pods, with the resource that has the most free devices; one of them opens a VF."""
    for pod, wanted in (("pod-a", 2), ("pod-b", 3)):
        await _admit(demo, pod, wanted, f"(allocation policy {demo.policy})")
    if not demo.pods:
        return
    pod, vf = next((pod, sorted(allocation.devices)[0]) for pod, allocation in demo.pods.items())
    if demo.node.kernel.driver(vf) != "vfio-pci":
        return
    async with demo.step(f"{pod} opened {vf}: reported as in use, and as idle after it was closed"):
        with demo.node.kernel.open_vfio(vf):
            await demo.node.until_status("the VF is in use", lambda status: _in_use(status, vf) is True)
        await demo.node.until_status("the VF is idle", lambda status: _in_use(status, vf) is False)


async def heartbeat(demo: DemoRun) -> None:
    """The firmware of a healthy PF stops answering, and then answers again."""
    node = demo.node
    status = await node.status()
    pf = next((pf for pf in status.pfs if not pf.reason and _healthy_vfs(status, pf)), None)
    if pf is None:
        if status.resources:
            demo.skip("no PF with a live heartbeat has VFs: no heartbeat can be lost")
        return
    before, lost = node.kubelet.allocatable(), len(_healthy_vfs(status, pf))
    total = sum(before.values())
    async with demo.step(f"heartbeat of PF {pf.address} lost: its VFs ({lost}) are Unhealthy"):
        node.kernel.set_heartbeat(pf.address, -1)
        await node.until("allocatable falls", lambda: sum(node.kubelet.allocatable().values()) == total - lost)
    demo.show_capacity()
    async with demo.step(f"heartbeat of PF {pf.address} back: its VFs ({lost}) are Healthy again"):
        node.kernel.set_heartbeat(pf.address, 0)
        await node.until("allocatable is as before", lambda: node.kubelet.allocatable() == before)


async def kill_helper(demo: DemoRun) -> None:
    """The root process is killed: pods keep their devices, a new pod is admitted, and a new helper is accepted."""
    node, before = demo.node, demo.node.kubelet.allocatable()
    if not before:
        return
    async with demo.step("helper killed: the server reports it, and continues to serve"):
        await node.stop_helper(signal.SIGKILL)
        await node.until_status(
            "the server reports it", lambda status: not status.helper.connected and not status.ready
        )
        if node.kubelet.allocatable() != before:
            raise SimulationError("the allocatable devices changed when the helper was killed")
        _check_pods_keep_their_devices(demo)
    await _admit(demo, "pod-c", 1, "while the helper is not running")
    async with demo.step("helper back: the server is ready again"):
        node.start_helper()
        await node.until_status("the server is ready", lambda status: status.helper.connected and status.ready)


async def restart_kubelet(demo: DemoRun) -> None:
    """The kubelet restarts, which removes the registrations."""
    node, before = demo.node, demo.node.kubelet.allocatable()
    if not before:
        return
    async with demo.step("kubelet restarted: resources registered again, pods keep their devices"):
        registered = len(node.kubelet.registrations)
        await node.kubelet.restart()
        await node.until("registered again", lambda: len(node.kubelet.registrations) > registered)
        await node.until("allocatable is as before", lambda: node.kubelet.allocatable() == before)
        _check_pods_keep_their_devices(demo)


async def change_services(demo: DemoRun) -> None:
    """The ConfigMap changes, and a PF that no pod uses gets other services."""
    node = demo.node
    status, before = await node.status(), node.kubelet.allocatable()
    held = {vf for allocation in demo.pods.values() for vf in allocation.devices}
    pf = next((pf for pf in status.pfs if _can_change(status, pf, held)), None)
    if pf is None:
        if status.resources:
            demo.skip("there is no PF whose services can be changed at once: a change would wait for its users")
        return
    wanted = "dc" if pf.services != "dc" else "sym;dc"
    old, new = (f"{NAMESPACE}/{name_of_services(services)}" for services in (pf.services, wanted))
    async with demo.step(f"ConfigMap changed: PF {pf.address} from {pf.services} to {wanted}, without a restart"):
        demo.config.write({"qat.toml": f'[[rules]]\naddress = "{pf.address}"\nservices = "{wanted}"\n'})
        expected = {old: before[old] - pf.vfs, new: before.get(new, 0) + pf.vfs}
        await node.until(
            "the VFs are in the other resource",
            lambda: {name: node.kubelet.allocatable().get(name) for name in expected} == expected,
        )
    demo.show_capacity()


async def _admit(demo: DemoRun, pod: str, wanted: int, note: str) -> None:
    """Admit a pod with `wanted` devices, or as many as are free."""
    free = {resource: number for resource, number in demo.node.kubelet.allocatable_free().items() if number}
    if not free:
        if demo.node.kubelet.capacity():
            demo.skip(f"no device is left for {pod}")
        return
    resource = max(free, key=lambda name: free[name])
    count = min(wanted, free[resource])
    async with demo.step(f"{pod} got {count} of {resource} {note}"):
        demo.pods[pod] = await demo.node.kubelet.allocate(pod, [("main", resource, count)])
    demo.show_allocation(demo.pods[pod])


def _in_use(status: Status, vf: str) -> bool | None:
    return next((each.in_use for each in status.vfs if each.address == vf), None)


def _healthy_vfs(status: Status, pf: PfStatus) -> list[VfStatus]:
    """The PF's VFs that new pods can get."""
    return [vf for vf in status.vfs if vf.pf == pf.address and vf.listed and not vf.reason]


def _can_change(status: Status, pf: PfStatus, held: set[str]) -> bool:
    vfs = _healthy_vfs(status, pf)
    # All VFs must be listed: one on another driver, or over the limit, may be in use, and the change would wait for it.
    return bool(vfs and pf.services and len(vfs) == pf.vfs and not held.intersection(vf.address for vf in vfs))


def _check_pods_keep_their_devices(demo: DemoRun) -> None:
    for pod, allocation in demo.pods.items():
        if demo.node.kubelet.devices_of(pod) != set(allocation.devices):
            raise SimulationError(f"pod {pod} lost devices")
