"""The demo on a table of nodes: its printed lines and exit status, and that it ends within its time limit."""

import io
import json
import re
import resource
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from qat_server.kubelet.allocation import AllocationPolicy
from qat_simulation.demo import sequence

PF, OTHER = "0000:6b:00.0", "0000:70:00.0"
GEN4 = {"address": PF, "services": "sym;asym", "total_vfs": 4}


class Case(NamedTuple):
    """`lines` are regular expressions of lines printed in this order; `never` match no printed line."""

    name: str
    node: dict[str, Any]
    status: int
    lines: tuple[str, ...]
    never: tuple[str, ...] = ()


CASES = [
    Case(
        "two PFs, the second with other services",
        {"pfs": [GEN4, {"address": OTHER, "services": "dc", "total_vfs": 4}]},
        0,
        (
            r"✓ every VF \(8\) bound to vfio-pci by the helper",
            rf"✓ heartbeat of PF {PF} lost",
            r"✓ helper killed",
            r"✓ pod-c got 1 of .* while the helper is not running",
            rf"✓ ConfigMap changed: PF ({PF}|{OTHER})|- there is no PF whose services",
            r"All \d+ steps succeeded in",
        ),
        ("✗",),
    ),
    Case(
        "128 VFs",
        {"pfs": [GEN4 | {"total_vfs": 64}, {"address": OTHER, "services": "sym;asym", "total_vfs": 64}]},
        0,
        (
            r"✓ 64 of 128 VFs bound to vfio-pci by the helper; 64 beyond --max-num-devices left alone",
            rf"PF {OTHER} beyond --max-num-devices: 64 VFs",
            r"All \d+ steps",
        ),
        ("every VF",),
    ),
    Case(
        "on vfio-pci already",
        {"pfs": [GEN4 | {"vf_driver": "vfio-pci"}]},
        0,
        (r"✓ 4 of 4 VFs on vfio-pci already", r"✓ pod-a got 2", r"All \d+ steps"),
        ("by the helper",),
    ),
    Case(
        "all on another driver",
        {"pfs": [GEN4 | {"vf_driver": "igb_uio"}]},
        0,
        (r"✓ 4 on igb_uio left alone", r"- no VF is served", r"All \d+ steps"),
        (r"heartbeat of PF .* lost", "pod-a", "kubelet restarted"),
    ),
    Case(
        "no VF, and none can be enabled",
        {"pfs": [GEN4 | {"total_vfs": 0}]},
        1,
        (r"demo failed: the node has no VF, and no PF on which the plugin could enable any",),
        ("✓",),
    ),
    Case(
        "no VF on a PF that is not provisioned",
        {"pfs": [{"address": PF, "device": "19e2", "num_vfs": 0}]},
        1,
        (r"demo failed: the node has no VF",),
        ("✓",),
    ),
    Case("an empty node", {}, 1, (r"demo failed: the node has no VF",), ("✓",)),
    Case(
        "a PF that is down",
        {"pfs": [GEN4 | {"state": "down"}]},
        0,
        (rf"✓ PF {PF}: VFs enabled by the helper", r"✓ every VF \(4\) bound", r"All \d+ steps"),
    ),
    Case(
        "no IOMMU",
        {"iommu": False, "pfs": [GEN4]},
        1,
        (r"✗ 4 of 4 VFs could not be bound to vfio-pci", r"  4 VFs \(.*\): .+", r"demo failed: 4 of 4 VFs"),
        ("every VF",),
    ),
    Case(
        "no IOMMU, and VFs to be enabled",
        {"iommu": False, "pfs": [GEN4 | {"num_vfs": 0}]},
        1,
        (rf"✗ PF {PF}: its VFs could not be enabled", r"demo failed: PF"),
    ),
    Case("noiommu", {"iommu": False, "noiommu": True, "pfs": [GEN4]}, 0, (r"noiommu-", r"All \d+ steps")),
    Case(
        "a failed PF from the start",
        {"pfs": [GEN4 | {"heartbeat": -1}, {"address": OTHER, "services": "sym;asym", "total_vfs": 4}]},
        0,
        (
            r"✓ every VF \(8\) bound",
            rf"✓ PF {PF} is not healthy: its VFs \(4\) are Unhealthy",
            rf"✓ heartbeat of PF {OTHER} lost",
            r"All \d+ steps",
        ),
        (rf"heartbeat of PF {PF} (lost|back)",),
    ),
    Case(
        "only a failed PF",
        {"pfs": [GEN4 | {"heartbeat": -1}]},
        0,
        (rf"✓ PF {PF} is not healthy", r"- no device is left for pod-a", r"- no PF with a live heartbeat"),
        ("heartbeat of PF .* back",),
    ),
    Case(
        "VFs without a PF, as in a VM",
        {"vfs": [{"address": "0000:00:05.0"}, {"address": "0000:00:06.0"}]},
        0,
        (r"✓ every VF \(2\) bound", r"- no PF with a live heartbeat", r"All \d+ steps"),
    ),
    Case(
        "a PF, and a VF without a PF",
        {"pfs": [GEN4], "vfs": [{"address": "0000:00:05.0"}]},
        0,
        (r"✓ 4 of 5 VFs bound to vfio-pci by the helper; 1 left alone whose PF is not on its kernel driver",),
    ),
    Case(
        "C62x only, in two domains",
        {"pfs": [{"address": each, "device": "37c8", "total_vfs": 2} for each in (PF, "10000:6b:00.0")]},
        0,
        (
            r"✓ every VF \(4\) bound",
            r"qat.intel.com/generic",
            r"QAT1=10000:6b:01\.0",
            r"- there is no PF whose services",
            r"All \d+ steps",
        ),
    ),
    Case(
        "Gen4, and C62x on the denylist of vfio-pci",
        {
            "disable_denylist": False,
            "pfs": [GEN4, {"address": OTHER, "device": "37c8", "total_vfs": 2}],
        },
        1,
        (r"✓ 4 of 6 VFs bound to vfio-pci by the helper; 2 not bound", r"✗ 2 of 6 VFs could not be bound", r"✓ pod-a"),
    ),
    Case(
        "a PF with its driver, and one without",
        {"pfs": [GEN4, GEN4 | {"address": OTHER, "driver": "", "num_vfs": 2}]},
        0,
        (r"✓ 4 of 6 VFs bound to vfio-pci by the helper; 2 left alone whose PF is not on its kernel driver",),
    ),
    Case(
        "one VF for all pods",
        {"pfs": [GEN4 | {"total_vfs": 1}]},
        0,
        (r"✓ every VF \(1\)", r"✓ pod-a got 1", r"- no device is left for pod-b", r"- no device is left for pod-c"),
    ),
]


@pytest.fixture(autouse=True)
def long_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long limit for busy machines; a demo that hangs still ends, and names the step."""
    monkeypatch.setattr(sequence, "LIMIT", 600.0)


def cpu() -> float:
    """Seconds of CPU time of this process and of its children that have ended; other processes do not count."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def show(node: dict[str, Any], tmp_path: Path, width: int = 160) -> tuple[int, str, float]:
    """The demo on a node: exit status, what it printed, seconds of CPU time."""
    file = tmp_path / "node.json"
    file.write_text(json.dumps(node))
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    began = cpu()
    status = sequence.run(file, AllocationPolicy.BALANCED, False, console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue(), cpu() - began


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_demo_on_a_node(case: Case, tmp_path: Path) -> None:
    status, output, seconds = show(case.node, tmp_path)

    position = 0
    for line in case.lines:
        found = re.search(line, output[position:])
        assert found, f"{line!r} is missing or out of order in\n{output}"
        position += found.end()
    for line in case.never:
        assert not re.search(line, output), f"{line!r} is in\n{output}"
    assert status == case.status, output
    assert ("All " in output) == (status == 0)
    assert seconds < 30, "it promises to end within 30 s on an idle machine"


def test_a_timeout_names_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "LIMIT", 0.001)  # no process has started by then
    status, output, _ = show({"pfs": [GEN4]}, tmp_path)
    assert status == 1
    line = r"^demo failed: the steps did not finish within 0\.001 s; the last one was: .+"
    assert re.search(line, output, re.MULTILINE), output
    assert "steps succeeded" not in output


def test_an_invalid_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "node.json"
    for text, message in (
        ("{", "it is not JSON: Input data was truncated"),
        ('{"pfs": [{}]}', "missing required field"),
    ):
        file.write_text(text)
        console = Console(file=io.StringIO(), width=80, color_system=None)
        assert sequence.run(file, AllocationPolicy.BALANCED, False, console) == 1
        assert isinstance(console.file, io.StringIO)
        (line,) = console.file.getvalue().splitlines()
        assert line.startswith(f"demo failed: {file}: the node description is not usable: ")
        assert message in line


def test_without_the_helper_s_distribution_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_simulation.running_node.shutil.which", lambda name, path=None: None)
    status, output, _ = show({"pfs": [GEN4]}, tmp_path)
    assert status == 1
    assert output.startswith("demo failed: qat-helper is not installed")
    assert "install the distribution qat-plugin-helper" in output
    assert "A node without hardware" not in output
