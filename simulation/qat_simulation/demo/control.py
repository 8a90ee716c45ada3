"""What one can do to the demo's node by hand: one command a line, each a row of one table.

They are what a person, a kubelet or a firmware does to a real node; none asks our processes for anything.
"""

import shlex
import signal
import subprocess
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct

from qat_shared.pci import PciAddress
from qat_simulation.demo.scene import Scene
from qat_simulation.kernel.vfio_files import OpenVfio
from qat_simulation.kubelet.kubelet import AdmissionError, KubeletPanicError


class ControlError(Exception):
    """The line cannot be done: one sentence."""


class Row(Struct, frozen=True):
    """One command: its arguments for help, what it does, how many arguments it takes, the function."""

    usage: str
    text: str
    count: int
    do: "Callable[[Control, list[str]], Awaitable[str]]"


class Control:
    """The commands on one scene. Devices that were opened stay open until they are closed."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._open: dict[str, OpenVfio] = {}

    async def do(self, line: str) -> str:
        """Carry out one line: what has come of it, in a sentence. Raises ControlError."""
        try:
            name, *arguments = shlex.split(line)
        except ValueError:
            raise ControlError(f"{line!r} cannot be read: help lists what can be said") from None
        row = COMMANDS.get(name)
        if row is None:
            raise ControlError(f"unknown command {name[:40]!r}: help lists what can be said")
        if len(arguments) != row.count:
            raise ControlError(f"it is: {name} {row.usage}".rstrip())
        try:
            return await row.do(self, arguments)
        except OSError as error:
            raise ControlError(f"{line}: {error.strerror or error}") from None
        except (AdmissionError, KubeletPanicError, ValueError) as error:
            raise ControlError(f"{line}: {error}") from None

    async def _heartbeat(self, arguments: list[str]) -> str:
        pf, number = arguments
        if number not in ("0", "-1"):
            raise ControlError("a heartbeat is 0 (alive) or -1 (lost)")
        self._scene.node.kernel.set_heartbeat(PciAddress.parse(pf), -1 if number == "-1" else 0)
        return f"the firmware of {pf} {'answers' if number == '0' else 'does not answer any more'}"

    async def _unplug(self, arguments: list[str]) -> str:
        self._scene.node.kernel.unplug(arguments[0])
        return f"{arguments[0]} is out"

    async def _unbind(self, arguments: list[str]) -> str:
        kernel, [address] = self._scene.node.kernel, arguments
        kernel.unbind(address)
        return f"{address} has no driver"

    async def _open_vf(self, arguments: list[str]) -> str:
        [address] = arguments
        self._open[address] = self._scene.node.kernel.open_vfio(address)
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
        known = self._scene.node.kubelet.capacity()
        if resource not in known:  # of what it does not know, a kubelet gives nothing, without a word
            raise ControlError(
                f"the kubelet knows no {resource[:60]!r}; there is {', '.join(sorted(known)) or 'nothing'}"
            )
        given = await self._scene.node.kubelet.allocate(pod, [("main", resource, int(number))])
        return f"{pod} got {', '.join(given.devices) or 'nothing'}"

    async def _free(self, arguments: list[str]) -> str:
        self._scene.node.kubelet.free(arguments[0])
        return f"{arguments[0]} has ended"

    async def _services(self, arguments: list[str]) -> str:
        pf, services = arguments
        text = f'[[rules]]\naddress = "{PciAddress.parse(pf)}"\nservices = "{services}"\n'
        if not services.replace(";", "").isalpha():
            raise ControlError("services are words with ; between: sym;asym")
        self._scene.config.write({"qat.toml": text})
        return f"{self._scene.config.directory}/qat.toml wants {services} of {pf}"

    async def _kubelet(self, arguments: list[str]) -> str:
        kubelet = self._scene.node.kubelet
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
                raise ControlError("a kubelet can stop, start and restart")
        return f"the kubelet {'runs' if kubelet.running else 'is down'}"

    async def _kill(self, arguments: list[str]) -> str:
        node, [name] = self._scene.node, arguments
        processes: dict[str, subprocess.Popen[bytes] | None] = {"helper": node.helper, "server": node.server}
        if name not in processes:
            raise ControlError("helper and server can be killed")
        process = processes[name]
        if process is None:
            raise ControlError(f"the {name} is not running")
        process.send_signal(signal.SIGKILL)
        return f"SIGKILL to the {name}, pid {process.pid}"

    async def _help(self, _: list[str]) -> str:
        width = max(len(f"{name} {row.usage}") for name, row in COMMANDS.items())
        rows = (f"{f'{name} {row.usage}':<{width}}  {row.text}" for name, row in COMMANDS.items())
        return "\n  ".join(("one command a line:", *rows))


COMMANDS: Final = {
    "heartbeat": Row("PF -1|0", "let its firmware hang, or answer again", 2, Control._heartbeat),
    "unplug": Row("ADDRESS", "pull a device out", 1, Control._unplug),
    "unbind": Row("ADDRESS", "take a device from its driver, by hand", 1, Control._unbind),
    "open": Row("VF", "open a VF, as a DPDK process does", 1, Control._open_vf),
    "close": Row("VF", "close it", 1, Control._close_vf),
    "pod": Row("NAME RESOURCE N", "admit a pod: pod web qat.intel.com/cy 2", 3, Control._pod),
    "free": Row("NAME", "the pod has ended", 1, Control._free),
    "services": Row("PF 'A;B'", "want other services of a PF, by the configuration", 2, Control._services),
    "kubelet": Row("stop|start|restart", "the emulated kubelet", 1, Control._kubelet),
    "kill": Row("helper|server", "SIGKILL; it is started again", 1, Control._kill),
    "help": Row("", "this list", 0, Control._help),
}
