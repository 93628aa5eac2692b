"""The full-precision values of quantized parameters, and the C++ trainer that follows them."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from moq._C import Schedule, TrainedParameter, Trainer
from moq.blocks import Blocks, blend_end
from moq.caller_warning import warn_caller
from moq.config import MoQConfig
from moq.record import MASTER_KEY
from moq.replaced import (
    require_finite,
    require_finite_replacement,
    require_in_model,
    some,
    warn_of_replacement,
)
from moq.rules import MatchedParameter
from moq.sharding import (
    first_element,
    is_sharded,
    local_tensor,
    raise_on_all_shards,
    whole_tensor,
)
from moq.shared_scales import SharedScales

if TYPE_CHECKING:
    from moq.activations import ActivationQuantizers
    from moq.quantized_parameter import QuantizedParameter
    from moq.simulators import WeightSimulators

_OWNERS = WeakTensorKeyDictionary()
"""Parameter -> weak reference to the Masters that write its simulated values."""


class StateToLoad(NamedTuple):
    """What a state dict holds.

    Attributes:
        masters: Masters by parameter.
        inner: State dict of the inner optimizer.
    """

    masters: dict[torch.Tensor, torch.Tensor]
    inner: dict[str, Any]


class Masters:
    """Masters of a model's quantized parameters.

    Args:
        matched: The quantized parameters.
        blocks: Their blocks.
        schedule: The schedule of these blocks.
        config: The configuration.
        inner: The optimizer that updates the masters; state that it has moves to them.
        simulators: Where the forward pass simulates, and parameters are their own masters.

    Raises:
        ValueError: naming the parameter, if it is not finite, if its memory has gaps, if another
            training has masters of it, or if its sharding splits a scale.
    """

    def __init__(
        self,
        matched: Sequence[MatchedParameter],
        blocks: Blocks,
        schedule: Schedule,
        config: MoQConfig,
        inner: torch.optim.Optimizer,
        simulators: WeightSimulators | None = None,
    ) -> None:
        """Makes a master of every parameter; writes nothing into the model."""
        self.config = config
        self.inner = inner
        self.simulators = simulators
        self._of: dict[torch.Tensor, torch.Tensor] = {}
        self.casts = not getattr(inner, "takes_low_precision_gradients", False)
        self._dtypes: dict[torch.Tensor, torch.dtype] = {}
        self._devices: dict[torch.Tensor, torch.device] = {}
        self._without_gradient: set[str] = set()
        self.matched: Sequence[MatchedParameter] = ()
        self.extend(matched, blocks, schedule)

    def extend(
        self, matched: Sequence[MatchedParameter], blocks: Blocks, schedule: Schedule, step: int = 0
    ) -> None:
        """Makes the masters that are missing, and a trainer over all.

        Raises:
            ValueError: as the constructor; then nothing has changed.
            RuntimeError: if another rank, with other shards, has refused them.
        """
        added = new = [m for m in matched if m.parameter not in self._of]
        with raise_on_all_shards(added):  # one of them may have a NaN
            for m in added:
                self._require_unowned(m)
                require_finite(m.name, m.parameter)
                if self.simulators is None:
                    _require_dense(m)
                first_element(m)
        if self.simulators is not None:
            self.simulators.require_possible(added)
            own = [m.parameter for m in added] + self.simulators.place(added, self.inner)
            self._of |= {parameter: parameter for parameter in own}
            added = []
        for m in added:
            dtype = torch.float32 if self.config.master_dtype == "float32" else m.parameter.dtype
            master = m.parameter.detach().to(dtype, copy=True)
            self._of[m.parameter] = master.requires_grad_(m.parameter.requires_grad)
            if not self.casts:
                master.grad_dtype = None  # any
            self._take_over_state(m.parameter, master)
        self.matched = matched
        self.blocks = blocks
        self.sharded = any(is_sharded(m.parameter) for m in matched)
        self._make_trainer(schedule, step)
        self._devices = {parameter: parameter.device for parameter in self._of}
        for m in new:
            self._dtypes[m.parameter] = m.parameter.dtype
            _OWNERS[m.parameter] = weakref.ref(self)

    def get(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """Returns the master of a parameter, or None if it is not quantized."""
        return self._of.get(parameter)

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns (parameter, master) of every quantized parameter."""
        return [(m.parameter, self._of[m.parameter]) for m in self.matched]

    def simulated(self, m: MatchedParameter) -> torch.Tensor:
        """Returns the value that forward and backward see."""
        if self.simulators is None:
            return m.parameter.detach()
        with torch.no_grad():
            simulated: torch.Tensor = self.simulators.of(m)(m.parameter)
            return simulated

    def placed(self) -> Iterator[tuple[MatchedParameter, int]]:
        """Yields every quantized parameter with the number of its block."""
        return zip(self.matched, self.blocks.numbers, strict=True)

    def by_block(self) -> dict[str, list[torch.Tensor]]:
        """Returns the parameters of each block, in the order of the schedule's blocks."""
        return self.blocks.parameters(self.matched)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Returns grid, block and master dtype of every parameter, as the state's record has it."""
        return {
            m.name: m.spec.to_dict()
            | {
                "block": self.blocks.names[block],
                "master_dtype": str(self._of[m.parameter].dtype).removeprefix("torch."),
                "simulate": self.config.simulate,
            }
            for m, block in self.placed()
        }

    def fingerprint(self) -> str:
        """Returns a digest of masters, learned scales and plan that ranks can compare."""
        digest = hashlib.sha256(repr(self.trainer.schedule.plan()).encode())
        for m in () if self.sharded else self.matched:
            scales = self.simulators.of(m).absmax if self.simulators else None
            for value in (self._of[m.parameter], scales):
                if value is not None:
                    # Sums of bit patterns: the same in whatever order a device adds integers.
                    bits = value.detach().view(torch.int32 if value.itemsize == 4 else torch.int16)
                    digest.update(f"{m.name} {int(bits.sum(dtype=torch.int64))}".encode())
        return digest.hexdigest()[:16]

    @contextmanager
    def in_groups(self) -> Iterator[None]:
        """Puts the masters into the param groups, where the inner optimizer looks for them.

        Raises:
            RuntimeError: if somebody has replaced parameters in the param groups.
        """
        shown = [group["params"] for group in self.inner.param_groups]
        present = {id(parameter) for parameter in chain.from_iterable(shown)}
        lost = [m.name for m in self.matched if id(m.parameter) not in present]
        if lost:
            raise RuntimeError(
                f"MoQOptimizer: the param groups must hold the quantized parameters, and {lost[0]} "
                f"and {len(lost) - 1} more are gone; apply fully_shard, or whatever replaces "
                "parameters, before MoQOptimizer is made"
            )
        for group, parameters in zip(self.inner.param_groups, shown, strict=True):
            group["params"] = [self._of.get(parameter, parameter) for parameter in parameters]
        try:
            yield
        finally:
            for group, parameters in zip(self.inner.param_groups, shown, strict=True):
                group["params"] = parameters

    def catch_up(self, *, before_write: bool = False) -> None:
        """Follows what happened to the model's weights since they were written last.

        They may have moved to another device, or have been replaced (`model.load_state_dict`): then
        the masters start from the new values, with a warning, and the model holds simulated ones
        again.

        Args:
            before_write: All weights are written next in any case, on all ranks. Where ranks share
                scales they agree on writing only without it, which waits for the device.

        Raises:
            ValueError: naming a parameter whose new values are not finite; masters stay.
            RuntimeError: as `find_memory`, or naming a rank whose shards are not finite.
        """
        self.find_memory()
        changed = self._replaced()
        self.forget_replaced()
        if self.simulators is None:
            self.trainer.adopt(changed)
            if not before_write and self.shared_scales.on_any_rank(bool(changed)):
                self.trainer.write_simulated()
        if changed:
            names = [self.matched[index].name for index in changed]
            warn_of_replacement(names, masters_lost=self.simulators is None)

    def can_adopt(self) -> bool:
        """Says whether weights were replaced since they were written last, by finite ones."""
        try:
            return bool(self._replaced())
        except (ValueError, RuntimeError):
            return False

    def _replaced(self) -> list[int]:
        """Returns the numbers of the parameters that somebody else has given other values.

        Raises:
            ValueError: naming a parameter whose new values are not finite.
            RuntimeError: naming a rank whose shards are not finite.
        """
        # Ranks do the same to their shards, but the values may be others on some of them alone.
        with raise_on_all_shards(self.matched if self.trainer.touched() else ()):
            changed = (
                self.trainer.overwritten()
                if self.simulators is None
                else self.simulators.loaded(self.matched)
            )
            for index in changed:
                m = self.matched[index]
                trained = self.simulators.trained(m) if self.simulators else {m.name: m.parameter}
                for name, value in trained.items():
                    require_finite_replacement(name, value, masters_kept=not self.simulators)
        return changed

    def require_in(self, model: nn.Module, *, idle: bool) -> None:
        """Makes sure that gradients are not missing because the model has other parameters now.

        Looks in a step without a gradient, and where a parameter has none for the first time.

        Raises:
            RuntimeError: naming one that the model has no longer.
        """
        without = {m.name for m in self.matched if m.parameter.grad is None}
        if idle or not without <= self._without_gradient:
            require_in_model(self.matched, model)
            self._without_gradient |= without

    def forget_replaced(self) -> None:
        """Takes what the parameters hold for masters, where they are these."""
        if self.simulators is not None:
            self.simulators.accept_loaded()

    def find_memory(self) -> None:
        """Follows the parameters to where they lie now: fully_shard and Module.to move them.

        Masters move along, and so does the state that the inner optimizer has of them.

        Raises:
            RuntimeError: if one has lost its values, or become another dtype, shape or layout;
                masters stay.
        """
        for m in self.matched:
            dtype, device = m.parameter.dtype, m.parameter.device
            if dtype != self._dtypes[m.parameter] or device.type not in ("cpu", "cuda"):
                kept = "The masters are as they were, and state_dict() still gives them"
                raise RuntimeError(
                    f"MoQOptimizer: {m.name} must stay {self._dtypes[m.parameter]} on a CPU or a "
                    f"CUDA device, got {dtype} on {device}: convert the model before MoQOptimizer "
                    f"is made. {'It is its own master' if self.simulators else kept}"
                )
        self.trainer.check_layouts()
        moved = [p for p, device in self._devices.items() if p.device != device]
        for parameter in moved:
            self._devices[parameter] = parameter.device
            master = self._of[parameter]
            if master is not parameter:
                master.data = master.data.to(parameter.device)
            state = self.inner.state.get(master, {})
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == master.shape:
                    state[key] = value.to(parameter.device)
        if moved:
            self._make_trainer(self.trainer.schedule, self.trainer.step)
        elif self.sharded:
            pairs = self.pairs()
            self.trainer.rebind(
                [local_tensor(parameter) for parameter, _ in pairs],
                [local_tensor(master) for _, master in pairs],
            )

    def equal_those_of(self, state_dict: dict[str, Any]) -> bool:
        """Says whether a state dict holds exactly the present masters, in their order."""
        saved = [
            local_tensor(entry[MASTER_KEY])
            for _, entry in sorted(state_dict["state"].items())
            if isinstance(entry, dict) and MASTER_KEY in entry
        ]
        present = [
            local_tensor(self._of[parameter])
            for parameter in chain.from_iterable(g["params"] for g in self.inner.param_groups)
            if parameter in self._of
        ]
        # accelerate moves a state to its device, and perhaps the model only afterwards.
        return len(saved) == len(present) and all(
            torch.equal(value.to(master.device), master)
            for value, master in zip(saved, present, strict=True)
        )

    def read(self, state_dict: dict[str, Any]) -> StateToLoad:
        """Reads what `load` takes from a state dict.

        Raises:
            ValueError: if param groups, shapes or masters do not fit.
        """
        where = "MoQOptimizer.load_state_dict"
        groups, own_groups = state_dict["param_groups"], self.inner.param_groups
        sizes = [[len(group["params"]) for group in side] for side in (groups, own_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{where}: param groups must have {sizes[1]} parameters, got {sizes[0]}"
            )
        parameters = dict(
            zip(
                chain.from_iterable(group["params"] for group in groups),
                chain.from_iterable(group["params"] for group in own_groups),
                strict=True,
            )
        )
        state: dict[Any, Any] = {}
        saved: dict[torch.Tensor, torch.Tensor] = {}
        for key, entry in state_dict["state"].items():
            if isinstance(entry, dict) and MASTER_KEY in entry:
                saved[parameters[key]] = entry[MASTER_KEY]
                entry = {name: value for name, value in entry.items() if name != MASTER_KEY}
            state[key] = entry
        self._require_masters(saved, where)
        return StateToLoad(saved, {"state": state, "param_groups": groups})

    def load(self, saved: StateToLoad) -> None:
        """Loads masters and the inner optimizer's state."""
        with self.in_groups():
            self.inner.load_state_dict(saved.inner)
        with torch.no_grad():
            for parameter, value in saved.masters.items():
                self._of[parameter].copy_(value)

    def _require_masters(self, saved: dict[torch.Tensor, torch.Tensor], where: str) -> None:
        """Checks the masters of a state dict against the present ones."""
        frozen: list[str] = []
        for parameter, master in saved.items():
            if parameter.dim() == 1:
                require_finite(f"{where}: a learned scale", master, "; nothing has changed")
        for m in self.matched:
            value = saved.get(m.parameter)
            if value is None and m.parameter.requires_grad:
                raise ValueError(f"{where}: the state must hold a master of {m.name}, got none")
            if value is None:
                frozen.append(m.name)
                continue
            if value.shape != m.parameter.shape:
                raise ValueError(
                    f"{where}: the master of {m.name} must have shape {list(m.parameter.shape)}, "
                    f"got {list(value.shape)}"
                )
            require_finite(f"{where}: the master of {m.name}", value, "; nothing has changed")
        if frozen:
            warn_caller(
                f"{where}: the state holds no masters of the frozen {some(frozen)} "
                "(torch.distributed.checkpoint leaves frozen parameters out): they keep the "
                "full-precision values that MoQOptimizer was made with"
            )

    def warn_if_simulated(self) -> None:
        """Warns if the weights of a new training lie on an integer grid already."""
        widths = set()
        telling = [i for i, m in enumerate(self.matched) if _has_telling_groups(m)]
        for index in sorted(telling, key=lambda i: self.matched[i].parameter.numel()):
            num_bits = self.trainer.grid_width(index)
            if num_bits is None:
                return
            widths.add(num_bits)
        if widths:
            warn_caller(
                f"MoQOptimizer: all weights to be quantized lie on integer grids (of "
                f"{sorted(widths)} bits): they look like the simulated weights of an earlier MoQ "
                "training. Their full-precision masters, the step of the schedule and the "
                "sensitivities are in that training's optimizer state: load it with "
                "load_state_dict to resume"
            )

    def export(self, activations: ActivationQuantizers) -> list[QuantizedParameter]:
        """Returns both values of every parameter, gathered from all ranks."""
        from moq.quantized_parameter import QuantizedParameter

        schedule, step = self.trainer.schedule, self.trainer.step
        plans = schedule.plan()
        result = []
        for m, block in self.placed():
            grid = activations.grid_of(m.name.rpartition(".")[0])
            end = blend_end(plans[block], m.spec.blend_steps, step)
            if step < end:
                raise RuntimeError(
                    f"MoQOptimizer: {m.name} still blends with its full-precision value until step "
                    f"{end}, got step {step}: export after it"
                )
            result.append(
                QuantizedParameter(
                    name=m.name,
                    master=whole_tensor(self._of[m.parameter].detach()),
                    simulated=whole_tensor(self.simulated(m)),
                    num_bits=schedule.bits_at(block, step),
                    mode=m.spec.mode,
                    granularity=m.granularity,
                    group_size=m.group_size,
                    scale=m.spec.scale,
                    activations=None if grid is None else grid.kind,
                    input_scale=None if grid is None else grid.scale,
                    input_zero_point=None if grid is None else grid.zero_point,
                    absmax=self.simulators.of(m).learned() if self.simulators else None,
                    transposed=m.transposed,
                    scale_dtype=m.parameter.dtype,
                )
            )
        return result

    def _make_trainer(self, schedule: Schedule, step: int) -> None:
        """Makes the C++ object that does a step's work."""
        trained = []
        shared = self.shared_scales = SharedScales(self.matched)
        for m, block in self.placed():
            master = self._of[m.parameter]
            element, columns = first_element(m)
            trained.append(
                TrainedParameter(
                    name=m.name,
                    parameter=m.parameter,
                    master=master,
                    simulated=local_tensor(m.parameter),
                    full_precision=local_tensor(master),
                    block=block,
                    granularity=m.granularity,
                    mode=m.spec.mode,
                    rounding=m.spec.rounding,
                    scale_rule="absmax" if m.spec.scale == "learned" else m.spec.scale,
                    group_size=m.group_size,
                    transposed=m.transposed,
                    blend_steps=m.spec.blend_steps,
                    first_element=element,
                    unsharded_cols=columns,
                    collected=shared.row(m.parameter),
                )
            )
        in_place = self.simulators is None
        self.trainer = Trainer(trained, schedule, self.config.seed, step, in_place)
        self.trainer.set_reduction(shared.reduce)
        if self.simulators is not None:
            self.simulators.connect(self.matched, self.trainer)

    def _require_unowned(self, m: MatchedParameter) -> None:
        """Refuses a parameter whose simulated values another training writes.

        Raises:
            ValueError: naming it.
        """
        for collect in (gc.collect, None):
            owner = _OWNERS[m.parameter] if m.parameter in _OWNERS else None
            if owner is None or owner() in (None, self):
                return
            if collect is not None:
                collect()  # the other training may be over
        raise ValueError(
            f"{m.name}: must have one MoQOptimizer, and another one holds its full-precision "
            "master: give all its param groups to one optimizer, or drop the other one (del) first"
        )

    def _take_over_state(self, parameter: torch.Tensor, master: torch.Tensor) -> None:
        """Moves state that the inner optimizer has already from a parameter to its master."""
        state = self.inner.state.pop(parameter, None)
        if state is not None:
            self.inner.state[master] = {
                key: value.to(master.dtype)
                if isinstance(value, torch.Tensor)
                and value.shape == master.shape
                and value.dtype == parameter.dtype
                else value
                for key, value in state.items()
            }


def _require_dense(matched: MatchedParameter) -> None:
    local = local_tensor(matched.parameter.detach())
    if local.numel() and torch.empty_like(local, device="meta").stride() != local.stride():
        raise ValueError(
            f"{matched.name}: a weight must lie in memory without gaps or overlaps, as a "
            f"contiguous or a transposed one does, got strides {local.stride()} of shape "
            f"{list(local.shape)}: assign nn.Parameter(weight.detach().contiguous()) to its module"
        )


def _has_telling_groups(matched: MatchedParameter) -> bool:
    """Says whether weights of this shape lie on a grid only if they were put there."""
    local = local_tensor(matched.parameter.detach())
    sharing = {
        "per_tensor": local.numel(),
        "per_channel": matched.in_features,
        "per_group": matched.group_size,
        "per_rows": matched.group_size * matched.in_features,
    }[matched.granularity]
    return sharing >= 8 and local.numel() >= 8 and len(set(local.flatten()[:64].tolist())) > 3
