"""The built-in policy, policy files, and which rule denies something."""

from collections.abc import Callable
from pathlib import Path

from qat_helper.errors import OperationError
from qat_helper.operations.table import NAMES
from qat_helper.policy import Policy
from qat_shared.messages import ErrorCode

BUILTIN = Policy(uids=frozenset({65532}), operations=NAMES)


def rule_of(check: Callable[[], object]) -> str:
    """The rule of the denial, "" when nothing is denied."""
    try:
        check()
    except OperationError as error:
        assert error.code is ErrorCode.DENIED
        assert error.message
        return error.rule
    return ""


def policy_file(tmp_path: Path, text: str | bytes) -> Path:
    """A policy file with this content."""
    path = tmp_path / "policy.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o644)
    return path


def write(path: Path, text: str) -> None:
    """A file that only its owner can write."""
    path.write_text(text)
    path.chmod(0o644)
