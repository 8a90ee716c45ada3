"""Programs on the emulated kernel: how they start and end, that they leave nothing behind, and need no root."""

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_simulation.interception.supervisor import InterceptionError
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node, Pf
from support.conditions import wait_until
from support.emulated_kernel import PF, VF, attribute, emulated

NODE = Node(pfs=(Pf(address=PF, total_vfs=4, vf_driver="vfio-pci"), Pf(address="0001:6b:00.0", total_vfs=4)))


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(NODE) as made:
        yield made


def test_program_that_does_not_exist(kernel: Kernel) -> None:
    with pytest.raises(FileNotFoundError, match="/no/such/program"):
        kernel.spawn(["/no/such/program"])


def test_program_has_its_exit_status_environment_and_directory(kernel: Kernel, tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(os.environ['WORD'] == 'yes' and os.getcwd() == sys.argv[1] and 7)"
    argv = [sys.executable, "-c", code, os.path.realpath(tmp_path)]
    with kernel.spawn(argv, env={**os.environ, "WORD": "yes"}, cwd=tmp_path) as process:
        assert process.wait(120) == 7


def test_only_given_descriptors_are_passed(kernel: Kernel) -> None:
    read_end, write_end = os.pipe()
    code = "import os, sys; os.write(int(sys.argv[1]), ' '.join(os.listdir('/proc/self/fd')).encode())"
    with kernel.spawn([sys.executable, "-I", "-S", "-c", code, str(write_end)], pass_fds=[write_end]) as process:
        assert process.wait(120) == 0
    seen = set(os.read(read_end, 999).decode().split())
    os.close(read_end)
    os.close(write_end)
    assert len(seen - {"0", "1", "2", str(write_end)}) == 1  # the listing itself


def test_programs_that_ended_leave_nothing_behind(kernel: Kernel) -> None:
    def round_trip() -> None:
        with kernel.spawn(["/bin/true"]) as process:
            assert process.wait(120) == 0
        wait_until(lambda: kernel._programs.ended)

    round_trip()
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        round_trip()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_one_sentence_names_the_requirements_of_interception(kernel: Kernel) -> None:
    code = """
        import sys
        from pathlib import Path
        from qat_simulation.interception.supervisor import InterceptionError, spawn
        try:
            spawn(["/bin/true"], [Path("/nowhere")], lambda path, data: 0)
        except InterceptionError as error:
            print(error)
    """
    # A process has at most one listener, so a supervised process fails like any process on an unsupported system.
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    with kernel.spawn(argv, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=60)
    assert output.startswith(
        "the simulated node cannot intercept writes on this system (Device or resource busy): it needs"
    )
    assert "Linux 5.5 or newer with seccomp user notification" in output


def test_unknown_machine_is_rejected(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_simulation.interception.launch.MACHINES", {})
    with pytest.raises(InterceptionError, match="cannot intercept writes on "):
        kernel.spawn(["/bin/true"])


UNPRIVILEGED = f"""
import os, subprocess, sys, tempfile
from pathlib import Path
from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import demo_node
folder = tempfile.TemporaryDirectory(prefix="qat-", dir="/tmp")
with folder as directory, Kernel(Path(directory), demo_node()) as kernel:
    code = '''
import os, sys
def write(path, data):
    os.write(os.open(sys.argv[1] + "/" + path, os.O_WRONLY), data)
write("{attribute(VF, "driver_override")}", b"vfio-pci")
write("{attribute(VF, "driver/unbind")}", b"{VF}")
write("bus/pci/drivers_probe", b"{VF}")
'''
    with kernel.spawn([sys.executable, "-c", code, str(kernel.sysfs_root)]) as process:
        assert process.wait(120) == 0
    assert kernel.driver("{VF}") == "vfio-pci"
    print(os.getuid(), kernel.driver("{VF}"))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="not root: the other tests of this file show it")
def test_no_root_is_needed() -> None:
    here = Path(__file__).parents[2]
    site = (
        Path(sys.executable).parents[1] / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    )
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONPATH"] = ":".join(
        str(folder) for folder in (here / "server", here / "shared", here / "simulation", site)
    )
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            probe = [python, "-c", "import msgspec, qat_simulation.kernel.kernel"]
            subprocess.run(
                probe, env=env, user=65534, group=65534, extra_groups=(), check=True, capture_output=True, cwd="/"
            )
            break
        except (OSError, subprocess.CalledProcessError):
            continue
    else:
        pytest.skip("no Python that an ordinary user may run can import this checkout")
    done = subprocess.run(
        [python, "-c", UNPRIVILEGED],
        env=env,
        user=65534,
        group=65534,
        extra_groups=(),
        capture_output=True,
        text=True,
        cwd="/",
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("65534 vfio-pci\n", 0), done.stderr
