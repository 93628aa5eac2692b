"""max_cost: how much is measured, how often, and what it takes, in time that the test makes."""

import copy
import json
import math
import random
import traceback

import pytest
from tiny_decoder import (
    FALLING,
    OnceDifferentiable,
    assert_same,
    batch,
    loss_of,
    masters,
    train_step,
    weights,
    wrap,
)

from moq import estimators, measurement, probe_cost, probing, record, sensitivity
from moq.probe_cost import BudgetTooSmallError, Cost, Size, fit
from moq.progress import ProductBar


def test_the_slowest_rank_decides_how_much_is_measured(decoder, monkeypatch):
    model = decoder()
    own = measurement.Measurement(
        model=model, blocks=sensitivity.find_blocks(model), batches=BATCHES[:1], counts=[1, 1],
        measure="trace", tolerance={"trace": 0.1}, max_products={"trace": 12}, max_seconds=20.0,
        seed=0, group=None, sharded=False, started=0.0,
    )  # fmt: skip
    size = own._size(Cost(0.0, 1.0), 1, False, 0.0, ProductBar("", False))
    assert size == Size(1, {"trace": 6})
    # The other rank has a product that takes four seconds, and two have passed there.
    monkeypatch.setattr(own, "_gather", lambda value: [value, (Cost(0.0, 4.0), 1, 2.0)])
    size = own._size(Cost(0.0, 1.0), 1, False, 0.0, ProductBar("", False))
    assert size == Size(1, {"trace": 4})


def test_everything_is_measured_where_there_is_room():
    assert fit([3, 2], {"trace": 12}, Cost(1, 1), 4, None) == Size(3, {"trace": 2})
    assert fit([3], {"trace": 12}, Cost(1, 1), 4, 15.0) == Size(3, {"trace": 4})
    both = {"trace": 6, "eigenvalue": 30}
    assert fit([2], both, Cost(0, 1), 4, 1e9) == Size(2, {"trace": 3, "eigenvalue": 30})


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        (14.9, Size(2, {"trace": 6})),  # a batch less, and its graph
        (13.9, Size(1, {"trace": 12})),
        (12.9, Size(1, {"trace": 11})),  # then products of the one that is left
        (3.0, Size(1, {"trace": 2})),
    ],
)
def test_batches_are_given_up_before_products(budget, size):
    assert fit([3], {"trace": 12}, Cost(1, 1), 4, budget) == size


def test_the_trace_is_served_before_the_eigenvalues():
    both = {"trace": 6, "eigenvalue": 30}
    least = 1 + 2 + 4 * 4
    assert fit([1], both, Cost(1, 1), 4, least) == Size(1, {"trace": 2, "eigenvalue": 4})
    assert fit([1], both, Cost(1, 1), 4, least + 5) == Size(1, {"trace": 6, "eigenvalue": 4})
    assert fit([1], both, Cost(1, 1), 4, least + 9) == Size(1, {"trace": 6, "eigenvalue": 5})


def test_gradients_of_examples_cannot_be_fewer():
    wanted, cost = {"trace": 16 * 3}, Cost(1, 1)
    assert fit([3], wanted, cost, 4, 51.0, divisible=False) == Size(3, {"trace": 16})
    assert fit([3], wanted, cost, 4, 48.0, divisible=False) == Size(2, {"trace": 16})
    assert fit([3], wanted, cost, 4, 17.0, divisible=False) == Size(1, {"trace": 16})
    with pytest.raises(BudgetTooSmallError, match=r"at least 17, .* got 16\.9"):
        fit([3], wanted, cost, 4, 16.9, divisible=False)


def test_a_batch_of_one_example_has_one_gradient():
    assert fit([2, 1], {"trace": 3}, Cost(0, 1), 4, None, divisible=False) == Size(2, {"trace": 1})


def test_a_batch_pays_for_its_own_examples_only():
    wanted, cost = {"trace": 64 * 4, "eigenvalue": 64}, Cost(0.02, 0.01)
    trace = {"trace": wanted["trace"]}
    assert fit([4], trace, cost, 4, 1.0, divisible=False) == Size(1, {"trace": 64})
    both = {"trace": 64, "eigenvalue": 64}
    assert fit([4], wanted, cost, 4, 7.0, divisible=False) == Size(2, both)


@pytest.mark.parametrize("seed", range(40))
def test_no_size_is_over_its_budget_and_the_smallest_is_named(seed):
    draw = random.Random(seed)
    counts = [draw.randrange(4) for _ in range(draw.randrange(1, 4))] + [1]
    kinds = draw.choice([["trace"], ["eigenvalue"], ["trace", "eigenvalue"]])
    wanted = {kind: draw.randrange(4, 40) for kind in kinds}
    cost, blocks = Cost(draw.random(), draw.random() + 0.01), draw.randrange(1, 9)
    budget = draw.random() * 100
    try:
        size = fit(counts, wanted, cost, blocks, budget)
    except BudgetTooSmallError as error:
        assert error.least > budget
        size = fit(counts, wanted, cost, blocks, error.least)
        assert math.isclose(size.seconds(cost, blocks), error.least)
    else:
        assert size.seconds(cost, blocks) <= budget + 1e-9


class Clock:
    """Time that passes only where the test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (measurement, probe_cost, probing, record, sensitivity):
        monkeypatch.setattr(module, "time", clock)
    return clock


def timed(model, clock, seconds=1.0):
    """A loss that takes `seconds`, so that a difference of gradients takes twice as long."""

    def loss_fn(tokens):
        clock.now += seconds
        return loss_of(model, tokens)

    return loss_fn


def differenced(**section):
    return FALLING | {"sensitivity": {"form": "finite_difference", **section}}


BATCHES = [batch(50), batch(51)]


@pytest.mark.parametrize(("max_cost", "products"), [(0.02, 7), (0.03, 12), (0.05, 12)])
def test_a_measurement_keeps_to_its_share(decoder, clock, max_cost, products):
    model = decoder()
    optimizer = wrap(model, differenced(max_cost=max_cost, tolerance=1e-6), total_steps=1000)
    found = optimizer.probe(timed(model, clock), BATCHES)
    cost = optimizer.history[0]["cost"]
    assert found.products == products
    assert cost["training_seconds"] == 1000.0  # a gradient a step
    assert cost["seconds"] == cost["spent"] == clock.now <= max_cost * 1000


def test_it_ends_early_where_products_turn_out_slower(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(max_cost=0.03, tolerance=1e-6), total_steps=1000)
    calls = []

    def loss_fn(tokens):
        calls.append(1)
        clock.now += 1.0 if len(calls) < 8 else 5.0
        return loss_of(model, tokens)

    found = optimizer.probe(loss_fn, BATCHES)
    assert 2 <= found.products < 12 and not found.converged
    assert clock.now <= 30 + 2 * 5  # the product that was under way


@pytest.mark.parametrize("kind", ["trace", "eigenvalue", "both"])
def test_the_time_bounds_products_that_turn_out_slower_ten_times(decoder, clock, kind):
    model = decoder()
    calls = []

    def loss_fn(tokens):
        calls.append(1)
        clock.now += 1.0 if len(calls) <= 8 else 10.0
        return loss_of(model, tokens)

    blocks = sensitivity.quantized_blocks(model)
    options = {"form": "finite_difference", "tolerance": 1e-6, "progress": False}
    found = sensitivity.measure(
        model, blocks, loss_fn, BATCHES, measure=kind, max_seconds=150.0, **options
    )
    assert not found.converged
    # Two products of each block are made, come what may.
    least = 2 * len(blocks) if kind != "trace" else 2
    assert found.products >= least
    assert clock.now <= 150.0 + 100.0  # ten gradients
    assert found.gradients == len(calls)


def test_slow_eigenvalues_have_equal_shares_of_the_time(decoder, clock, monkeypatch):
    model = decoder(layers=4)
    calls = []

    def loss_fn(tokens):
        calls.append(1)
        clock.now += 1.0 if len(calls) <= 8 else 3.0
        return loss_of(model, tokens)

    made = []
    real = estimators.Eigenvalues._of_block

    def of_block(*args):
        row = real(*args)
        made.append(row["iterations"])
        return row

    monkeypatch.setattr(estimators.Eigenvalues, "_of_block", of_block)
    sensitivity.measure(
        model, sensitivity.quantized_blocks(model), loss_fn, BATCHES[:1], measure="eigenvalue",
        form="finite_difference", tolerance=1e-9, max_seconds=250.0, progress=False,
    )  # fmt: skip
    assert len(made) == 4 and min(made) > 2
    assert max(made) <= 2 * min(made)  # not all of the time for the first


def test_every_measurement_counts(decoder, clock):
    model = decoder()
    config = differenced(max_cost=0.025, max_products=4, tolerance=1e-6)
    optimizer = wrap(model, config, total_steps=1000)
    loss_fn = timed(model, clock)
    for spent in (14.0, 24.0):
        # Two batches; then what is left is enough for one of them, and the form is known.
        optimizer.probe(loss_fn, BATCHES)
        assert optimizer.history[-1]["cost"]["spent"] == clock.now <= spent
    for _ in range(2):  # the second time nothing is tried
        with pytest.raises(ValueError, match=r"sensitivity.max_cost must be at least 0\.04 for"):
            optimizer.probe(loss_fn, BATCHES)
        assert clock.now == 28.0
    assert len(optimizer.history) == 2


def test_the_share_that_an_error_names_is_enough(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(), total_steps=100)
    before = weights(model)
    with pytest.raises(ValueError, match="of a training of 100 s|in a training of 100 s") as error:
        optimizer.probe(timed(model, clock), BATCHES)
    assert_same(weights(model), before)
    needed = float(str(error.value).split("at least ")[1].split(" ")[0])
    assert 0.02 < needed < 0.3
    assert optimizer.probe(timed(model, clock), BATCHES, max_cost=needed).products >= 2


def refused(optimizer, loss_fn, batches, **options) -> str:
    """What a probe says that there is too little time for."""
    with pytest.raises(ValueError, match=r"sensitivity\.max_cost must be") as error:
        optimizer.probe(loss_fn, batches, **options)
    shown = "".join(traceback.format_exception(error.value))
    assert "max_seconds" not in shown and "another exception" not in shown  # what nobody gave
    return str(error.value)


def test_the_share_is_named_at_once_where_timing_alone_takes_what_there_is(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(), total_steps=50)
    said = refused(optimizer, timed(model, clock), BATCHES)
    assert "measurement (0 s" not in said
    needed = float(said.split("at least ")[1].split(" ")[0])
    assert optimizer.probe(timed(model, clock), BATCHES, max_cost=needed).products >= 2
    assert clock.now <= needed * 50


def test_no_share_above_one_is_asked_for(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(), total_steps=10)
    for _ in range(2):
        said = refused(optimizer, timed(model, clock), BATCHES)
        assert "max_cost must be None for" in said and "set max_cost to None" in said
    assert optimizer.probe(timed(model, clock), BATCHES, max_cost=None).products >= 2


def test_the_remedy_named_is_one_that_helps(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(), total_steps=50)
    said = refused(optimizer, timed(model, clock), BATCHES)
    assert "probe after 5 steps" in said and "smaller batches" not in said
    for step in range(5):
        train_step(model, optimizer, step)
        clock.now += 10.0
    said = refused(optimizer, timed(model, clock), BATCHES)
    assert "in a training of 500 s" in said
    assert "give smaller batches" in said and "probe after" not in said
    quick = timed(model, clock, seconds=0.01)
    optimizer._probes.state.spent = 0.0
    assert optimizer.probe(quick, [BATCHES[0][:1]]).products >= 2


@pytest.mark.parametrize(
    ("rows", "options"), [(1, {}), (4, {"form": "exact"}), (4, {"measure": "trace"})]
)
def test_that_one_measurement_was_too_large_says_nothing_of_another(decoder, clock, rows, options):
    model = decoder()
    config = differenced(measure="eigenvalue")
    optimizer = wrap(model, config, total_steps=1000)

    def loss_fn(tokens):  # an example takes as long as the others
        clock.now += len(tokens) / 4
        return loss_of(model, tokens)

    refused(optimizer, loss_fn, BATCHES)
    optimizer._probes.state.spent = 5.0
    before = clock.now
    refused(optimizer, loss_fn, BATCHES)
    assert clock.now == before  # the same one is not tried again
    saved = json.loads(optimizer.state_dict()["param_groups"][0]["moq"])["probes"]
    optimizer._probes.restore(saved, 0)
    refused(optimizer, loss_fn, BATCHES)
    assert clock.now == before
    optimizer.probe(loss_fn, [tokens[:rows] for tokens in BATCHES], **options)


def test_seconds_that_the_caller_bounds_are_not_blamed_on_the_share(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(max_cost=1.0), total_steps=1000)
    with pytest.raises(BudgetTooSmallError, match=r"max_seconds must be at least .* got 1$"):
        optimizer.probe(timed(model, clock), BATCHES, max_seconds=1.0)


def test_the_time_of_steps_counts_once_they_are_known(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(tolerance=1e-6), total_steps=1000)
    for step in range(7):
        train_step(model, optimizer, step)
        clock.now += 5.0
    found = optimizer.probe(timed(model, clock), BATCHES)
    cost = optimizer.history[0]["cost"]
    assert cost["training_seconds"] == pytest.approx(5000.0)
    assert found.products == 12


def test_without_a_bound_nothing_is_timed_first(decoder, clock, capsys):
    calls = {}
    for max_cost in (None, 1.0):
        model = decoder()
        config = differenced(max_cost=max_cost)
        optimizer = wrap(model, config, total_steps=1000, verbose=max_cost is None)
        optimizer.probe(timed(model, clock), BATCHES, max_products=4, progress=False)
        calls[max_cost], clock.now = clock.now, 0.0
        cost = optimizer.history[0]["cost"]
        assert cost["max_cost"] == max_cost
        assert cost["training_seconds"] == (None if max_cost is None else 1000.0)
    # Neither the two gradients that guess a training's time nor the product that is timed.
    assert calls[None] == calls[1.0] - 2 - 2
    line = capsys.readouterr().out.splitlines()[-1]
    seconds = f"{calls[None]:g} s"
    assert line.endswith(f"batches in {seconds}; measuring has taken {seconds} so far")


def test_without_a_bound_the_time_of_steps_is_told_once_it_is_known(decoder, clock):
    model = decoder()
    optimizer = wrap(model, differenced(max_cost=None), total_steps=100)
    for step in range(5):
        train_step(model, optimizer, step)
        clock.now += 3.0
    optimizer.probe(timed(model, clock), BATCHES, max_products=4)
    assert optimizer.history[0]["cost"]["training_seconds"] == pytest.approx(300.0)


@pytest.mark.parametrize("max_cost", [0.0, 1.5])
def test_a_share_out_of_range_is_refused(decoder, max_cost):
    with pytest.raises(ValueError, match=r"max_cost must lie in \(0, 1\]"):
        wrap(decoder(), differenced(max_cost=max_cost))
    optimizer = wrap(decoder(), FALLING)
    with pytest.raises(ValueError, match=r"max_cost must lie in \(0, 1\] or be None"):
        optimizer.probe(pytest.fail, BATCHES, max_cost=max_cost)


def test_what_it_took_is_printed(decoder, clock, capsys):
    model = decoder()
    optimizer = wrap(model, differenced(), total_steps=1000, verbose=True)
    optimizer.probe(timed(model, clock), BATCHES, progress=False)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == (
        "moq: step 0: 7 products (finite_difference, 18 gradients) over 1 batches in 20 s; "
        "measuring has taken 2 % of the training's 1e+03 s so far (at most 2 %)"
    )


# ------------------------------------------------------------------ cadence


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


def test_a_form_that_is_not_possible_is_paid_for_too(decoder, clock):
    model = decoder()
    calls = []

    def loss_fn(tokens):
        calls.append(1)
        clock.now += 10.0 if len(calls) == 1 else 1.0
        return (
            loss_of(model, tokens) + OnceDifferentiable.apply(model.layers[0].q_proj.weight).sum()
        )

    options = {"tolerance": 1e-6, "progress": False}
    with pytest.raises(BudgetTooSmallError, match="max_seconds must be at least") as error:
        sensitivity.measure(model, None, loss_fn, BATCHES, max_seconds=13.0, **options)
    assert error.value.least > 13.0
    calls.clear()
    clock.now = 0.0
    found = sensitivity.measure(model, None, loss_fn, BATCHES, max_seconds=25.0, **options)
    assert found.form == "finite_difference" and 2 <= found.products < 12
    assert found.seconds == clock.now <= 25.0


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
