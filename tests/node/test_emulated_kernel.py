"""The emulated kernel and real processes: their write(2) calls are answered by it, late or never where it must be."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emulated import PF, VF, VF2, attribute, emulated, read, wait_until
from qat_server.simulation.interception import InterceptionError
from qat_server.simulation.kernel import Kernel
from qat_server.simulation.node import Node, Pf

NODE = Node(pfs=(Pf(address=PF, total_vfs=4, vf_driver="vfio-pci"), Pf(address="0001:6b:00.0", total_vfs=4)))

PRELUDE = """
import errno, json, os, signal, sys, threading
root = sys.argv[1]
def write(path, data):
    try:
        descriptor = os.open(f"{root}/{path}", os.O_WRONLY)
    except OSError as error:  # who is not root gets there what root gets from the write
        return errno.errorcode[error.errno]
    try:
        return os.write(descriptor, data.encode())
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        os.close(descriptor)
def say(*words):
    print(json.dumps(words), flush=True)
"""


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(NODE) as made:
        yield made


def start(kernel: Kernel, program: str) -> "subprocess.Popen[str]":
    """Run a Python program under the kernel; it has `write` and `say` (a JSON list to its output)."""
    code = PRELUDE + textwrap.dedent(program)
    argv = [sys.executable, "-I", "-S", "-c", code, str(kernel.sysfs_root)]
    return kernel.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(process: "subprocess.Popen[str]") -> list[object]:
    """The next thing that the program says."""
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    assert isinstance(said, list)
    return said


def finish(process: "subprocess.Popen[str]") -> None:
    """It ends well by itself."""
    with process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(120) == 0


def test_writes_are_answered_as_the_kernel_does(kernel: Kernel) -> None:
    vf = "0001:6b:00.1"
    process = start(
        kernel,
        f"""
        say(write("{attribute(vf, "driver_override")}", "vfio-pci"),
            write("{attribute(vf, "driver/unbind")}", "{vf}"),
            write("bus/pci/drivers_probe", "{vf}\\n"),
            os.readlink(f"{{root}}/{attribute(vf, "driver")}"),
            write("bus/pci/drivers/4xxxvf/unbind", "{vf}"),
            write("{attribute(PF, "sriov_numvfs")}", "99"),
            write("{attribute(PF, "sriov_numvfs")}", "3"),
            write("{attribute(vf, "vendor")}", "x"),
            write("{attribute(vf, "driver_override")}", ""),
            write("bus/pci/drivers_autoprobe", "1" * 5000))
        """,
    )
    assert heard(process) == [
        *(8, 12, 13, "../../../bus/pci/drivers/vfio-pci"),
        *("ENODEV", "ERANGE", "EBUSY", "EACCES", 0, 4096),
    ]
    finish(process)
    assert kernel.driver(vf) == "vfio-pci"


def test_file_emptied_by_opening_it_is_whole_again(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        path = f"{{root}}/{attribute(VF, "driver_override")}"
        os.write(os.open(path, os.O_WRONLY | os.O_TRUNC), b"vfio-pci")
        one = open(path).read()
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, b"a"), os.write(descriptor, b"bc")   # the second time the file is another one
        say(one, open(path).read())
        """,
    )
    assert heard(process) == ["vfio-pci\n", "bc\n"]
    finish(process)


def test_other_writes_go_on_as_they_are(kernel: Kernel, tmp_path: Path) -> None:
    process = start(
        kernel,
        f"""
        descriptor = os.open("{tmp_path}/file", os.O_WRONLY | os.O_CREAT)
        read_end, write_end = os.pipe()
        say(os.write(descriptor, b"x" * 100_000), os.write(write_end, b"abc"), os.read(read_end, 9).decode())
        try:
            os.write(99, b"")
        except OSError as error:
            say(errno.errorcode[error.errno])
        """,
    )
    assert heard(process) == [100_000, 3, "abc"]
    assert heard(process) == ["EBADF"]
    finish(process)
    assert (tmp_path / "file").stat().st_size == 100_000


def test_children_and_threads_are_supervised_too(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        import subprocess
        path = "{attribute(VF, "driver_override")}"
        thread = threading.Thread(target=lambda: say(write(path, "one")))
        thread.start(), thread.join()
        if os.fork() == 0:
            say(write(path, "three"))
            os._exit(0)
        os.wait()
        say(subprocess.run(["/bin/sh", "-c", f"printf shell > {{root}}/{{path}}"]).returncode)
        """,
    )
    assert [heard(process) for _ in range(3)] == [[3], [5], [0]]
    finish(process)
    assert read(kernel, attribute(VF, "driver_override")) == "shell\n"


def test_bad_pointer_is_a_fault_and_no_write(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"{{root}}/{attribute(VF, "driver_override")}", os.O_WRONLY)
        for address in (1, 2**64 - 8):
            result = libc.write(descriptor, ctypes.c_void_p(address), ctypes.c_size_t(4))
            say(result, errno.errorcode[ctypes.get_errno()])
        """,
    )
    assert [heard(process) for _ in range(2)] == [[-1, "EFAULT"]] * 2
    finish(process)


BLOCKED = f"""
        def writer():
            say("blocked", write("bus/pci/drivers/vfio-pci/unbind", "{VF}"))
        thread = threading.Thread(target=writer)
        thread.start()
        sys.stdin.readline()
        say("other", write("bus/pci/drivers/vfio-pci/unbind", "{VF2}"))
        thread.join()
"""


def test_blocked_write_waits_for_the_close_and_others_do_not(kernel: Kernel) -> None:
    handle = kernel.open_vfio(VF)
    process = start(kernel, BLOCKED)
    wait_until(lambda: kernel.driver(VF) is None)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert heard(process) == ["other", 12]
    assert read(kernel, attribute(VF, "enable")) == "1\n"
    handle.close()
    assert heard(process) == ["blocked", 12]
    finish(process)


def test_writer_killed_while_it_waits_does_no_harm(kernel: Kernel) -> None:
    handle = kernel.open_vfio(VF)
    with start(kernel, BLOCKED) as process:
        wait_until(lambda: kernel.driver(VF) is None)
        process.kill()
        assert process.wait(120) == -signal.SIGKILL
    handle.close()  # the kernel's part of the work goes on to its end
    wait_until(lambda: read(kernel, attribute(VF, "enable")) == "0\n" and not kernel.writing())
    kernel.probe(VF)
    assert kernel.driver(VF) == "vfio-pci"


def test_signal_does_not_make_a_waiting_write_happen_twice(kernel: Kernel) -> None:
    handle = kernel.open_vfio(VF)
    process = start(
        kernel,
        f"""
        signal.signal(signal.SIGUSR1, lambda *_: None)
        say("ready")
        say(write("bus/pci/drivers/vfio-pci/unbind", "{VF}"))
        """,
    )
    assert heard(process) == ["ready"]
    wait_until(lambda: kernel.driver(VF) is None)
    process.send_signal(signal.SIGUSR1)
    handle.close()
    assert heard(process) == [12]
    finish(process)


def test_faults_reach_the_writer(kernel: Kernel) -> None:
    kernel.fail_next(VF, "driver_override", errno.ENOMEM)
    kernel.hang("drivers_probe")
    process = start(
        kernel,
        f"""
        say(write("{attribute(VF, "driver_override")}", "x"), write("{attribute(VF, "driver_override")}", "x"))
        say(write("bus/pci/drivers_probe", "{VF}"))
        """,
    )
    assert heard(process) == ["ENOMEM", 1]
    kernel.release("drivers_probe")
    assert heard(process) == [12]
    finish(process)


def test_device_that_went_while_its_file_was_open(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        descriptor = os.open(f"{{root}}/{attribute(VF, "driver_override")}", os.O_WRONLY)
        say("open")
        sys.stdin.readline()
        try:
            os.write(descriptor, b"x")
        except OSError as error:
            say(errno.errorcode[error.errno])
        """,
    )
    assert heard(process) == ["open"]
    kernel.set_numvfs(PF, 0)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert heard(process) == ["ENODEV"]
    finish(process)


# Starting and ending


def test_program_that_is_not_there(kernel: Kernel) -> None:
    with pytest.raises(FileNotFoundError, match="/no/such/program"):
        kernel.spawn(["/no/such/program"])


def test_exit_status_environment_and_folder_are_the_program_s(kernel: Kernel, tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(os.environ['WORD'] == 'yes' and os.getcwd() == sys.argv[1] and 7)"
    argv = [sys.executable, "-c", code, os.path.realpath(tmp_path)]
    with kernel.spawn(argv, env={**os.environ, "WORD": "yes"}, cwd=tmp_path) as process:
        assert process.wait(120) == 7


def test_descriptors_are_passed_and_no_others(kernel: Kernel) -> None:
    read_end, write_end = os.pipe()
    code = "import os, sys; os.write(int(sys.argv[1]), ' '.join(os.listdir('/proc/self/fd')).encode())"
    with kernel.spawn([sys.executable, "-I", "-S", "-c", code, str(write_end)], pass_fds=[write_end]) as process:
        assert process.wait(120) == 0
    seen = set(os.read(read_end, 999).decode().split())
    os.close(read_end)
    os.close(write_end)
    assert len(seen - {"0", "1", "2", str(write_end)}) == 1  # the listing itself


def test_nothing_is_left_of_programs_that_ended(kernel: Kernel) -> None:
    def round_trip() -> None:
        with kernel.spawn(["/bin/true"]) as process:
            assert process.wait(120) == 0
        wait_until(lambda: all(supervisor.ended for _, supervisor in kernel._processes))

    round_trip()
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        round_trip()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


def test_close_kills_what_runs() -> None:
    with emulated(NODE) as kernel:
        kernel.open_vfio(VF)
        process = start(kernel, BLOCKED)
        wait_until(lambda: kernel.driver(VF) is None)
    with process:
        assert process.returncode == -signal.SIGKILL


def test_two_kernels_do_not_meet(kernel: Kernel) -> None:
    with emulated(NODE) as other:
        process = start(other, f"""say(write("{attribute(VF, "driver_override")}", "x"))""")
        assert heard(process) == [1]
        finish(process)
        assert read(other, attribute(VF, "driver_override")) == "x\n"
        assert read(kernel, attribute(VF, "driver_override")) == "vfio-pci\n"


def test_where_writes_cannot_be_intercepted_one_sentence_says_what_is_needed(kernel: Kernel) -> None:
    code = """
        import sys
        from pathlib import Path
        from qat_server.simulation.interception import InterceptionError, spawn
        try:
            spawn(["/bin/true"], [Path("/nowhere")], lambda path, data: 0)
        except InterceptionError as error:
            print(error)
    """
    # A process has one listener at most, so a supervised one cannot supervise: as on a system that cannot at all.
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    with kernel.spawn(argv, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=60)
    assert said.startswith(
        "the simulated node cannot intercept writes on this system (Device or resource busy): needed"
    )
    assert "Linux 5.5 or newer with seccomp user notification" in said


def test_unknown_machine_is_refused(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_server.simulation.launch.MACHINES", {})
    with pytest.raises(InterceptionError, match="not known for"):
        kernel.spawn(["/bin/true"])


# Uevents


def listen(kernel: Kernel) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(120)
    sock.connect(str(kernel.uevents_path))
    wait_until(lambda: kernel._uevents._clients)
    return sock


def steps(sock: socket.socket, count: int) -> list[str]:
    """The heads of the next uevents, without the folders before the name."""
    heads = [sock.recv(9999).partition(b"\0")[0].decode() for _ in range(count)]
    return [f"{head.partition('@')[0]} {head.rpartition('/')[2]}" for head in heads]


def test_uevents_of_a_rebinding(kernel: Kernel) -> None:
    vf = "0001:6b:00.1"
    with listen(kernel) as sock:
        kernel.set_driver_override(vf, "vfio-pci")
        kernel.unbind(vf)
        kernel.probe(vf)
        packets = [sock.recv(9999) for _ in range(3)]
    group = os.readlink(kernel.sysfs_root / attribute(vf, "iommu_group")).rpartition("/")[2]
    path = f"/devices/pci0001:6b/{vf}"
    ids = "PCI_CLASS=B4000\0PCI_ID=8086:4941\0PCI_SUBSYS_ID=8086:0000\0"
    ids += f"PCI_SLOT_NAME={vf}\0MODALIAS=pci:v00008086d00004941sv00008086sd00000000bc0Bsc40i00\0"
    sequence = int(packets[0].rpartition(b"SEQNUM=")[2].rstrip(b"\0"))
    assert [packet.decode() for packet in packets] == [
        f"unbind@{path}\0ACTION=unbind\0DEVPATH={path}\0SUBSYSTEM=pci\0{ids}SEQNUM={sequence}\0",
        f"add@/devices/virtual/vfio/{group}\0ACTION=add\0DEVPATH=/devices/virtual/vfio/{group}\0SUBSYSTEM=vfio\0"
        f"DEVNAME=vfio/{group}\0SEQNUM={sequence + 1}\0",
        f"bind@{path}\0ACTION=bind\0DEVPATH={path}\0SUBSYSTEM=pci\0DRIVER=vfio-pci\0{ids}SEQNUM={sequence + 2}\0",
    ]


def test_uevents_of_vfs_that_come_and_go() -> None:
    with emulated(Node(pfs=(Pf(address=PF, total_vfs=2, num_vfs=0),))) as kernel, listen(kernel) as sock:
        kernel.set_numvfs(PF, 2)
        one = [f"{action} {VF}" for action in ("add", "change", "bind")]
        two = [f"{action} {VF2}" for action in ("add", "change", "bind")]
        assert steps(sock, 7) == [*one, *two, f"change {PF}"]
        kernel.set_numvfs(PF, 0)
        assert steps(sock, 4) == [f"unbind {VF}", f"remove {VF}", f"unbind {VF2}", f"remove {VF2}"]


def test_uevents_of_a_driver(kernel: Kernel) -> None:
    with listen(kernel) as sock:
        kernel.remove_driver("igb_uio")
        assert steps(sock, 2) == ["remove igb_uio", "remove igb_uio"]
        kernel.add_driver("igb_uio")
        assert steps(sock, 2) == ["add igb_uio", "add igb_uio"]


# Scale, and without root


def test_a_thousand_vfs_cost_seconds() -> None:
    pfs = tuple(Pf(address=f"{number // 32:04x}:{number % 32 * 8:02x}:00.0") for number in range(64))
    began = time.process_time()  # not the time that others had
    with emulated(Node(pfs=pfs)) as kernel:
        took = time.process_time() - began
        assert len(kernel.snapshot()) == 64 + 1024
        assert took < 30  # about 1 s on an idle machine with tmpfs


UNPRIVILEGED = f"""
import os, subprocess, sys, tempfile
from pathlib import Path
from qat_server.simulation.kernel import Kernel
from qat_server.simulation.node import demo_node
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


@pytest.mark.skipif(os.getuid() != 0, reason="not root: all other tests of this file have shown it already")
def test_no_root_is_needed() -> None:
    here = Path(__file__).parents[2]
    site = (
        Path(sys.executable).parents[1] / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    )
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONPATH"] = ":".join(str(folder) for folder in (here / "server", here / "shared", site))
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            probe = [python, "-c", "import msgspec, qat_server.simulation.kernel"]
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
