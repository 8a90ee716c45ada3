"""`qat-plugin provision` and `qat-plugin config check`: the plan shown, and carried out once.

The plan, the helper's operations and the order of steps are those of the running server (provisioner.py). What is not
here is a server that could withhold VFs from pods meanwhile: the helper's own look at `enable` is the last word.
"""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Final

from msgspec import Struct
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat_server.devices.discovery import discover
from qat_server.devices.inventory import Inventory
from qat_server.helper_client.client import HelperClient, HelperError
from qat_server.instrumentation.counters import Counters
from qat_server.kubelet.pod_resources import PodResourcesError, held_devices
from qat_server.provisioning.configuration import Configuration
from qat_server.provisioning.plan import PfPlan, Plan, plan
from qat_server.provisioning.state import read_states
from qat_server.provisioning.steps import carry_out, is_refused, why
from qat_server.provisioning.table import rows
from qat_shared.devices import PHYSICAL, VIRTUAL
from qat_shared.messages import ErrorCode
from qat_shared.pci import PciAddress

ALL_DRIVERS: Final = tuple(
    sorted({kind.driver for kind in VIRTUAL.values() if PHYSICAL[kind.physical].provisioned}),
)
"""The kernel VF drivers of all PFs that can be provisioned."""

_MOST_VFS: Final = 2**31 - 1


class Outcome(IntEnum):
    """The exit status of `qat-plugin provision`; of several PFs the first here that fits one. 2 is a wrong setting."""

    FAILED = 1
    WAITING = 11
    DONE = 0
    NOTHING_TO_DO = 10


class Result(Struct, frozen=True):
    """What came of one PF: sentences about its steps."""

    outcome: Outcome
    said: tuple[str, ...] = ()


class Once(Struct, frozen=True, kw_only=True):
    """What `provision` was told; `patience` is how many seconds it waits for the helper."""

    configuration: Configuration
    sysfs_root: Path
    helper_socket: Path
    kernel_vf_drivers: tuple[str, ...]
    dry_run: bool
    patience: float


def provision(once: Once, console: Console) -> Outcome:
    """Show the plan, carry it out, say what came of it. Raises SysfsError."""
    return asyncio.run(_provision(once, console))


def check(configuration: Configuration, sysfs_root: Path, drivers: Sequence[str], console: Console) -> bool:
    """Show the plan for the PFs of a sysfs tree as if no pod had a VF: whether all of it can be. Raises SysfsError."""
    planned = _plan(configuration, sysfs_root, drivers, {})
    show(planned, configuration, console)
    return not any(one.impossible for one in planned.pfs)


def show(planned: Plan, configuration: Configuration, console: Console) -> None:
    """Print a plan as a table, and its notes below."""
    files = ", ".join(configuration.files) or "none: all VFs are wanted, and nothing else"
    console.print(Text(f"configuration files: {files}"))
    if not planned.pfs:
        console.print(Text("no PF that can be provisioned: is its kernel driver loaded?"))
        return
    table = Table("PF", "now", "wanted", "steps", "held by", box=None, pad_edge=False, header_style="bold")
    for row in rows(planned):
        table.add_row(*(Text(text) for text in (row.pf, row.now, row.wanted, row.steps, row.held_by)))
    console.print(table)
    for row in rows(planned):
        for note in row.notes:
            console.print(Text(f"{row.pf}: {note}"))
    for note in planned.notes:
        console.print(Text(f"note: {note}"))


async def _provision(once: Once, console: Console) -> Outcome:
    connected = asyncio.Event()
    helper = HelperClient(once.helper_socket, Counters())
    helper.on_connected.append(connected.set)
    running = asyncio.create_task(helper.run())
    try:
        await _reach(helper, connected, once.patience)
        if not helper.connected and not once.dry_run:
            console.print(Text(helper.error))
            return Outcome.FAILED
        holders, unknown = await _holders(helper)
        planned = await asyncio.to_thread(_plan, once.configuration, once.sysfs_root, once.kernel_vf_drivers, holders)
        show(planned, once.configuration, console)
        if unknown and any(one.waiting for one in planned.pfs):
            console.print(Text(f"who holds VFs is not known: {unknown}"))
        if once.dry_run:
            results = [_foreseen(one) for one in planned.pfs]
        else:
            results = await asyncio.gather(*(_carry_out(helper, one) for one in planned.pfs))
        for one, result in zip(planned.pfs, results, strict=True):
            for sentence in result.said:
                console.print(Text(f"{one.pf.address}: {sentence}"))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    outcomes = {result.outcome for result in results}
    return next((outcome for outcome in Outcome if outcome in outcomes), Outcome.NOTHING_TO_DO)


async def _reach(helper: HelperClient, changed: asyncio.Event, patience: float) -> None:
    try:
        async with asyncio.timeout(patience):
            while not helper.connected:
                changed.clear()
                await changed.wait()
    except TimeoutError:
        return


async def _holders(helper: HelperClient) -> tuple[Mapping[PciAddress, str] | None, str]:
    """Who has which VF, or None and why that is not known."""
    if not helper.connected:
        return None, helper.error
    try:
        with tempfile.TemporaryDirectory(prefix="qat-") as directory:
            held = (await held_devices(helper, Path(directory))).holders
    except PodResourcesError as error:
        return None, str(error)
    return {address: holder.name for devices in held.values() for address, holder in devices.items()}, ""


def _plan(
    configuration: Configuration,
    sysfs_root: Path,
    drivers: Sequence[str],
    holders: Mapping[PciAddress, str] | None,
) -> Plan:
    inventory: Inventory = discover(sysfs_root, drivers, _MOST_VFS)
    return plan(inventory, read_states(sysfs_root, inventory.pfs), configuration, holders)


def _foreseen(one: PfPlan) -> Result:
    if one.impossible:
        return Result(Outcome.FAILED)
    if one.waiting:
        return Result(Outcome.WAITING)
    return Result(Outcome.DONE if one.steps else Outcome.NOTHING_TO_DO)


async def _carry_out(helper: HelperClient, one: PfPlan) -> Result:
    said: list[str] = []
    steps, outcome = list(one.steps), _foreseen(one).outcome
    while steps:
        step = steps.pop(0)
        try:
            done = await carry_out(helper, step)
        except HelperError as error:
            said.append(f"failed: {why(step, error)}")
            if error.code == ErrorCode.BUSY:
                return Result(Outcome.WAITING, tuple(said))
            outcome = Outcome.FAILED
            if not is_refused(step, error):
                break
            continue  # it is up with its old services, and is to have its VFs again
        said.append(f"{step}: done ({done.before} before, {done.now} now)")
    return Result(outcome, tuple(said))
