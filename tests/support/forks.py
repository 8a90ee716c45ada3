"""The processes that code under test forks."""

from collections.abc import Callable


def noted(fork: Callable[[], int], pids: list[int]) -> Callable[[], int]:
    """As fork; the children's process ids go to `pids`."""

    def forked() -> int:
        pids.append(fork())
        return pids[-1]

    return forked
