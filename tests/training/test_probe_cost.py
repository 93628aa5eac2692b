"""max_cost: how much is measured, and what it takes, in time that the test makes."""

import json
import traceback

import pytest
from probe_clock import BATCHES, differenced, timed
from tiny_decoder import (
    FALLING,
    OnceDifferentiable,
    assert_same,
    loss_of,
    train_step,
    weights,
    wrap,
)

from moq import estimators, measurement, sensitivity
from moq.probe_cost import BudgetTooSmallError, Cost, Size
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
