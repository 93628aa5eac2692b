"""An optimizer with a plan: when its weights' widths fall, and how measurements change that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moq._C import Schedule
from moq.blocks import make_schedule, require_blends_end, require_same_past, retarget
from moq.budget import Budget, LatencyTable, require_table
from moq.caller_warning import warn_caller
from moq.collective import raise_together
from moq.config import MoQConfig
from moq.masters import Masters
from moq.planning import choose_for_masters, plan_by, require_plannable
from moq.probe_cost import ProbeRefusedError
from moq.probe_inputs import listed_batches
from moq.probing import ProbeCost, Probes
from moq.reporting import Reporter, is_main_process
from moq.scalars import ScalarLog
from moq.target_bits import (
    WIDTHS,
    Objective,
    TargetBits,
    require_objective,
    require_widths,
    traces_for,
)
from moq.undisturbed import without_gradients
from moq.wrapper import OptimizerWrapper

if TYPE_CHECKING:
    from moq.estimators import Sensitivity


class PlannedOptimizer(OptimizerWrapper):
    """What MoQOptimizer has to do with time: its schedule, and the second order that stretches it.

    Attributes:
        model: What is trained, unwrapped.
        config: Of the training.
        total_steps: Optimizer steps of the whole training.
        history: Every measurement, in order.
    """

    model: nn.Module
    config: MoQConfig
    total_steps: int
    history: list[dict[str, Any]]
    _model_as_given: nn.Module
    _masters: Masters
    _probes: Probes
    _scalars: ScalarLog
    _reporter: Reporter
    _target_bits: dict[str, int]
    _shows_masters: bool

    @property
    def steps(self) -> int:
        """Completed optimizer steps; steps that GradScaler skipped do not count."""
        return int(self._masters.trainer.step)

    @property
    def num_bits(self) -> dict[str, int]:
        """Present width of each quantized parameter, by name."""
        schedule, steps = self.schedule(), self.steps
        return {
            matched.name: schedule.bits_at(block, steps)
            for matched, block in self._masters.placed()
        }

    def schedule(self) -> Schedule:
        """Returns a copy of the schedule, measurements included; waits for the device.

        Printed, it is a table: for every layer the step from which it has each width, a range of
        steps where that follows measurements to come. Its `plot` draws that to a .png or .svg file.
        """
        schedule: Schedule = self._masters.trainer.schedule
        schedule.completed_steps = self.steps
        return schedule

    def probe(
        self, loss_fn: Callable[[Any], torch.Tensor], batches: Iterable[Any], **options: Any
    ) -> Sensitivity:
        """Measures how sensitive each block is, and plans the rest of the schedule by it.

        Under torch.distributed all ranks must call it, each with its own batches, of any number.

        Args:
            loss_fn: Maps one batch to a scalar loss through the model, as it was given to
                MoQOptimizer or without what is around it (to more for the forms ``gauss_newton``
                and ``fisher``, see moq.sensitivity.measure); must not call backward.
            batches: A fixed set of batches, the same at every probe.
            **options: Over the configuration's: `max_cost`, and what moq.sensitivity.measure has,
                `measure`, `form` and others.

        Returns:
            The measurement: per block value, normalised value and standard error.

        Raises:
            ValueError: before anything is measured, if nothing is quantized or if the schedule does
                not follow sensitivities (schedule.table, sensitivity.rule ``none``); if `max_cost`
                has no room for the smallest measurement, naming what would; as measure.
            RuntimeError: inside `full_precision`.
            TypeError, NotImplementedError, moq.Error: as moq.sensitivity.measure.
        """
        self._require_simulated("probe")
        require_plannable(self.config, self._masters, "MoQOptimizer.probe")
        return self._probe(loss_fn, listed_batches(batches), options)[0]

    def probe_regularly(
        self, loss_fn: Callable[[Any], torch.Tensor], batches: Iterable[Any], **options: Any
    ) -> None:
        """Measures now, and again in later steps, as often as sensitivity.max_cost allows.

        The steps are spread evenly until the last width falls, at most as many as there are drops.
        They are decided by the cost of the first measurement and saved with the state: a resumed
        training calls this too, and goes on as it would have, without measuring at once. All ranks
        must call it. A later measurement that fails warns, and leaves the plan as it is.

        Args:
            loss_fn: As for `probe`.
            batches: Likewise; they are kept.
            **options: Likewise, for all measurements.

        Raises:
            ValueError, RuntimeError, TypeError, NotImplementedError, moq.Error: as `probe`, of
                the first measurement.
        """
        self._require_simulated("probe_regularly")
        require_plannable(self.config, self._masters, "MoQOptimizer.probe_regularly")
        kept, probes = listed_batches(batches), self._probes
        if probes.state.cadence is None:
            _, cost = self._probe(loss_fn, kept, options)
            probes.plan_cadence(self.schedule(), self.steps, cost)
        probes.loss_fn, probes.batches, probes.options = loss_fn, kept, options

    def apply_sensitivity(self, found: Sensitivity) -> None:
        """Plans the rest of the schedule by a measurement that `probe` did not make.

        Parameters that fully_shard will divide can so be measured in any form before, by
        moq.sensitivity.measure of moq.sensitivity.quantized_blocks(model, config). All ranks must
        give the same measurement.

        Args:
            found: What measure() returned for the blocks of this training.

        Raises:
            ValueError: if the schedule does not follow sensitivities, or if the blocks are others.
        """
        where = "MoQOptimizer.apply_sensitivity"
        require_plannable(self.config, self._masters, where)
        self._plan_by(found, None, where)

    def choose_target_bits(
        self,
        *,
        mean_bits: float | None = None,
        bytes: int | None = None,
        latency: float | None = None,
        latency_table: str | os.PathLike[str] | LatencyTable | None = None,
        widths: Iterable[int] = WIDTHS,
        sensitivity: Sensitivity | None = None,
        objective: Objective = "mean_eigenvalue",
    ) -> TargetBits:
        """Chooses the width that each block ends at, and plans the schedule by it.

        Minimises the expected increase of the loss, the sum over blocks of
        1/2 |trace| / number of weights * squared rounding error, under one budget, exactly, unless
        the objective is another.
        Blocks whose trace was not measured (frozen ones), ternary and binary ones keep their
        configured target; a schedule.table can end earlier, not lower. Under torch.distributed all
        ranks must call it; they take the numbers of rank 0.

        Args:
            mean_bits: Most bits of a quantized weight, in the mean over all of them.
            bytes: Largest size of all tensors of the exported model.
            latency: Most seconds of a decode step, by `latency_table`.
            latency_table: JSON of `moq bench` measurements (moq.budget.LatencyTable); widths that
                it lacks are not offered.
            widths: Bits that are offered, in [2, 16], as far as a block's start_bits reach. Above 8
                weights are exported as floats.
            sensitivity: Traces of the blocks; None takes the last that `probe` measured.
            objective: "trace" minimises the sum of |trace| * squared rounding error instead, by
                which large blocks weigh more.

        Returns:
            The choice, with the whole Pareto front; print it, or call its `plot`.

        Raises:
            ValueError: if no trace was measured, if there is no such objective, if the budget is
                infeasible (naming the smallest feasible one), if ranks differ in what they ask for,
                or if widths have fallen already that the new plan would have kept; then nothing has
                changed.
            moq.Error: if the schedule cannot finish, with the smallest change that lets it.
            RuntimeError: inside `full_precision`.
        """
        where = "MoQOptimizer.choose_target_bits"
        self._require_simulated("choose_target_bits")
        with raise_together():
            budget = Budget.of(mean_bits, bytes, latency)
            table = require_table(budget, latency_table)
            offered = require_widths(widths)
            weighed_by = require_objective(objective)
            history = self.history if sensitivity is None else [asdict(sensitivity)]
            traces = traces_for(history, where)
        choice = choose_for_masters(
            self._masters, self.model, budget, table, offered, traces, weighed_by, where
        )
        configured, schedule = self._configured_schedule(), self.schedule()
        state = retarget(configured, choice.target_bits).state_dict()
        planned = Schedule.from_state_dict(
            state | {"measurements": schedule.state_dict()["measurements"]}
        )
        require_same_past(schedule, planned, self.steps, where)
        require_blends_end(self._masters.matched, self._masters.blocks, planned)
        self._masters.trainer.restore(planned, self.steps)
        self._target_bits = choice.target_bits
        self._reporter.target_bits(choice)
        return choice

    def _probe(
        self, loss_fn: Callable[[Any], Any], batches: Sequence[Any], options: Mapping[str, Any]
    ) -> tuple[Sensitivity, ProbeCost]:
        """Measures within the budget, and plans by what was found."""
        options = {"progress": self._reporter.enabled} | dict(options)
        # Of what the model does not hold, too, and however a checkpoint hides it.
        with without_gradients(p for group in self.param_groups for p in group["params"]):
            found, cost = self._probes.measure(
                self._model_as_given, self._masters, loss_fn, batches, options
            )
        self._plan_by(found, cost, "MoQOptimizer.probe")
        return found, cost

    def _probe_again(self) -> None:
        """Makes the regular measurement that is due; a training does not end because it fails."""
        probes = self._probes
        probes.pass_over()
        assert probes.loss_fn is not None
        try:
            self._masters.catch_up()
            self._probe(probes.loss_fn, probes.batches, probes.options)
        except ProbeRefusedError as error:
            self._reporter.probe_left_out(self.steps, str(error))
        except Exception as error:
            warn_caller(
                f"MoQOptimizer: the measurement of step {self.steps} failed, and the plan stays "
                f"as it is: {type(error).__name__}: {error}"
            )

    def _plan_by(self, found: Sensitivity, cost: ProbeCost | None, where: str) -> None:
        """Plans by a measurement, and tells all who want to know."""
        plan_by(found, self._masters, where)
        entry = {"step": self.steps} | asdict(found)
        if cost is not None:
            entry["cost"] = asdict(cost)
        self.history.append(entry)
        self._reporter.sensitivity(self.steps, found)
        if cost is not None:
            self._reporter.probe_cost(self.steps, found, cost)
        if is_main_process():
            values = zip(found.blocks, found.normalised, strict=True)
            named = {f"moq/sensitivity/{name}": value for name, value in values}
            self._scalars.tell(named, step=self.steps)

    def _configured_schedule(self) -> Schedule:
        """Returns the schedule before anything was measured or chosen."""
        return make_schedule(self._masters.blocks, self.config, self.total_steps)

    def _require_simulated(self, method: str) -> None:
        """Makes sure that the model holds the simulated values of the masters."""
        if self._shows_masters:
            raise RuntimeError(f"MoQOptimizer.{method}: must be called outside full_precision()")
        self._masters.catch_up()
