"""The tree changes between the helper's checks and its writes: links are swapped, devices replaced, drivers moved.

In a real sysfs only the kernel can do this. Here a thread does it as fast as it can; still every write of the helper,
as the kernel sees it, is one of the three that its table allows, for the requested device.
"""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from helper_security import hostile
from helper_security.attacked_tree import SWAPS, Attacked, attacked
from helper_security.figures import tried, wanted
from helper_security.writes import Write
from qat_shared.messages import AnyReply, Bound, DpdkDriver, ErrorCode, Failure
from support.emulated_kernel import PF, VF

OPERATIONS = wanted("QAT_RACE_OPERATIONS", 200)
REFUSALS = (ErrorCode.KERNEL, ErrorCode.VANISHED, ErrorCode.DENIED, ErrorCode.UNAVAILABLE, ErrorCode.BUSY)


@pytest.fixture(scope="module")
def shared() -> Iterator[Attacked]:
    """One tree for all swaps at a chosen moment: each swap leaves everything as it was."""
    with attacked() as on:
        yield on


def outcome(reply: AnyReply) -> str:
    assert isinstance(reply, Bound | Failure)
    if isinstance(reply, Failure):
        assert reply.code in REFUSALS, reply
        return "refused"
    return "done"


class Moment:
    """Swap after the helper's n-th write (0: now), and swap back at the end."""

    def __init__(self, on: Attacked, kind: str, writes: int) -> None:
        self.on = on
        self.kind = kind
        self.left = writes
        self.swapped = False
        on.writes.made = self.made
        if writes == 0:
            self.swap()

    def made(self, write: Write) -> None:
        self.left -= 1
        if self.left == 0:
            with self.on.kernel.frozen():
                self.swap()

    def swap(self) -> None:
        if os.path.lexists(self.on.root / SWAPS[self.kind][0]):  # the driver's link, while there is no driver
            self.on.swap(self.kind)
            self.swapped = True

    def end(self) -> None:
        self.on.writes.made = lambda write: None
        if self.swapped:
            self.on.swap_back(self.kind)
            tried("swaps at a chosen moment")


@pytest.mark.parametrize("kind", SWAPS)
def test_swapped_after_each_step(shared: Attacked, kind: str) -> None:
    """Before the operation and after each of its writes, before the helper knows that it was made."""
    on = shared
    for operation in (on.bind, on.release):
        for step in range(4):
            if operation == on.release:
                assert isinstance(on.bind(), Bound)
            moment = Moment(on, kind, step)
            outcome(operation())
            moment.end()
            on.check()
            assert isinstance(on.bind(), Bound), "no effect remains"
            assert isinstance(on.release(), Bound)
            assert on.kernel.driver(VF) == "4xxxvf"


class Swapper(threading.Thread):
    """Swaps as fast as it can. During a swap, the emulated kernel waits; the helper does not."""

    def __init__(self, on: Attacked, dice: random.Random) -> None:
        super().__init__()
        self.on = on
        self.dice = dice
        self.swaps: Counter[str] = Counter()
        self.stopping = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        kinds = list(SWAPS)
        try:
            while not self.stopping.is_set():
                kind = self.dice.choice(kinds)
                with self.on.kernel.frozen():
                    if not os.path.lexists(self.on.root / SWAPS[kind][0]):
                        continue  # the driver's link, while there is no driver
                    self.on.swap(kind)
                    until = time.perf_counter() + self.dice.random() * 0.002
                    while time.perf_counter() < until:
                        pass
                    self.on.swap_back(kind)
                self.swaps[kind] += 1
                time.sleep(self.dice.random() * 0.001)
        except OSError as error:
            self.error = error


def test_swapped_all_the_time_by_a_thread() -> None:
    seed, dice = hostile.seeded()
    with attacked() as on:
        outcomes: Counter[str] = Counter()
        swapper = Swapper(on, random.Random(seed))  # noqa: S311
        swapper.start()
        try:
            for _ in range(OPERATIONS):
                operation = dice.choice((on.bind, on.release, lambda: on.bind(DpdkDriver.IGB_UIO)))
                outcomes[outcome(operation())] += 1
        finally:
            swapper.stopping.set()
            swapper.join()
        assert swapper.error is None, f"seed {seed}"
        assert isinstance(on.release(), Bound)
        assert isinstance(on.bind(), Bound), "no effect remains"
        tried("swaps by a thread", swapper.swaps.total())
        tried("operations under swaps by a thread", OPERATIONS)
        tried("operations under swaps by a thread that were refused", outcomes["refused"])
        tried("writes seen under swaps by a thread", len(on.sysfs_writes()))


def test_the_device_goes_and_comes_back_all_the_time() -> None:
    """Its PF removes and recreates its VFs while they are bound and released."""
    with attacked() as on:
        stopping = threading.Event()
        rounds = 0

        def replug() -> None:
            nonlocal rounds
            while not stopping.is_set():
                on.kernel.set_numvfs(PF, 0)
                on.kernel.set_numvfs(PF, 2)
                rounds += 1
                time.sleep(0.002)

        thread = threading.Thread(target=replug)
        thread.start()
        try:
            for _ in range(OPERATIONS // 4):
                outcome(on.bind())
                outcome(on.release())
        finally:
            stopping.set()
            thread.join()
        assert isinstance(on.bind(), Bound)
        tried("devices removed and made anew", rounds)
