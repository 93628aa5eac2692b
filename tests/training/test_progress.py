"""What long work says of itself: a bar on a terminal, lines now and then in a log."""

import itertools

import pytest

from moq import progress


@pytest.fixture
def clock(monkeypatch) -> None:
    """The time that it is said to be; every look at it takes ten seconds."""
    seconds = itertools.count(0.0, 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))


def test_products_are_told_to_a_log_every_half_minute(clock, capsys):
    with progress.ProductBar("sensitivity (trace)", True) as bar:
        bar.start(8)
        for _ in range(8):
            bar.advance()
    assert capsys.readouterr().err.splitlines() == [
        "moq: sensitivity (trace): 3 of 8 products in 30 s",
        "moq: sensitivity (trace): 6 of 8 products in 60 s",
    ]


def test_products_of_an_unknown_number_are_counted(clock, capsys):
    with progress.ProductBar("eigenvalues", True) as bar:
        bar.start(None)
        for _ in range(3):
            bar.advance()
    assert capsys.readouterr().err == "moq: eigenvalues: 3 products in 30 s\n"


def test_items_are_told_to_a_log_too(clock, capsys):
    assert list(progress.track("abcdef", "hashing")) == list("abcdef")
    assert capsys.readouterr().err.splitlines() == [
        "moq: hashing: 2 of 6 done in 30 s",
        "moq: hashing: 5 of 6 done in 60 s",
    ]


def test_short_work_and_quiet_work_print_nothing(clock, capsys, monkeypatch):
    with progress.ProductBar("sensitivity", False) as bar:
        bar.start(8)
        for _ in range(8):
            bar.advance()
    monkeypatch.setattr(progress, "LINE_SECONDS", 1000.0)
    assert list(progress.track(range(5), "writing")) == list(range(5))
    assert capsys.readouterr().err == ""
