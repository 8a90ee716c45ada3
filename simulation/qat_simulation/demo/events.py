"""What happens to the demo's node: a heartbeat lost, the helper killed, a kubelet restart, other services wanted."""

import signal

from qat_server.devices.naming import resource_of
from qat_server.observability.status import PfStatus, Status, VfStatus
from qat_shared import NAMESPACE
from qat_simulation.demo import pods
from qat_simulation.demo.scene import Scene
from qat_simulation.running_node import SimulationError


async def heartbeat(scene: Scene) -> None:
    """The firmware of a PF that is well does not answer any more, and then does."""
    node = scene.node
    status = await node.status()
    pf = next((pf for pf in status.pfs if not pf.reason and _well(status, pf)), None)
    if pf is None:
        if status.resources:
            scene.skip("no PF with a live heartbeat has VFs here: none to lose")
        return
    before, lost = node.kubelet.allocatable(), len(_well(status, pf))
    total = sum(before.values())
    async with scene.step(f"heartbeat of PF {pf.address} lost: its VFs ({lost}) are Unhealthy"):
        node.kernel.set_heartbeat(pf.address, -1)
        await node.until("allocatable falls", lambda: sum(node.kubelet.allocatable().values()) == total - lost)
    scene.show_capacity()
    async with scene.step(f"heartbeat of PF {pf.address} back: its VFs too"):
        node.kernel.set_heartbeat(pf.address, 0)
        await node.until("allocatable is as before", lambda: node.kubelet.allocatable() == before)


async def kill_helper(scene: Scene) -> None:
    """The root process is killed: pods keep their devices, a new one is admitted, and all goes on when it is back."""
    node, before = scene.node, scene.node.kubelet.allocatable()
    if not before:
        return
    async with scene.step("helper killed: the server says so, and goes on serving"):
        await node.stop_helper(signal.SIGKILL)
        await node.until_status("the server says so", lambda status: not status.helper.connected and not status.ready)
        if node.kubelet.allocatable() != before:
            raise SimulationError("what the kubelet can give to pods changed when the helper was killed")
        _pods_keep_their_devices(scene)
    await pods.admit(scene, "pod-c", 1, "while the helper is away")
    async with scene.step("helper back: the server is ready again"):
        node.start_helper()
        await node.until_status("the server is ready", lambda status: status.helper.connected and status.ready)


async def restart_kubelet(scene: Scene) -> None:
    """The kubelet restarts, which takes the registrations away."""
    node, before = scene.node, scene.node.kubelet.allocatable()
    if not before:
        return
    async with scene.step("kubelet restarted: resources registered again, pods keep their devices"):
        registered = len(node.kubelet.registrations)
        await node.kubelet.restart()
        await node.until("registered again", lambda: len(node.kubelet.registrations) > registered)
        await node.until("allocatable is as before", lambda: node.kubelet.allocatable() == before)
        _pods_keep_their_devices(scene)


async def change_services(scene: Scene) -> None:
    """Another configuration is swapped in, and a PF that no pod uses gets other services."""
    node = scene.node
    status, before = await node.status(), node.kubelet.allocatable()
    held = {vf for allocation in scene.pods.values() for vf in allocation.devices}
    pf = next((pf for pf in status.pfs if _can_change(status, pf, held)), None)
    if pf is None:
        if status.resources:
            scene.skip("there is no PF whose services can be changed and that nobody uses: a change would wait")
        return
    wanted = "dc" if pf.services != "dc" else "sym;dc"
    old, new = (f"{NAMESPACE}/{resource_of(services)}" for services in (pf.services, wanted))
    async with scene.step(f"ConfigMap swapped: PF {pf.address} from {pf.services} to {wanted}, without a restart"):
        scene.config.write({"qat.toml": f'[[rules]]\naddress = "{pf.address}"\nservices = "{wanted}"\n'})
        expected = {old: before[old] - pf.vfs, new: before.get(new, 0) + pf.vfs}
        await node.until(
            "the VFs are in the other resource",
            lambda: {name: node.kubelet.allocatable().get(name) for name in expected} == expected,
        )
    scene.show_capacity()


def _well(status: Status, pf: PfStatus) -> list[VfStatus]:
    """Its VFs that pods may be given."""
    return [vf for vf in status.vfs if vf.pf == pf.address and vf.listed and not vf.reason]


def _can_change(status: Status, pf: PfStatus, held: set[str]) -> bool:
    well = _well(status, pf)
    # All of them: one that is left alone, or cut off the list, has a driver whose use of it would be waited for.
    return bool(well and pf.services and len(well) == pf.vfs and not held.intersection(vf.address for vf in well))


def _pods_keep_their_devices(scene: Scene) -> None:
    for pod, allocation in scene.pods.items():
        if scene.node.kubelet.devices_of(pod) != set(allocation.devices):
            raise SimulationError(f"pod {pod} lost devices")
