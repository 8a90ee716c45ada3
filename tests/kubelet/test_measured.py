"""How times are judged: seconds too much are seen on an idle machine, and a busy one does not fail."""

import pytest

from kubelet import measured
from kubelet.measured import Timed
from qat_server.kubelet.registration.directories import Registration


@pytest.mark.parametrize(
    ("factor", "times", "good"),
    [
        (1.0, (0.5, 0.9, 4.0), True),
        (1.0, (0.5, 3.5, 3.6), False),
        (10.0, (5.0, 8.0, 20.0), True),
        (10.0, (5.0, 13.0, 20.0), False),
    ],
)
async def test_the_median_is_judged_by_how_busy_the_machine_is(
    factor: float, times: tuple[float, ...], good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def busy() -> float:
        return factor

    monkeypatch.setattr(measured, "busy", busy)
    monkeypatch.setattr(measured, "_TIMES", {})

    async def judge() -> None:
        async with Timed("a start", 1, Registration.KUBELET_SOCKET) as timed:
            for seconds in times:
                await timed.add(seconds)

    if good:
        await judge()
    else:
        with pytest.raises(AssertionError, match="a start: "):
            await judge()
    assert list(measured.lines()) != []


async def test_a_machine_is_at_least_as_busy_as_an_idle_one() -> None:
    assert await measured.busy() >= 1.0
