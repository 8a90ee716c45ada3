"""In the guest: plug in the devices of a description (a JSON file; see qat_simulation.node), or unplug all without one.

devices.py [FILE]
"""

import contextlib
import sys
from pathlib import Path

from kernel.real_kernel import RealKernel
from qat_simulation.node.description import Node, parse_node


def main() -> None:
    with contextlib.suppress(FileNotFoundError):
        Path("/sys/module/fake_qat").stat()
        RealKernel(Node()).unload()
    if sys.argv[1:]:
        RealKernel(parse_node(Path(sys.argv[1]).read_bytes())).load()


if __name__ == "__main__":
    main()
