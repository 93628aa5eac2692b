"""Target widths under a budget: the choice, what it costs, and the training that follows it."""

import copy
import dataclasses
import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from conftest import (
    assert_same,
    assert_simulated,
    batch,
    loss_of,
    tiny_llama,
    train_step,
    weights,
    wrap,
)
from reference import quantize as reference
from torch import nn

import moq
from moq._C import Error, ParetoFront
from moq.budget import Budget, LatencyTable, served_bits
from moq.cli import main
from moq.inspect import describe_checkpoint
from moq.sensitivity import Sensitivity, normalise
from moq.target_bits import Candidates, choose

STEPS = 20


def traces(model_blocks, values, measure="trace") -> Sensitivity:
    """A measurement that nobody made."""
    return Sensitivity(
        measure=measure,
        blocks=tuple(model_blocks),
        values=tuple(values),
        normalised=normalise(values),
        standard_error=(0.0,) * len(values),
        products=1,
        seconds=0.0,
        converged=True,
    )


def measured(decoder, values=(2.0, 0.5), total_steps=STEPS, model=None, **config):
    """An optimizer whose layers have the given traces."""
    model = model or decoder(layers=len(values))
    optimizer = wrap(model, config, total_steps)
    optimizer.apply_sensitivity(traces([f"layers.{i}" for i in range(len(values))], values))
    return model, optimizer


def best(choice, costs, limit):
    """The least loss of all choices whose cost keeps to a limit, by trying every one."""
    losses = [block.losses for block in choice.blocks]
    options = itertools.product(*(range(len(block.widths)) for block in choice.blocks))
    return min(
        sum((losses[block][option] for block, option in enumerate(picked)), 0.0)
        for picked in options
        if sum(costs[block][option] for block, option in enumerate(picked)) <= limit
    )


# ---------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize("seed", range(200))
def test_no_other_choice_loses_less_within_the_budget(seed):
    torch.manual_seed(seed)
    blocks = []
    for index in range(int(torch.randint(1, 6, ()))):
        widths = tuple(sorted(torch.randperm(15)[: int(torch.randint(1, 5, ()))].add(2).tolist()))
        errors = tuple(torch.rand(len(widths), dtype=torch.float64).tolist())
        size = int(torch.randint(1, 1000, ()))
        sizes = tuple(bits * size // 8 + 3 for bits in widths)
        trace = float(torch.randn((), dtype=torch.float64))
        blocks.append(Candidates(f"h.{index}", trace, size, widths, errors, sizes))
    total = sum(block.num_weights for block in blocks)
    bits = [[width * block.num_weights for width in block.widths] for block in blocks]
    for limit in (Fraction(sum(map(min, bits)), total), Fraction(8), Fraction(21, 2)):
        if limit * total < sum(map(min, bits)):
            continue
        choice = choose(blocks, Budget("mean_bits", limit))
        assert choice.cost <= float(limit)
        assert choice.mean_bits == pytest.approx(choice.cost)
        assert choice.loss == best(choice, bits, limit * total)
    sizes = [list(block.bytes) for block in blocks]
    limit = sum(map(min, sizes)) + int(torch.randint(2000, ()))
    choice = choose(blocks, Budget("bytes", Fraction(limit + 777)), other_bytes=777)
    assert choice.cost <= limit + 777
    assert choice.loss == best(choice, sizes, limit)


@pytest.mark.parametrize("size", [3, 48])
def test_the_loss_is_the_mean_increase_by_errors_that_know_nothing_of_the_hessian(size):
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(size, size, generator=generator, dtype=torch.float64)
    hessian = half @ half.T
    errors = 0.01 * torch.randn(20_000, size, generator=generator, dtype=torch.float64)
    increases = 0.5 * (errors @ hessian * errors).sum(1)
    squared = errors.square().sum(1).mean().item()
    block = Candidates("h.0", hessian.trace().item(), size, (4,), (squared,), (1,))
    standard_error = increases.std().item() / math.sqrt(len(increases))
    assert abs(block.losses[0] - increases.mean().item()) <= 4 * standard_error
    assert standard_error <= 0.02 * block.losses[0]


def test_a_large_block_bears_the_squared_error_of_a_small_one_of_equal_trace():
    small, large = (Candidates(f"h.{n}", 2.0, n, (4, 8), (1.0, 0.0), (n, 2 * n)) for n in (10, 40))
    assert [block.losses for block in (small, large)] == [(0.1, 0.0), (0.025, 0.0)]
    choice = choose([small, large], Budget("bytes", Fraction(70)))
    assert choice.bits == (8, 4)


def test_the_front_and_the_widths_behind_it_agree(decoder):
    _, optimizer = measured(decoder, (3.0, 0.1, 1.0, 2.0))
    choice = optimizer.choose_target_bits(mean_bits=6)
    total = sum(block.num_weights for block in choice.blocks)
    for (cost, loss), (dearer, lower) in itertools.pairwise(choice.front):
        assert cost < dearer and loss > lower
    for point, (cost, loss) in enumerate(choice.front):
        bits = choice.front_bits(point)
        used = sum(b * c.num_weights for b, c in zip(bits, choice.blocks, strict=True))
        lost = [
            block.losses[block.widths.index(b)]
            for b, block in zip(bits, choice.blocks, strict=True)
        ]
        assert cost == used / total
        assert loss == pytest.approx(sum(lost))
    assert choice.front[0][0] == 4 and choice.front[-1][0] == 16
    assert (choice.cost, choice.loss) in choice.front


@pytest.mark.parametrize(
    "grid",
    [
        {},
        {"mode": "asymmetric", "granularity": "per_tensor"},
        {"granularity": "per_group", "group_size": 4},
        {"scale": "mse"},
    ],
    ids=["symmetric", "asymmetric", "groups", "mse"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squared_errors_are_those_of_the_grid(decoder, grid, dtype):
    model = decoder(dtype, layers=1)
    originals = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    _, optimizer = measured(decoder, (1.0,), model=model, **grid)
    choice = optimizer.choose_target_bits(mean_bits=8, widths=[3, 8])
    grid = {"scale_rule" if key == "scale" else key: value for key, value in grid.items()}
    for bits, found in zip((3, 8), choice.blocks[0].squared_errors, strict=True):
        expected = 0.0
        for name in optimizer.num_bits:
            exact = reference.fake_quantize(originals[name], bits, scale_dtype=dtype, **grid)
            error = exact.to(dtype).double() - originals[name].double()
            expected += float(error.square().sum())
        assert found == pytest.approx(expected, rel=1e-6)


def test_learned_scales_keep_their_magnitude(decoder):
    config = {"simulate": "autograd", "scale": "learned"}
    model, optimizer = measured(decoder, (1.0, 1.0), **config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("absmax"):
                p.mul_(0.25)
    clipped = optimizer.choose_target_bits(mean_bits=8, widths=[8]).loss
    _, plain = measured(decoder, (1.0, 1.0))
    assert clipped > 100 * plain.choose_target_bits(mean_bits=8, widths=[8]).loss


# ---------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"mode": "asymmetric"},
        {"granularity": "per_group", "group_size": 4},
        {"rules": [{"match": "*.mlp.*", "activations": "dynamic"}]},
    ],
    ids=["symmetric", "asymmetric", "groups", "activations"],
)
def test_bytes_are_those_of_the_exported_tensors(tmp_path, config, dtype):
    model = llama(dtype)
    optimizer = probed_llama(model, config | {"schedule": {"finish_at": 0.5}}, total_steps=4)
    most = optimizer.choose_target_bits(bytes=10**9)
    mixed = next(i for i in range(len(most.front)) if len(set(most.front_bits(i))) > 1)
    choice = optimizer.choose_target_bits(bytes=int(most.front[mixed][0]))
    assert choice.bits == most.front_bits(mixed)
    for _ in range(3):
        model(**tokens(1)).loss.backward()
        optimizer.step()
    optimizer.export(tmp_path / "out")
    found = describe_checkpoint(tmp_path / "out")
    assert found["bytes"] == choice.cost
    assert found["mean_bits"] == pytest.approx(choice.mean_bits)
    assert found["history"]["target_bits"] == choice.target_bits


BENCH = {
    "context": 256,
    "batch": 2,
    "decode_tokens_per_second": 200.0,
    "architecture": "llama",
    "device": "cpu",
    "weights": "int8",
    "head": "float32",
    "weight_bytes": 100,
}


def write_table(path, *entries, lines=True):
    entries = [BENCH | entry for entry in entries]
    path.write_text("\n".join(map(json.dumps, entries)) if lines else json.dumps(entries))
    return path


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


# ---------------------------------------------------------------------------------- the training


def test_the_training_ends_at_the_chosen_widths(decoder):
    model, optimizer = measured(decoder, (3.0, 0.1), start_bits=9)
    before = weights(model)
    choice = optimizer.choose_target_bits(mean_bits=6)
    assert choice.target_bits == {"layers.0": 8, "layers.1": 4}
    assert_same(weights(model), before)
    for step in range(STEPS):
        train_step(model, optimizer, step)
        assert_simulated(optimizer)
    assert optimizer.num_bits["layers.0.q_proj.weight"] == 8
    assert optimizer.num_bits["layers.1.down_proj.weight"] == 4
    assert optimizer.schedule().plan()[1][-1] == (12, 4)  # finish_at is met


@pytest.mark.parametrize("at", [0, 6, 15])
def test_a_resumed_run_is_that_of_one_that_never_stopped(decoder, at):
    config = {"start_bits": 9, "rounding": "stochastic"}
    model, optimizer = measured(decoder, (3.0, 0.1), **config)
    optimizer.choose_target_bits(mean_bits=6)
    for step in range(at):
        train_step(model, optimizer, step)
    state = json.loads(json.dumps(optimizer.state_dict()["param_groups"][0]["moq"]))
    assert json.loads(state)["target_bits"] == {"layers.0": 8, "layers.1": 4}
    twin = decoder()
    resumed = wrap(twin, config, STEPS)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(at, STEPS):
        train_step(model, optimizer, step)
        train_step(twin, resumed, step)
    assert resumed.schedule().plan() == optimizer.schedule().plan()
    assert_same(weights(twin), weights(model))
    assert (
        resumed.state_dict()["param_groups"][0]["moq"]
        == (optimizer.state_dict()["param_groups"][0]["moq"])
    )


def test_a_state_without_a_choice_ends_at_the_configured_widths(decoder):
    _, plain = measured(decoder, (3.0, 0.1))
    _, optimizer = measured(decoder, (3.0, 0.1))
    optimizer.choose_target_bits(mean_bits=6)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.schedule().plan() == plain.schedule().plan()


def test_a_second_choice_starts_from_the_configuration(decoder):
    _, optimizer = measured(decoder, (3.0, 0.1))
    first = optimizer.choose_target_bits(mean_bits=4)
    assert set(first.bits) == {4}
    second = optimizer.choose_target_bits(mean_bits=16)
    assert set(second.bits) == {16}
    assert [drops[-1][1] for drops in optimizer.schedule().plan()] == [16, 16]


def test_a_choice_after_drops_is_refused_unless_they_stand(decoder):
    model, optimizer = measured(decoder, (3.0, 0.1))
    for step in range(10):
        train_step(model, optimizer, step)
    plan = optimizer.schedule().plan()
    with pytest.raises(ValueError, match="choose_target_bits: the schedule must agree with what"):
        optimizer.choose_target_bits(mean_bits=12)
    assert optimizer.schedule().plan() == plan
    assert optimizer.choose_target_bits(mean_bits=8, widths=[8]).mean_bits == 8


def test_a_later_measurement_keeps_the_chosen_widths(decoder):
    _, optimizer = measured(decoder, (3.0, 0.1))
    optimizer.choose_target_bits(mean_bits=6)
    optimizer.apply_sensitivity(traces(["layers.0", "layers.1"], (0.0, 1.0)))
    assert [drops[-1][1] for drops in optimizer.schedule().plan()] == [8, 4]


def test_added_parameters_keep_to_the_configuration(decoder):
    model = decoder()
    late = list(model.layers[1].parameters())
    rest = [p for p in model.parameters() if all(p is not other for other in late)]
    with pytest.warns(UserWarning, match="in no param group"):
        optimizer = moq.MoQOptimizer(
            torch.optim.AdamW(rest), model, {}, total_steps=STEPS, verbose=False
        )
    optimizer.apply_sensitivity(traces(["layers.0"], (1.0,)))
    optimizer.choose_target_bits(mean_bits=4)
    optimizer.add_param_group({"params": late})
    assert [drops[-1][1] for drops in optimizer.schedule().plan()] == [4, 8]


def test_a_schedule_that_cannot_finish_with_the_choice_is_refused(decoder):
    schedule = {"period": 1, "growth": 1.0}
    rule = {"sensitivity": {"rule": "stepped"}}
    _, optimizer = measured(decoder, (1.0, 1.0), 45, schedule=schedule, **rule)
    plan = optimizer.schedule().plan()
    with pytest.raises(Error, match="every block must reach its target by total_steps"):
        optimizer.choose_target_bits(mean_bits=4)
    assert optimizer.schedule().plan() == plan
    assert "target_bits" not in str(optimizer._target_bits)


def test_a_table_can_end_early(decoder):
    optimizer = wrap(decoder(), {"schedule": {"table": {0: 16, 5: 12, 9: 8}}}, STEPS)
    found = traces(["layers.0", "layers.1"], (5.0, 0.1))
    choice = optimizer.choose_target_bits(mean_bits=10, widths=[4, 8, 12], sensitivity=found)
    assert [block.widths for block in choice.blocks] == [(8, 12)] * 2
    assert optimizer.schedule().plan() == [[(0, 16), (5, 12)], [(0, 16), (5, 12), (9, 8)]]


def test_frozen_and_ternary_blocks_keep_their_width(decoder):
    model = decoder(layers=3)
    model.layers[0].requires_grad_(False)
    rules = [{"match": "layers.1.*", "mode": "ternary"}]
    optimizer = wrap(model, {"rules": rules}, STEPS)
    optimizer.probe(lambda ids: loss_of(model, ids), [batch(50)], progress=False, max_cost=None)
    choice = optimizer.choose_target_bits(mean_bits=16)
    assert choice.bits == (8, 2, 16)
    assert choice.blocks[0].trace is None and choice.blocks[0].losses == (0.0,)


def test_a_block_without_curvature_gets_the_cheapest_width(decoder):
    _, optimizer = measured(decoder, (0.0, 1.0))
    assert optimizer.choose_target_bits(mean_bits=16).bits == (4, 16)


def test_start_bits_bound_what_is_offered(decoder):
    rules = [{"match": "layers.0.*", "start_bits": 8, "target_bits": 8}]
    _, optimizer = measured(decoder, (9.0, 1.0), rules=rules)
    assert optimizer.choose_target_bits(mean_bits=16).bits == (8, 16)


def test_an_early_export_is_measured_by_the_chosen_widths(decoder, tmp_path):
    model, optimizer = measured(decoder, (3.0, 0.1), start_bits=9)
    optimizer.choose_target_bits(mean_bits=6)
    with pytest.warns(UserWarning, match="have not reached .*at 9 of 8 bits"):
        optimizer.export(tmp_path / "out")
    assert model is optimizer.model


# ---------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "one of mean_bits, bytes and latency must be given, got none"),
        ({"mean_bits": 4, "bytes": 9}, ValueError, "got mean_bits and bytes"),
        ({"mean_bits": "6"}, TypeError, "mean_bits must be a number, got '6'"),
        ({"mean_bits": True}, TypeError, "mean_bits must be a number, got True"),
        ({"mean_bits": math.nan}, ValueError, "mean_bits must be finite, got nan"),
        ({"mean_bits": 17}, ValueError, r"mean_bits must lie in \[1, 16\], got 17"),
        ({"bytes": -5}, ValueError, "bytes must be positive, got -5"),
        ({"latency": 1.0}, ValueError, "a latency table must be given with a latency"),
        ({"mean_bits": 6, "latency_table": "x"}, ValueError, "got mean_bits with one"),
        ({"mean_bits": 6, "widths": []}, ValueError, "at least one width, got none"),
        ({"mean_bits": 6, "widths": [1]}, ValueError, r"integers in \[2, 16\], got 1"),
        ({"mean_bits": 6, "widths": [4.0]}, ValueError, r"integers in \[2, 16\], got 4.0"),
        ({"mean_bits": 3.9}, ValueError, "mean_bits must be at least 4, the smallest feasible"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(decoder, options, error, message):
    _, optimizer = measured(decoder)
    plan = optimizer.schedule().plan()
    with pytest.raises(error, match=message):
        optimizer.choose_target_bits(**options)
    assert optimizer.schedule().plan() == plan


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


def test_a_measurement_is_needed(decoder):
    optimizer = wrap(decoder(), {}, STEPS)
    with pytest.raises(ValueError, match="must have been measured, got no measurement: call opt"):
        optimizer.choose_target_bits(mean_bits=6)
    optimizer.apply_sensitivity(traces(["layers.0", "layers.1"], (1.0, 1.0), "eigenvalue"))
    with pytest.raises(ValueError, match="must have been measured, got eigenvalues"):
        optimizer.choose_target_bits(mean_bits=6)


def test_a_measurement_of_other_blocks_is_refused(decoder):
    optimizer = wrap(decoder(), {}, STEPS)
    with pytest.raises(ValueError, match="must have the 2 blocks that train"):
        optimizer.choose_target_bits(mean_bits=6, sensitivity=traces(["layers.7"], (1.0,)))


def test_a_trace_that_is_not_finite_is_refused(decoder):
    optimizer = wrap(decoder(), {}, STEPS)
    found = traces(["layers.0", "layers.1"], (1.0, math.nan))
    with pytest.raises(ValueError, match="the trace of 'layers.1' must be finite, got nan"):
        optimizer.choose_target_bits(mean_bits=6, sensitivity=found)


def test_nothing_to_choose_for_is_an_error():
    model = nn.Sequential(nn.Embedding(4, 4))
    with pytest.warns(UserWarning, match="no weight is quantized"):
        optimizer = wrap(model, {}, STEPS)
    with pytest.raises(ValueError, match="at least one parameter must be quantized"):
        optimizer.choose_target_bits(mean_bits=6, sensitivity=traces([], ()))


def test_masters_are_not_chosen_for(decoder):
    _, optimizer = measured(decoder)
    with optimizer.full_precision(), pytest.raises(RuntimeError, match="outside full_precision"):
        optimizer.choose_target_bits(mean_bits=6)


def test_the_solver_names_the_block_and_the_bound():
    with pytest.raises(Error, match=r"costs of 'a' must lie in \[0, 2\^62\], got -1"):
        ParetoFront(["a"], [[(-1, 0.0)]])
    with pytest.raises(Error, match="one list a name, got 1 for 2"):
        ParetoFront(["a", "b"], [[(1, 0.0)]])
    with pytest.raises(Error, match="at least 1, the smallest feasible one, got 0"):
        ParetoFront(["a"], [[(1, 0.0)]]).within(0)


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


# ---------------------------------------------------------------------------------- what one sees


def test_the_choice_is_printed_and_drawn(decoder, tmp_path, capsys):
    model = decoder()
    optimizer = wrap(model, {}, STEPS, verbose=True)
    optimizer.apply_sensitivity(traces(["layers.0", "layers.1"], (3.0, 0.0)))
    capsys.readouterr()
    choice = optimizer.choose_target_bits(mean_bits=12)
    printed = capsys.readouterr().out
    assert printed.startswith("moq: Target bits under 12 bits a quantized weight: 10 used")
    row = next(line for line in printed.splitlines() if "layers.0" in line).split()
    assert row[1:3] == [str(choice.blocks[0].num_weights), "3"] and row[-1] == "16"
    assert sum(line.rstrip().endswith("*") for line in printed.splitlines()) == 1
    pytest.importorskip("matplotlib")
    choice.plot(tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="must end in .png or .svg"):
        choice.plot(tmp_path / "front.jpg")


def llama(dtype=torch.float32):
    return tiny_llama(
        dtype,
        layers=3,
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )


def tokens(seed):
    row = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": row, "labels": row}


def probed_llama(model, config, total_steps=STEPS):
    optimizer = wrap(model, config, total_steps, lr=1e-4)
    optimizer.probe(lambda row: model(**row).loss, [tokens(9)], progress=False, max_cost=None)
    return optimizer


@pytest.fixture
def run(tmp_path):
    """A saved run whose layers were measured, and its optimizer."""
    optimizer = probed_llama(llama(), {"granularity": "per_group", "group_size": 16})
    optimizer.save(tmp_path / "run")
    return str(tmp_path / "run"), optimizer


def test_the_command_chooses_as_the_training_does(run, tmp_path, capsys):
    directory, optimizer = run
    expected = optimizer.choose_target_bits(mean_bits=6)
    arguments = ["schedule", "--run", directory, "--budget", "mean_bits=6"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == expected.to_dict() | {"plan": None}
    pytest.importorskip("matplotlib")
    assert main([*arguments, "--plot", str(tmp_path / "front.png")]) == 0
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert str(expected) in capsys.readouterr().out
    assert main(["schedule", "--run", directory, "--budget", "bytes=1MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == optimizer.choose_target_bits(bytes=10**6).to_dict() | {"plan": None}


def test_the_command_plans_with_the_chosen_widths(run, tmp_path, capsys):
    directory, optimizer = run
    config = tmp_path / "moq.json"
    config.write_text('{"granularity": "per_group", "group_size": 16}')
    choice = optimizer.choose_target_bits(mean_bits=6)
    arguments = ["schedule", str(config), "--steps", str(STEPS), "--run", directory]
    arguments += ["--budget", "mean_bits=6"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target_bits"] == choice.target_bits
    plans = [
        [(width["latest"], width["bits"]) for width in block["widths"]]
        for block in found["plan"]["blocks"]
    ]
    assert plans == optimizer.schedule().plan()
    assert main(arguments) == 0
    assert "First step at each bit width, of 20 steps" in capsys.readouterr().out


def test_the_command_reads_a_latency_table(run, tmp_path, capsys):
    directory, _ = run
    table = write_table(tmp_path / "bench.json", {}, {"weights": "int4", "batch": 2})
    arguments = ["schedule", "--run", directory, "--budget", "latency=9ms"]
    assert main([*arguments, "--latency-table", str(table)]) == 1
    assert (
        "latency must be at least 0.009999999, the smallest feasible budget"
        in capsys.readouterr().err
    )
    arguments[-1] = "latency=10ms"
    assert main([*arguments, "--latency-table", str(table), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(block["widths"] == [4, 8] for block in found["blocks"])


def test_the_command_refuses_other_blocks_than_those_measured(run, tmp_path, capsys):
    directory, _ = run
    config = tmp_path / "moq.json"
    config.write_text('{"rules": [{"match": "*.mlp.*", "target_bits": 4}]}')
    assert main(["schedule", str(config), "--run", directory, "--budget", "mean_bits=6"]) == 1
    assert "must hold the same weights as those of the run" in capsys.readouterr().err


def test_the_command_refuses_a_run_without_traces(tmp_path, capsys):
    optimizer = wrap(llama(), {}, STEPS)
    optimizer.save(tmp_path / "run")
    arguments = ["schedule", "--run", str(tmp_path / "run"), "--budget", "mean_bits=6"]
    assert main(arguments) == 1
    assert "traces of the blocks must have been measured" in capsys.readouterr().err


def test_the_command_refuses_a_run_that_does_not_name_its_blocks(run, tmp_path, capsys):
    directory, _ = run
    path = tmp_path / "run" / "run.json"
    saved = json.loads(path.read_text())
    del saved["history"]["blocks"]
    path.write_text(json.dumps(saved))
    assert main(["schedule", "--run", directory, "--budget", "mean_bits=6"]) == 1
    assert "history.blocks must name the block of every" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "mean_bits=6"], "--budget needs --run RUN"),
        ([], "CONFIG and --steps are needed"),
        (["x"], "CONFIG and --steps are needed"),
        (["--steps", "9"], "CONFIG and --steps are needed"),
        (["x", "--steps", "9", "--latency-table", "t"], "--latency-table needs --budget"),
        (["--run", "x", "--budget", "bytes=9", "--steps", "9"], "--steps with --budget needs a"),
        (["--run", "x", "--deepspeed"], "--deepspeed needs a CONFIG"),
    ],
)
def test_the_command_refuses_a_line_that_it_cannot_use(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["schedule", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_traces_that_are_noise_are_marked_and_warned_of(decoder, capsys):
    model = decoder(layers=3)
    optimizer = wrap(model, {}, STEPS, verbose=True)
    found = traces([f"layers.{i}" for i in range(3)], (2.0, -0.5, 0.0))
    found = dataclasses.replace(found, standard_error=(0.3, 0.6, 0.0), converged=False)
    choice = optimizer.choose_target_bits(mean_bits=8, sensitivity=found)
    assert [block.is_noise for block in choice.blocks] == [False, True, False]
    assert choice.to_dict()["blocks"][1]["trace_error"] == 0.6
    assert choice.to_dict()["warning"] == choice.warning
    assert choice.warning.startswith("1 of 3 traces are no larger than their standard errors")
    text = capsys.readouterr().out
    assert "2 ± 0.3" in text and "-0.5 ± 0.6" in text
    assert text.count("1 of 3 traces are no larger than their standard errors (layers.1)") == 1
    sure = dataclasses.replace(found, standard_error=(0.3, 0.4, 0.0))
    certain = optimizer.choose_target_bits(mean_bits=8, sensitivity=sure)
    assert certain.warning is None and certain.to_dict()["warning"] is None


@pytest.mark.parametrize("text", ["4;8", "", "4,", "four"])
def test_the_command_refuses_widths_that_are_no_list(run, text, capsys):
    directory, _ = run
    arguments = ["schedule", "--run", directory, "--budget", "mean_bits=6", "--widths", text]
    assert main(arguments) == 1
    assert "--widths must be bits between commas" in capsys.readouterr().err
