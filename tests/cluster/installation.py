"""What is on the node in the guest, so that tests can say what they need of it; and what they have measured."""

from typing import Final

from cluster.node import KubeletNode
from deployments.rendered import Manifest
from qat_simulation.node.description import Node

lines: Final[list[str]] = []
"""Shown at the end of the run."""


class Installation:
    """Devices, and the plugin's pod as some manifests say. A test that changes either otherwise calls `clear`."""

    def __init__(self, node: KubeletNode) -> None:
        self.node = node
        self._devices: Node | None = None
        self._manifests: list[Manifest] | None = None

    def devices(self, devices: Node) -> None:
        """No plugin, and these devices, as they are after a boot."""
        self.clear()
        self.node.devices(devices)

    def plugin(self, devices: Node, manifests: list[Manifest]) -> None:
        """These devices and the plugin by these manifests, ready; the very same that are there are left."""
        if (devices, manifests) != (self._devices, self._manifests):
            self.devices(devices)
            self.node.plugin(manifests)
            self.node.until_ready("qat-plugin")
            self._devices, self._manifests = devices, manifests

    def clear(self) -> None:
        """No plugin and no workloads."""
        self._devices, self._manifests = None, None
        if pods := self.node.pods():
            self.node.withdraw(*pods)
