"""What time may heal is repeated, everything else is raised at once."""

from __future__ import annotations

import pytest

from mist.broker import patience as module
from mist.broker.patience import again
from mist.errors import Ambiguous, MistError, StorageFull, TooLarge, Unavailable
from tests.conftest import run


class Failing:
    """Raises these errors one after the other, then answers."""

    def __init__(self, *errors: MistError) -> None:
        self.errors = list(errors)
        self.calls = 0

    async def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(_seconds: float) -> None:
        return None

    monkeypatch.setattr(module.asyncio, "sleep", sleep)


def test_a_broker_that_comes_back() -> None:
    """Every error that is waited out is told; the answer is the call's."""
    call = Failing(Unavailable("away"), Ambiguous("lost"), Unavailable("away"))
    told: list[str] = []
    assert run(again(call, on_retry=lambda e: told.append(e.code))) == "answer"
    assert call.calls == 4
    assert told == ["unavailable", "ambiguous", "unavailable"]


@pytest.mark.parametrize("error", [TooLarge("x", size_bytes=2, size_bytes_max=1), StorageFull("full")])
def test_what_time_does_not_heal(error: MistError) -> None:
    """Raised at the first try."""
    call = Failing(error)
    with pytest.raises(type(error)):
        run(again(call))
    assert call.calls == 1


def test_a_broker_that_stays_away() -> None:
    """The last error is raised when the time is over; the time begins with the first failure."""

    class Ticking:
        now = 0.0

        def monotonic(self) -> float:
            self.now += 10.0
            return self.now

        def time_ns(self) -> int:
            return 0

    call = Failing(*(Unavailable(f"away {n}") for n in range(100)))
    with pytest.raises(Unavailable, match="away 4"):
        run(again(call, away_s_max=35.0, clock=Ticking()))
