"""A server for tests: once it serves, its loop and a thread attempt everything that is forbidden.

build_server.py DIRECTORY OPTION...      lines "forbidden: {...}" on standard error
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from helper_security.forbidden import attempts
from qat_server import composition, main, process
from qat_server.command_line.settings import Settings

directory = Path(sys.argv.pop(1))


def report() -> None:
    os.write(2, f"forbidden: {json.dumps(attempts(directory, helper=False))}\n".encode())


class Server(composition.Server):
    def __init__(self, settings: Settings, *arguments: object) -> None:
        super().__init__(settings, *arguments)  # type: ignore[arg-type]
        self.reported = False
        self.run_loop.on_reconciled = self.reconciled

    def reconciled(self) -> None:
        if self.reported:
            return
        if any(state.registered for state in self.endpoints.states.values()):
            self.reported = True
            report()
            self.thread = asyncio.get_running_loop().run_in_executor(None, report)
        else:
            self.queue.rescan()


process.Server = Server  # type: ignore[attr-defined,assignment]
main.main()
