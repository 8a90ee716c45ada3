"""The real helper process on an emulated kernel, and a client of it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qat_shared.messages import AnyReply, BindDriver, DpdkDriver, ErrorCode, Failure
from qat_shared.pci import PciAddress
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node
from support.conditions import wait_until
from support.emulated_kernel import emulated
from support.helper_process import COMMAND, Client, helper_options


class Running:
    """A helper on the emulated kernel, and a client of it."""

    def __init__(self, kernel: Kernel, directory: Path) -> None:
        self.kernel = kernel
        self.audit = directory / "audit.jsonl"
        self.socket = directory / "h.sock"
        options = helper_options(kernel.sysfs_root, directory, self.socket, self.audit)
        with (directory / "log").open("ab") as log:
            kernel.spawn([COMMAND, *options], stderr=log)
        wait_until(lambda: b"serving on" in (directory / "log").read_bytes())
        self.client = Client(self.socket)

    def bind(self, address: str, number: int = 1) -> BindDriver:
        return BindDriver(id=number, address=PciAddress.parse(address), driver=DpdkDriver.VFIO_PCI, reason="a test")

    def story(self) -> list[tuple[str, str, Any]]:
        """The audit log's complete lines about operations: event, verdict, address."""
        whole, _, _ = self.audit.read_bytes().rpartition(b"\n")
        lines = map(json.loads, whole.splitlines())
        return [
            (line["event"], line.get("verdict", ""), line["arguments"]["address"])
            for line in lines
            if "operation" in line
        ]


@contextmanager
def helper_on(node: Node) -> Iterator[Running]:
    """A helper that runs while the block does."""
    with emulated(node) as kernel:
        directory = kernel.sysfs_root.parent / "run"
        directory.mkdir(exist_ok=True)
        running = Running(kernel, directory)
        with running.client:
            yield running


def code(reply: AnyReply) -> ErrorCode:
    assert isinstance(reply, Failure), reply
    return reply.code
