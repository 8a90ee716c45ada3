"""The demo's pods: what they are given under the policy, and a device that one of them opens."""

from qat_server.observability.status import Status
from qat_simulation.demo.scene import Scene


async def allocate(scene: Scene) -> None:
    """Two pods, of the resource with the most free devices."""
    for pod, wanted in (("pod-a", 2), ("pod-b", 3)):
        await admit(scene, pod, wanted, f"(allocation policy {scene.policy})")
    if not scene.pods:
        return
    pod, vf = next((pod, sorted(allocation.devices)[0]) for pod, allocation in scene.pods.items())
    if scene.node.kernel.driver(vf) != "vfio-pci":
        return
    async with scene.step(f"{pod} opened {vf}: seen as in use, and as idle when it is closed"):
        with scene.node.kernel.open_vfio(vf):
            await scene.node.until_status("the VF is in use", lambda status: _in_use(status, vf) is True)
        await scene.node.until_status("the VF is idle", lambda status: _in_use(status, vf) is False)


async def admit(scene: Scene, pod: str, wanted: int, how: str) -> None:
    """One pod, with as many devices as there are, up to `wanted`."""
    free = {resource: number for resource, number in scene.node.kubelet.allocatable_free().items() if number}
    if not free:
        if scene.node.kubelet.capacity():
            scene.skip(f"no device is left for {pod}")
        return
    resource = max(free, key=lambda name: free[name])
    count = min(wanted, free[resource])
    async with scene.step(f"{pod} got {count} of {resource} {how}"):
        scene.pods[pod] = await scene.node.kubelet.allocate(pod, [("main", resource, count)])
    scene.show_allocation(scene.pods[pod])


def _in_use(status: Status, vf: str) -> bool | None:
    return next((seen.in_use for seen in status.vfs if seen.address == vf), None)
