"""The store functions, by attribute: the data written, the errno, the effect. No process is involved."""

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from qat_simulation.kernel.kernel import Kernel
from qat_simulation.kernel.sysfs.attributes import boolean, unsigned
from support.emulated_kernel import PF, VF, attribute, emulated, read, real
from support.mixed_node import DOWN, DRV, GO_DOWN, MIXED, NONE, NUMVFS, OFF, OLD, OVERRIDE, SERVICES, STATE, TO_VFIO


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(MIXED) as made:
        yield made


class Case(NamedTuple):
    """`first` are writes that succeed, before `data` to `path`; `shows` is a file and its text afterwards."""

    name: str
    path: str
    data: str
    error: int = 0
    shows: tuple[str, str] | None = None
    driver: tuple[str, str | None] | None = None
    first: tuple[tuple[str, str], ...] = ()


CASES = [
    # driver_override
    Case("override", OVERRIDE, "vfio-pci", shows=(attribute(VF, "driver_override"), "vfio-pci\n")),
    Case("override with newline", OVERRIDE, "vfio-pci\n", shows=(attribute(VF, "driver_override"), "vfio-pci\n")),
    Case("override padded with NUL", OVERRIDE, "vfio-pci\0\0", shows=(attribute(VF, "driver_override"), "vfio-pci\n")),
    Case(
        "override cleared by newline",
        OVERRIDE,
        "\n",
        shows=(attribute(VF, "driver_override"), "(null)\n"),
        first=(TO_VFIO,),
    ),
    Case(
        "override cleared by NUL",
        OVERRIDE,
        "\0",
        shows=(attribute(VF, "driver_override"), "(null)\n"),
        first=(TO_VFIO,),
    ),
    Case(
        "an empty write does nothing",
        OVERRIDE,
        "",
        shows=(attribute(VF, "driver_override"), "vfio-pci\n"),
        first=(TO_VFIO,),
    ),
    Case("override too long", OVERRIDE, "x" * 4096, errno.EINVAL, (attribute(VF, "driver_override"), "(null)\n")),
    Case("override changes no binding", OVERRIDE, "vfio-pci", driver=(VF, "4xxxvf")),
    # unbind
    Case("unbind", f"{DRV}/4xxxvf/unbind", f"{VF}\n", driver=(VF, None)),
    Case("unbind twice", f"{DRV}/4xxxvf/unbind", VF, errno.ENODEV, first=(OFF,)),
    Case("unbind another driver's", f"{DRV}/vfio-pci/unbind", VF, errno.ENODEV, driver=(VF, "4xxxvf")),
    Case("unbind a missing device", f"{DRV}/4xxxvf/unbind", "0000:00:00.0", errno.ENODEV),
    Case("unbind nonsense", f"{DRV}/4xxxvf/unbind", "x/../y", errno.ENODEV),
    Case("unbind shows in enable", f"{DRV}/4xxxvf/unbind", VF, shows=(attribute(VF, "enable"), "0\n")),
    # bind
    Case("bind", f"{DRV}/4xxxvf/bind", VF, driver=(VF, "4xxxvf"), first=(OFF,)),
    Case("bind a bound device", f"{DRV}/4xxxvf/bind", VF, errno.EBUSY, driver=(VF, "4xxxvf")),
    Case("bind without id or override", f"{DRV}/vfio-pci/bind", VF, errno.ENODEV, driver=(VF, None), first=(OFF,)),
    Case("bind by override", f"{DRV}/vfio-pci/bind", VF, driver=(VF, "vfio-pci"), first=(OFF, TO_VFIO)),
    Case("bind against the override", f"{DRV}/4xxxvf/bind", VF, errno.ENODEV, driver=(VF, None), first=(OFF, TO_VFIO)),
    Case("bind a missing device", f"{DRV}/4xxxvf/bind", "0000:00:00.0", errno.ENODEV),
    # drivers_probe
    Case("probe takes the kernel's driver", "bus/pci/drivers_probe", VF, driver=(VF, "4xxxvf"), first=(OFF,)),
    Case("probe takes the override", "bus/pci/drivers_probe", f"{VF}\n", driver=(VF, "vfio-pci"), first=(OFF, TO_VFIO)),
    Case(
        "probe finds none and succeeds",
        "bus/pci/drivers_probe",
        VF,
        driver=(VF, None),
        first=(OFF, (OVERRIDE, "uio_hv_generic")),
    ),
    Case("probe of a bound device does nothing", "bus/pci/drivers_probe", VF, driver=(VF, "4xxxvf"), first=(TO_VFIO,)),
    Case("probe a missing device", "bus/pci/drivers_probe", "0000:00:00.0", errno.ENODEV),
    # new_id
    Case("new_id takes free devices", f"{DRV}/vfio-pci/new_id", "8086 4941", driver=(VF, "vfio-pci"), first=(OFF,)),
    Case("new_id leaves bound devices", f"{DRV}/vfio-pci/new_id", "8086 4941", driver=(VF, "4xxxvf")),
    Case("new_id of a known id", f"{DRV}/4xxxvf/new_id", "8086 4941", errno.EEXIST),
    Case("new_id nonsense", f"{DRV}/vfio-pci/new_id", "8086", errno.EINVAL),
    Case("remove_id of none", f"{DRV}/vfio-pci/remove_id", "8086 4941", errno.ENODEV),
    # sriov_numvfs
    Case("VFs off", NUMVFS, "0\n", shows=(attribute(PF, "sriov_numvfs"), "0\n")),
    Case("the present number", NUMVFS, "4"),
    Case("another number", NUMVFS, "2", errno.EBUSY, (attribute(PF, "sriov_numvfs"), "4\n")),
    Case("more than sriov_totalvfs", NUMVFS, "5", errno.ERANGE),
    Case("no number", NUMVFS, "all", errno.EINVAL),
    Case("a negative number", NUMVFS, "-1", errno.EINVAL),
    Case("any number enables all", NUMVFS, "1", shows=(attribute(PF, "sriov_numvfs"), "4\n"), first=(NONE,)),
    Case("a hexadecimal number", NUMVFS, "0x4", shows=(attribute(PF, "sriov_numvfs"), "4\n"), first=(NONE,)),
    Case("new VFs go to their driver", NUMVFS, "4", driver=(VF, "4xxxvf"), first=(NONE,)),
    Case(
        "unless autoprobe is off",
        NUMVFS,
        "4",
        driver=(VF, None),
        first=(NONE, (real(PF, "sriov_drivers_autoprobe"), "0")),
    ),
    Case(
        "autoprobe off stops even a bind by hand",
        f"{DRV}/4xxxvf/bind",
        VF,
        errno.ENODEV,
        first=(OFF, (real(PF, "sriov_drivers_autoprobe"), "0")),
    ),
    Case("enabling brings a device up", real(DOWN, "sriov_numvfs"), "4", shows=(attribute(DOWN, "qat/state"), "up\n")),
    Case("no driver, no VFs", NUMVFS, "4", errno.ENOENT, first=((f"{DRV}/4xxx/unbind", PF),)),
    Case("old devices too", real(OLD, "sriov_numvfs"), "0", shows=(attribute(OLD, "sriov_numvfs"), "0\n")),
    # qat/state
    Case("down", STATE, "down\n", shows=(attribute(PF, "qat/state"), "down\n")),
    Case("down takes the VFs", STATE, "down", shows=(attribute(PF, "sriov_numvfs"), "0\n")),
    Case("down when down", STATE, "down", first=(GO_DOWN,)),
    Case("up when up", STATE, "up", shows=(attribute(PF, "sriov_numvfs"), "4\n")),
    Case("up again has no VFs", STATE, "up", shows=(attribute(PF, "sriov_numvfs"), "0\n"), first=(GO_DOWN,)),
    Case("no state", STATE, "reset", errno.EINVAL),
    # qat/cfg_services
    Case("services while up", SERVICES, "dc", errno.EINVAL, (attribute(PF, "qat/cfg_services"), "sym;asym\n")),
    Case("services while down", SERVICES, "dc\n", shows=(attribute(PF, "qat/cfg_services"), "dc\n"), first=(GO_DOWN,)),
    Case(
        "in the kernel's order",
        SERVICES,
        "dc;asym",
        shows=(attribute(PF, "qat/cfg_services"), "asym;dc\n"),
        first=(GO_DOWN,),
    ),
    Case("unknown services", SERVICES, "rsa", errno.EINVAL, first=(GO_DOWN,)),
    Case("too many services", SERVICES, "sym;asym;dc", errno.EINVAL, first=(GO_DOWN,)),
    # qat/auto_reset
    Case("auto_reset", real(PF, "qat/auto_reset"), "on\n", shows=(attribute(PF, "qat/auto_reset"), "on\n")),
    Case("auto_reset nonsense", real(PF, "qat/auto_reset"), "maybe", errno.EINVAL),
    # everything else
    Case("read only", real(VF, "vendor"), "0x8086", errno.EACCES, (attribute(VF, "vendor"), "0x8086\n")),
    Case("no such attribute", real(VF, "qat/state"), "up", errno.ENODEV),
    Case("no qat/ on old devices", real(OLD, "qat/state"), "down", errno.ENODEV),
    Case("enable needs a capability", real(VF, "enable"), "1", errno.EPERM),
    Case("no such device", real("0000:6b:1f.0", "driver_override"), "x", errno.ENODEV),
    Case("no such driver", f"{DRV}/nvme/unbind", VF, errno.ENODEV),
    Case("debugfs", f"kernel/debug/qat_4xxx_{PF}/heartbeat/status", "0", errno.EINVAL),
    Case("uevent nonsense", real(VF, "uevent"), "boom", errno.EINVAL),
    Case("uevent", real(VF, "uevent"), "change\n"),
    Case("a VF has no remove", real(VF, "remove"), "1", errno.ENOENT),
    Case("a VF has no rescan", real(VF, "rescan"), "1", errno.ENOENT),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_store(kernel: Kernel, case: Case) -> None:
    for path, data in case.first:
        kernel.write(path, data)
    if case.error:
        with pytest.raises(OSError, match=rf"^\[Errno {case.error}\]"):
            kernel.write(case.path, case.data)
    else:
        assert kernel.write(case.path, case.data) == len(case.data)
    if case.shows:
        assert read(kernel, case.shows[0]) == case.shows[1]
    if case.driver:
        address, driver = case.driver
        assert kernel.driver(address) == driver
        link = kernel.sysfs_root / attribute(address, "driver")
        assert (os.path.basename(os.readlink(link)) if link.is_symlink() else None) == driver


def test_one_page_of_a_longer_write_is_accepted(kernel: Kernel) -> None:
    assert kernel.write("bus/pci/drivers_autoprobe", "1" * 5000) == 4096


@pytest.mark.parametrize(("text", "value"), [("16\n", 16), ("0x10", 16), ("020", 16), ("+16", 16), ("0", 0)])
def test_numbers_are_parsed_as_in_the_kernel(text: str, value: int) -> None:
    assert unsigned(text, 0xFFFF) == value


@pytest.mark.parametrize("text", ["", "\n", "-1", " 1", "1 ", "1\n\n", "0x", "08", "65536", "one"])
def test_invalid_numbers(text: str) -> None:
    with pytest.raises(OSError, match="Invalid"):
        unsigned(text, 0xFFFF)


@pytest.mark.parametrize(("text", "value"), [("on\n", True), ("Y", True), ("1", True), ("off", False), ("n", False)])
def test_booleans_are_parsed_as_in_the_kernel(text: str, value: bool) -> None:
    assert boolean(text) is value
