"""How often sensitivity is measured in a training, and for how much of its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from moq._C import Schedule
from moq.collective import all_gather
from moq.config import MoQConfig
from moq.masters import Masters
from moq.planning import measure_blocks
from moq.probe_cost import BudgetTooSmallError, ProbeRefusedError
from moq.record import Pace

if TYPE_CHECKING:
    from moq.estimators import Sensitivity

#: Steps after which their mean time is trusted; the first of them is not timed.
_LEAST_STEPS = 5


@dataclass
class ProbeState:
    """What a resumed training must know of the measurements before; the same on all ranks.

    Attributes:
        spent: Wall seconds of all measurements so far, on the slowest rank.
        training_seconds: What the whole training was thought to take when it was measured last.
        cadence: Steps at which it is measured again; None: not regularly.
        form: What ``auto`` turned out to be.
        least: Seconds of the smallest measurement, if one was refused for them.
        refused: What that was a measurement of; of another one they say nothing.
    """

    spent: float = 0.0
    training_seconds: float | None = None
    cadence: list[int] | None = None
    form: str | None = None
    least: float = 0.0
    refused: list[Any] | None = None


@dataclass(frozen=True)
class ProbeCost:
    """What a measurement took.

    Attributes:
        seconds: Wall time on the slowest rank.
        spent: Of all measurements so far.
        training_seconds: Of the whole training, as far as can be told; None: not timed.
        max_cost: The share of it that they may take; None: any.
    """

    seconds: float
    spent: float
    training_seconds: float | None
    max_cost: float | None

    def __str__(self) -> str:
        """Says it in one line."""
        if self.training_seconds is None:
            return f"{self.seconds:.3g} s; measuring has taken {self.spent:.3g} s so far"
        share = f"{100 * self.spent / self.training_seconds:.2g} %"
        bound = "" if self.max_cost is None else f" (at most {100 * self.max_cost:g} %)"
        return (
            f"{self.seconds:.3g} s; measuring has taken {share} of the training's "
            f"{self.training_seconds:.3g} s so far{bound}"
        )


@dataclass
class Probes:
    """The measurements of one training, past and to come.

    Args:
        config: Of the training.
        total_steps: Optimizer steps of the training.
        pace: Of its steps.
    """

    config: MoQConfig
    total_steps: int
    pace: Pace
    state: ProbeState = field(default_factory=ProbeState)
    loss_fn: Callable[[Any], Any] | None = None
    batches: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    _seen: int = 0
    _calls: int = 0
    _last_seconds: float = 0.0

    def due(self, steps: Callable[[], int]) -> bool:
        """Says at the end of a step whether it is time to measure again.

        Args:
            steps: Returns the completed steps. It may wait for the device, so it is asked only when
                as many steps have been called for.
        """
        if not self.state.cadence or self.loss_fn is None:
            return False
        self._calls += 1
        if self._seen + self._calls < self.state.cadence[0]:
            return False
        self._seen, self._calls = steps(), 0
        return self._seen >= self.state.cadence[0]

    def restore(self, state: Mapping[str, Any], steps: int) -> None:
        """Goes on from a saved state."""
        self.state = ProbeState(**state)
        self._seen, self._calls = steps, 0

    def saved(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists."""
        return asdict(self.state)

    def measure(
        self,
        model: nn.Module,
        masters: Masters,
        loss_fn: Callable[[Any], Any],
        batches: Sequence[Any],
        options: Mapping[str, Any],
    ) -> tuple[Sensitivity, ProbeCost]:
        """Measures within what is left of the budget; all ranks must call.

        What a measurement takes is known after its first product. Where not even the smallest one
        fits, that product was too much, once. Without a bound nothing is timed.

        Raises:
            ValueError: if too little is left, with the smallest max_cost that is enough; whatever
                measure() raises.
        """
        options = dict(options)
        limit = options.pop("max_cost", self.config.sensitivity.max_cost)
        if limit is not None and not 0 < limit <= 1:
            raise ValueError(f"probe: max_cost must lie in (0, 1] or be None, got {limit!r}")
        form = options.setdefault("form", self.config.sensitivity.form)
        if form == "auto" and self.state.form is not None:
            options.setdefault("first", self.state.form)
        started = time.perf_counter()
        try:
            total = self._known_training_seconds()
            if limit is not None:
                if total is None:
                    total = self._guess_training_seconds(model, loss_fn, batches, options["form"])
                overhead = time.perf_counter() - started
                left = min(all_gather(limit * total - self.state.spent - overhead))
                request = self._request(masters, batches, options)
                if self.state.refused == request and left < self.state.least:
                    raise BudgetTooSmallError(self.state.least, left)  # known without another try
                given = options.get("max_seconds")
                options["max_seconds"] = left if given is None else min(left, given)
            self.state.training_seconds = total
            found = measure_blocks(model, masters, self.config, loss_fn, batches, options)
        except Exception as error:
            self._spend(started)
            if isinstance(error, BudgetTooSmallError) and limit is not None and left < error.least:
                assert total is not None
                self.state.least, self.state.refused = error.least, request
                raise self._too_small(error, limit, total) from None
            raise
        self._spend(started)
        if form == "auto":
            self.state.form = found.form
        cost = ProbeCost(self._last_seconds, self.state.spent, total, limit)
        return found, cost

    def _request(
        self, masters: Masters, batches: Sequence[Any], options: Mapping[str, Any]
    ) -> list[Any]:
        """Returns what decides how long the smallest measurement takes, as JSON has it.

        The same on all ranks.
        """
        measured = [
            name
            for name, parameters in masters.by_block().items()
            if any(parameter.requires_grad for parameter in parameters)
        ]
        measure = options.get("measure", self.config.sensitivity.measure)
        sizes = all_gather(_shapes(batches[0]) if batches else None)
        return [options.get("first") or options["form"], measure, measured, sizes]

    def _spend(self, started: float) -> None:
        self.pace.interrupt()
        self._last_seconds = max(all_gather(time.perf_counter() - started))
        self.state.spent += self._last_seconds

    def _too_small(
        self, error: BudgetTooSmallError, limit: float, total: float
    ) -> ProbeRefusedError:
        """Says the share that would be enough: for what was spent, on trying too, and the rest.

        A tenth more, since times vary from one measurement to the next.
        """
        needed = 1.1 * (self.state.spent + error.least) / total
        must, remedy = f"at least {needed:.2g}", "raise it (None: no bound)"
        if needed > 1:
            must, remedy = "None", "set max_cost to None (no bound)"
        if self._paced():
            other = "give smaller batches"
        else:  # a gradient of smaller ones would make the training shorter too
            other = f"probe after {_LEAST_STEPS} steps, whose time then counts"
        return ProbeRefusedError(
            f"MoQOptimizer.probe: sensitivity.max_cost must be {must} for the smallest measurement "
            f"({error.least:.2g} s, after {self.state.spent:.2g} s so far) in a training of "
            f"{total:.3g} s, got {limit:g}: {remedy}, {other}, or train longer"
        )

    def _paced(self) -> bool:
        return self.pace.steps >= _LEAST_STEPS - 1

    def _known_training_seconds(self) -> float | None:
        """Estimates how long the whole training takes from what was timed; the same on all ranks.

        By the mean time of a step; before there were some, by what it was at a measurement before,
        perhaps one of the training that is resumed.
        """
        paces = all_gather(self.pace.seconds / self.pace.steps if self._paced() else 0.0)
        if min(paces) > 0.0:
            return max(paces) * self.total_steps
        return self.state.training_seconds

    def _guess_training_seconds(
        self, model: nn.Module, loss_fn: Callable[[Any], Any], batches: Sequence[Any], form: str
    ) -> float:
        """Estimates the same by the time of one gradient of a batch that is measured.

        A step takes that long at least, unless its batch is smaller.
        """
        from moq.sensitivity import gradient_seconds

        return gradient_seconds(model, loss_fn, batches, form) * self.total_steps

    def plan_cadence(self, schedule: Schedule, step: int, cost: ProbeCost) -> None:
        """Decides when to measure again: as often as the budget allows and widths still fall.

        Evenly until the last drop, after which a measurement would change nothing. Fixed once, so
        that a resumed training measures at the same steps.
        """
        ahead = sorted({at for plan in schedule.plan() for at, _ in plan if at > step})
        more = len(ahead)
        if cost.max_cost is not None:
            assert cost.training_seconds is not None
            left = cost.max_cost * cost.training_seconds - cost.spent
            more = max(0, min(more, int(left / cost.seconds)))
        between = (ahead[-1] - step) / (more + 1) if ahead else 0.0
        steps = {step + round(k * between) for k in range(1, more + 1)}
        self.state.cadence = sorted(at for at in steps if at > step)
        self._seen, self._calls = step, 0

    def pass_over(self) -> None:
        """Takes the step that is due from the cadence."""
        assert self.state.cadence
        self.state.cadence = self.state.cadence[1:]


def _shapes(batch: Any) -> list[list[int]]:
    """Returns the shapes of the tensors that a batch holds, and the lengths of what else it has."""
    if isinstance(shape := getattr(batch, "shape", None), Iterable):
        return [[int(size) for size in shape]]
    if isinstance(batch, str | bytes):
        return [[len(batch)]]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    elif not isinstance(batch, Sequence):
        batch = list(getattr(batch, "__dict__", {}).values())
        return [shape for value in batch if hasattr(value, "shape") for shape in _shapes(value)]
    return [shape for value in batch for shape in _shapes(value)] or [[len(batch)]]
