"""One run of provisioning without a server: makes the plan, shows it, and carries it out.

The plan, the helper's operations and the order of the steps are those of the running server (provisioner.py). There is
no server that could withhold VFs from pods in the meantime, so the helper's own check of `enable` decides.
"""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final

from msgspec import Struct
from rich.console import Console
from rich.text import Text

from qat_server.command_line.provision.plan_table import show
from qat_server.devices.discovery import discover
from qat_server.helper_client.client import HelperClient, HelperError
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.pod_resources import PodResourcesError, held_devices, holder_names
from qat_server.provisioning.actual_state import read_actual_states
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.execute import execute, failure_text, refused_services
from qat_server.provisioning.plan import PfPlan, Plan, plan
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

_ALL_VFS: Final = 2**31 - 1


class Outcome(IntEnum):
    """The exit status of `qat-plugin provision`, and the outcome of one PF. Of several, the first here applies.

    2 is reserved for an invalid file or option.
    """

    FAILED = 1
    WAITING = 11
    DONE = 0
    NOTHING_TO_DO = 10


class _Result(Struct, frozen=True):
    """The outcome of one PF, with a sentence about each step."""

    outcome: Outcome
    sentences: tuple[str, ...] = ()


async def provision(
    configuration: Configuration,
    sysfs_root: Path,
    helper_socket: Path,
    kernel_vf_drivers: Sequence[str],
    dry_run: bool,
    helper_timeout: float,
    console: Console,
) -> Outcome:
    """Show the plan, carry it out unless it is a dry run, and print a sentence about each step. Raises SysfsError.

    `helper_timeout`: seconds to wait for the helper.
    """
    connected = asyncio.Event()
    helper = HelperClient(helper_socket, Counters())
    helper.on_connected.append(connected.set)
    running = asyncio.create_task(helper.run())
    try:
        await _connect(helper, connected, helper_timeout)
        if not helper.connected and not dry_run:
            console.print(Text(helper.error))
            return Outcome.FAILED
        holders, unknown = await _holders(helper)
        planned = await asyncio.to_thread(plan_node, configuration, sysfs_root, kernel_vf_drivers, holders)
        show(planned, configuration, console)
        if unknown and any(each.holds for each in planned.pfs):
            console.print(Text(f"the holders of VFs are unknown: {unknown}"))
        if dry_run:
            results = [_Result(_expected(each)) for each in planned.pfs]
        else:
            results = await asyncio.gather(*(_execute(helper, each) for each in planned.pfs))
        for each, result in zip(planned.pfs, results, strict=True):
            for sentence in result.sentences:
                console.print(Text(f"{each.pf.address}: {sentence}"))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    outcomes = {result.outcome for result in results}
    return next((outcome for outcome in Outcome if outcome in outcomes), Outcome.NOTHING_TO_DO)


def plan_node(
    configuration: Configuration,
    sysfs_root: Path,
    kernel_vf_drivers: Sequence[str],
    holders: Mapping[PciAddress, str] | None,
) -> Plan:
    """Plan the PFs of a sysfs tree. `holders` are the pods that hold VFs, None while unknown. Raises SysfsError."""
    inventory = discover(sysfs_root, kernel_vf_drivers, _ALL_VFS)
    return plan(inventory, read_actual_states(sysfs_root, inventory.pfs), configuration, holders)


async def _connect(helper: HelperClient, connected: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not helper.connected:
                connected.clear()
                await connected.wait()
    except TimeoutError:
        return


async def _holders(helper: HelperClient) -> tuple[Mapping[PciAddress, str] | None, str]:
    """The pods that hold VFs, or None and why they are unknown."""
    if not helper.connected:
        return None, helper.error
    try:
        with tempfile.TemporaryDirectory(prefix="qat-") as directory:
            held = (await held_devices(helper, Path(directory))).holders
    except PodResourcesError as error:
        return None, str(error)
    return holder_names(held), ""


def _expected(pf_plan: PfPlan) -> Outcome:
    """The outcome of a plan whose steps all succeed."""
    if pf_plan.impossible:
        return Outcome.FAILED
    if pf_plan.holds:
        return Outcome.WAITING
    return Outcome.DONE if pf_plan.steps else Outcome.NOTHING_TO_DO


async def _execute(helper: HelperClient, pf_plan: PfPlan) -> _Result:
    outcome, sentences = _expected(pf_plan), []
    for step in pf_plan.steps:
        try:
            done = await execute(helper, step)
        except HelperError as error:
            sentences.append(f"failed: {failure_text(step, error)}")
            if error.code == ErrorCode.BUSY:
                outcome = Outcome.WAITING
                break
            outcome = Outcome.FAILED
            if not refused_services(step, error):
                break
            # The PF is up with its old services, so the other steps give it its VFs back.
        else:
            sentences.append(f"{step}: done ({done.before} before, {done.now} now)")
    return _Result(outcome, tuple(sentences))
