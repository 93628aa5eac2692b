"""What benchmarks print of a comparison, for people and for programs."""

import json

import pytest
from report import Row, Target, print_rows

FACTS = {"machine": "a GPU", "versions": "torch 2", "date": "2026-01-02"}


@pytest.mark.parametrize(
    ("unit", "ratio"),
    [("ms", 0.5), ("us", 0.5), ("ms/token", 0.5), ("tokens/s", 2.0), ("TFLOPS", 2.0), ("%", 2.0)],
)
def test_a_ratio_above_one_says_that_moq_is_better(unit, ratio):
    assert Row("case", 4.0, 2.0, unit).ratio == ratio
    assert Row("case", 4.0, None, unit).ratio is None


@pytest.mark.parametrize(
    ("found", "at_most", "met"),
    [(1.0, True, True), (1.1, True, False), (1.0, False, True), (0.9, False, False)],
)
def test_a_target_is_met_up_to_its_limit(found, at_most, met):
    target = Target("ms/token", found, 1.0, at_most)
    assert target.met == met
    assert str(target).startswith("MISSED: ") != met


def test_programs_get_an_object_a_line(capsys):
    missed = Target("ratio", 1.2, 1.25, at_most=False)
    rows = [Row("a", 2.0, 3.0, "ms", "(a note)", [missed]), Row("b", 2.0, None, "tokens/s")]
    print_rows("title", "the peer", rows, as_json=True, facts=FACTS)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    shared = {**FACTS, "peer_name": "the peer"}
    assert first == {
        "case": "a",
        "moq": 2.0,
        "peer": 3.0,
        "ratio": 1.5,
        "unit": "ms",
        "note": "(a note)",
        "targets": ["MISSED: ratio 1.2 >= 1.25"],
        "met": False,
        **shared,
    }
    expected = {"case": "b", "moq": 2.0, "peer": None, "ratio": None, "unit": "tokens/s"}
    assert second == expected | shared


def test_people_get_a_table(capsys):
    target = Target("ms/token", 0.84, 0.95, at_most=True)
    rows = [Row("gpt2-xl", 0.84, 2.43, "ms/token", targets=[target])]
    print_rows("title", "the peer", rows, as_json=False, facts=FACTS)
    shown = capsys.readouterr().out
    for part in (
        "title",
        "moq [ms/token]",
        "gpt2-xl [ms/token 0.84 <= 0.95]",
        "0.84",
        "2.43",
        "2.89x",
        "a GPU",
    ):
        assert part in shown
