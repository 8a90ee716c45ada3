"""The rule of the overlay for Node Feature Discovery, evaluated by that project's own code (`kubectl nfd`) on what a
node may have: every device of the table, each way to have vfio-pci. That a node's worker reports them in this form, and
what follows from the label, is in test_cluster_nfd.py."""

import json
import subprocess
from pathlib import Path
from typing import Final

import pytest

from cluster.disk import BINARIES
from cluster.node import LABEL
from deployments.rendered import DEPLOYMENTS, Manifest
from qat_shared.devices import PHYSICAL, VENDOR_INTEL, VIRTUAL

_PROGRAM: Final = BINARIES / "kubectl-nfd"
_RULE: Final = DEPLOYMENTS / "overlays/nfd/node-feature-rule.yaml"
_INTEL: Final = f"{VENDOR_INTEL:04x}"
_QAT: Final = (_INTEL, "4940")
_LOADED: Final[Manifest] = {"flags": {"kernel.loadedmodule": {"elements": {"vfio_pci": {}}}}}
_NOT_LOADED: Final[Manifest] = {"flags": {"kernel.loadedmodule": {"elements": {"vfio": {}}}}}


def _configured(value: str) -> Manifest:
    return {**_NOT_LOADED, "attributes": {"kernel.config": {"elements": {"VFIO_PCI": value}}}}


_CASES: Final = {
    **{f"{number:04x} and vfio-pci": ([(_INTEL, f"{number:04x}")], _LOADED, True) for number in (*PHYSICAL, *VIRTUAL)},
    "vfio-pci built in": ([_QAT], _configured("y"), True),
    "one of several devices": ([("1af4", "1000"), _QAT], _LOADED, True),
    "a module that nobody has loaded": ([_QAT], _configured("m"), False),
    "another module": ([_QAT], _NOT_LOADED, False),
    "nothing known of the kernel": ([_QAT], {}, False),
    "another device of Intel's": ([(_INTEL, "1572")], _LOADED, False),
    "the number of another's device": ([("1af4", "4940"), (_INTEL, "1572")], _LOADED, False),
    "no device": ([], _LOADED, False),
}


def _run(*words: str | Path) -> list[str]:
    if not _PROGRAM.exists():
        pytest.skip("kubectl-nfd has not been built: make test-cluster builds it")
    return subprocess.run([_PROGRAM, *words], capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_rule_is_valid() -> None:
    """Among others, the label is in a namespace that needs no permission."""
    assert f"NodeFeatureRule {_RULE} is valid" in _run("validate", "-f", _RULE)


@pytest.mark.parametrize("name", _CASES)
def test_a_node_is_labelled(tmp_path: Path, name: str) -> None:
    devices, features, labelled = _CASES[name]
    elements = [{"attributes": {"vendor": vendor, "device": device, "class": "0b40"}} for vendor, device in devices]
    found = {**features, "instances": {"pci.device": {"elements": elements}}}
    path = tmp_path / "features.json"
    path.write_text(json.dumps({"spec": {"features": found}}))
    said = _run("dryrun", "-f", _RULE, "-n", path)
    assert [line for line in said if line.startswith("Processing rule")] != [], said
    assert (LABEL in said) == labelled, said
    assert not any("error" in line for line in said), said
