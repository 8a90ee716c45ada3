"""A server for tests: once it serves, its loop and a thread attempt everything that is forbidden.

build_server.py DIRECTORY OPTION...      lines "forbidden: {...}" on standard error
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from helper_security.forbidden import attempts
from qat_server import main
from qat_server.run_loop import Plugin
from qat_shared.pci import PciAddress

directory = Path(sys.argv.pop(1))
look = Plugin._look
told = False


def tell() -> None:
    os.write(2, f"forbidden: {json.dumps(attempts(directory, helper=False))}\n".encode())


async def looks(plugin: Plugin, changed: frozenset[PciAddress] | None, work: asyncio.TaskGroup) -> None:
    global told  # noqa: PLW0603
    await look(plugin, changed, work)
    if not told and any(state.registered for state in plugin.endpoints.states.values()):
        told = True
        tell()
        work.create_task(asyncio.to_thread(tell))
    elif not told:
        plugin.changes.mark()


Plugin._look = looks  # type: ignore[method-assign,assignment]
main.main()
