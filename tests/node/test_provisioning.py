"""Provisioning by the real server and helper on a simulated node, whose kernel answers as the QAT driver does."""

import errno
import hashlib
import json
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from qat_server.simulation.config_map import ConfigMap
from qat_server.simulation.node import Node, Pf
from qat_server.simulation.running_node import RunningNode, running_node
from qat_server.status import ProvisioningStatus, Status

CY, DC, SYM_DC, GENERIC = (f"qat.intel.com/{name}" for name in ("cy", "dc", "sym-dc", "generic"))
PF0, PF1, PF2 = "0000:6b:00.0", "0001:6b:00.0", "0000:e8:00.0"
CRYPTO, COMPRESSION = {"qat.conf": "ServicesEnabled=sym;asym\n"}, {"qat.conf": "ServicesEnabled = dc\n"}


def bare(*addresses: str, **more: Any) -> Node:
    """PFs as after boot: their driver's default services, no VFs."""
    return Node(pfs=tuple(Pf(address=each, services="sym;asym", total_vfs=4, num_vfs=0, **more) for each in addresses))


@asynccontextmanager
async def provisioned(
    node: Node, files: dict[str, str], options: Sequence[str] = ()
) -> AsyncIterator[tuple[RunningNode, ConfigMap]]:
    """Both processes started, with a ConfigMap."""
    async with running_node(node) as running:
        config = ConfigMap(running.directory / "config")
        config.write(files)
        running.add_server_options(f"--provisioning-config={config.directory}", "--resync-interval=1h", *options)
        running.start_helper()
        running.start_server()
        yield running, config
        assert running.kernel.defects == []


async def serves(node: RunningNode, allocatable: dict[str, int], seconds: float = 20) -> None:
    """What can be allocated is this, beside resources that are on their way out (0)."""
    await node.until(
        f"allocatable is {allocatable}",
        lambda: {name: n for name, n in node.kubelet.allocatable().items() if n} == allocatable,
        seconds,
    )


def of(status: Status, pf: str = PF0) -> ProvisioningStatus:
    return next((each for each in status.provisioning if each.pf == pf), ProvisioningStatus(pf, "", "", (), (), ""))


def read(node: RunningNode, name: str, pf: str = PF0) -> str:
    return (node.kernel.sysfs_root / "bus/pci/devices" / pf / name).read_text().strip()


def story(node: RunningNode, pf: str = PF0) -> list[tuple[Any, ...]]:
    """What the audit log tells of a PF: operations that ended, in order, with what they changed."""
    told = []
    for line in map(json.loads, node.audit_log.read_bytes().splitlines()):
        about = line.get("arguments", {}).get("address") == pf and line["operation"].startswith("Set")
        if about and line["event"] in ("done", "late", "refused"):
            result = line["result"]
            told.append((line["operation"], line["verdict"], result.get("before"), result.get("now")))
    return told


async def test_two_domains_from_nothing_to_resources() -> None:
    files = CRYPTO | {"qat.toml": f"[[rules]]\naddress = '{PF1}'\nservices = 'dc'\nauto_reset = true\n"}
    async with provisioned(bare(PF0, PF1), files) as (node, _):
        await serves(node, {CY: 4, DC: 4})
        status = await node.until_status("ready", lambda status: status.ready)
        assert [(each.pf, each.stage) for each in status.provisioning] == [(PF0, "done"), (PF1, "done")]
        assert story(node) == [("SetNumVfs", "ok", "0", "4")]
        assert story(node, PF1) == [
            ("SetAutoReset", "ok", "off", "on"),
            ("SetServices", "ok", "sym;asym", "dc"),
            ("SetNumVfs", "ok", "0", "4"),
        ]
