"""A write that finds no room is tried again, and said once."""

from __future__ import annotations

import pytest

from halfbyte.errors import DiskFull
from halfbyte.runs import folder
from halfbyte.runs.folder import DiskRetry


class Fills:
    """A disk that is full for the first few writes."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> str:
        if self.left:
            self.left -= 1
            raise DiskFull("the disk is full.")
        return "written"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "RETRY_EVERY_S", 0.0)


def test_it_goes_on_when_there_is_room() -> None:
    said: list[str] = []
    assert DiskRetry(said.append).write(Fills(3)) == "written"
    assert said == ["the disk is full. Waiting 10 minutes for room"]
    assert DiskRetry(said.append).write(Fills(0)) == "written" and len(said) == 1


@pytest.mark.parametrize("given", [{"wait_s": 0.0}, {"stops": lambda: True}])
def test_it_ends_after_its_time_and_where_the_run_is_to_end(given: dict[str, object]) -> None:
    with pytest.raises(DiskFull):
        DiskRetry(lambda _: None, **given).write(Fills(3))  # type: ignore[arg-type]
