"""What several test modules stand on: a dispatcher of their own; logging as it was before."""

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_server.logs.handler import OUR_LOGGERS
from support.dispatcher_bench import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """The helper's dispatcher, with a policy that allows all."""
    bench = Bench(tmp_path, monkeypatch, Policy(uids=frozenset(), operations=NAMES))
    with closing(bench.audit):
        yield bench
        bench.close()


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in (None, *OUR_LOGGERS)}
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)
