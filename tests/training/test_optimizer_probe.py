"""Measuring and planning: optimizer.probe, the schedule, and what is printed of both."""

import copy
import json

import pytest
import torch
from tiny_decoder import (
    FALLING,
    OnceDifferentiable,
    assert_same,
    assert_simulated,
    batch,
    loss_of,
    train_step,
    weights,
    wrap,
)
from torch import nn

from moq import MoQOptimizer
from moq._C import Error, Schedule
from moq.reporting import compact_names
from moq.sensitivity import measure, quantized_blocks

STEPS = 15


def probed(decoder, at: int, **config):
    model = decoder()
    optimizer = wrap(model, FALLING | config, STEPS)
    for step in range(at):
        train_step(model, optimizer, step)
    found = optimizer.probe(
        lambda tokens: loss_of(model, tokens), [batch(50), batch(51)], max_cost=None
    )
    return model, optimizer, found


@pytest.mark.parametrize("measure", ["trace", "eigenvalue"])
def test_a_probe_measures_every_block_and_stretches_the_sensitive_ones(decoder, measure):
    _, optimizer, found = probed(decoder, 0, sensitivity={"measure": measure})
    assert found.measure == measure
    assert found.blocks == ("layers.0", "layers.1")
    assert max(found.normalised) == 1.0
    plan = dict(zip(optimizer.schedule().block_names, optimizer.schedule().plan(), strict=True))
    least, most = sorted(found.blocks, key=lambda b: found.normalised[found.blocks.index(b)])
    assert plan[least][-1][0] <= plan[most][-1][0] == 12  # finish_at is met exactly


@pytest.mark.parametrize("at", [0, 4])
def test_what_happens_is_the_plan_of_configuration_and_sensitivities(decoder, at):
    model, optimizer, found = probed(decoder, at)
    state = wrap(decoder(), FALLING, STEPS).schedule().state_dict()
    planned = Schedule.from_state_dict(
        state | {"measurements": [{"step": at, "sensitivities": list(found.normalised)}]}
    )
    for step in range(at, STEPS):
        expected = [planned.bits_at(block, step) for block in (0, 1)]
        assert optimizer.num_bits["layers.0.q_proj.weight"] == expected[0]
        assert optimizer.num_bits["layers.1.down_proj.weight"] == expected[1]
        assert_simulated(optimizer)
        train_step(model, optimizer, step)
    assert optimizer.schedule().plan() == planned.plan()


def test_a_probe_leaves_the_training_as_it_was(decoder):
    model, twin = decoder(), decoder()
    optimizer, untouched = wrap(model, FALLING, STEPS), wrap(twin, FALLING, STEPS)
    loss_of(model, batch(0)).backward()
    loss_of(twin, batch(0)).backward()
    before = weights(model)
    optimizer.probe(lambda tokens: loss_of(model, tokens), [batch(50)], max_cost=None)
    assert model.training
    assert_same(weights(model), before)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert optimizer.steps == untouched.steps == 0


def test_the_measurements_are_in_the_state_and_come_back(decoder):
    _, optimizer, found = probed(decoder, 3)
    state = optimizer.state_dict()
    record = json.loads(state["param_groups"][0]["moq"])
    assert record["history"][0]["step"] == 3
    assert tuple(record["history"][0]["values"]) == found.values
    resumed = wrap(decoder(), FALLING, STEPS)
    resumed.load_state_dict(state)
    assert resumed.history == record["history"]
    assert resumed.schedule().plan() == optimizer.schedule().plan()


def test_blocks_of_frozen_weights_are_not_measured_and_do_not_wait(decoder):
    model = decoder()
    model.layers[0].requires_grad_(False)
    optimizer = wrap(model, FALLING, STEPS)
    found = optimizer.probe(lambda tokens: loss_of(model, tokens), [batch(50)], max_cost=None)
    assert found.blocks == ("layers.1",)
    plan = optimizer.schedule().plan()
    assert plan[0][-1][0] < plan[1][-1][0] == 12


def test_both_measures_plan_by_the_trace_and_keep_the_eigenvalues(decoder):
    model, optimizer, found = probed(decoder, 0, sensitivity={"measure": "both"})
    _, by_trace, trace = probed(decoder, 0)
    assert found.values == trace.values
    assert optimizer.schedule().plan() == by_trace.schedule().plan()
    entry = optimizer.history[0]
    for name in ("eigenvalues", "residuals", "smallest", "largest"):
        assert len(entry[name]) == 2
    for low, high, top in zip(found.smallest, found.largest, found.eigenvalues, strict=True):
        assert low <= top <= high and abs(top) == max(high, -low)
    assert optimizer.choose_target_bits(mean_bits=6, widths=range(4, 10)).cost <= 6


def unaffected(optimizer, model, before, plan):
    """Says whether a measurement that failed has left no trace."""
    assert_same(weights(model), before)
    assert_simulated(optimizer)
    assert optimizer.history == [] and optimizer.schedule().plan() == plan
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    train_step(model, optimizer, 0)
    return optimizer.steps == 1


def kink(weight):
    """Sum of |w - w0|^1.5 at w0: finite, and flat, but infinitely curved."""
    return (weight - weight.detach()).abs().pow(1.5).sum()


def loss_of_another(model):
    twin = copy.deepcopy(model)
    return lambda tokens: loss_of(twin, tokens) + 0 * sum(p.sum() for p in model.parameters())


BAD_INPUT = {
    "a loss that is not a number": (
        lambda model: lambda tokens: loss_of(model, tokens) * float("nan"),
        lambda: [batch(50)],
        ValueError,
        "the loss of every batch must be finite, got nan for batch 0: look for labels",
    ),
    "an infinite loss": (
        lambda model: lambda tokens: loss_of(model, tokens) / 0.0,
        lambda: [batch(50)],
        ValueError,
        "must be finite, got inf for batch 0",
    ),
    "a second derivative that is infinite": (
        lambda model: lambda tokens: loss_of(model, tokens) + kink(model.layers[1].q_proj.weight),
        lambda: [batch(50)],
        Error,
        "the products must be finite, got .* in block layers.1",
    ),
    "an empty batch": (
        lambda model: lambda tokens: loss_of(model, tokens),
        lambda: [batch(50), batch(51)[:0]],
        ValueError,
        "every batch must hold data, got only empty tensors in batch 1",
    ),
    "no batch": (
        lambda model: lambda tokens: loss_of(model, tokens),
        lambda: [],
        ValueError,
        "batches must hold at least one batch, got none",
    ),
    "a batch instead of batches": (
        lambda model: lambda b: loss_of(model, b["ids"]),
        lambda: {"ids": batch(50), "mask": batch(51)},
        TypeError,
        r"batches must be an iterable of batches, got one batch alone, a dict with the keys "
        r"\['ids', 'mask'\]: put it into a list",
    ),
    "batches of other keys": (
        lambda model: lambda b: loss_of(model, b["ids"]),
        lambda: [{"ids": batch(50)}, {"tokens": batch(51)}],
        ValueError,
        r"the same keys .*got \['ids'\] on rank 0 and \['tokens'\] on rank 0",
    ),
    "a loss of another model": (
        lambda model: loss_of_another(model),
        lambda: [batch(50)],
        ValueError,
        "the loss must curve in some block, got 0 in all 2 .layers.0, layers.1.: does loss_fn call",
    ),
    "a model without second derivatives": (
        lambda model: (
            lambda tokens: (
                loss_of(model, tokens)
                + OnceDifferentiable.apply(model.layers[0].q_proj.weight).sum()
            )
        ),
        lambda: [batch(50)],
        NotImplementedError,
        "every operation must be twice differentiable, got OnceDifferentiableBackward, "
        "whose backward pass",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_and_training_goes_on(decoder, case):
    make_loss, make_batches, error, words = BAD_INPUT[case]
    model = decoder()
    optimizer = wrap(model, FALLING, STEPS)
    before, plan = weights(model), optimizer.schedule().plan()
    with pytest.raises(error, match=words):
        optimizer.probe(make_loss(model), make_batches(), form="exact", max_cost=None)
    assert unaffected(optimizer, model, before, plan)


def test_a_block_that_does_not_curve_the_loss_is_named_and_need_not_wait(decoder, capsys):
    model = decoder()
    optimizer = wrap(model, FALLING, STEPS, verbose=True)

    def loss_fn(tokens):
        x = model.layers[1](model.embedding(tokens))
        return model.lm_head(x).square().mean() + 0 * model.layers[0](x).sum()

    found = optimizer.probe(loss_fn, [batch(50)], max_cost=None)
    assert found.normalised == (0.0, 1.0)
    said = " ".join(capsys.readouterr().err.split())
    assert "the loss does not curve at all in layers.0: on these batches it may not" in said
    plan = optimizer.schedule().plan()
    assert plan[0][-1][0] < plan[1][-1][0] == 12


def test_nothing_to_probe_is_an_error(decoder):
    model = decoder()
    optimizer = wrap(model, {"rules": [{"match": "*", "exclude": True}]})
    with pytest.raises(ValueError, match="at least one parameter must be quantized"):
        optimizer.probe(lambda tokens: loss_of(model, tokens), [batch(50)], max_cost=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"schedule": {"table": {0: 9, 2: 4}}}, "must be finish_at or period.*got schedule.table"),
        ({"sensitivity": {"rule": "none"}}, "sensitivity.rule must be 'stepped' or 'linear'"),
    ],
)
def test_what_a_measurement_cannot_change_is_refused_before_it(decoder, config, message):
    optimizer = wrap(decoder(), FALLING | config, STEPS)
    with pytest.raises(ValueError, match=f"MoQOptimizer.probe: .*{message}"):
        optimizer.probe(pytest.fail, [batch(50)], max_cost=None)
    with pytest.raises(ValueError, match=f"MoQOptimizer.apply_sensitivity: .*{message}"):
        optimizer.apply_sensitivity(None)


def test_masters_are_not_measured(decoder):
    optimizer = wrap(decoder(), FALLING, STEPS)
    with optimizer.full_precision(), pytest.raises(RuntimeError, match="outside full_precision"):
        optimizer.probe(pytest.fail, [batch(50)], max_cost=None)


def test_a_finished_measurement_plans_as_a_probe_does(decoder):
    model, probed_optimizer, found = probed(decoder, 0)
    optimizer = wrap(decoder(), FALLING, STEPS)
    optimizer.apply_sensitivity(found)
    assert optimizer.schedule().plan() == probed_optimizer.schedule().plan()
    cost = probed_optimizer.history[0].pop("cost")
    assert cost["max_cost"] is None and cost["spent"] == cost["seconds"] > 0
    assert optimizer.history == probed_optimizer.history


def test_blocks_of_a_plain_model_are_those_of_its_training(decoder):
    config = FALLING | {"rules": [{"match": "layers.1.down_proj", "target_bits": 6}]}
    model = decoder()
    blocks = quantized_blocks(model, config)
    found = measure(model, blocks, lambda tokens: loss_of(model, tokens), [batch(50)])
    optimizer = wrap(model, config, STEPS)
    assert found.blocks == tuple(optimizer.schedule().block_names)
    optimizer.apply_sensitivity(found)
    assert optimizer.history[0]["values"] == found.values


def test_a_measurement_of_other_blocks_is_refused(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING, STEPS)
    for blocks in (None, {"layers.0": [model.layers[0].q_proj.weight]}):
        found = measure(model, blocks, lambda tokens: loss_of(model, tokens), [batch(50)])
        with pytest.raises(ValueError, match=r"the 2 blocks that train.*quantized_blocks"):
            optimizer.apply_sensitivity(found)
    assert optimizer.history == []


def test_every_sensitivity_is_printed(decoder, capsys):
    model = decoder(layers=30)
    optimizer = shown(model, FALLING)
    capsys.readouterr()
    found = optimizer.probe(
        lambda tokens: loss_of(model, tokens), [batch(50)], progress=False, max_cost=None
    )
    head, *rows, cost = capsys.readouterr().out.splitlines()
    assert "products (exact) over 1 batches in" in cost
    largest = max(found.values, key=abs)
    assert head == f"moq: step 0: sensitivity (trace) over the largest, {largest:.3g}:"
    words = " ".join(rows).split()
    expected = [f"{value:.2f}" for value in found.normalised]
    assert dict(zip(words[::2], words[1::2], strict=True)) == dict(
        zip(found.blocks, expected, strict=True)
    )
    assert len(rows) < 10
    assert max(map(len, rows)) <= 100


def shown(model: nn.Module, config: dict, total_steps: int = STEPS) -> MoQOptimizer:
    return MoQOptimizer(
        torch.optim.AdamW(model.parameters()), model, config, total_steps=total_steps
    )


def test_the_start_table_says_what_falls_where_and_when(decoder, capsys):
    rules = [{"match": "*.down_proj", "granularity": "per_group", "group_size": 4}]
    shown(decoder(layers=4), FALLING | {"rules": rules, "rounding": "stochastic"})
    output = capsys.readouterr().out
    assert "24 quantized parameters" in output
    row = next(line for line in output.splitlines() if "up_proj" in line)
    assert "layers.{0-3}.up_proj" in row
    assert "20 x 12" in row
    assert "default" in row
    assert "per_channel, stochastic" in row
    assert "9 -> 4" in row
    assert "arrives at step" in output
    assert row.split()[-3:] == ["3", "to", "12"]
    group_row = next(line for line in output.splitlines() if "down_proj" in line)
    assert "*.down_proj" in group_row
    assert "per_group of 4" in group_row


def test_one_line_is_printed_at_each_drop_and_none_between(decoder, capsys):
    model = decoder()
    optimizer = shown(model, FALLING | {"schedule": {"table": {0: 9, 2: 6, 5: 4}}})
    capsys.readouterr()
    lines = []
    for step in range(7):
        train_step(model, optimizer, step)
        lines.append(capsys.readouterr().out.splitlines())
    assert [len(line) for line in lines] == [0, 1, 0, 0, 1, 0, 0]
    assert lines[1] == ["moq: step 2: 9 -> 6 bits: layers.0, layers.1"]
    assert lines[4] == ["moq: step 5: 6 -> 4 bits: layers.0, layers.1"]


def test_lines_are_printed_above_a_progress_bar(decoder, capsys):
    from tqdm import tqdm

    model = decoder()
    optimizer = shown(model, FALLING | {"schedule": {"table": {0: 9, 1: 4}}})
    capsys.readouterr()
    for step in tqdm(range(2), mininterval=0):
        train_step(model, optimizer, step)
    out, err = capsys.readouterr()
    assert out == "moq: step 1: 9 -> 4 bits: layers.0, layers.1\n"
    assert "2/2" in err


def test_nothing_is_printed_when_told_so(decoder, capsys):
    model = decoder()
    optimizer = wrap(model, FALLING)
    for step in range(6):
        train_step(model, optimizer, step)
    optimizer.probe(lambda tokens: loss_of(model, tokens), [batch(50)], max_cost=None)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.fc"], "a.fc"),
        (["h.0.fc", "h.1.fc"], "h.{0-1}.fc"),
        (["h.3.fc", "h.0.fc", "h.1.fc", "h.10.fc"], "h.{0-1,3,10}.fc"),
        (["0", "2", "4"], "{0,2,4}"),
    ],
)
def test_names_that_differ_in_a_number_are_joined(names, joined):
    assert compact_names(names) == joined
