"""The kernel that the tests run on is the one that we think."""

import subprocess
from pathlib import Path


def test_the_modules_load_and_unload_and_groups_are_the_iommus() -> None:
    subprocess.run(["modprobe", "fake_qat", "devices=0:6b:8086:4940:16:-1"], check=True)
    try:
        pf = Path("/sys/bus/pci/devices/0000:6b:00.0")
        assert (pf / "qat/state").read_text() == "up\n"
        (pf / "sriov_numvfs").write_text("16")
        assert (pf / "sriov_numvfs").read_text() == "16\n"
        assert (pf / "virtfn15/iommu_group").readlink().name.isdigit()
    finally:
        subprocess.run(["modprobe", "-r", "fake_qat"], check=True)
