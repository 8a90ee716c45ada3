"""The emulated kernel's tree, and binding with and without an IOMMU. No process is involved."""

import os
from collections.abc import Iterator

import pytest

from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import LoneVf, Node, Pf
from support.emulated_kernel import PF, VF, VF2, attribute, emulated, read
from support.mixed_node import FOREIGN, MIXED, OLD, TO_VFIO


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(MIXED) as made:
        yield made


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


def test_down_removes_all_files_of_vfs(kernel: Kernel) -> None:
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


def test_attributes_of_the_pf_driver_are_removed_with_it(kernel: Kernel) -> None:
    kernel.unbind(PF)
    assert not (kernel.sysfs_root / attribute(PF, "qat")).exists()
    assert not (kernel.sysfs_root / f"kernel/debug/qat_4xxx_{PF}").exists()
    kernel.bind(PF, "4xxx")
    assert read(kernel, attribute(PF, "qat/state")) == "up\n"
    assert read(kernel, attribute(PF, "qat/cfg_services")) == "sym;asym\n"
    assert read(kernel, attribute(PF, "sriov_numvfs")) == "0\n"


def test_rescan_finds_a_removed_pf_but_no_unplugged_one(kernel: Kernel) -> None:
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


def test_another_device_is_in_the_tree(kernel: Kernel) -> None:
    assert kernel.driver(FOREIGN) == "ice"
    assert read(kernel, attribute(FOREIGN, "class")) == "0x020000\n"


def test_drivers_are_loaded_and_unloaded(kernel: Kernel) -> None:
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


def test_without_iommu_vfs_are_refused_and_vfio_accepts_no_device() -> None:
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


def test_noiommu_groups_have_a_name_and_exist_as_long_as_the_binding() -> None:
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
def test_vfio_pci_rejects_old_devices_unless_the_denylist_is_disabled(device: str, off: bool, taken: bool) -> None:
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
