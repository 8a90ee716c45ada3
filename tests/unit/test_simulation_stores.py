"""The store functions, by attribute: what is written, which errno comes back, what it did. No process is involved."""

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from emulated import PF, VF, VF2, attribute, background, emulated, read, real, wait_until
from qat_server.simulation.kernel import Kernel
from qat_server.simulation.node import LoneVf, Node, OtherDevice, Pf
from qat_server.simulation.written import boolean, unsigned

OLD = "0001:3d:00.0"
FOREIGN = "0000:03:00.0"
DOWN = "0000:70:00.0"
NODE = Node(
    pfs=(
        Pf(address=PF, numa_node=0, services="sym;asym", total_vfs=4),
        Pf(address=DOWN, services="dc", total_vfs=4, state="down"),
        Pf(address=OLD, device="37c8", total_vfs=2, services="dc"),
    ),
    others=(OtherDevice(address=FOREIGN, vendor="8086", device="1592", driver="ice"),),
)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(NODE) as made:
        yield made


class Case(NamedTuple):
    """`first` are writes that succeed, then comes `data` to `path`; `shows` is what a file holds afterwards."""

    name: str
    path: str
    data: str
    error: int = 0
    shows: tuple[str, str] | None = None
    driver: tuple[str, str | None] | None = None
    first: tuple[tuple[str, str], ...] = ()


OVERRIDE = real(VF, "driver_override")
NUMVFS = real(PF, "sriov_numvfs")
SERVICES = real(PF, "qat/cfg_services")
STATE = real(PF, "qat/state")
DRV = "bus/pci/drivers"
OFF = (f"{DRV}/4xxxvf/unbind", VF)
TO_VFIO = (OVERRIDE, "vfio-pci")
NONE = (real(PF, "sriov_numvfs"), "0")
GO_DOWN = (STATE, "down")

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
    Case("unbind what is not there", f"{DRV}/4xxxvf/unbind", "0000:00:00.0", errno.ENODEV),
    Case("unbind nonsense", f"{DRV}/4xxxvf/unbind", "x/../y", errno.ENODEV),
    Case("unbind shows in enable", f"{DRV}/4xxxvf/unbind", VF, shows=(attribute(VF, "enable"), "0\n")),
    # bind
    Case("bind", f"{DRV}/4xxxvf/bind", VF, driver=(VF, "4xxxvf"), first=(OFF,)),
    Case("bind what is bound", f"{DRV}/4xxxvf/bind", VF, errno.EBUSY, driver=(VF, "4xxxvf")),
    Case("bind without id or override", f"{DRV}/vfio-pci/bind", VF, errno.ENODEV, driver=(VF, None), first=(OFF,)),
    Case("bind by override", f"{DRV}/vfio-pci/bind", VF, driver=(VF, "vfio-pci"), first=(OFF, TO_VFIO)),
    Case("bind against the override", f"{DRV}/4xxxvf/bind", VF, errno.ENODEV, driver=(VF, None), first=(OFF, TO_VFIO)),
    Case("bind what is not there", f"{DRV}/4xxxvf/bind", "0000:00:00.0", errno.ENODEV),
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
    Case("probe what is not there", "bus/pci/drivers_probe", "0000:00:00.0", errno.ENODEV),
    # new_id
    Case("new_id takes what is free", f"{DRV}/vfio-pci/new_id", "8086 4941", driver=(VF, "vfio-pci"), first=(OFF,)),
    Case("new_id leaves what is bound", f"{DRV}/vfio-pci/new_id", "8086 4941", driver=(VF, "4xxxvf")),
    Case("new_id of a known id", f"{DRV}/4xxxvf/new_id", "8086 4941", errno.EEXIST),
    Case("new_id nonsense", f"{DRV}/vfio-pci/new_id", "8086", errno.EINVAL),
    Case("remove_id of none", f"{DRV}/vfio-pci/remove_id", "8086 4941", errno.ENODEV),
    # sriov_numvfs
    Case("VFs off", NUMVFS, "0\n", shows=(attribute(PF, "sriov_numvfs"), "0\n")),
    Case("the number there is", NUMVFS, "4"),
    Case("another number", NUMVFS, "2", errno.EBUSY, (attribute(PF, "sriov_numvfs"), "4\n")),
    Case("more than there can be", NUMVFS, "5", errno.ERANGE),
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
    Case("a VF cannot be removed by itself", real(VF, "remove"), "1", errno.ENOENT),
    Case("nor be looked for", real(VF, "rescan"), "1", errno.ENOENT),
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


def test_a_page_is_taken_of_a_longer_write(kernel: Kernel) -> None:
    assert kernel.write("bus/pci/drivers_autoprobe", "1" * 5000) == 4096


@pytest.mark.parametrize(("text", "value"), [("16\n", 16), ("0x10", 16), ("020", 16), ("+16", 16), ("0", 0)])
def test_numbers_are_read_as_the_kernel_does(text: str, value: int) -> None:
    assert unsigned(text, 0xFFFF) == value


@pytest.mark.parametrize("text", ["", "\n", "-1", " 1", "1 ", "1\n\n", "0x", "08", "65536", "one"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(OSError, match="Invalid"):
        unsigned(text, 0xFFFF)


@pytest.mark.parametrize(("text", "value"), [("on\n", True), ("Y", True), ("1", True), ("off", False), ("n", False)])
def test_booleans_are_read_as_the_kernel_does(text: str, value: bool) -> None:
    assert boolean(text) is value


# What the tree shows


def test_vf_is_linked_as_in_sysfs(kernel: Kernel) -> None:
    kernel.write(*TO_VFIO)
    kernel.unbind(VF)
    kernel.probe(VF)
    vf = kernel.sysfs_root / "bus/pci/devices" / VF
    assert vf.resolve() == kernel.sysfs_root / "devices/pci0000:6b" / VF
    assert (vf / "physfn").resolve().name == PF
    assert (vf / "physfn" / "virtfn0").resolve() == vf.resolve()
    assert (vf / "driver").resolve() == kernel.sysfs_root / "bus/pci/drivers/vfio-pci"
    assert (vf / "driver" / VF).resolve() == vf.resolve()
    group = (vf / "iommu_group").resolve()
    assert group.parent == kernel.sysfs_root / "kernel/iommu_groups"
    assert [device.resolve() for device in (group / "devices").iterdir()] == [vf.resolve()]
    assert (kernel.sysfs_root / "class/vfio" / group.name).is_dir()
    assert (vf / "numa_node").read_text() == "0\n"


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        ("bus/pci/drivers_probe", 0o200),
        ("bus/pci/drivers/vfio-pci/unbind", 0o200),
        (attribute(VF, "vendor"), 0o444),
        (attribute(VF, "driver_override"), 0o644),
        ("kernel/debug", 0o700),
    ],
)
def test_modes(kernel: Kernel, path: str, mode: int) -> None:
    assert (kernel.sysfs_root / path).stat().st_mode & 0o777 == mode


def test_igb_uio_gives_each_device_a_number(kernel: Kernel) -> None:
    for number, vf in enumerate((VF, VF2)):
        kernel.set_driver_override(vf, "igb_uio")
        kernel.unbind(vf)
        kernel.bind(vf, "igb_uio")
        uio = kernel.sysfs_root / "class/uio" / f"uio{number}"
        assert (uio / "device").resolve().name == vf
        assert os.listdir(kernel.sysfs_root / attribute(vf, "uio")) == [f"uio{number}"]
        assert read(kernel, attribute(vf, "enable")) == "1\n"
    kernel.unbind(VF)
    assert os.listdir(kernel.sysfs_root / "class/uio") == ["uio1"]


def test_down_and_up_leaves_no_trace_of_vfs(kernel: Kernel) -> None:
    groups = kernel.sysfs_root / "kernel/iommu_groups"
    before = sorted(os.listdir(groups))
    kernel.set_state(PF, "down")
    assert not [name for name in os.listdir(kernel.sysfs_root / f"bus/pci/devices/{PF}") if name.startswith("virtfn")]
    assert not (kernel.sysfs_root / "devices/pci0000:6b" / VF).exists()
    assert os.listdir(kernel.sysfs_root / f"kernel/debug/qat_4xxx_{PF}") == ["dev_cfg"]
    kernel.set_state(PF, "up")
    kernel.set_numvfs(PF, 1)
    assert sorted(os.listdir(groups)) == before
    assert kernel.driver(VF) == "4xxxvf"


def test_heartbeat_and_dev_cfg(kernel: Kernel) -> None:
    status = f"kernel/debug/qat_4xxx_{PF}/heartbeat/status"
    assert read(kernel, status) == "0\n\0"
    kernel.set_heartbeat(PF, -1)
    assert read(kernel, status) == "-1\n\0"
    assert "ServicesEnabled = dc\n" in read(kernel, f"kernel/debug/qat_c6xx_{OLD}/dev_cfg")


def test_pf_driver_takes_its_attributes_along(kernel: Kernel) -> None:
    kernel.unbind(PF)
    assert not (kernel.sysfs_root / attribute(PF, "qat")).exists()
    assert not (kernel.sysfs_root / f"kernel/debug/qat_4xxx_{PF}").exists()
    kernel.bind(PF, "4xxx")
    assert read(kernel, attribute(PF, "qat/state")) == "up\n"
    assert read(kernel, attribute(PF, "qat/cfg_services")) == "sym;asym\n"
    assert read(kernel, attribute(PF, "sriov_numvfs")) == "0\n"


def test_removed_pf_comes_back_by_rescan_and_an_unplugged_one_does_not(kernel: Kernel) -> None:
    kernel.remove(PF)
    assert not (kernel.sysfs_root / attribute(PF, "")).exists()
    kernel.rescan()
    assert kernel.driver(PF) == "4xxx"
    kernel.unplug(PF)
    kernel.rescan()
    with pytest.raises(OSError, match="No such device"):
        kernel.driver(PF)
    kernel.add_pf(Pf(address=PF, services="dc"))
    assert kernel.driver(VF) == "4xxxvf"


def test_removed_vf_leaves_a_dangling_link_until_sriov_ends(kernel: Kernel) -> None:
    kernel.unplug(VF)
    link = kernel.sysfs_root / attribute(PF, "virtfn0")
    assert link.is_symlink()
    assert not link.exists()
    kernel.set_numvfs(PF, 0)
    assert not link.is_symlink()
    kernel.set_numvfs(PF, 4)
    assert link.exists()


def test_foreign_device_is_there(kernel: Kernel) -> None:
    assert kernel.driver(FOREIGN) == "ice"
    assert read(kernel, attribute(FOREIGN, "class")) == "0x020000\n"


def test_drivers_come_and_go(kernel: Kernel) -> None:
    kernel.remove_driver("4xxxvf")
    assert kernel.driver(VF) is None
    assert not (kernel.sysfs_root / "bus/pci/drivers/4xxxvf").exists()
    kernel.add_driver("4xxxvf")
    assert kernel.driver(VF) == "4xxxvf"
    with pytest.raises(OSError, match="File exists"):
        kernel.add_driver("4xxxvf")


def test_snapshot(kernel: Kernel) -> None:
    snapshot = {str(address): state for address, state in kernel.snapshot().items()}
    assert list(snapshot) == sorted(snapshot)
    assert snapshot[VF].driver == "4xxxvf"
    assert str(snapshot[VF].pf) == PF


# IOMMU


def test_without_iommu_vfs_are_refused_and_vfio_takes_nothing() -> None:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=2),), iommu=False)) as kernel:
        assert os.listdir(kernel.sysfs_root / "kernel/iommu_groups") == []
        kernel.write(*TO_VFIO)
        kernel.unbind(VF)
        kernel.probe(VF)
        assert kernel.driver(VF) is None
        with pytest.raises(OSError, match="Invalid argument"):
            kernel.bind(VF, "vfio-pci")
        kernel.set_numvfs(PF, 0)
        with pytest.raises(OSError, match="Invalid argument"):
            kernel.set_numvfs(PF, 2)


def test_noiommu_groups_have_a_name_and_live_as_long_as_the_binding() -> None:
    vf = "0000:00:05.0"
    with emulated(Node(vfs=(LoneVf(address=vf, driver="vfio-pci"),), iommu=False, noiommu=True)) as kernel:
        group = kernel.sysfs_root / attribute(vf, "iommu_group")
        assert (group / "name").read_text() == "vfio-noiommu\n"
        assert os.listdir(kernel.sysfs_root / "class/vfio") == ["noiommu-0"]
        assert read(kernel, "module/vfio/parameters/enable_unsafe_noiommu_mode") == "Y\n"
        kernel.unbind(vf)
        assert not group.is_symlink()
        assert os.listdir(kernel.sysfs_root / "kernel/iommu_groups") == []


@pytest.mark.parametrize(
    ("wanted", "driver"), [(None, "4xxxvf"), ("", None), ("vfio-pci", "vfio-pci"), ("uio_x", "uio_x")]
)
def test_vf_driver_of_the_description(wanted: str | None, driver: str | None) -> None:
    node = Node(pfs=(Pf(address=PF, total_vfs=1, vf_driver=wanted),), drivers=("vfio-pci", "uio_x"))
    with emulated(node) as kernel:
        assert kernel.driver(VF) == driver


@pytest.mark.parametrize(
    ("device", "off", "taken"), [("37c8", True, True), ("37c8", False, False), ("4940", False, True)]
)
def test_vfio_pci_denies_old_devices_unless_told_not_to(device: str, off: bool, taken: bool) -> None:
    with emulated(Node(pfs=(Pf(address=PF, device=device, total_vfs=1),), disable_denylist=off)) as kernel:
        assert read(kernel, "module/vfio_pci/parameters/disable_denylist") == f"{'NY'[off]}\n"
        vf = next(str(address) for address, state in kernel.snapshot().items() if state.pf)
        kernel.unbind(vf)
        kernel.set_driver_override(vf, "vfio-pci")
        kernel.probe(vf)
        assert kernel.driver(vf) == ("vfio-pci" if taken else None)


def test_old_kernels_show_services_as_written() -> None:
    with emulated(Node(pfs=(Pf(address=PF, state="down"),), canonical_services=False)) as kernel:
        kernel.set_services(PF, "sym;asym")
        assert read(kernel, attribute(PF, "qat/cfg_services")) == "sym;asym\n"


# What waits


def in_use(kernel: Kernel) -> str:
    return read(kernel, attribute(VF, "enable")) + read(kernel, attribute(VF, "power/runtime_status"))


@pytest.fixture
def vfio() -> Iterator[Kernel]:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=4, vf_driver="vfio-pci"),))) as made:
        yield made


def test_enable_says_whether_a_vfio_device_is_open(vfio: Kernel) -> None:
    assert in_use(vfio) == "0\nsuspended\n"
    handle = vfio.open_vfio(VF)
    assert in_use(vfio) == "1\nactive\n"
    with pytest.raises(OSError, match="busy"):
        vfio.open_vfio(VF)
    with pytest.raises(OSError, match="Resource temporarily unavailable"):
        vfio.remove_driver("vfio-pci")
    handle.close()
    handle()
    assert in_use(vfio) == "0\nsuspended\n"


def test_only_vfio_devices_can_be_opened(kernel: Kernel) -> None:
    with pytest.raises(OSError, match="No such device"):
        kernel.open_vfio(VF)


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("bus/pci/drivers/vfio-pci/unbind", VF),
        (NUMVFS, "0"),
        (STATE, "down"),
        ("bus/pci/drivers/4xxx/unbind", PF),
        (real(PF, "remove"), "1"),
    ],
    ids=["unbind", "numvfs", "down", "PF unbind", "PF remove"],
)
def test_release_waits_until_the_device_is_closed(vfio: Kernel, path: str, data: str) -> None:
    handle = vfio.open_vfio(VF)
    writer = background(lambda: vfio.write(path, data))
    wait_until(lambda: vfio.driver(VF) is None)  # the link goes at once
    assert read(vfio, attribute(VF, "enable")) == "1\n"
    vfio.unbind(VF2)  # nobody else is held up
    vfio.probe(VF)  # bound still, in a way: nothing happens
    other = background(lambda: vfio.write(OVERRIDE, "x"))  # needs the device's lock
    assert writer.is_alive()
    assert other.is_alive()
    handle.close()
    for thread in (writer, other):
        thread.join(10)
        assert not thread.is_alive()


def test_writes_that_wait_end_with_the_kernel() -> None:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=1, vf_driver="vfio-pci"),))) as kernel:
        kernel.open_vfio(VF)
        errors: list[int | None] = []

        def write() -> None:
            try:
                kernel.unbind(VF)
            except OSError as error:
                errors.append(error.errno)

        thread = background(write)
        wait_until(lambda: kernel.driver(VF) is None)
    thread.join(10)
    assert errors == [errno.ESHUTDOWN]


# Faults


def test_next_write_fails_and_does_nothing(kernel: Kernel) -> None:
    kernel.fail_next(VF, "driver_override", errno.ENOMEM, times=2)
    for _ in range(2):
        with pytest.raises(OSError, match="Cannot allocate memory"):
            kernel.write(*TO_VFIO)
    kernel.write(real(VF2, "driver_override"), "vfio-pci")
    kernel.write(*TO_VFIO)


def test_faults_know_the_device_of_bus_wide_files(kernel: Kernel) -> None:
    kernel.fail_next(VF, "unbind", errno.EIO)
    kernel.fail_next(None, "state", errno.EBUSY)
    kernel.write(f"{DRV}/4xxxvf/unbind", VF2)
    with pytest.raises(OSError, match="Input/output error"):
        kernel.write(*OFF)
    with pytest.raises(OSError, match="busy"):
        kernel.write(STATE, "down")


def test_driver_that_will_not_take_the_device(kernel: Kernel) -> None:
    kernel.unbind(VF)
    kernel.fail_next(VF, "probe", errno.EIO, times=2)
    kernel.write("bus/pci/drivers_probe", VF)
    assert kernel.driver(VF) is None
    with pytest.raises(OSError, match="Input/output error"):
        kernel.write(f"{DRV}/4xxxvf/bind", VF)
    kernel.write("bus/pci/drivers_probe", VF)
    assert kernel.driver(VF) == "4xxxvf"


def test_hanging_write_holds_up_nobody_else(kernel: Kernel) -> None:
    kernel.hang("unbind", VF)
    writer = background(lambda: kernel.write(*OFF))
    kernel.write(f"{DRV}/4xxxvf/unbind", VF2)
    assert writer.is_alive()
    assert kernel.driver(VF) == "4xxxvf"
    kernel.release("unbind", VF)
    writer.join(10)
    assert kernel.driver(VF) is None


def test_slow_write_takes_its_time(kernel: Kernel) -> None:
    kernel.delay("unbind", 0.05)
    writer = background(lambda: kernel.write(*OFF))
    assert kernel.driver(VF) == "4xxxvf"
    writer.join(10)
    assert kernel.driver(VF) is None
    kernel.delay("unbind", 0)
    assert kernel._faults._faults == []
