"""Each installation's policy allows exactly what its server uses: nothing is denied, and nothing is left unused."""

import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from deployments import rendered
from deployments.overlays import Setup, Used, allowed, run_life, setup_of
from deployments.rendered import COMPONENTS, DEPLOYMENTS, INSTALLATIONS, Manifest

pytestmark = pytest.mark.usefixtures("kustomize")

_README: Final = (DEPLOYMENTS / "README.md").read_text()


def everything(policy_directory: Path) -> Used:
    """All that a policy allows, as if it had been used."""
    policy = allowed(policy_directory)
    return Used(policy.operations, frozenset(policy.drivers), frozenset(policy.directories), ())


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_an_installations_policy_allows_exactly_what_its_server_uses(name: str, tmp_path: Path) -> None:
    assert run_life(setup_of(rendered.render(name)), tmp_path) == everything(tmp_path / "policy")


def test_another_driver_needs_its_line_in_place_of_the_first(tmp_path: Path) -> None:
    """As the README of the deployments says, in a kustomization of one's own."""
    manifests = rendered.combined(tmp_path, (), *_kustomization_for("igb_uio"))
    assert "igb_uio" in str(setup_of(manifests).server)
    run = tmp_path / "run"
    run.mkdir()
    assert run_life(setup_of(manifests), run) == everything(run / "policy")
    assert allowed(run / "policy").drivers == {"igb_uio"}


def _kustomization_for(word: str) -> list[str]:
    """The lines of the README's kustomization that has this word, without those that name the base."""
    blocks = re.findall(r"^```yaml\n(.*?)^```$", _README, re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if word in block)
    return str(block).splitlines()


def test_the_units_policy_allows_exactly_what_their_server_uses(tmp_path: Path) -> None:
    unit = (DEPLOYMENTS / "systemd/qat-helper.service").read_text()
    (directory,) = re.findall(r"^Environment=QAT_HELPER_POLICY=(\S+)$", unit, re.MULTILINE)
    (pattern,) = re.findall(rf"^install -D -m 0644 -t {directory} (\S+)$", _README, re.MULTILINE)
    policy = {file.name: file.read_text() for file in rendered.ROOT.glob(pattern)}
    assert policy
    assert run_life(Setup(helper=(), server=(), policy=policy), tmp_path) == everything(tmp_path / "policy")


def test_the_units_policy_for_provisioning_is_the_components(tmp_path: Path) -> None:
    files = re.findall(r"^install -m 0644 -t /etc/qat-plugin/policy (\S+)$", _README, re.MULTILINE)
    assert [(rendered.ROOT / file).is_file() for file in files] == [True]
    base = sorted((DEPLOYMENTS / "base/policy").iterdir())
    for file in (*base, *(rendered.ROOT / file for file in files)):
        shutil.copy(file, tmp_path)
    (tmp_path / "rendered").mkdir()
    for name, text in setup_of(rendered.render("overlays/qat_initcontainer")).policy.items():
        (tmp_path / "rendered" / name).write_text(text)
    together = allowed(tmp_path / "rendered")
    shutil.rmtree(tmp_path / "rendered")
    assert allowed(tmp_path) == together


@pytest.mark.parametrize("name", INSTALLATIONS)
def test_a_policy_cannot_be_changed_in_place(name: str) -> None:
    _is_immutable(rendered.render(name))


def test_nor_can_that_of_all_components_together(tmp_path: Path) -> None:
    _is_immutable(rendered.combined(tmp_path, COMPONENTS))


def _is_immutable(manifests: list[Manifest]) -> None:
    """Under a name with the hash of its content, so that a change makes another one, and new pods."""
    named = [each for each in rendered.of_kind(manifests, "ConfigMap") if "-policy-" in each["metadata"]["name"]]
    (config,) = named
    assert config["immutable"] is True
    assert re.fullmatch(r"qat-plugin-policy-[a-z0-9]{10}", config["metadata"]["name"])
    volumes = [each["configMap"]["name"] for each in rendered.pod_spec(manifests)["volumes"] if "configMap" in each]
    assert config["metadata"]["name"] in volumes
