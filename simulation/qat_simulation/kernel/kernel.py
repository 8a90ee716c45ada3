"""The emulated kernel of a simulated node: a tree that looks like sysfs, and store functions for writes to it.

Processes read the tree as files. Writes to it by a process that `spawn` started are intercepted and answered as the
real kernel's store functions answer (stores.py). Uevents are sent on a socket. docs/simulation.md lists what is
emulated faithfully and what differs.
"""

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from qat_shared.pci import PciAddress
from qat_simulation.interception import supervisor as interception
from qat_simulation.interception.programs import Programs
from qat_simulation.kernel import drivers, stores
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.faults import Faults
from qat_simulation.kernel.hardware import Hardware
from qat_simulation.kernel.model import Device, os_error
from qat_simulation.kernel.sysfs import attributes
from qat_simulation.kernel.sysfs.tree import Tree
from qat_simulation.kernel.uevents import Broadcaster
from qat_simulation.kernel.vfio_files import OpenVfio, VfioFiles
from qat_simulation.node.description import Node, Pf

Address = PciAddress | str


class DeviceState(Struct, frozen=True):
    """A snapshot of one device."""

    driver: str | None
    override: str | None
    pf: PciAddress | None
    iommu_group: int | None
    opened: bool


class Kernel:
    """Builds the node in `directory` (sys/, uevents.sock) and runs until `close`. Safe to use from several threads.

    Methods that stand for a person's shell commands raise OSError with the kernel's errno, and wait as a shell does.
    """

    def __init__(self, directory: Path, node: Node) -> None:
        directory = Path(os.path.realpath(directory))
        self.sysfs_root = directory / "sys"
        self.uevents_path = directory / "uevents.sock"
        self.roots = (self.sysfs_root, directory / ".kernel")
        """The directories whose files' writes this kernel answers: the tree, and files that were removed from it."""
        self.defects: list[str] = []
        self._tree = Tree(*self.roots)
        self._uevents = Broadcaster(self.uevents_path)
        self._bus = bus = Bus(self._tree, self._uevents, node)
        self._faults = Faults(bus)
        bus.probe_fault = lambda device: self._faults.apply("probe", str(device.address))
        self._vfio_files = VfioFiles(bus)
        self._hardware = Hardware(bus, node)
        self._programs = Programs(self.roots, self.write, self.defects)
        try:
            with bus.monitor:
                self._hardware.build()
        except BaseException:
            self._uevents.close()
            raise

    # Writes

    def write(self, path: str, data: bytes | str) -> int:
        """Do what write(2) on an attribute does, faults included; the number of bytes accepted. Raises OSError."""
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
        """Answer a process's write to a file under the sysfs root; a `Handler` of interception/supervisor.py."""
        return self._programs.answer(path, data)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Change nothing in the tree while the block runs, for callers that change it themselves."""
        with self._bus.monitor:
            yield

    def spawn(self, argv: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a program whose writes under the sysfs root this kernel answers; further arguments are Popen's.

        Raises OSError if it cannot be started, InterceptionError if this system cannot intercept writes.
        """
        return self._programs.spawn(argv, **popen)

    def close(self) -> None:
        """Kill the spawned programs that still run, wake every waiting write (ESHUTDOWN), end all threads."""
        self._programs.kill()
        with self._bus.monitor:
            self._bus.closed = True
            self._bus.monitor.notify_all()
        self._programs.end()
        self._uevents.close()

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What a person does by hand
    def bind(self, address: Address, driver: str) -> None:
        """echo ADDRESS > drivers/DRIVER/bind."""
        self._by_hand(f"bus/pci/drivers/{driver}/bind", str(address))

    def unbind(self, address: Address) -> None:
        """echo ADDRESS > driver/unbind. Raises OSError (ENODEV) if the device has no driver."""
        driver = self.driver(address)
        if driver is None:
            raise os_error(errno.ENODEV)
        self._by_hand(f"bus/pci/drivers/{driver}/unbind", str(address))

    def set_driver_override(self, address: Address, driver: str | None) -> None:
        """echo DRIVER > driver_override."""
        self._attribute(address, "driver_override", driver or "")

    def probe(self, address: Address) -> None:
        """echo ADDRESS > drivers_probe."""
        self._by_hand("bus/pci/drivers_probe", str(address))

    def remove(self, address: Address) -> None:
        """echo 1 > remove: remove the device until the next `rescan`. VFs of a PF have no such file: ENOENT."""
        self._attribute(address, "remove", "1")

    def unplug(self, address: Address) -> None:
        """Pull out the device: it is removed, and no rescan finds it. A single VF can be pulled out too."""
        with self._bus.monitor:
            self._hardware.forget(str(address))
            device = self._device(address)
            with self._bus.locked(device):
                self._bus.remove_device(device)

    def rescan(self) -> None:
        """echo 1 > rescan."""
        self._by_hand("bus/pci/rescan", "1")

    def add_pf(self, pf: Pf) -> None:
        """Plug in a PF in the described state. Raises NodeError if it does not fit this node."""
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
        """Let the PF's firmware answer (0) or hang (-1). Raises OSError (ENODEV) if the device is no PF."""
        with self._bus.monitor:
            device = self._device(address)
            if device.qat is None:
                raise os_error(errno.ENODEV)
            device.qat.heartbeat = status
            drivers.show_debugfs(self._bus, device)

    def add_driver(self, name: str) -> None:
        """modprobe."""
        with self._bus.monitor:
            self._bus.add_driver(drivers.make_driver(self._bus, name))

    def remove_driver(self, name: str) -> None:
        """modprobe -r. Raises OSError: ENOENT, or EAGAIN while a device of this driver is open."""
        with self._bus.monitor:
            self._bus.remove_driver(name)

    def open_vfio(self, address: Address) -> OpenVfio:
        """Open a device as a DPDK process does. Raises OSError: ENODEV if not on vfio-pci, EBUSY if open."""
        with self._bus.monitor:
            return self._vfio_files.open(self._device(address))

    # Faults

    def fail_next(self, address: Address | None, attribute: str, number: int, times: int = 1) -> None:
        """Let the next writes to an attribute fail with this errno (faults.py); address None: of any device."""
        with self._bus.monitor:
            self._faults.fail(attribute, _text(address), number, times)

    def delay(self, attribute: str, seconds: float, address: Address | None = None) -> None:
        """Delay writes to an attribute by this time; 0 removes the delay."""
        with self._bus.monitor:
            self._faults.delay(attribute, _text(address), seconds)

    def hang(self, attribute: str, address: Address | None = None) -> None:
        """Let writes to an attribute wait until `release`."""
        with self._bus.monitor:
            self._faults.hang(attribute, _text(address))

    def release(self, attribute: str, address: Address | None = None) -> None:
        """Remove a hang; writes that waited continue."""
        with self._bus.monitor:
            self._faults.release(attribute, _text(address))

    def hanging(self) -> int:
        """How many writes wait because of `hang`."""
        with self._bus.monitor:
            return self._faults.hanging

    # State
    def driver(self, address: Address) -> str | None:
        """The driver that the device's link shows, None for none. Raises OSError (ENODEV) without such a device."""
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
            raise os_error(errno.ENODEV)
        return device

    def _attribute(self, address: Address, name: str, text: str) -> None:
        self._by_hand(f"{self._device(address).path}/{name}", text)

    def _by_hand(self, path: str, text: str) -> None:
        """As `write`, but without faults."""
        with self._bus.monitor:
            self._bus.check_open()
            stores.find(self._bus, path, f"{text}\n".encode()).run()


def _text(address: Address | None) -> str | None:
    return None if address is None else str(address)
