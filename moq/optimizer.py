"""The wrapper: any torch optimizer, training weights whose bit width falls.

When it falls, and the measurements that change it, are planned_optimizer's; what leaves the
training is writable_optimizer's.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from moq.activations import ActivationQuantizers
from moq.blocks import (
    Blocks,
    assign_blocks,
    extend_schedule,
    make_schedule,
    require_blends_end,
    retarget,
)
from moq.caller_warning import warn_caller
from moq.config import MoQConfig
from moq.loggers import Logger
from moq.masters import Masters
from moq.probing import Probes
from moq.record import MASTER_KEY, RECORD_KEY, Pace, Record
from moq.reporting import Reporter
from moq.rules import MatchedParameter, match_parameters, unwrap, warn_of_overruled
from moq.scalars import ScalarLog
from moq.sharding import raise_on_all_shards
from moq.simulators import WeightSimulators, remove_left_over_simulators, require_learnable
from moq.state_creation import is_state_creation, make_blank_state
from moq.wrapper import require_wrappable, warn_of_lost_eps
from moq.writable_optimizer import WritableOptimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MoQOptimizer(WritableOptimizer):
    """Trains with `optimizer` while the weights of `model` fall to fewer and fewer bits.

    Every quantized parameter has two values: the *master*, in full precision, which the inner
    optimizer updates, and the *simulated* one, on the integer grid, which is in the model and which
    forward and backward see. The gradient at the simulated value is applied to the master.

    It is a torch.optim.Optimizer over the model's parameters: schedulers, GradScaler,
    clip_grad_norm_, accelerate, transformers' Trainer and torch.distributed.checkpoint take it as
    they take the inner one. Outside `step` the param groups, shared with the inner optimizer, hold
    the model's parameters.

    Args:
        optimizer: A constructed torch optimizer over parameters of `model`, or an object with its
            param_groups, state, step, state_dict and load_state_dict; from now on use only the
            wrapper. Warm state is kept. What it holds besides (a loss's own parameters, another
            model's) it trains as before, in full precision. One that has the attribute
            ``takes_low_precision_gradients``, True, as moq.AdamW has it, gets gradients of float32
            masters in the dtype of their parameters, without a cast.
        model: The model; DistributedDataParallel and torch.compile may be around it, fully_shard
            must have been applied.
        config: A MoQConfig, a dict, the path of a JSON or YAML file, or None for the defaults:
            every Linear and Conv1D but the head falls from 16 to 8 bits by 60 % of the steps.
        total_steps: Optimizer steps of the whole training.
        verbose: Print the start table and a line at each drop (rank 0 only).
        loggers: Who is told bits, quantization error, flips and blend ratio, of the model and of
            each block: one or several objects with ``log(scalars, step=…)``, such as moq.loggers
            has. Rank 0 tells; with sharded parameters every rank must be given as many.
        log_every: Steps between two measurements for the loggers. A step never waits for them.
        process_group: Ranks that train copies of the model, over which static scales of activations
            are one. Only needed where neither fully_shard nor DistributedDataParallel, which may
            also be applied later, says it: gradients averaged by hand, stages of a pipeline.

    Raises:
        TypeError: if an argument has another type, or the configuration holds a wrong one.
        ValueError: for a configuration that names what does not exist, weights that have no grid
            (NaN, infinity, other dtypes) or another MoQOptimizer already, or an optimizer that
            cannot be wrapped or holds no parameter of `model`.
        moq.Error: if the schedule cannot finish, with the smallest change that lets it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
        >>> optimizer = MoQOptimizer(
        ...     torch.optim.AdamW(model.parameters()), model, total_steps=100, verbose=False
        ... )
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.num_bits["0.weight"]
        16
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        config: MoQConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        total_steps: int,
        verbose: bool = True,
        loggers: Logger | Sequence[Logger] = (),
        log_every: int = 10,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Makes the masters and writes the first simulated values into the model."""
        require_wrappable(optimizer, model, total_steps)
        self._scalars = ScalarLog(
            loggers if isinstance(loggers, Sequence) else [loggers], log_every
        )
        super().__init__(optimizer)
        self.model = unwrap(model)
        self._model_as_given = model
        self.config = MoQConfig.load(config)
        self.total_steps = total_steps
        self.history = []
        self._target_bits = {}
        self._blank_state = False
        self._stateless = False
        self._shows_masters = False
        self._pace = Pace()
        matched, blocks = self._match()
        warn_of_overruled(self.model, self.config)
        if not matched:
            warn_caller(
                "MoQOptimizer: no weight is quantized, and training goes on in full precision: the "
                "model has no layer that the rules choose, or a rule excludes all of them"
            )
        schedule = make_schedule(blocks, self.config, total_steps)
        require_blends_end(matched, blocks, schedule)
        self._activations = ActivationQuantizers(
            self.model, self.config.observer, total_steps, process_group
        )
        remove_left_over_simulators(self.model)
        self._simulators = None
        if self.config.simulate == "autograd":
            self._simulators = WeightSimulators(
                self.model, self.config.seed, self.config.master_dtype
            )
            require_learnable(matched, model, optimizer)
        self._masters = Masters(
            matched, blocks, schedule, self.config, self.inner, self._simulators
        )
        self._masters.warn_if_simulated()
        self._masters.trainer.write_simulated()
        self._activations.place(matched)
        warn_of_lost_eps(self.param_groups, self._masters.get)
        self._probes = Probes(self.config, total_steps, self._pace)
        self.param_groups[0][RECORD_KEY] = self._record().to_json()
        self._reporter = Reporter(verbose)
        self._reporter.start(matched, blocks.numbers, schedule)

    # ------------------------------------------------------------------ what torch asks for

    @property
    def state(self) -> Mapping[Any, Any]:  # type: ignore[override]
        """State of each of the model's parameters: the inner optimizer's, and ``moq_master``.

        Before the first step the inner optimizer has none; it is then made as a form with the
        entries that it will have, which the first step discards.
        """
        self._require_state()
        shown: defaultdict[Any, Any] = defaultdict(dict)
        for parameter in self.parameters():
            master = self._masters.get(parameter)
            if master is not None:
                shown[parameter] = {**self.inner.state.get(master, {}), MASTER_KEY: master}
            elif parameter in self.inner.state:
                shown[parameter] = self.inner.state[parameter]
        for key, value in self.inner.state.items():
            if not isinstance(key, torch.Tensor):
                shown[key] = value
        return shown

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, and quantizes those of its parameters that the rules match.

        Args:
            param_group: As for any torch optimizer.

        Raises:
            ValueError: as the constructor, or if the schedule with the new blocks contradicts what
                has happened already.
            RuntimeError: inside `full_precision`.
        """
        self._require_simulated("add_param_group")
        self.inner.add_param_group(param_group)
        try:
            matched, blocks = self._match()
            schedule = make_schedule(blocks, self.config, self.total_steps)
            renamed = self._masters.blocks.names_in(blocks)
            targets = {renamed[name]: bits for name, bits in self._target_bits.items()}
            schedule = retarget(schedule, targets)
            schedule = extend_schedule(schedule, self.schedule(), self.steps, renamed)
            require_blends_end(matched, blocks, schedule)
            self.flush_logs()  # what is on its way is of the present blocks
            self._masters.extend(matched, blocks, schedule, self.steps)
            self._activations.place(matched)
        except Exception:
            self.inner.param_groups.pop()
            raise
        self._target_bits = targets
        self._stateless = False  # the new group may have a momentum
        self._masters.trainer.write_simulated()

    @_disable_dynamo  # a compiled loop calls it as it is: what it does is in C++ already
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one optimizer step: masters, then schedule, then simulated values.

        Without a single gradient it is none: nothing changes, the schedule included.

        Args:
            closure: Evaluates the loss once, at the simulated values, before the step.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: inside `full_precision`, if a quantized parameter has become another
                dtype, or if static scales of activations need a `process_group`; no step is made
                then. Likewise if the model has other parameters in place of the trained ones.
            ValueError: if a quantized parameter has a sparse gradient, or was given values that are
                not finite.
        """
        if self._shows_masters:
            raise RuntimeError(
                "MoQOptimizer.step: must be called outside full_precision(): the gradients of a "
                "step are those at the simulated values"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_state_creation(self.param_groups):
            self._require_state()
            return loss
        skipped = self.skips()
        idle = skipped or all(parameter.grad is None for parameter in self.parameters())
        self._masters.catch_up(before_write=bool(self._masters.shared_scales) and not idle)
        if skipped:
            self._activations.forget()
        else:
            self._masters.require_in(self.model, idle=idle)
        if idle:
            return loss
        self._activations.find_ranks()
        if self._blank_state:
            self.inner.state.clear()
            self._blank_state = False
        trainer = self._masters.trainer
        self._scalars.before_step(self._masters)
        trainer.begin_step(cast=self._masters.casts or self.scale_to_undo is not None)
        try:
            with self.grad_scaling() as found_inf, self._masters.in_groups():
                self.unscale()
                self.inner.step()
        except BaseException:
            trainer.abandon_step()
            raise
        trainer.end_step(found_inf)
        self._activations.update(trainer.step_on_device, found_inf)
        self._reporter.drops(trainer)
        self._reporter.beyond(trainer, self.total_steps)
        self._scalars.after_step(self._masters)
        self._pace.step()
        if self._probes.due(lambda: self.steps):
            self._probe_again()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs to continue bit for bit.

        The usual dict of a torch optimizer: masters are entries of ``state``; step, seed, schedule
        and measurements are one JSON string in the first param group.
        """
        state = super().state_dict()
        state["param_groups"][0][RECORD_KEY] = self._record().to_json()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken; the model's weights become its simulated ones.

        With sharded parameters all ranks must call it, each with its own state.

        Args:
            state_dict: From a MoQOptimizer over the same parameters with the same configuration.

        Raises:
            TypeError: for what is no dict, the path of a run for example.
            ValueError: naming the parameters or values that differ; then nothing has changed.
            RuntimeError: naming a rank that could not load its shards; likewise.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                "MoQOptimizer.load_state_dict: the state must be what state_dict() gave, got "
                f"{type(state_dict).__name__}: read it with torch.load first (a run that "
                "optimizer.save wrote is for moq export, and lacks the inner optimizer's state)"
            )
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        with raise_on_all_shards(self._masters.matched):
            record, own = Record.from_state_dict(state_dict), self._record()
            record.require_same_model(own)
            schedule = record.resumed_schedule(self._configured_schedule())
            self._masters.find_memory()
            saved = self._masters.read(state_dict)
        # accelerate loads an optimizer's own state into it. If the model's weights were replaced
        # just before, they must stay: the next step adopts them as masters, with a warning.
        on_any_rank = self._masters.shared_scales.on_any_rank
        other_state = record != own or not self._masters.equal_those_of(state_dict)
        replaced = on_any_rank(self._masters.can_adopt())
        keep_weights = replaced and not on_any_rank(other_state)
        with raise_on_all_shards(self._masters.matched):
            self._masters.load(saved)
        self._masters.trainer.restore(schedule, record.step)
        self._activations.load(record.activations, record.step)
        self._blank_state = record.blank_state
        self.history = record.history
        self._target_bits = record.target_bits
        self._probes.restore(record.probes, record.step)
        self._reporter.reported = record.step
        if not keep_weights:
            self._masters.forget_replaced()
            if not self._shows_masters:
                self._masters.trainer.write_simulated()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # ------------------------------------------------------------------ what moq adds

    def __repr__(self) -> str:
        """The inner optimizer and its groups, without the record that travels in them."""
        widths = Counter(self.num_bits.values())
        bits = ", ".join(f"{count} at {bits} bits" for bits, count in sorted(widths.items()))
        lines = super().__repr__().splitlines()
        lines = [line for line in lines if not line.startswith(f"    {RECORD_KEY}: ")]
        summary = [f"inner: {type(self.inner).__name__}", f"step: {self.steps}", f"weights: {bits}"]
        return "\n".join([*lines[:1], *summary, *lines[1:]])

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Shows the masters in the model, for evaluation, averaging or saving.

        The weights keep their addresses; at the end the simulated values return bit for bit.

        Raises:
            RuntimeError: if one is open already.
            ValueError: at either end, naming a parameter that was given values that are not finite;
                masters stay, and at the second the simulated values return.
        """
        if self._shows_masters:
            raise RuntimeError("MoQOptimizer.full_precision: must not be nested")
        self._masters.catch_up(before_write=True)
        self._shows_masters = True
        self._show_full_precision(True)
        self._masters.trainer.write_masters()
        try:
            yield
        finally:
            try:
                self._masters.catch_up(before_write=True)
            finally:
                self._shows_masters = False
                self._show_full_precision(False)
                self._masters.trainer.write_simulated()

    # ------------------------------------------------------------------ inside

    def _match(self) -> tuple[list[MatchedParameter], Blocks]:
        """Applies the rules to the parameters that the optimizer holds now."""
        matched, unheld = match_parameters(self.model, self.config, self.parameters())
        if unheld:
            warn_caller(
                f"MoQOptimizer: {len(unheld)} weights match the rules but are in no param group of "
                f"the optimizer, and stay in full precision: {', '.join(unheld[:5])}"
                + (", …" if unheld[5:] else "")
                + ". Give them to the optimizer (frozen ones too), or exclude them by a rule"
            )
        return matched, assign_blocks(matched)

    def _show_full_precision(self, shown: bool) -> None:
        """Switches what simulates within the forward pass."""
        self._activations.enable(not shown)
        if self._simulators is not None:
            self._simulators.enable(not shown)

    def _require_state(self) -> None:
        """Makes sure that the inner optimizer has state, or a form of it, unless it keeps none."""
        if self._stateless or any(self.inner.state.values()):
            return
        with self._masters.in_groups():
            make_blank_state(self.inner)
        self._blank_state = True
        self._stateless = not any(self.inner.state.values())
