"""doctor on the simulated node: no finding on a good node, and the faults of a bad one."""

import asyncio
import errno
import json
import subprocess

from qat_simulation.node.description import Node, Pf
from qat_simulation.running_node import RunningNode, command, running_node


async def findings_of(node: RunningNode) -> tuple[int, list[dict[str, str]]]:
    """The exit status, and the findings that are not ok."""
    done = await asyncio.to_thread(
        subprocess.run,
        [
            *command("qat-plugin"),
            "doctor",
            f"--sysfs-root={node.kernel.sysfs_root}",
            f"--kubelet-dir={node.kubelet_directory}",
            f"--helper-socket={node.helper_socket}",
            "-json",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, [finding for finding in json.loads(done.stdout) if finding["level"] != "ok"]


async def doctor(node: RunningNode) -> tuple[int, dict[str, str]]:
    """The exit status, and the level by text of the findings that are not ok."""
    status, findings = await findings_of(node)
    # Of this machine's own /proc and /dev, not of the simulated node's.
    not_ours = ("security module", "kubelet")
    return status, {
        finding["text"]: finding["level"]
        for finding in findings
        if finding["check"] not in not_ours and "/dev/vfio" not in finding["text"]
    }


async def test_nothing_is_wrong_once_both_run_and_much_is_before() -> None:
    node = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=2),))
    async with running_node(node) as running:
        status, levels = await doctor(running)
        assert status == 1
        assert levels["2 VFs bound to 4xxxvf; expected vfio-pci"] == "note"
        assert [text for text, level in levels.items() if level == "problem"] == [
            f"cannot reach the helper at {running.helper_socket}: No such file or directory: "
            "is qat-helper running? (--helper-socket)"
        ]
        running.start_helper()
        running.start_server()
        await running.until_status(
            "every VF is bound", lambda status: status.ready and all(vf.driver == "vfio-pci" for vf in status.vfs)
        )
        assert await doctor(running) == (0, {})


async def test_a_node_that_cannot_work() -> None:
    node = Node(
        pfs=(
            Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=2, num_vfs=0),
            Pf(address="0000:70:00.0", services="dc", driver=""),
        ),
        iommu=False,
        drivers=(),
    )
    async with running_node(node) as running:
        status, levels = await doctor(running)
        problems = [text for text, level in levels.items() if level == "problem"]
        assert status == 1
        for text in (
            "0000:70:00.0 is not bound to a driver; expected 4xxx",
            "0000:6b:00.0 has 0 of 2 VFs enabled",
            "the IOMMU is off: /sys/kernel/iommu_groups is empty",
            "vfio-pci is not loaded",
        ):
            assert text in problems


async def test_a_bind_that_apparmor_may_have_refused_is_told_with_what_to_set() -> None:
    node = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=2),))
    async with running_node(node) as running:
        parameters = running.kernel.sysfs_root / "module/apparmor/parameters"
        parameters.mkdir(parents=True)
        (parameters / "enabled").write_text("Y\n")
        running.kernel.fail_next("0000:6b:00.1", "driver_override", errno.EACCES, times=1000)
        running.start_helper()
        running.start_server()
        await running.until_status("it was refused", lambda status: any("denied" in vf.reason for vf in status.vfs))
        (logged,) = [line for line in running.log("server").splitlines() if "VF not bound" in line]
        status, findings = await findings_of(running)
        assert status == 1
        (finding,) = [finding for finding in findings if "AppArmor" in finding["text"]]
        assert finding["level"] == "problem"
        assert finding["text"].endswith("not permitted to bind 0000:6b:00.1 (Permission denied)")
        for text in (finding["advice"], logged):
            assert "appArmorProfile {type: Unconfined}" in text
