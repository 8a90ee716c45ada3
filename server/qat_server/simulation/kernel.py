"""The emulated kernel of a simulated node: a tree that looks like sysfs, and answers to what is written there.

Processes read the tree as files. What a process started with `spawn` writes beneath it comes here (interception.py) and
is answered as the real kernel's store functions answer (stores.py), each write in a thread that it has for itself: one
that waits holds up nobody else. Uevents go out on a socket. docs/simulation.md says what is faithful and what is not.
"""

import contextlib
import errno
import functools
import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

from msgspec import Struct

from qat_server.simulation import attributes, drivers, interception, stores
from qat_server.simulation.bus import Bus
from qat_server.simulation.faults import Faults
from qat_server.simulation.hardware import Hardware
from qat_server.simulation.model import Device, failure
from qat_server.simulation.node import Node, Pf
from qat_server.simulation.tree import Tree
from qat_server.simulation.uevents import Broadcaster
from qat_shared.pci import PciAddress

log = logging.getLogger(__name__)

WRITERS: Final = 1024
"""Writes that may be under way at a time: more than any program makes. Their threads are made as they are needed."""

Address = PciAddress | str


class DeviceState(Struct, frozen=True):
    """A device as it is at one moment."""

    driver: str | None
    override: str | None
    pf: PciAddress | None
    iommu_group: int | None
    opened: bool


class OpenVfio:
    """A device held open as by a DPDK process. `close` lets it go; a call of the object does the same."""

    def __init__(self, kernel: "Kernel", device: Device) -> None:
        self._kernel = kernel
        self._device = device

    def close(self) -> None:
        """Close it; nothing happens the second time."""
        self._kernel._close_vfio(self._device, self)

    def __call__(self) -> None:
        self.close()

    def __enter__(self) -> "OpenVfio":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Kernel:
    """Builds the node in `directory` (sys/, uevents.sock) and runs until `close`. Safe to use from several threads.

    Methods that do what a person would do by hand raise OSError with the kernel's errno, and wait as a shell would.
    """

    def __init__(self, directory: Path, node: Node) -> None:
        directory = Path(os.path.realpath(directory))
        self.sysfs_root = directory / "sys"
        self.uevents_path = directory / "uevents.sock"
        self.roots = (self.sysfs_root, directory / ".kernel")
        """Where writes are this kernel's to answer: what is in the tree, or was."""
        self.defects: list[str] = []
        self._tree = Tree(*self.roots)
        self._uevents = Broadcaster(self.uevents_path)
        self._bus = bus = Bus(self._tree, self._uevents, node)
        self._faults = Faults(bus)
        bus.entries = attributes.entries
        bus.refresh = functools.partial(attributes.refresh, self._tree)
        bus.probe_fault = lambda device: self._faults.apply("probe", str(device.address))
        self._opens: dict[PciAddress, OpenVfio] = {}
        self._hardware = Hardware(bus, node)
        self._processes: list[tuple[subprocess.Popen[Any], interception.Supervisor]] = []
        self._writers = ThreadPoolExecutor(WRITERS, "write")
        self._under_way: set[Future[int]] = set()
        try:
            with bus.monitor:
                self._hardware.build()
        except BaseException:
            self._uevents.close()
            raise

    # Writes

    def write(self, path: str, data: bytes | str) -> int:
        """What write(2) on an attribute does, faults included; the number of bytes taken. Raises OSError."""
        data = data.encode() if isinstance(data, str) else data
        if not data:
            return 0  # kernfs does not call the store function
        data = data[: interception.WRITE_LIMIT]
        with self._bus.monitor:
            self._bus.check_open()
            store = stores.find(self._bus, path, data)
            try:
                self._faults.apply(store.attribute, store.subject)
                store.run()
            finally:
                device, attribute = store.device, attributes.ALL.get(store.attribute)
                if device is not None and not device.dead and attribute is not None and attribute.show is not None:
                    self._tree.restore(f"{device.path}/{store.attribute}", attribute.show(device), attribute.mode)
        return len(data)

    def intercepted(self, path: str, data: bytes) -> "int | Future[int]":
        """Answer a write of a process to a file beneath the sysfs root, as a handler of interception.py does."""
        relative = os.path.relpath(path, self.sysfs_root)
        if relative.startswith(".."):  # a file of a device that was removed while the writer had it open
            return -errno.ENODEV
        try:
            future = self._writers.submit(self._serve, relative, data)
        except RuntimeError:  # this kernel has ended
            return -errno.ESHUTDOWN
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def _serve(self, path: str, data: bytes) -> int:
        try:
            return self.write(path, data)
        except OSError as error:
            return -(error.errno or errno.EIO)
        except Exception as error:  # the outermost edge of this thread; the writer must get an answer
            log.exception("the emulated kernel failed in a write", extra={"fields": {"path": path}})
            self.defects.append(f"{path}: {error!r}")
            return -errno.EIO

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """While the block runs, this kernel changes nothing in its tree: for those who do so themselves."""
        with self._bus.monitor:
            yield

    def spawn(self, argv: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a program whose writes beneath the sysfs root come to this kernel; further arguments are Popen's.

        Raises OSError when it cannot be started, InterceptionError where the system cannot intercept.
        """
        process, supervisor = interception.spawn(argv, self.roots, self.intercepted, **popen)
        self._processes = [known for known in self._processes if known[0].returncode is None or not known[1].ended]
        self._processes.append((process, supervisor))
        return process

    def close(self) -> None:
        """Kill what was spawned and still runs, wake every write that waits (ESHUTDOWN), end all threads."""
        for process, _ in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        with self._bus.monitor:
            self._bus.closed = True
            self._bus.monitor.notify_all()
        self._writers.shutdown()
        for _, supervisor in self._processes:
            supervisor.stop()
        self._processes.clear()
        self._uevents.close()

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # By hand

    def bind(self, address: Address, driver: str) -> None:
        """echo ADDRESS > drivers/DRIVER/bind."""
        self._by_hand(f"bus/pci/drivers/{driver}/bind", str(address))

    def unbind(self, address: Address) -> None:
        """echo ADDRESS > driver/unbind. ENODEV when no driver has it."""
        driver = self.driver(address)
        if driver is None:
            raise failure(errno.ENODEV)
        self._by_hand(f"bus/pci/drivers/{driver}/unbind", str(address))

    def set_driver_override(self, address: Address, driver: str | None) -> None:
        """echo DRIVER > driver_override."""
        self._attribute(address, "driver_override", driver or "")

    def probe(self, address: Address) -> None:
        """echo ADDRESS > drivers_probe."""
        self._by_hand("bus/pci/drivers_probe", str(address))

    def remove(self, address: Address) -> None:
        """echo 1 > remove: the device goes, and `rescan` finds it again. VFs of a PF do not have it: ENOENT."""
        self._attribute(address, "remove", "1")

    def unplug(self, address: Address) -> None:
        """The device is pulled out: it goes, and does not come back. A VF by itself, too, although that is rare."""
        with self._bus.monitor:
            self._hardware.forget(str(address))
            device = self._device(address)
            with self._bus.locked(device):
                self._bus.remove_device(device)

    def rescan(self) -> None:
        """echo 1 > rescan."""
        self._by_hand("bus/pci/rescan", "1")

    def add_pf(self, pf: Pf) -> None:
        """Plug in a device, in the state that its description says. Raises NodeError when it cannot be on this node."""
        with self._bus.monitor:
            self._hardware.add_pf(pf)

    def set_numvfs(self, address: Address, number: int) -> None:
        """echo NUMBER > sriov_numvfs."""
        self._attribute(address, "sriov_numvfs", str(number))

    def set_state(self, address: Address, state: Literal["up", "down"]) -> None:
        """echo STATE > qat/state."""
        self._attribute(address, "qat/state", state)

    def set_services(self, address: Address, services: str) -> None:
        """echo SERVICES > qat/cfg_services."""
        self._attribute(address, "qat/cfg_services", services)

    def set_heartbeat(self, address: Address, status: Literal[0, -1]) -> None:
        """Let the PF's firmware live (0) or hang (-1)."""
        with self._bus.monitor:
            device = self._device(address)
            if device.qat is None:
                raise failure(errno.ENODEV)
            device.qat.heartbeat = status
            drivers.show_debugfs(self._bus, device)

    def add_driver(self, name: str) -> None:
        """modprobe."""
        with self._bus.monitor:
            self._bus.add_driver(drivers.make_driver(name, noiommu=not self._bus.iommu))

    def remove_driver(self, name: str) -> None:
        """modprobe -r. Raises OSError: ENOENT, EAGAIN while a device is open through it."""
        with self._bus.monitor:
            self._bus.remove_driver(name)

    def open_vfio(self, address: Address) -> OpenVfio:
        """Open a device as a DPDK process does. Raises OSError: ENODEV when not on vfio-pci, EBUSY when open."""
        with self._bus.monitor:
            device = self._device(address)
            if not isinstance(device.driver, drivers.VfioPci) or not device.linked:
                raise failure(errno.ENODEV)
            if device.opened:
                raise failure(errno.EBUSY)
            device.opened = True
            self._bus.refresh(device, "enable", "power/runtime_status")
            handle = self._opens[device.address] = OpenVfio(self, device)
            return handle

    def _close_vfio(self, device: Device, handle: OpenVfio) -> None:
        with self._bus.monitor:
            if self._opens.get(device.address) is not handle:
                return
            del self._opens[device.address]
            device.opened = False
            with contextlib.suppress(FileNotFoundError):  # the tree may be gone by now
                self._bus.refresh(device, "enable", "power/runtime_status")
            self._bus.monitor.notify_all()

    # Faults

    def fail_next(self, address: Address | None, attribute: str, number: int, times: int = 1) -> None:
        """Let the next writes to an attribute fail with this errno (faults.py); address None: of any device."""
        with self._bus.monitor:
            self._faults.fail(attribute, _text(address), number, times)

    def delay(self, attribute: str, seconds: float, address: Address | None = None) -> None:
        """Let writes to an attribute take so long; 0 ends it."""
        with self._bus.monitor:
            self._faults.delay(attribute, _text(address), seconds)

    def hang(self, attribute: str, address: Address | None = None) -> None:
        """Let writes to an attribute wait until `release`."""
        with self._bus.monitor:
            self._faults.hang(attribute, _text(address))

    def release(self, attribute: str, address: Address | None = None) -> None:
        """End what `hang` began."""
        with self._bus.monitor:
            self._faults.release(attribute, _text(address))

    def hanging(self) -> int:
        """How many writes wait now because of `hang`."""
        with self._bus.monitor:
            return self._faults.hanging

    # Looking

    def writing(self) -> int:
        """How many writes of processes have not been done yet."""
        return len(self._under_way)

    def driver(self, address: Address) -> str | None:
        """The driver that a device's link shows, None for none. Raises OSError ENODEV without such a device."""
        with self._bus.monitor:
            device = self._device(address)
            return device.driver.name if device.driver is not None and device.linked else None

    def snapshot(self) -> dict[PciAddress, DeviceState]:
        """All devices at one moment, in address order."""
        with self._bus.monitor:
            return {
                address: DeviceState(
                    driver=device.driver.name if device.driver is not None and device.linked else None,
                    override=device.override,
                    pf=device.physfn.address if device.physfn is not None else None,
                    iommu_group=device.group,
                    opened=device.opened,
                )
                for address, device in sorted(self._bus.devices.items())
            }

    def _device(self, address: Address) -> Device:
        parsed = PciAddress.parse(address) if isinstance(address, str) else address
        device = self._bus.devices.get(parsed)
        if device is None:
            raise failure(errno.ENODEV)
        return device

    def _attribute(self, address: Address, name: str, text: str) -> None:
        self._by_hand(f"{self._device(address).path}/{name}", text)

    def _by_hand(self, path: str, text: str) -> None:
        """As `write`, but the faults are not for this one."""
        with self._bus.monitor:
            self._bus.check_open()
            stores.find(self._bus, path, f"{text}\n".encode()).run()


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)
