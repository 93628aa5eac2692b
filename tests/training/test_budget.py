"""Budgets of target widths: how they are read, and what measured latencies allow."""

import json
from fractions import Fraction

import pytest
import torch
from measured_runs import BENCH, measured, write_table

from moq.budget import Budget, LatencyTable, served_bits
from moq.target_bits import Candidates, choose


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "list"])
def test_a_latency_budget_offers_only_what_was_measured(decoder, tmp_path, lines):
    table = write_table(
        tmp_path / "bench.json",
        {"decode_tokens_per_second": 150.0},
        {},
        {"weights": "float32", "decode_tokens_per_second": 100.0, "weight_bytes": 400},
        lines=lines,
    )
    _, optimizer = measured(decoder, (3.0, 0.1, 1.0, 2.0))
    choice = optimizer.choose_target_bits(latency=0.0175, latency_table=table)
    assert LatencyTable.load(table).seconds == {8: 0.01, 16: 0.02}
    assert [block.widths for block in choice.blocks] == [(8, 16)] * 4
    # A model of one width takes what was measured; a quarter of the weights moves a quarter of it.
    assert choice.front[0][0] == pytest.approx(0.01) and choice.front[-1][0] == pytest.approx(0.02)
    assert choice.bits == (16, 8, 16, 16)
    assert choice.cost == pytest.approx(0.0175)


def test_widths_count_as_what_they_are_served_at():
    assert [served_bits(bits) for bits in (1, 2, 3, 4, 5, 8, 9, 12, 16)] == [
        *(2, 2, 4, 4, 8, 8),
        *(16, 16, 16),
    ]


def test_the_fastest_measurement_of_a_width_counts_wherever_it_stands(tmp_path):
    speeds = [{"decode_tokens_per_second": speed} for speed in (150.0, 200.0, 100.0)]
    assert LatencyTable.load(write_table(tmp_path / "bench.json", *speeds)).seconds == {8: 0.01}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one object that moq bench --json printed, got none"),
        ("[1]", "at least one object that moq bench --json printed, got something else"),
        ("{", "must hold what moq bench --json prints"),
        ('{"weights": "int3"}', "entry 0: weights must be one of int2, int4, int8, .*'int3'"),
        ('{"weights": "int8", "bits": 5}', "entry 0: weights must be one of .* bits 5"),
        ('{"weights": "int8", "batch": 0}', "entry 0: batch must be a positive number, got 0"),
        ('{"weights": "int8", "batch": 1}', "decode_tokens_per_second must be .*, got None"),
        (
            json.dumps([BENCH, BENCH | {"weights": "int4", "context": 64}]),
            "entry 1: context must be the 256 of the first entry, got 64: measure all widths",
        ),
    ],
)
def test_a_bad_latency_table_is_refused_with_the_entry(tmp_path, text, message):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        LatencyTable.load(path)


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_feasible_budget_that_is_named_is_feasible(seed):
    torch.manual_seed(seed)
    sizes = torch.randint(1, 10**6, (3,)).tolist()
    blocks = [
        Candidates(str(i), 1.0, size, (3 + i, 8), (1.0, 0.0), (size // 2, size))
        for i, size in enumerate(sizes)
    ]
    table = LatencyTable({4: 0.00123456789, 8: 0.0023456789})
    for kind in ("mean_bits", "bytes", "latency"):
        with pytest.raises(ValueError) as caught:
            choose(
                blocks,
                Budget(kind, Fraction(1) if kind != "latency" else Fraction(1, 10**6)),
                other_bytes=5,
                table=table,
            )
        named = str(caught.value).split("must be at least ")[1].split(",")[0]
        found = choose(blocks, Budget.parse(f"{kind}={named}"), other_bytes=5, table=table)
        assert found.cost == found.front[0][0]


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        ("mean_bits=6", "mean_bits", 6),
        ("mean_bits=6.1", "mean_bits", Fraction(61, 10)),
        ("bytes=90MB", "bytes", 90_000_000),
        ("bytes=1.5kB", "bytes", 1500),
        ("bytes=2e6", "bytes", 2_000_000),
        ("latency=12ms", "latency", Fraction(12, 1000)),
        ("latency=.5", "latency", Fraction(1, 2)),
    ],
)
def test_a_budget_is_read_exactly(text, kind, limit):
    assert Budget.parse(text) == Budget(kind, Fraction(limit))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean_bit=6", r"mean_bits=N, bytes=N, latency=N, got 'mean_bit=6' \(did you mean 'mean_b"),
        ("6", "must be one of mean_bits=N"),
        ("mean_bits", "must be one of mean_bits=N"),
        ("mean_bits=", "mean_bits must be a decimal number, got ''"),
        ("mean_bits=six", "mean_bits must be a decimal number, got 'six'"),
        ("mean_bits=6bits", "mean_bits must be a decimal number, got '6bits'"),
        ("mean_bits=-6", "mean_bits must be a decimal number, got '-6'"),
        ("bytes=90MiB", "bytes must be a decimal number, alone or in kB, MB, GB, got '90MiB'"),
        ("bytes=0", "bytes must be positive, got 0"),
        ("latency=1min", "alone or in s, ms, us, got '1min'"),
        ("mean_bits=0", r"mean_bits must lie in \[1, 16\], got 0"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)
