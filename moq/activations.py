"""INT8 activations in training: the inputs of the layers that the rules choose, as served later."""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moq.config import ObserverConfig
from moq.input_grid import InputGrid, is_asymmetric, is_static, mode_of, static_grid
from moq.leftovers import is_left_over, remember
from moq.rules import MatchedParameter, own_weight, plain_name
from moq.sharding import is_sharded, mesh_groups

#: Name under which a layer holds the quantizer of its input.
ATTRIBUTE = "input_quantizer"


class ActivationQuantizer(nn.Module):
    """Rounds what it is given to INT8 by the operator that the INT8 kernels share.

    The gradient passes straight through, but to elements that a static grid clips.

    Args:
        kind: One of moq.input_grid.KINDS: ``dynamic`` (a grid for each token) or ``static`` (one,
            from what was seen), with a zero point if ``_asymmetric``.
        dtype: In which a checkpoint stores a static scale.
        device: Of the layer.
    """

    def __init__(self, kind: str, dtype: torch.dtype, device: torch.device) -> None:
        """Has seen nothing yet: until the first update, a batch is its own measure."""
        super().__init__()
        self.kind = kind
        self.dtype = dtype
        self.enabled = True
        if self.is_static:
            for name in ("extent", "seen"):
                zeros = torch.zeros(2, dtype=torch.float32, device=device)
                self.register_buffer(name, zeros, persistent=False)

    extent: torch.Tensor
    """[2]: moving averages of the largest magnitudes of a step below and above 0, alike if the grid
    is symmetric; 0 before the first."""
    seen: torch.Tensor
    """[2]: the largest finite ones since the last update."""

    @property
    def is_static(self) -> bool:
        """Whether all tokens share one grid."""
        return is_static(self.kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x on its grid; in training a static quantizer also takes its measure."""
        if not self.enabled:
            return x
        scale = zero_point = None
        if self.is_static:
            with torch.no_grad():
                own = self._extent_of(x.detach()) if x.numel() else self.seen
                if self.training:
                    # A batch that overflows is no measure, nor may it spoil that of the next step.
                    finite = torch.where(own.isfinite().all(), own, self.seen)
                    self.seen.copy_(torch.maximum(self.seen, finite))
                extent = torch.where(self.extent.amax() > 0, self.extent, own)
                scale, zero_point = static_grid(extent, self.kind, self.dtype)
        rounded: torch.Tensor = torch.ops.moq.fake_quantize_activation(
            x, scale, zero_point, mode=mode_of(self.kind)
        )
        return rounded

    def _extent_of(self, x: torch.Tensor) -> torch.Tensor:
        if is_asymmetric(self.kind):
            lowest, highest = x.aminmax()
            return torch.stack([-lowest, highest]).float().clamp(min=0)
        return x.abs().amax().float().expand(2)

    def grid(self) -> InputGrid:
        """Returns the grid as it is now; waits for the device."""
        if not self.is_static:
            return InputGrid(self.kind)
        scale, zero_point = static_grid(self.extent, self.kind, self.dtype)
        return InputGrid(self.kind, float(scale), None if zero_point is None else int(zero_point))

    def extra_repr(self) -> str:
        """Says which kind it is."""
        return self.kind


class ActivationQuantizers:
    """The quantizers of a model's activations, placed by the rules, and their observers.

    Args:
        model: The model, unwrapped.
        config: How static scales follow what is seen.
        total_steps: Optimizer steps of the whole training.
        process_group: Ranks that train copies of the model, if neither fully_shard nor
            DistributedDataParallel tells.

    Raises:
        TypeError: if process_group is something else.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ObserverConfig,
        total_steps: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Places nothing yet."""
        _require_group(process_group)
        self.model = model
        self.config = config
        self.process_group = process_group
        # The first step counts even where that share of the steps is less than one.
        self.freeze_step = max(1, int(config.freeze_at * total_steps + 1e-6))
        self.by_name: dict[str, ActivationQuantizer] = {}
        self._layers: dict[str, nn.Module] = {}
        self._completed = 0  # steps, at least
        self._frozen = False
        self._shared: list[_Shared] | None = None

    def place(self, matched: Sequence[MatchedParameter]) -> None:
        """Puts a quantizer before every layer whose rule asks for one and that has none yet.

        Those that an earlier training has left are removed.
        """
        kinds = {id(m.parameter): m for m in matched if m.spec.activations != "none"}
        for name, module in self.model.named_modules():
            found = module._modules.get(ATTRIBUTE)
            if isinstance(found, ActivationQuantizer) and is_left_over(found):
                delattr(module, ATTRIBUTE)
            m = kinds.get(id(own_weight(module)))
            if m is None or ATTRIBUTE in module._modules:
                continue
            parameter = m.parameter
            quantizer = ActivationQuantizer(m.spec.activations, parameter.dtype, parameter.device)
            quantizer.train(module.training)
            remember(quantizer, self)
            module.add_module(ATTRIBUTE, quantizer)
            if _quantize_input not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
            self.by_name[plain_name(name)] = quantizer
            self._layers[plain_name(name)] = module
            self._shared = None
            if quantizer.is_static:
                self._keep_from_ddp(f"{name}.{ATTRIBUTE}.seen".removeprefix("."))

    def _keep_from_ddp(self, buffer: str) -> None:
        """Excludes a buffer from what a DistributedDataParallel made later broadcasts.

        It does so before every forward pass, and what a rank has seen is its own. The second name
        is the one in a compiled model.
        """
        ignored = getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())
        self.model._ddp_params_and_buffers_to_ignore = list(  # type: ignore[assignment]
            dict.fromkeys([*ignored, buffer, f"_orig_mod.{buffer}"])
        )

    def enable(self, enabled: bool) -> None:
        """Switches all of them on or off."""
        for quantizer in self.by_name.values():
            quantizer.enabled = enabled

    def _static(self) -> dict[str, ActivationQuantizer]:
        return {name: q for name, q in self.by_name.items() if q.is_static}

    def find_ranks(self) -> list[_Shared]:
        """Finds out, once all wrappers are there, whose batches count for each static scale.

        Raises:
            RuntimeError: in a job of several ranks, naming a layer of which nothing says it.
        """
        if self._shared is None:
            static = self._static()
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            search = several and static and self.process_group is None
            wrappers = _data_parallel() if search else []
            by_groups = defaultdict(list)
            for name, quantizer in static.items():
                by_groups[self._groups_of(name, wrappers) if several else ()].append(quantizer)
            self._shared = list(by_groups.items())
        return self._shared

    def _groups_of(
        self, name: str, wrappers: Sequence[nn.parallel.DistributedDataParallel]
    ) -> tuple[dist.ProcessGroup, ...]:
        """Returns the groups of several ranks over which the inputs of a layer are spread."""
        weight = own_weight(layer := self._layers[name])
        groups = [] if self.process_group is None else [self.process_group]
        if weight is not None and is_sharded(weight):
            groups += mesh_groups(weight)
        elif not groups:
            groups = [w.process_group for w in wrappers if any(m is layer for m in w.modules())]
            if not groups:
                raise RuntimeError(
                    f"MoQOptimizer: the ranks whose batches count for the static scale of {name} "
                    "must be known, got a layer that neither fully_shard nor "
                    "DistributedDataParallel holds: say MoQOptimizer(…, process_group=…), with "
                    "torch.distributed.group.WORLD if every rank trains a copy of the model, or "
                    "torch.distributed.new_subgroups(1)[0] if each trains a part or a model of its "
                    "own"
                )
        return tuple(dict.fromkeys(g for g in groups if dist.get_world_size(g) > 1))

    @torch.no_grad()
    def update(self, step: torch.Tensor, found_inf: torch.Tensor | None) -> None:
        """Moves the averages on by what was seen since the last step, alike on all ranks it is of.

        Nothing moves after the step at which they freeze, nor in a step that was skipped. A step
        that GradScaler skips by not making it comes to nobody's notice: its batches count to the
        next one. Waits for no device.

        Once all ranks know that it is over, nothing is computed or sent any more; on a GPU that is
        never known of a fused optimizer under GradScaler, whose skipped steps only the device
        counts.

        Args:
            step: Completed optimizer steps, [1], on a device.
            found_inf: Non-zero if this step was skipped; None: it was not.
        """
        shared = self.find_ranks()
        static = [quantizer for _, members in shared for quantizer in members]
        if not static:
            return
        self._frozen = self._is_over(step, found_inf)
        if self._frozen:
            return
        device = step.device
        seen = torch.stack([q.seen.to(device) for q in static])
        parts = torch.split(seen, [len(members) for _, members in shared])
        for (groups, _), part in zip(shared, parts, strict=True):
            for group in groups:
                dist.all_reduce(part, dist.ReduceOp.MAX, group=group)
        old = torch.stack([q.extent.to(device) for q in static])
        momentum = self.config.momentum
        began, runs = (extent.amax(1, keepdim=True) > 0 for extent in (old, seen))
        average = torch.where(began, momentum * old + (1 - momentum) * seen, seen)
        moves = runs & (step <= self.freeze_step)
        if found_inf is not None:
            moves &= found_inf.to(device).eq(0)
        new = torch.where(moves, average, old)
        torch._foreach_copy_([q.extent for q in static], list(new.unbind()))
        torch._foreach_zero_([q.seen for q in static])

    def _is_over(self, step: torch.Tensor, found_inf: torch.Tensor | None) -> bool:
        """Says whether nothing can move any more, by what the hosts of all ranks know alike."""
        if step.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # the captured step may be replayed after an earlier state was loaded
        if not step.is_cuda:
            self._completed = int(step)
        elif found_inf is None:
            self._completed += 1
        return self._completed > self.freeze_step

    def forget(self) -> None:
        """Drops what was seen since the last update."""
        for quantizer in self._static().values():
            quantizer.seen.zero_()

    def state(self) -> dict[str, float]:
        """Returns the averages by name of the layer; waits for the device.

        They are the largest magnitudes; if the grid is asymmetric those above 0, and ``NAME.below``
        are those below. ``NAME.seen`` (and ``NAME.seen.below``) is what a layer has seen since the
        last update: micro-batches, and steps that GradScaler skipped by not making them.
        """
        static = self._static()
        if not static:
            return {}
        averages = torch.stack([q.extent.cpu() for q in static.values()]).tolist()
        seen = torch.stack([q.seen.cpu() for q in static.values()]).tolist()
        state: dict[str, float] = {}
        for (name, quantizer), average, pending in zip(static.items(), averages, seen, strict=True):
            state |= _named(name, quantizer, average)
            if any(pending) and not self._frozen:  # then nobody asks any more
                state |= _named(f"{name}.seen", quantizer, pending)
        return state

    @torch.no_grad()
    def load(self, state: dict[str, float], completed: int) -> None:
        """Continues with the averages that `state` returned after so many completed steps."""
        self._completed, self._frozen = completed, False
        for name, quantizer in self._static().items():
            for key, buffer in ((name, quantizer.extent), (f"{name}.seen", quantizer.seen)):
                above = state.get(key, 0.0)
                below = state.get(f"{key}.below", 0.0) if is_asymmetric(quantizer.kind) else above
                buffer.copy_(torch.tensor([below, above]))

    def grid_of(self, module: str) -> InputGrid | None:
        """Returns the grid of a layer's input, or None if it reads floats.

        Raises:
            RuntimeError: naming the layer, if its grid is static and nothing was seen.
        """
        quantizer = self.by_name.get(module)
        if quantizer is None:
            return None
        if quantizer.is_static and not bool(quantizer.extent.amax() > 0):
            raise RuntimeError(
                f"MoQOptimizer: {module or 'the model'}: a static scale of activations must have "
                "seen inputs other than 0, got none: export after a training step that runs the "
                "layer"
            )
        return quantizer.grid()


def _named(name: str, quantizer: ActivationQuantizer, extent: Sequence[float]) -> dict[str, float]:
    """An extent as `ActivationQuantizers.state` has it."""
    below, above = extent
    return {name: above} | ({f"{name}.below": below} if is_asymmetric(quantizer.kind) else {})


#: Groups whose largest value counts, one after the other, and the quantizers of which it does.
_Shared = tuple[tuple[Any, ...], list[ActivationQuantizer]]


def _require_group(group: object) -> None:
    """Refuses what is no process group; a rank outside of one has a number in its place.

    Raises:
        TypeError: naming its type.
    """
    if group is None:
        return
    if not (isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER):
        raise TypeError(
            "MoQOptimizer: process_group must be a torch.distributed.ProcessGroup, got "
            f"{type(group).__name__}; that of a device mesh is mesh['name'].get_group()"
        )


def _data_parallel() -> list[nn.parallel.DistributedDataParallel]:
    """Returns every DistributedDataParallel that there is: one may be made after MoQOptimizer.

    It knows its module; nothing leads from there to it.
    """
    gc.collect()  # not those of a training that is over
    parallel = nn.parallel.DistributedDataParallel
    return [found for found in gc.get_objects() if issubclass(type(found), parallel)]


@contextlib.contextmanager
def exported_inputs(model: nn.Module, grids: Mapping[str, InputGrid]) -> Iterator[None]:
    """Shows layers the inputs that a checkpoint says they have, whatever quantizers they hold.

    Args:
        model: The model.
        grids: Name of a layer with INT8 inputs -> their grid.
    """
    enabled = [m for m in model.modules() if isinstance(m, ActivationQuantizer) and m.enabled]
    # A wrapper and what it wraps have one name; the inner module comes last and is the layer. One
    # that has several names has one hook.
    named = model.named_modules(remove_duplicate=False)
    layers = {plain_name(name): module for name, module in named}
    with contextlib.ExitStack() as restored:
        for quantizer in enabled:
            quantizer.enabled = False
            restored.callback(setattr, quantizer, "enabled", True)
        for layer, grid in {layers[name]: grid for name, grid in grids.items()}.items():
            hook = layer.register_forward_pre_hook(_rounding_hook(grid), with_kwargs=True)
            restored.callback(hook.remove)
        yield


def _rounding_hook(grid: InputGrid) -> Callable[..., Any]:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        # Not token ids of an embedding that shares the layer's weight.
        return grid.rounded(x) if x.is_floating_point() else x

    return lambda module, args, kwargs: _with_first(rounded, args, kwargs)


def _quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hook of a layer: its first argument, quantized, unless its quantizer has been removed."""
    quantizer: Any = module._modules.get(ATTRIBUTE)
    if quantizer is None:
        return args, kwargs
    return _with_first(quantizer, args, kwargs)


def _with_first(
    change: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer, of which the first is changed."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: change(kwargs[name])}
