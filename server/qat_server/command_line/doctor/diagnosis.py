"""`qat-plugin doctor` from start to finish: observes, queries, runs the checks and prints the findings."""

import asyncio
import logging
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from qat_server.command_line.doctor.checks import run_checks
from qat_server.command_line.doctor.findings import Level, show
from qat_server.command_line.doctor.observations import observe_node
from qat_server.command_line.doctor.queries import query_helper, query_server
from qat_server.command_line.settings import Settings
from qat_shared.devices import PHYSICAL


def run(settings: Settings, *, as_json: bool) -> int:
    """Print the findings and return 1 if any is a problem, else 0. Raises SysfsError if there is no PCI bus."""
    # Errors of the helper's client become findings, so they are not logged as well.
    logging.getLogger("qat_server").setLevel(logging.CRITICAL)
    node = observe_node(settings.sysfs_root, Path("/proc"), Path("/dev"), settings.socket_directory)
    pfs = [each.address for each in node.functions if each.physical and each.driver == PHYSICAL[each.device_id].driver]
    node = msgspec.structs.replace(
        node,
        helper=asyncio.run(query_helper(settings.helper_socket, pfs)),
        refused=query_server(settings.socket_directory),
    )
    findings = run_checks(node, settings)
    if as_json:
        sys.stdout.write(msgspec.json.encode(findings).decode() + "\n")
    else:
        show(findings, Console() if sys.stdout.isatty() else Console(width=160))
    return int(any(finding.level is Level.PROBLEM for finding in findings))
