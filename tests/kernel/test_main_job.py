"""The main job on the real kernel: start to allocatable, a client in a container, in use, registration, the boundary."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.real_node import RealNode, group_of, real_node
from kubelet.nodes import CY
from qat_server.simulation.node import Node, Pf

TWO_PFS = Node(
    pfs=tuple(
        Pf(address=f"0000:{bus}:00.0", services="sym;asym", numa_node=numa) for numa, bus in enumerate(("6b", "e8"))
    )
)
SMALL = Node(pfs=(Pf(address="0000:6b:00.0", services="sym;asym", total_vfs=4, numa_node=0),))


async def test_32_vfs_are_bound_and_allocatable(record_property: Callable[[str, object], None]) -> None:
    async with real_node(TWO_PFS) as node:
        seconds = await node.start({CY: 32})
        status = await node.until_bound()
        assert {vf.driver for vf in status.vfs} == {"vfio-pci"}
        for vf in status.vfs:
            assert Path(f"/dev/vfio/{group_of(vf.address)}").is_char_device()
        assert len({group_of(vf.address) for vf in status.vfs}) == 32
        record_property("measured", f"server's start to 32 VFs bound and allocatable in the kubelet: {seconds:.1f} s")
        pod = await node.kubelet.allocate("pod", [("main", CY, 2)])
        main = pod.containers["main"]
        assert set(main.device_nodes) == {
            "/dev/vfio/vfio",
            *(f"/dev/vfio/{group_of(address)}" for address in main.envs.values()),
        }
