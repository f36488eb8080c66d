"""Progress: nothing where nobody watches, and a bar on stderr that leaves stdout to the program where someone does."""

from __future__ import annotations

import re

import pytest

from offramp.progress import bar


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No colours and 120 columns, wherever the tests run."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def work(*, show: bool, total: float | None = 4) -> None:
    with bar("training caches", total, show=show) as running:
        running.note("the first one")
        running.advance()
        running.advance(2)
        running.note("the last one")


def test_the_silent_stand_in_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    work(show=False)
    work(show=False, total=None)
    assert capfd.readouterr() == ("", "")


def test_a_bar_writes_to_stderr_and_not_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    work(show=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training caches" in err
    assert re.search(r"\b3/4\b", err), "one and two of four are done"
    assert err.rstrip().endswith("the last one"), "the last remark is beside the bar"


def test_parts_of_a_unit_add_up(capfd: pytest.CaptureFixture[str]) -> None:
    with bar("training", 2, show=True) as running:
        for _ in range(8):
            running.advance(0.25)
    assert re.search(r"\b2/2\b", capfd.readouterr().err)


def test_an_unknown_total_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    work(show=True, total=None)
    assert re.search(r"\b3/\?", capfd.readouterr().err)


@pytest.mark.parametrize("show", [True, False])
def test_an_error_inside_comes_out_and_the_bar_ends(capfd: pytest.CaptureFixture[str], show: bool) -> None:
    with pytest.raises(ValueError, match="inside"), bar("training", 2, show=show):
        raise ValueError("inside")
    work(show=show)  # a bar that had not ended would refuse a second one
    assert capfd.readouterr().out == ""


def test_what_the_program_prints_stays_on_stdout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a terminal
    with bar("recording", 2, show=True) as running:
        print("from the stream")
        running.advance()
    assert "from the stream" in capsys.readouterr().out
