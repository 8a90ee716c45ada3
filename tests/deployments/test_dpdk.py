"""DPDK's image, and the examples' own command lines in it, on software drivers: nothing here has a QAT engine."""

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from deployments import containers, images, measured, rendered
from deployments.containers import Container
from deployments.rendered import BUILT
from deployments.software_driver import software_driver

pytestmark = [
    pytest.mark.usefixtures("kustomize"),
    pytest.mark.skipif(bool(images.why_not()), reason=images.why_not()),
    pytest.mark.skipif(bool(containers.why_not()), reason=containers.why_not()),
]

_EXAMPLES: Final = {"crypto": ("examples/dpdk/crypto-perf", "cy"), "compress": ("examples/dpdk/compress-perf", "dc")}


def _run(
    kind: str, *, software: bool, given: dict[str, str], name: str | None = None
) -> "subprocess.CompletedProcess[str]":
    (pod,) = rendered.render(name or _EXAMPLES[kind][0])
    spec: dict[str, Any] = rendered.container(pod["spec"], "main")
    if software:
        values = software_driver(kind)
        assert {each["name"] for each in spec["env"]} == set(values)
        spec["env"] = [{"name": key, "value": value} for key, value in values.items()]
        # Memory that would be hugepages is the container's own.
        spec["resources"]["limits"]["memory"] = "1Gi"
    with containers.pod_directory(str(BUILT)) as directory, containers.sandbox() as shared:
        environment = [f"{key}={value}" for key, value in given.items()]
        image = images.image("dpdk")
        container = Container(
            directory, image, pod["spec"], spec, shared, {}, Path("/sys"), extra_environment=environment
        )
        return container.run_to_its_end()


def test_the_image_has_the_programs_and_the_drivers() -> None:
    image = images.image("dpdk")
    names = {path.name for path in image.files()}
    assert {"dpdk-test-crypto-perf", "dpdk-test-compress-perf"} <= names
    for driver in ("common_qat", "crypto_openssl", "compress_zlib"):
        assert any(name.startswith(f"librte_{driver}.so") for name in names)
    sizes = f"{image.compressed / 1e6:.1f} MB compressed, {image.size / 1e6:.1f} MB"
    measured.note(f"{image.name}: {sizes}, built in {image.took:.0f} s")


@pytest.mark.parametrize("kind", _EXAMPLES)
def test_its_command_runs_on_the_software_driver(kind: str) -> None:
    done = _run(kind, software=True, given={})
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s*\d+\s+\d+", line)]
    assert rows, said
    measured.note(f"dpdk {kind}: {' '.join(rows[-1])}")


@pytest.mark.parametrize("name", ["examples/dpdk/crypto-perf", "examples/dpdk/crypto-perf-generic"])
def test_the_plugins_variables_become_the_allow_list(name: str) -> None:
    """With hardware's own options it gets as far as the hugepages, which are not to be had here."""
    done = _run("crypto", software=False, given={"QAT0": "0000:6b:00.1", "QAT1": "0001:3d:01.2"}, name=name)
    assert done.returncode != 0
    assert "hugepage" in done.stdout + done.stderr, done.stdout + done.stderr
    (pod,) = rendered.render(name)
    line = rendered.container(pod["spec"], "main")["command"][-1]
    shown = subprocess.run(
        ["sh", "-c", line.replace("exec ", "echo ", 1)],
        env={
            "QAT0": "0000:6b:00.1",
            "QAT1": "0001:3d:01.2",
            "EAL_OPTIONS": "--in-memory --no-telemetry",
            "DEVICE_TYPE": "crypto_qat",
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.startswith("dpdk-test-crypto-perf -a 0000:6b:00.1 -a 0001:3d:01.2 --in-memory --no-telemetry -- ")
