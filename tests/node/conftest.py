"""What several of these tests stand on: a directory whose sockets' paths fit, a policy file for the helper."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.kubelet_sockets import short_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


@pytest.fixture
def helper_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give helpers that are started from now on this policy."""

    def give(text: str) -> None:
        policy = tmp_path / "policy.toml"
        policy.write_text(text)
        policy.chmod(0o644)
        monkeypatch.setenv("QAT_HELPER_POLICY", str(policy))

    return give
