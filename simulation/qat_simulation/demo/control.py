"""The commands for `demo --keep`, one on each line; each is a row of one table.

They do what a person, a kubelet or a PF's firmware does to a real node. None of them calls the helper or the server.
"""

import contextlib
import shlex
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct

from qat_shared.pci import PciAddress
from qat_simulation.demo.demo_run import DemoRun
from qat_simulation.kernel.vfio_files import OpenVfio
from qat_simulation.kubelet.kubelet import AdmissionError, KubeletPanicError


class ControlError(Exception):
    """The command cannot be carried out: one sentence."""


class Command(Struct, frozen=True):
    """One command: its arguments and description for help, the number of arguments, the function."""

    usage: str
    text: str
    count: int
    run: "Callable[[Control, list[str]], Awaitable[str]]"


class Control:
    """The commands on one demo's node. Devices that were opened stay open until they are closed."""

    def __init__(self, demo: DemoRun) -> None:
        self._demo = demo
        self._open: dict[str, OpenVfio] = {}

    async def run(self, line: str) -> str:
        """Carry out one line and return the result in a sentence. Raises ControlError."""
        try:
            name, *arguments = shlex.split(line)
        except ValueError:
            raise ControlError(f"{line!r} cannot be read: help lists the commands") from None
        command = COMMANDS.get(name)
        if command is None:
            raise ControlError(f"unknown command {name[:40]!r}: help lists the commands")
        if len(arguments) != command.count:
            raise ControlError(f"usage: {name} {command.usage}".rstrip())
        try:
            return await command.run(self, arguments)
        except OSError as error:
            raise ControlError(f"{line}: {error.strerror or error}") from None
        except (AdmissionError, KubeletPanicError, ValueError) as error:
            raise ControlError(f"{line}: {error}") from None

    async def _heartbeat(self, arguments: list[str]) -> str:
        pf, number = arguments
        if number not in ("0", "-1"):
            raise ControlError("a heartbeat is 0 (alive) or -1 (lost)")
        self._demo.node.kernel.set_heartbeat(PciAddress.parse(pf), -1 if number == "-1" else 0)
        return f"the firmware of {pf} {'answers' if number == '0' else 'does not answer any more'}"

    async def _unplug(self, arguments: list[str]) -> str:
        [address] = arguments
        return self._release(self._demo.node.kernel.unplug, address, "removed from the bus")

    async def _unbind(self, arguments: list[str]) -> str:
        [address] = arguments
        return self._release(self._demo.node.kernel.unbind, address, "has no driver now")

    def _release(self, action: Callable[[str], None], address: str, result: str) -> str:
        """Take a device from its driver. The kernel waits while a VF is open, so that is done in a thread."""
        if address not in self._open:
            action(address)
            return f"{address} {result}"

        def wait() -> None:
            with contextlib.suppress(OSError):  # it may have been released in another way
                action(address)

        threading.Thread(target=wait, daemon=True).start()
        return f"{address} is open: the kernel waits until it is closed"

    async def _open_vf(self, arguments: list[str]) -> str:
        [address] = arguments
        self._open[address] = self._demo.node.kernel.open_vfio(address)
        return f"{address} is open, as by a DPDK process"

    async def _close_vf(self, arguments: list[str]) -> str:
        [address] = arguments
        if address not in self._open:
            raise ControlError(f"{address} was not opened here")
        self._open.pop(address).close()
        return f"{address} is closed"

    async def _pod(self, arguments: list[str]) -> str:
        pod, resource, number = arguments
        if not number.isdecimal():
            raise ControlError(f"{number[:20]!r} is not a number of devices")
        known = self._demo.node.kubelet.capacity()
        if resource not in known:  # a kubelet silently ignores a resource that it does not know
            raise ControlError(
                f"the kubelet has no resource {resource[:60]!r}; it has {', '.join(sorted(known)) or 'none'}"
            )
        given = await self._demo.node.kubelet.allocate(pod, [("main", resource, int(number))])
        return f"{pod} got {', '.join(given.devices) or 'nothing'}"

    async def _free(self, arguments: list[str]) -> str:
        self._demo.node.kubelet.free(arguments[0])
        return f"{arguments[0]} has ended"

    async def _services(self, arguments: list[str]) -> str:
        pf, services = arguments
        text = f'[[rules]]\naddress = "{PciAddress.parse(pf)}"\nservices = "{services}"\n'
        if not services.replace(";", "").isalpha():
            raise ControlError("services are words separated by ; as in sym;asym")
        self._demo.config.write({"qat.toml": text})
        return f"{self._demo.config.directory}/qat.toml sets services {services} for {pf}"

    async def _kubelet(self, arguments: list[str]) -> str:
        kubelet = self._demo.node.kubelet
        match arguments[0], kubelet.running:
            case "stop", True:
                await kubelet.stop()
            case "start", False:
                await kubelet.start()
            case "restart", _:
                await kubelet.restart()
            case (("stop" | "start"), _):
                pass
            case _:
                raise ControlError(f"unknown action {arguments[0][:40]!r}: stop, start or restart")
        return f"the kubelet {'runs' if kubelet.running else 'is down'}"

    async def _kill(self, arguments: list[str]) -> str:
        node, [name] = self._demo.node, arguments
        processes: dict[str, subprocess.Popen[bytes] | None] = {"helper": node.helper, "server": node.server}
        if name not in processes:
            raise ControlError(f"unknown process {name[:40]!r}: helper or server")
        process = processes[name]
        if process is None:
            raise ControlError(f"the {name} is not running")
        process.send_signal(signal.SIGKILL)
        return f"SIGKILL to the {name}, pid {process.pid}"

    async def _help(self, _: list[str]) -> str:
        width = max(len(f"{name} {command.usage}") for name, command in COMMANDS.items())
        rows = (f"{f'{name} {command.usage}':<{width}}  {command.text}" for name, command in COMMANDS.items())
        return "\n  ".join(("one command on each line:", *rows))


COMMANDS: Final = {
    "heartbeat": Command("PF -1|0", "let the PF's firmware hang, or answer again", 2, Control._heartbeat),
    "unplug": Command("ADDRESS", "pull a device out", 1, Control._unplug),
    "unbind": Command("ADDRESS", "unbind a device from its driver", 1, Control._unbind),
    "open": Command("VF", "open a VF, as a DPDK process does", 1, Control._open_vf),
    "close": Command("VF", "close the VF", 1, Control._close_vf),
    "pod": Command("NAME RESOURCE N", "admit a pod: pod web qat.intel.com/cy 2", 3, Control._pod),
    "free": Command("NAME", "end a pod", 1, Control._free),
    "services": Command("PF 'A;B'", "set other services for a PF in the configuration", 2, Control._services),
    "kubelet": Command("stop|start|restart", "stop, start or restart the emulated kubelet", 1, Control._kubelet),
    "kill": Command("helper|server", "kill the process with SIGKILL; it is restarted", 1, Control._kill),
    "help": Command("", "show this list", 0, Control._help),
}
