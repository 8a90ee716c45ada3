"""An overlay's processes on a simulated node: the rendered options and ConfigMaps, through a whole life.

Only what a simulated node cannot do without is changed: paths, the source of uevents and the metrics' port. The
containers' variables are left out too: neither process requires its sandbox, because the emulated kernel traces them.
"""

import asyncio
import json
import os
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from deployments import rendered
from deployments.rendered import Manifest
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_helper.policy_file import narrow
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.node.description import LoneVf, Node, Pf
from qat_simulation.running_node import RunningNode, running_node

PF: Final = Pf(address="0000:6b:00.0", services="dc", total_vfs=4, numa_node=0)
OLD: Final = Pf(address="0000:70:00.0", services="dc", total_vfs=2)
"""Its driver has no qat/ in sysfs, as before Linux 6.0: its services are in debugfs."""
UNUSED: Final = Pf(address="0000:6b:00.0", services="dc", total_vfs=4, num_vfs=0)
ON_A_HOST: Final = Node(pfs=(PF, OLD))
IN_A_VM: Final = Node(vfs=(LoneVf(address="0000:00:05.0"), LoneVf(address="0000:00:06.0")))
TO_PROVISION: Final = Node(pfs=(UNUSED, OLD))
SETTINGS: Final = {
    "qat.conf": "ServicesEnabled=sym;asym\nAutoresetEnabled=on\n",
    "qat.toml": '[[rules]]\naddress = "0000:6b:00.0"\nvfs = "all"\npm_idle_enabled = false\n',
}
"""What a user may write into the ConfigMap qat-config."""


class Setup(Struct, frozen=True):
    """What an installation gives to the node: both processes' options, and the files of its ConfigMaps by name."""

    helper: tuple[str, ...]
    server: tuple[str, ...]
    policy: Mapping[str, str]
    node: Node = ON_A_HOST
    provisioning: bool = False


class Used(Struct, frozen=True):
    """What the helper was asked for, from its audit log and counters. `denied`: what it refused by policy."""

    operations: frozenset[str]
    drivers: frozenset[str]
    directories: frozenset[str]
    denied: tuple[str, ...]


def setup_of(manifests: list[Manifest]) -> Setup:
    """Of rendered manifests."""
    spec = rendered.pod_spec(manifests)
    helper, server = (rendered.container(spec, name)["args"] for name in ("helper", "server"))
    (option,) = (word for word in helper if word.startswith("--policy="))
    (mount,) = (
        mount
        for mount in rendered.container(spec, "helper")["volumeMounts"]
        if mount["mountPath"] == option.removeprefix("--policy=")
    )
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == mount["name"])
    (config,) = (
        each
        for each in rendered.of_kind(manifests, "ConfigMap")
        if each["metadata"]["name"] == volume["configMap"]["name"]
    )
    provisioning = any(word.startswith("--provisioning-config=") for word in server)
    in_a_vm = "--health-interval=0" in server
    return Setup(
        helper=_kept(helper, "--policy="),
        server=_kept(server, "--metrics-address=", "--provisioning-config="),
        policy=config["data"],
        node=IN_A_VM if in_a_vm else TO_PROVISION if provisioning else ON_A_HOST,
        provisioning=provisioning,
    )


def _kept(words: list[str], *left_out: str) -> tuple[str, ...]:
    return tuple(word for word in words if not word.startswith(left_out))


def allowed(directory: Path) -> Policy:
    """The policy that the helper takes from a directory."""
    return narrow(Policy(uids=frozenset(), operations=NAMES), directory, os.geteuid())


@asynccontextmanager
async def installed(setup: Setup, directory: Path) -> AsyncIterator[RunningNode]:
    """The node with both processes' options, and with the ConfigMaps in `directory`, as the kubelet mounts them."""
    policy = ConfigMap(directory / "policy", 0o444)
    policy.write(setup.policy)
    config = ConfigMap(directory / "qat-config")
    config.write(SETTINGS)
    options = [*setup.server, *([f"--provisioning-config={config.directory}"] if setup.provisioning else [])]
    async with running_node(setup.node, options) as node:
        node.helper_options = (*setup.helper, f"--policy={policy.directory}")
        if OLD in setup.node.pfs:
            shutil.rmtree((node.kernel.sysfs_root / "bus/pci/devices" / OLD.address / "qat").resolve())
        yield node


async def whole_life(node: RunningNode) -> None:
    """Start, bind, register, a pod, and a restart of each of the three."""
    node.start_helper()
    node.start_server()
    await _served(node)
    name, number = next(iter(node.kubelet.allocatable().items()))
    await node.kubelet.allocate("pod", [("main", name, 1)])
    await node.until_status("the pod is known", lambda status: any(vf.pod == "default/pod/main" for vf in status.vfs))
    assert number > 1
    await node.kubelet.restart()
    await _served(node)
    await node.stop_server()
    node.start_server()
    await _served(node)
    await node.stop_helper()
    node.start_helper()
    await node.until_status("the helper is back", lambda status: status.ready)
    await _served(node)
    await node.stop_server()
    await node.stop_helper()


async def _served(node: RunningNode) -> None:
    await node.until_status(
        "all VFs are bound and served",
        lambda status: status.ready and status.vfs and all(vf.driver in ("vfio-pci", "igb_uio") for vf in status.vfs),
    )
    await node.until("the kubelet has them", lambda: sum(node.kubelet.allocatable().values()) > 1)


def used(node: RunningNode) -> Used:
    """What the audit log of a helper that has ended says."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in node.audit_lines()]
    asked = [line for line in lines if line["event"] == "asked"]
    counted: Counter[str] = Counter()
    for line in lines:
        if line["event"] == "stop":
            counted.update(line.get("arguments", {}))
    values = {
        field: frozenset(line["arguments"][field] for line in asked if field in line["arguments"])
        for field in ("driver", "directory")
    }
    return Used(
        operations=frozenset(line["operation"] for line in asked) | (counted.keys() & NAMES),
        drivers=values["driver"],
        directories=values["directory"],
        denied=tuple(line["result"]["message"] for line in lines if line.get("verdict") == "denied")
        + tuple(word for word in counted if "denied" in word),
    )


def run_life(setup: Setup, directory: Path) -> Used:
    """What the server of an installation asks of the helper in its whole life."""

    async def life() -> Used:
        async with installed(setup, directory) as node:
            await whole_life(node)
            return used(node)

    return asyncio.run(life())
