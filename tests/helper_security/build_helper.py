"""A helper for tests: once it serves, it and each of its children attempt everything that is forbidden.

build_helper.py DIRECTORY OPTION...      lines "forbidden: {...}" and "modules: [...]" on standard error
"""

import json
import os
import sys
from pathlib import Path

from helper_security.forbidden import attempts
from qat_helper import dispatch, main, serve
from qat_helper.operations.node import Node, Outcome
from qat_shared.messages import AnyRequest

directory = Path(sys.argv.pop(1))
begins, perform = serve.Server._listen, dispatch.perform


def tell(what: str, answer: object) -> None:
    os.write(2, f"{what}: {json.dumps(answer)}\n".encode())


def serves(server: serve.Server) -> None:
    listens = server._listening
    begins(server)
    if not listens:
        tell("forbidden", attempts(directory, helper=True))


def performs(node: Node, request: AnyRequest) -> Outcome:
    outcome = perform(node, request)
    tell("forbidden", attempts(directory, helper=True))
    return outcome


serve.Server._listen = serves  # type: ignore[method-assign,assignment]
dispatch.perform = performs
sys.exit(main.main())
