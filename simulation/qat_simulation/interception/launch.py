"""The launcher: installs a filter that sends every write(2) of this process to a supervisor, then runs the program.

supervisor.py runs it as `python -I -S launch.py SOCKET_FD -- PROGRAM ARGUMENT...`. All children inherit the filter.
It sends the filter's listener through the socket (SCM_RIGHTS), or "seccomp ERRNO" if this kernel does not support it;
then "exec ERRNO" if the program cannot be started. The end of the stream means that the program has started.
It imports little, and only from the standard library, because each start waits for it.
"""

import ctypes
import os
import signal
import socket
import struct
import sys
from array import array
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_SET_MODE_FILTER: Final = 1
FLAG_NEW_LISTENER: Final = 1 << 3
FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5
RET_USER_NOTIF: Final = 0x7FC00000
RET_ALLOW: Final = 0x7FFF0000

# machine: AUDIT_ARCH, number of seccomp(2), number of write(2)
MACHINES: Final = {"x86_64": (0xC000003E, 317, 1), "aarch64": (0xC00000B7, 277, 64)}


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def filter_program(arch: int, write: int) -> bytes:
    """Classic BPF on struct seccomp_data (number at 0, architecture at 4): notify on write, allow all else."""
    load_word, jump_equal, return_constant = 0x20, 0x15, 0x06
    instructions = (
        (load_word, 0, 0, 4),
        (jump_equal, 0, 3, arch),  # on another architecture, the numbers are of other calls
        (load_word, 0, 0, 0),
        (jump_equal, 0, 1, write),
        (return_constant, 0, 0, RET_USER_NOTIF),
        (return_constant, 0, 0, RET_ALLOW),
    )
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def install() -> int:
    """Install the filter on this process and return the listener's descriptor. Raises OSError."""
    arch, seccomp, write = MACHINES[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    code = filter_program(arch, write)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    # Without its supervisor, this process would block for ever in its next write.
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    # Without the second flag (Linux 5.19) a signal restarts a waiting write, which then notifies twice.
    for flags in (FLAG_NEW_LISTENER | FLAG_WAIT_KILLABLE_RECV, FLAG_NEW_LISTENER):
        listener = int(libc.syscall(seccomp, SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(program)))
        if listener >= 0:
            return listener
    raise OSError(ctypes.get_errno(), "seccomp")


def main(arguments: list[str]) -> int:
    """Install the filter, send its listener, run the program in this process."""
    sock = socket.socket(fileno=int(arguments[0]))
    sock.set_inheritable(False)
    command = arguments[2:]
    try:
        listener = install()
    except (OSError, KeyError) as error:
        sock.send(b"seccomp %d" % (getattr(error, "errno", None) or 0))
        return 1
    # Not a write(2): from here on, write(2) waits for the supervisor.
    sock.sendmsg([b"listener"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [listener]))])
    os.close(listener)
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sock.send(b"exec %d" % (error.errno or 0))
    return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
