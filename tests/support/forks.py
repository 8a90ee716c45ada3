"""Track the processes that code under test forks."""

from collections.abc import Callable


def recording_fork(fork: Callable[[], int], pids: list[int]) -> Callable[[], int]:
    """Wrap `fork`: append the children's process ids to `pids`."""

    def forked() -> int:
        pids.append(fork())
        return pids[-1]

    return forked
