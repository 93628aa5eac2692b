"""What a measurement of sensitivity costs, and how large one may be for a number of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["trace", "eigenvalue"]

#: Fewer products have no standard error, and tell nothing of a spectrum.
LEAST_PRODUCTS: dict[Kind, int] = {"trace": 2, "eigenvalue": 4}


class BudgetTooSmallError(ValueError):
    """No measurement fits into the seconds that were given.

    Attributes:
        least: Seconds of the smallest measurement.
    """

    def __init__(self, least: float, budget: float) -> None:
        """Says both."""
        super().__init__(
            f"max_seconds must be at least {least:.3g}, what the smallest measurement takes (one "
            f"batch on each rank), got {budget:.3g}"
        )
        self.least = least


class ProbeRefusedError(ValueError):
    """What is left of a training's budget for measurements has no room for the smallest one."""


class Deadline:
    """When a measurement should end, whatever it was thought to take.

    Args:
        at: Of time.perf_counter.
        gather: Brings a value of all ranks that must hear the same together; they ask together.
    """

    def __init__(self, at: float, gather: Callable[[Any], list[Any]]) -> None:
        """Lies ahead or not."""
        self.at, self.gather = at, gather

    def passed(self) -> bool:
        """Says whether it has on some rank."""
        return any(self.gather(time.perf_counter() > self.at))

    def share(self, parts: float) -> Deadline:
        """Returns when the first of `parts` parts should end that have the time left in common."""
        now = time.perf_counter()
        return Deadline(now + max(0.0, self.at - now) / parts, self.gather)


@dataclass(frozen=True)
class Cost:
    """Wall seconds on the slowest rank.

    Attributes:
        graph: Of a batch before its first product.
        product: Of a product, or of an example's gradient.
    """

    graph: float
    product: float


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        batches: Of each rank, at most.
        products: Of each batch: for the trace, of all blocks at once; for the eigenvalue, of each
            block. Only what is measured has an entry.
    """

    batches: int
    products: dict[Kind, int]

    def seconds(self, cost: Cost, blocks: int) -> float:
        """Returns the wall time that it takes at most."""
        each = self.products.get("trace", 0) + blocks * self.products.get("eigenvalue", 0)
        return self.batches * (cost.graph + each * cost.product)


def wanted_size(counts: Sequence[int], most: int, wanted: dict[Kind, int]) -> Size:
    """Returns the size with `most` batches of each rank.

    Args:
        counts: Batches that each rank has.
        most: Batches that each rank uses.
        wanted: Products, for the trace over all batches, which have at least two each; for the
            eigenvalue of each block and batch.
    """
    products = dict(wanted)
    if "trace" in products:
        total = sum(min(count, most) for count in counts)
        products["trace"] = max(LEAST_PRODUCTS["trace"], products["trace"] // total)
    return Size(most, products)


def fit(
    counts: Sequence[int],
    wanted: dict[Kind, int],
    cost: Cost,
    blocks: int,
    budget: float | None,
    *,
    divisible: bool = True,
) -> Size:
    """Returns the largest measurement that takes at most `budget` seconds.

    Batches are given up first, since each of them needs its graph; then products of the one that is
    left.

    Args:
        counts: Batches that each rank has; those of sharded models count once.
        wanted: As in `wanted_size`.
        cost: Of its parts.
        blocks: Number of blocks.
        budget: Seconds; None takes all batches.
        divisible: Whether products can be shared out otherwise: a batch of which others are given
            up takes theirs, and can do with fewer. If not, each batch has its even share of them.

    Raises:
        BudgetTooSmallError: if no measurement fits.
    """
    each = dict(wanted)
    if "trace" in each:
        each["trace"] //= sum(counts)
    for batches in range(max(counts), 0, -1):
        size = wanted_size(counts, batches, wanted) if divisible else Size(batches, each)
        if budget is None or size.seconds(cost, blocks) <= budget:
            return size
    assert budget is not None
    products = size.products if not divisible else {kind: LEAST_PRODUCTS[kind] for kind in wanted}
    least = Size(1, products)
    spare = budget - least.seconds(cost, blocks)
    if spare < 0:
        raise BudgetTooSmallError(least.seconds(cost, blocks), budget)
    for kind, unit in (("trace", 1), ("eigenvalue", blocks)):
        if kind in products:
            more = min(size.products[kind] - products[kind], int(spare / (unit * cost.product)))
            products[kind] += more
            spare -= more * unit * cost.product
    return Size(1, products)
