"""OpenSSL's image, and the example's own command in it, as far as there is no hardware for it.

What stands for a VF is a file in /dev/vfio and its group in a simulated node's tree: QATlib opens the one, reads the
other, and ends at the first ioctl of VFIO.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from deployments import containers, images, measured, rendered
from deployments.containers import Container
from deployments.rendered import BUILT, DEPLOYMENTS
from qat_shared.devices import VIRTUAL
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import LoneVf, Node, Pf

pytestmark = [
    pytest.mark.usefixtures("kustomize"),
    pytest.mark.skipif(bool(images.why_not()), reason=images.why_not()),
    pytest.mark.skipif(bool(containers.why_not()), reason=containers.why_not()),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="Debian has QAT_Engine for x86_64 alone"),
]

_ENGINE: Final = "(qatengine) Reference implementation of QAT crypto engine(qat_hw & qat_sw)"
_CHECK: Final = "openssl engine -pre INIT_ENGINE -pre SET_INSTANCE_FOR_THREAD:0 qatengine"
_NO_INSTANCE: Final = "[Failure]: SET_INSTANCE_FOR_THREAD:0"
_PF: Final = Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, num_vfs=4, vf_driver="vfio-pci")
_SIGNED: Final = re.compile(r"^Doing 2048 bits private rsa sign ops .*: [1-9]\d* 2048 bits private RSA", re.MULTILINE)


@contextmanager
def _node(node: Node) -> Iterator[Kernel]:
    # In memory, as sysfs: on a disk "." may be listed last, and then QATlib takes it for a second device of the group.
    with tempfile.TemporaryDirectory(prefix="qat-", dir="/dev/shm") as made, Kernel(Path(made), node) as kernel:
        yield kernel


def _groups(kernel: Kernel) -> dict[str, str]:
    """The IOMMU groups of all VFs, and their devices' ids."""
    folders = (kernel.sysfs_root / "kernel/iommu_groups").glob("*/devices/*/device")
    found = {path.parents[2].name: path.read_text().strip() for path in folders}
    return {group: device for group, device in found.items() if int(device, 16) in VIRTUAL}


def _run(
    sysfs: Path, groups: Sequence[str] = (), command: str | None = None, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run the example, or another command in its place, with some of its variables changed."""
    (pod,) = rendered.render("examples/openssl")
    spec: dict[str, Any] = rendered.container(pod["spec"], "main")
    if command is not None:
        spec["command"] = ["/bin/sh", "-c", command]
    values = {each["name"]: each["value"] for each in spec["env"]}
    assert set(variables) <= set(values)
    spec["env"] = [{"name": key, "value": value} for key, value in (values | variables).items()]
    with containers.pod_directory(str(BUILT)) as directory, containers.sandbox() as shared:
        files = []
        for name in ("vfio", *groups) if groups else ():
            (directory / name).touch()
            files.append((directory / name, f"/dev/vfio/{name}"))
        container = Container(directory, images.image("openssl"), pod["spec"], spec, shared, {}, sysfs, files)
        return container.run_to_its_end()


def _said(done: "subprocess.CompletedProcess[str]") -> str:
    """Both outputs; which line of one was before which of the other, nobody knows: runc hands each on by itself."""
    return done.stdout + done.stderr


def test_the_image_has_the_engine_and_its_libraries_and_no_daemon() -> None:
    image = images.image("openssl")
    names = {path.name for path in image.files()}
    assert {"openssl", "openssl.cnf", "qatengine.so", "libqat.so.4", "libusdm.so.0"} <= names
    assert not names & {"qatprovider.so", "qatmgr", "qat_init"}
    sizes = f"{image.compressed / 1e6:.1f} MB compressed, {image.size / 1e6:.1f} MB"
    measured.note(f"{image.name}: {sizes}, built in {image.took:.0f} s")


def test_its_command_says_that_both_were_software() -> None:
    """All of it, each operation once: no VF is there, the engine computes all the same, and the pod has failed."""
    done = _run(Path("/sys"), SPEED="-testmode rsa2048")
    said = _said(done)
    assert done.returncode == 1, said
    assert done.stdout.index("Cannot open /dev/vfio") < done.stdout.index(_NO_INSTANCE), said  # QATlib's comes first
    assert _ENGINE in done.stdout, said
    assert re.search(r"^ \[RSA, ", done.stdout, re.MULTILINE), said
    assert said.count('Engine "qatengine" set.') == 1, said
    assert len(_SIGNED.findall(said)) == 2, said
    assert done.stdout.splitlines()[-1].startswith("both in software: QATlib has no instance that works"), said


def test_a_measurement_that_fails_is_the_pods_failure() -> None:
    done = _run(Path("/sys"), SPEED="-no-such-option")
    said = _said(done)
    assert done.returncode == 1, said
    assert "no-such-option" in said, said
    assert "both in software" not in said, said


def test_its_policy_is_as_many_vfs_as_it_asks_for() -> None:
    (pod,) = rendered.render("examples/openssl")
    spec = rendered.container(pod["spec"], "main")
    values = {each["name"]: each["value"] for each in spec["env"]}
    assert values["QAT_POLICY"] == str(spec["resources"]["limits"]["qat.intel.com/cy"])


@pytest.mark.parametrize("given", [0, 2])
def test_what_the_engine_signs_in_software_is_a_signature(given: int) -> None:
    """Also with VFs that QATlib found and could not open, when the engine is already QAT's."""
    command = (
        "cd /dev/shm && openssl genpkey -quiet -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out key &&"
        " openssl pkey -in key -pubout -out public && echo some text >text &&"
        " openssl dgst -engine qatengine -sha256 -sign key -out signature text &&"
        " openssl dgst -sha256 -verify public -signature signature text &&"
        " echo other text >text; openssl dgst -sha256 -verify public -signature signature text"
    )
    with _node(Node(pfs=(_PF,))) as kernel:
        done = _run(kernel.sysfs_root, sorted(_groups(kernel))[:given], command)
    said = _said(done)
    assert done.returncode == 1, said  # of the text that was not signed
    assert 'Engine "qatengine" set.' in said, said
    assert "Verified OK" in said, said
    assert "Verification failure" in said, said
    assert ("VFIO_GET_API_VERSION ioctl failed" in said) == bool(given), said


@pytest.mark.parametrize(
    ("policy", "tried", "sentence"),
    [
        (None, 2, "Cannot open vfio device"),
        ("1", 1, "Cannot open vfio device"),
        ("2", 2, "Cannot open vfio device"),
        ("3", 0, "Policy 3 is incompatible with the number of available devices 2"),
        ("0", 0, "Sal Ctrl failed to start in given time"),
    ],
)
def test_qatlib_takes_of_the_vfs_that_it_was_given_as_many_as_its_policy_says(
    policy: str | None, tried: int, sentence: str
) -> None:
    """Two of the node's four, and it counts no other; by the policy that the manifest names it opens both."""
    with _node(Node(pfs=(_PF,))) as kernel:
        groups = sorted(_groups(kernel))
        assert len(groups) == 4
        command = f"unset QAT_POLICY; {_CHECK}" if policy is None else _CHECK
        done = _run(kernel.sysfs_root, groups[1:3], command, QAT_POLICY=policy or "")
    said = _said(done)
    assert sentence in said, said
    assert _NO_INSTANCE in said, said
    assert len(re.findall(r"VFIO_GROUP_GET_STATUS ioctl failed", said)) == tried, said
    assert set(re.findall(r"/dev/vfio/(\S+)", said)) <= set(groups[1:3]), said


def test_qatlib_knows_the_vfs_that_the_page_says() -> None:
    page = (DEPLOYMENTS / "examples/README.md").read_text()
    found = re.search(r"knows VFs of the ids ([0-9a-f]{4}(?:, [0-9a-f]{4})*)", page)
    assert found is not None
    known = {f"0x{each}" for each in found[1].replace(",", " ").split()}
    vfs = tuple(
        LoneVf(address=f"0000:{number:02x}:00.0", device=f"{device:04x}", driver="vfio-pci")
        for number, device in enumerate(sorted(VIRTUAL), start=1)
    )
    with _node(Node(vfs=vfs)) as kernel:
        groups = _groups(kernel)
        assert len(groups) == len(VIRTUAL)
        assert known < set(groups.values())
        these = [group for group, device in groups.items() if device in known]
        others = [group for group, device in groups.items() if device not in known]
        count = f"Policy 200 is incompatible with the number of available devices {len(known)}\n"
        assert count in _said(_run(kernel.sysfs_root, these, _CHECK, QAT_POLICY="200"))
        # Of the others not even the first is looked at more closely than by its id.
        assert "available devices" not in _said(_run(kernel.sysfs_root, others, _CHECK, QAT_POLICY="200"))
        assert count in _said(_run(kernel.sysfs_root, [*these, *others], _CHECK, QAT_POLICY="200"))
