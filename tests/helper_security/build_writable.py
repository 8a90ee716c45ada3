"""A helper for tests: once it has bound a PF's first VF, a process next to it tries to open all of sysfs for writing.

build_writable.py OPTION...      a line "writable: [...]" on standard error: the paths that could be opened
"""

import json
import os
import sys
from collections.abc import Iterator

from qat_helper import dispatch, main
from qat_helper.operations.node import Node, Outcome
from qat_shared.messages import AnyRequest, BindDriver

ROOT = "/sys"


def files(root: str) -> Iterator[str]:
    """All files beneath a directory, links left out; not the kernel's traces, which are tens of thousands."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name != "tracing"]
        yield from (f"{folder}/{name}" for name in names if not os.path.islink(f"{folder}/{name}"))


def can_be_written(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def performs(node: Node, request: AnyRequest) -> Outcome:
    outcome = perform(node, request)
    # In a process of its own: it takes longer than an operation may.
    if isinstance(request, BindDriver) and request.address.function == 1 and os.fork() == 0:
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        now = {*before, *files(f"{ROOT}/devices"), *files(f"{ROOT}/bus/pci")}
        os.write(2, f"writable: {json.dumps(sorted(filter(can_be_written, now)))}\n".encode())
        os._exit(0)
    return outcome


if __name__ == "__main__":
    # The sandbox refuses to list most directories, so these names are read before it applies.
    before = list(files(ROOT))
    perform = dispatch.perform
    dispatch.perform = performs
    sys.exit(main.main())
