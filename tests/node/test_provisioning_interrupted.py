"""Provisioning that is interrupted by kill -9 of either process at each of its writes: the next start completes it."""

import contextlib
import errno
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from node.test_provisioning import CY, DC, PF0, bare, provisioned, read, serves
from qat_simulation.kubelet.config_map import ConfigMap
from qat_simulation.running_node import RunningNode

VF = "0000:6b:00.2"
STEPS = (
    ("qat/auto_reset", PF0),
    ("qat/state", PF0),
    ("qat/cfg_services", PF0),
    ("qat/pm_idle_enabled", PF0),
    ("sriov_drivers_autoprobe", PF0),
    ("sriov_numvfs", PF0),
    ("driver_override", VF),
    ("drivers_probe", VF),
)
VERSIONS = (
    (
        CY,
        {"qat.conf": "ServicesEnabled=sym;asym\nAutoresetEnabled=off\n", "qat.toml": "defaults.pm_idle_enabled = true"},
    ),
    (DC, {"qat.conf": "ServicesEnabled=dc\nAutoresetEnabled=on\n", "qat.toml": "defaults.pm_idle_enabled = false"}),
)
Interrupt = Callable[[RunningNode, str, str], Awaitable[None]]


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(status.parent.name))
        except (OSError, ValueError):
            continue
    return found


async def helper_alone(node: RunningNode, attribute: str, address: str) -> None:
    """Its child continues alone, in parallel with those of the next helper."""
    await node.stop_helper(signal.SIGKILL)
    node.start_helper()
    await node.until_status("the server reaches the new one", lambda status: status.helper.connected)
    node.kernel.release(attribute, address)


async def with_children(node: RunningNode, attribute: str, address: str) -> None:
    """As when its container ends; the write that was in the kernel takes effect."""
    assert node.helper is not None
    for child in children(node.helper.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    await node.stop_helper(signal.SIGKILL)
    node.kernel.release(attribute, address)
    node.start_helper()


async def before_the_write(node: RunningNode, attribute: str, address: str) -> None:
    """The same, but the write does not take effect."""
    assert node.helper is not None
    for child in children(node.helper.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    await node.stop_helper(signal.SIGKILL)
    node.kernel.fail_next(address, attribute, errno.EINTR)
    node.kernel.release(attribute, address)
    node.start_helper()


async def server(node: RunningNode, attribute: str, address: str) -> None:
    """The helper completes the operation that it has begun."""
    await node.stop_server(signal.SIGKILL)
    node.kernel.release(attribute, address)
    node.start_server()


async def both(node: RunningNode, attribute: str, address: str) -> None:
    """As when the pod ends."""
    await node.stop_server(signal.SIGKILL)
    await with_children(node, attribute, address)
    node.start_server()


async def interrupted(node: RunningNode, config: ConfigMap, number: int, interrupt: Interrupt) -> None:
    attribute, address = STEPS[number]
    resource, files = VERSIONS[number % 2 - 1]
    if attribute == "drivers_probe":
        # It is written for all VFs. Only this VF hangs: uevents of the others would come in between.
        address = VF
    node.kernel.hang(attribute, address)
    config.write(files)
    await node.until(f"{attribute} is being written", node.kernel.hanging)
    await interrupt(node, attribute, address)
    await serves(node, {resource: 4}, 60)
    wanted = files["qat.conf"]
    assert set(read(node, "qat/cfg_services").split(";")) == set(wanted.split("\n")[0].partition("=")[2].split(";"))
    assert read(node, "qat/auto_reset") == wanted.split("\n")[1].partition("=")[2]
    assert read(node, "qat/pm_idle_enabled") == str(int(files["qat.toml"].endswith("true")))
    await node.until_status("it is done", lambda status: all(each.stage == "done" for each in status.provisioning))


@pytest.mark.parametrize("interrupt", [helper_alone, with_children, before_the_write, server, both])
async def test_interrupted_at_each_write(interrupt: Interrupt) -> None:
    async with provisioned(bare(PF0), VERSIONS[0][1]) as (node, config):
        await serves(node, {CY: 4})
        for number in range(len(STEPS)):
            await interrupted(node, config, number, interrupt)
