"""How often a training measures, and what becomes of what later measurements find."""

import copy
import json
import math

import pytest
from probe_clock import BATCHES, differenced, timed
from tiny_decoder import (
    FALLING,
    OnceDifferentiable,
    assert_same,
    loss_of,
    masters,
    train_step,
    weights,
    wrap,
)


def trained(decoder, config, steps, saved=None):
    """Trains with regular measurements; from the states of model and optimizer, if given."""
    model = decoder()
    optimizer = wrap(model, config, total_steps=15)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    optimizer.probe_regularly(lambda tokens: loss_of(model, tokens), BATCHES, max_products=4)
    for step in range(optimizer.steps, steps):
        train_step(model, optimizer, step)
    return model, optimizer


ALWAYS = FALLING | {"sensitivity": {"max_cost": None}}


def test_it_is_measured_until_the_last_drop_and_at_most_as_often(decoder):
    _, optimizer = trained(decoder, ALWAYS, 15)
    steps = [entry["step"] for entry in optimizer.history]
    assert steps[0] == 0 and 3 <= len(steps) <= 11
    assert steps == sorted(set(steps)) and steps[-1] < 12  # finish_at
    assert set(optimizer.num_bits.values()) == {4}


def test_a_resumed_training_measures_when_the_uninterrupted_one_does(decoder):
    _, whole = trained(decoder, ALWAYS, 15)
    model, first = trained(decoder, ALWAYS, 5)
    saved = (weights(model), copy.deepcopy(first.state_dict()))
    state = json.loads(first.state_dict()["param_groups"][0]["moq"])
    assert state["probes"]["cadence"] and state["probes"]["spent"] > 0
    before = len(first.history)
    _, resumed = trained(decoder, ALWAYS, 5, saved)
    assert len(resumed.history) == before  # not at once
    _, resumed = trained(decoder, ALWAYS, 15, saved)
    assert_same(masters(resumed), masters(whole))
    assert resumed.schedule().plan() == whole.schedule().plan()
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert (a["step"], tuple(a["values"])) == (b["step"], tuple(b["values"]))


def test_the_budget_decides_how_often(decoder, clock):
    model = decoder()
    counts = []
    for max_cost in (0.02, 0.1, 0.2):
        optimizer = wrap(model, differenced(max_cost=max_cost, tolerance=1e-6), total_steps=1000)
        optimizer.probe_regularly(timed(model, clock), BATCHES)
        cadence = optimizer._probes.state.cadence
        cost = optimizer.history[0]["cost"]
        assert (1 + len(cadence)) * cost["seconds"] <= max_cost * 1000
        counts.append(len(cadence))
        del optimizer
        model = decoder()
    assert counts[0] == 0 < counts[1] <= counts[2]


def test_what_the_budget_has_no_room_for_is_left_out_and_said(decoder, clock, capsys):
    model = decoder()
    config = differenced(max_cost=0.3, tolerance=1e-6, max_products=4)
    optimizer = wrap(model, config, total_steps=100, verbose=True)
    loss_fn = timed(model, clock)
    optimizer.probe_regularly(loss_fn, BATCHES)
    assert optimizer._probes.state.cadence
    optimizer._probes.state.cadence = [1]
    optimizer._probes.state.spent = 29.0
    train_step(model, optimizer, 0)
    assert "step 1: not measured again: MoQOptimizer.probe: sensitivity.max_cost" in (
        capsys.readouterr().out
    )
    assert len(optimizer.history) == 1


def test_a_later_measurement_that_fails_warns_and_training_goes_on(decoder):
    poison = []
    model = decoder()
    optimizer, twin = wrap(model, ALWAYS, 15), decoder()
    expected = wrap(twin, ALWAYS, 15)
    optimizer.probe_regularly(
        lambda tokens: loss_of(model, tokens) * (math.nan if poison else 1.0),
        BATCHES,
        max_products=4,
    )
    expected.probe(lambda tokens: loss_of(twin, tokens), BATCHES, max_products=4)
    poison.append(True)
    with pytest.warns(UserWarning, match="failed, and the plan stays as it is.*got nan"):
        for step in range(15):
            train_step(model, optimizer, step)
    for step in range(15):
        train_step(twin, expected, step)
    assert len(optimizer.history) == 1
    assert_same(weights(model), weights(twin))


def test_a_form_that_was_possible_once_is_a_first_choice_only(decoder, capsys):
    model = decoder()
    optimizer = wrap(model, ALWAYS, 15, verbose=True)
    fused = []

    def loss_fn(tokens):
        loss = loss_of(model, tokens)
        return loss + OnceDifferentiable.apply(fused[0]).sum() if fused else loss

    assert optimizer.probe(loss_fn, BATCHES, max_products=4).form == "exact"
    fused.append(model.layers[0].q_proj.weight)
    assert optimizer.probe(loss_fn, BATCHES, max_products=4).form == "finite_difference"
    assert capsys.readouterr().err.count("form 'exact' is not possible") == 1


def test_that_exact_products_are_not_possible_is_said_once(decoder, capsys):
    model = decoder()
    optimizer = wrap(model, ALWAYS, 15, verbose=True)

    def loss_fn(tokens):
        fused = OnceDifferentiable.apply(model.layers[0].q_proj.weight).sum()
        return loss_of(model, tokens) + fused

    for _ in range(2):
        optimizer.probe(loss_fn, BATCHES, max_products=4)
    assert capsys.readouterr().err.count("form 'exact' is not possible") == 1
    assert [entry["form"] for entry in optimizer.history] == ["finite_difference"] * 2
    resumed = wrap(decoder(), ALWAYS, 15, verbose=True)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed._probes.state.form == "finite_difference"
