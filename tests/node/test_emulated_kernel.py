"""The emulated kernel and real processes: it answers their write(2) calls, late or never where the real one does."""

import errno
import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qat_simulation.kernel.kernel import Kernel
from qat_simulation.node.description import Node, Pf
from support.conditions import wait_until
from support.emulated_kernel import PF, VF, VF2, attribute, emulated, read

NODE = Node(pfs=(Pf(address=PF, total_vfs=4, vf_driver="vfio-pci"), Pf(address="0001:6b:00.0", total_vfs=4)))

PRELUDE = """
import errno, json, os, signal, sys, threading
root = sys.argv[1]
def write(path, data):
    try:
        descriptor = os.open(f"{root}/{path}", os.O_WRONLY)
    except OSError as error:  # another user gets the error here that root gets from the write
        return errno.errorcode[error.errno]
    try:
        return os.write(descriptor, data.encode())
    except OSError as error:
        return errno.errorcode[error.errno]
    finally:
        os.close(descriptor)
def report(*words):
    print(json.dumps(words), flush=True)
"""


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with emulated(NODE) as made:
        yield made


def start(kernel: Kernel, program: str) -> "subprocess.Popen[str]":
    """Run a Python program under the kernel; it has `write` and `report` (prints a JSON list)."""
    code = PRELUDE + textwrap.dedent(program)
    argv = [sys.executable, "-I", "-S", "-c", code, str(kernel.sysfs_root)]
    return kernel.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def printed(process: "subprocess.Popen[str]") -> list[object]:
    """The next list that the program prints."""
    assert process.stdout is not None
    values = json.loads(process.stdout.readline())
    assert isinstance(values, list)
    return values


def finish(process: "subprocess.Popen[str]") -> None:
    """Wait for the program to end with status 0."""
    with process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(120) == 0


def test_writes_are_answered_as_by_the_kernel(kernel: Kernel) -> None:
    vf = "0001:6b:00.1"
    process = start(
        kernel,
        f"""
        report(write("{attribute(vf, "driver_override")}", "vfio-pci"),
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
    assert printed(process) == [
        *(8, 12, 13, "../../../bus/pci/drivers/vfio-pci"),
        *("ENODEV", "ERANGE", "EBUSY", "EACCES", 0, 4096),
    ]
    finish(process)
    assert kernel.driver(vf) == "vfio-pci"


def test_file_emptied_by_opening_it_is_restored(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        path = f"{{root}}/{attribute(VF, "driver_override")}"
        os.write(os.open(path, os.O_WRONLY | os.O_TRUNC), b"vfio-pci")
        one = open(path).read()
        descriptor = os.open(path, os.O_WRONLY)
        os.write(descriptor, b"a"), os.write(descriptor, b"bc")   # the file was replaced before the second write
        report(one, open(path).read())
        """,
    )
    assert printed(process) == ["vfio-pci\n", "bc\n"]
    finish(process)


def test_other_writes_are_not_changed(kernel: Kernel, tmp_path: Path) -> None:
    process = start(
        kernel,
        f"""
        descriptor = os.open("{tmp_path}/file", os.O_WRONLY | os.O_CREAT)
        read_end, write_end = os.pipe()
        report(os.write(descriptor, b"x" * 100_000), os.write(write_end, b"abc"), os.read(read_end, 9).decode())
        try:
            os.write(99, b"")
        except OSError as error:
            report(errno.errorcode[error.errno])
        """,
    )
    assert printed(process) == [100_000, 3, "abc"]
    assert printed(process) == ["EBADF"]
    finish(process)
    assert (tmp_path / "file").stat().st_size == 100_000


def test_children_and_threads_are_supervised_too(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        import subprocess
        path = "{attribute(VF, "driver_override")}"
        thread = threading.Thread(target=lambda: report(write(path, "one")))
        thread.start(), thread.join()
        if os.fork() == 0:
            report(write(path, "three"))
            os._exit(0)
        os.wait()
        report(subprocess.run(["/bin/sh", "-c", f"printf shell > {{root}}/{{path}}"]).returncode)
        """,
    )
    assert [printed(process) for _ in range(3)] == [[3], [5], [0]]
    finish(process)
    assert read(kernel, attribute(VF, "driver_override")) == "shell\n"


def test_bad_pointer_gives_efault_and_no_write(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        descriptor = os.open(f"{{root}}/{attribute(VF, "driver_override")}", os.O_WRONLY)
        for address in (1, 2**64 - 8):
            result = libc.write(descriptor, ctypes.c_void_p(address), ctypes.c_size_t(4))
            report(result, errno.errorcode[ctypes.get_errno()])
        """,
    )
    assert [printed(process) for _ in range(2)] == [[-1, "EFAULT"]] * 2
    finish(process)


BLOCKED = f"""
        def writer():
            report("blocked", write("bus/pci/drivers/vfio-pci/unbind", "{VF}"))
        thread = threading.Thread(target=writer)
        thread.start()
        sys.stdin.readline()
        report("other", write("bus/pci/drivers/vfio-pci/unbind", "{VF2}"))
        thread.join()
"""


def test_blocked_write_waits_for_the_close_and_blocks_no_other(kernel: Kernel) -> None:
    handle = kernel.open_vfio(VF)
    process = start(kernel, BLOCKED)
    wait_until(lambda: kernel.driver(VF) is None)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert printed(process) == ["other", 12]
    assert read(kernel, attribute(VF, "enable")) == "1\n"
    handle.close()
    assert printed(process) == ["blocked", 12]
    finish(process)


def test_killing_a_waiting_writer_does_no_harm(kernel: Kernel) -> None:
    handle = kernel.open_vfio(VF)
    with start(kernel, BLOCKED) as process:
        wait_until(lambda: kernel.driver(VF) is None)
        process.kill()
        assert process.wait(120) == -signal.SIGKILL
    handle.close()  # the kernel finishes the operation
    wait_until(lambda: read(kernel, attribute(VF, "enable")) == "0\n" and kernel._programs.idle)
    kernel.probe(VF)
    assert kernel.driver(VF) == "vfio-pci"


def test_signal_does_not_repeat_a_waiting_write(kernel: Kernel) -> None:
    handle = kernel.open_vfio(VF)
    process = start(
        kernel,
        f"""
        signal.signal(signal.SIGUSR1, lambda *_: None)
        report("ready")
        report(write("bus/pci/drivers/vfio-pci/unbind", "{VF}"))
        """,
    )
    assert printed(process) == ["ready"]
    wait_until(lambda: kernel.driver(VF) is None)
    process.send_signal(signal.SIGUSR1)
    handle.close()
    assert printed(process) == [12]
    finish(process)


def test_faults_reach_the_writer(kernel: Kernel) -> None:
    kernel.fail_next(VF, "driver_override", errno.ENOMEM)
    kernel.hang("drivers_probe")
    process = start(
        kernel,
        f"""
        report(write("{attribute(VF, "driver_override")}", "x"), write("{attribute(VF, "driver_override")}", "x"))
        report(write("bus/pci/drivers_probe", "{VF}"))
        """,
    )
    assert printed(process) == ["ENOMEM", 1]
    kernel.release("drivers_probe")
    assert printed(process) == [12]
    finish(process)


def test_device_removed_while_its_file_is_open(kernel: Kernel) -> None:
    process = start(
        kernel,
        f"""
        descriptor = os.open(f"{{root}}/{attribute(VF, "driver_override")}", os.O_WRONLY)
        report("open")
        sys.stdin.readline()
        try:
            os.write(descriptor, b"x")
        except OSError as error:
            report(errno.errorcode[error.errno])
        """,
    )
    assert printed(process) == ["open"]
    kernel.set_numvfs(PF, 0)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert printed(process) == ["ENODEV"]
    finish(process)


def test_close_kills_running_programs() -> None:
    with emulated(NODE) as kernel:
        kernel.open_vfio(VF)
        process = start(kernel, BLOCKED)
        wait_until(lambda: kernel.driver(VF) is None)
    with process:
        assert process.returncode == -signal.SIGKILL


def test_two_kernels_are_independent(kernel: Kernel) -> None:
    with emulated(NODE) as other:
        process = start(other, f"""report(write("{attribute(VF, "driver_override")}", "x"))""")
        assert printed(process) == [1]
        finish(process)
        assert read(other, attribute(VF, "driver_override")) == "x\n"
        assert read(kernel, attribute(VF, "driver_override")) == "vfio-pci\n"


def test_a_thousand_vfs_take_seconds() -> None:
    pfs = tuple(Pf(address=f"{number // 32:04x}:{number % 32 * 8:02x}:00.0") for number in range(64))
    began = time.process_time()  # CPU time: other processes do not count
    with emulated(Node(pfs=pfs)) as kernel:
        took = time.process_time() - began
        assert len(kernel.snapshot()) == 64 + 1024
        assert took < 30  # about 1 s on an idle machine with tmpfs
