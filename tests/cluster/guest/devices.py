"""In the guest: put in the devices of a description (simulation/node.py; a file of JSON), or, without one, all out.

devices.py [FILE]
"""

import contextlib
import sys
from pathlib import Path

from kernel.real_kernel import RealKernel
from qat_server.simulation.node import Node, parse_node


def main() -> None:
    with contextlib.suppress(FileNotFoundError):
        Path("/sys/module/fake_qat").stat()
        RealKernel(Node()).unload()
    if sys.argv[1:]:
        RealKernel(parse_node(Path(sys.argv[1]).read_bytes())).load()


if __name__ == "__main__":
    main()
