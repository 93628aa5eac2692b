"""How much of a measurement fits into a budget."""

import math
import random

import pytest

from moq.probe_cost import BudgetTooSmallError, Cost, Size, fit


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
