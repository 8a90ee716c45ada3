"""The emulated kernel of a simulated node: a tree that looks like sysfs, and answers to what is written there.

Processes read the tree as files. What a process started with `spawn` writes beneath it comes here (writers.py) and is
answered as the real kernel's store functions answer (stores.py). Uevents go out on a socket. docs/simulation.md says
what is faithful and what is not.
"""

import contextlib
import errno
import functools
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from qat_shared.pci import PciAddress
from qat_simulation.interception import supervisor as interception
from qat_simulation.interception.writers import Writers
from qat_simulation.kernel import drivers
from qat_simulation.kernel.bus import Bus
from qat_simulation.kernel.faults import Faults
from qat_simulation.kernel.hardware import Hardware
from qat_simulation.kernel.model import Device, failure
from qat_simulation.kernel.sysfs import attributes, stores
from qat_simulation.kernel.sysfs.tree import Tree
from qat_simulation.kernel.uevents import Broadcaster
from qat_simulation.kernel.vfio_files import OpenVfio, VfioFiles
from qat_simulation.node.description import Node, Pf

Address = PciAddress | str


class DeviceState(Struct, frozen=True):
    """A device as it is at one moment."""

    driver: str | None
    override: str | None
    pf: PciAddress | None
    iommu_group: int | None
    opened: bool


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
        self._vfio_files = VfioFiles(bus)
        self._hardware = Hardware(bus, node)
        self._writers = Writers(self.roots, self.write, self.defects)
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
        return self._writers.answer(path, data)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """While the block runs, this kernel changes nothing in its tree: for those who do so themselves."""
        with self._bus.monitor:
            yield

    def spawn(self, argv: Sequence[str], **popen: Any) -> "subprocess.Popen[Any]":
        """Start a program whose writes beneath the sysfs root come to this kernel; further arguments are Popen's.

        Raises OSError when it cannot be started, InterceptionError where the system cannot intercept.
        """
        return self._writers.spawn(argv, **popen)

    def close(self) -> None:
        """Kill what was spawned and still runs, wake every write that waits (ESHUTDOWN), end all threads."""
        self._writers.kill()
        with self._bus.monitor:
            self._bus.closed = True
            self._bus.monitor.notify_all()
        self._writers.end()
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
            return self._vfio_files.open(self._device(address))

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
