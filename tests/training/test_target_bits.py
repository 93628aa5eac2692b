"""Target widths under a budget: the choice, what it costs, and the training that follows it."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import operator
from fractions import Fraction

import pytest
import torch
from measured_runs import STEPS, llama, measured, probed_llama, tokens, traces
from reference import quantize as reference
from tiny_decoder import (
    assert_same,
    assert_simulated,
    batch,
    loss_of,
    train_step,
    weights,
    wrap,
)
from torch import nn

import moq
from moq._C import Error, ParetoFront
from moq.budget import Budget
from moq.inspect import describe_checkpoint
from moq.target_bits import Candidates, choose


def best(choice, costs, limit):
    """The least loss of all choices whose cost keeps to a limit, by trying every one."""
    losses = [block.losses for block in choice.blocks]
    options = itertools.product(*(range(len(block.widths)) for block in choice.blocks))
    return min(  # not by sum(), which rounds otherwise from Python 3.12 on
        functools.reduce(operator.add, map(operator.getitem, losses, picked), 0.0)
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


def test_by_trace_a_large_block_bears_no_more_than_a_small_one(decoder):
    def blocks(objective):
        return [
            Candidates(f"h.{n}", 2.0, n, (4, 8), (1.0, 0.0), (n, 2 * n), objective=objective)
            for n in (10, 40)
        ]

    assert [block.losses for block in blocks("trace")] == [(2.0, 0.0)] * 2
    for objective, bits in {"mean_eigenvalue": (8, 4), "trace": (4, 8)}.items():
        small, large = blocks(objective)
        small = dataclasses.replace(small, squared_errors=(0.5, 0.0))
        choice = choose([small, large], Budget("bytes", Fraction(90)))
        assert choice.bits == bits and choice.to_dict()["objective"] == objective

    _, optimizer = measured(decoder, (3.0, 0.1, 1.0, 2.0))
    choice = optimizer.choose_target_bits(mean_bits=6, objective="trace")
    assert "loss: |trace| * squared rounding error" in str(choice)
    bits = [[width * block.num_weights for width in block.widths] for block in choice.blocks]
    total = sum(block.num_weights for block in choice.blocks)
    assert choice.loss == best(choice, bits, 6 * total)
    for block in choice.blocks:
        assert block.losses == tuple(abs(block.trace) * error for error in block.squared_errors)
    with pytest.raises(
        ValueError, match="objective must be 'mean_eigenvalue' or 'trace', got 'sum'"
    ):
        optimizer.choose_target_bits(mean_bits=6, objective="sum")


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
