"""The second form of simulation: weights put on their grid inside the forward pass.

A parametrization computes the simulated weight wherever the model reads it. No second copy of the
weights is kept, and scales can be learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from moq._C import Trainer, name_hash
from moq.leftovers import is_left_over, remember, remove_parametrization
from moq.rules import MatchedParameter, own_weight
from moq.sharding import is_sharded

#: How the names of learned scales end in a model.
LEARNED_SCALE = "parametrizations.weight.0.absmax"


class WeightSimulator(nn.Module):
    """Parametrization of one weight; reads its width, blend ratio and step on the device.

    Args:
        matched: The parameter.
        seed: Key of stochastic rounding.
    """

    is_weight_simulator = True
    loaded_over: bytes | None
    """Digest of the weight that load_state_dict has replaced, if any."""
    num_bits: torch.Tensor
    blend_ratio: torch.Tensor | None
    step: torch.Tensor

    def __init__(self, matched: MatchedParameter, seed: int) -> None:
        """Learned scales begin at the largest magnitude of each group."""
        super().__init__()
        spec = matched.spec
        self.enabled = True
        self.arguments = {
            "granularity": matched.granularity,
            "group_size": matched.group_size,
            "mode": spec.mode,
            "rounding": spec.rounding,
            "seed": seed,
            "name_hash": name_hash(matched.name),
            "transposed": matched.transposed,
            "scale_rule": "absmax" if spec.scale == "learned" else spec.scale,
        }
        self.loaded_over: bytes | None = None
        self.absmax: nn.Parameter | None = None
        self.group_elements = 1
        if spec.scale == "learned":
            groups = matched.groups(matched.parameter.detach())
            self.group_elements = max(1, groups.shape[1])
            largest = groups.abs().amax(1) if groups.shape[1] else groups.new_zeros(len(groups))
            self.absmax = nn.Parameter(
                largest.float(), requires_grad=matched.parameter.requires_grad
            )

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the simulated weight.

        The gradient of a learned magnitude A is divided by √N, with N weights that share it: it is
        a sum over them. LSQ (Esser et al., 2020) learns the step size s = A / Q of codes up to Q,
        and divides its gradient by √(N Q). As dL/dA = dL/ds / Q, a plain gradient step moves s here
        by Q^(-3/2) times what it does there. Adam knows no constant factor: it moves A by the
        learning rate, and s by the Q-th part of that, so in A a step is as long at every width.

        The weight may have moved to another device since the last step, which moves the rest.
        """
        if not self.enabled:
            return weight
        absmax = self.absmax
        if absmax is not None and absmax.requires_grad:
            value = absmax.detach()  # exactly the value: the difference is 0
            absmax = value + (absmax - value) * self.group_elements**-0.5
        simulated: torch.Tensor = torch.ops.moq.simulate(
            weight,
            self.num_bits.to(weight.device),
            absmax=absmax,
            blend_ratio=None if self.blend_ratio is None else self.blend_ratio.to(weight.device),
            step=self.step.to(weight.device),
            **self.arguments,
        )
        return simulated

    def learned(self) -> torch.Tensor | None:
        """Returns the magnitude of the largest code of each group, if it is learned."""
        return None if self.absmax is None else self.absmax.detach().abs()

    def codes(self, weight: torch.Tensor, num_bits: int) -> torch.Tensor:
        """Returns the integers of a weight with learned scales, in its groups."""
        assert self.absmax is not None
        limits = torch.finfo(weight.dtype)  # which stores the scales
        scale = (self.absmax.detach().abs() / (2 ** (num_bits - 1) - 1)).to(weight.dtype)
        scale = scale.clamp(limits.tiny, limits.max).float()
        with torch.no_grad():
            simulated: torch.Tensor = self(weight)
        matrix = simulated.t() if self.arguments["transposed"] else simulated
        groups = matrix.reshape(len(scale), -1).float()
        codes: torch.Tensor = (groups / scale[:, None]).round().to(torch.int32)
        return codes


class WeightSimulators:
    """The parametrizations of a model.

    Args:
        model: The model, unwrapped.
        seed: Key of stochastic rounding.
        master_dtype: As in MoQConfig.
    """

    def __init__(self, model: nn.Module, seed: int, master_dtype: str) -> None:
        """Places nothing yet."""
        self.model = model
        self.seed = seed
        self.master_dtype = master_dtype
        self._of: dict[torch.Tensor, WeightSimulator] = {}

    def require_possible(self, matched: Sequence[MatchedParameter]) -> None:
        """Refuses parameters that cannot be simulated in the forward pass.

        Raises:
            ValueError: naming the parameter and the reason.
        """
        for m in matched:
            if is_sharded(m.parameter):
                raise ValueError(
                    f"{m.name}: simulate must be 'in_place' for sharded parameters, got 'autograd'"
                )
            if self.master_dtype == "float32" and m.parameter.dtype != torch.float32:
                raise ValueError(
                    f"{m.name}: with simulate 'autograd' the parameters are the masters: they must "
                    f"be float32 (use autocast), got {m.parameter.dtype}; master_dtype 'parameter' "
                    "trains them as they are"
                )

    def place(
        self, matched: Sequence[MatchedParameter], inner: torch.optim.Optimizer
    ) -> list[nn.Parameter]:
        """Parametrizes the modules of new parameters; learned scales join the inner optimizer.

        Returns:
            The learned scales.
        """
        new = {id(m.parameter): WeightSimulator(m, self.seed) for m in matched}
        owners = [
            (module, new[id(own_weight(module))])
            for module in self.model.modules()
            if id(own_weight(module)) in new
        ]
        for module, simulator in owners:
            _parametrize(module, simulator)
        learned = []
        for m in matched:
            simulator = self._of[m.parameter] = new[id(m.parameter)]
            remember(simulator, self)
            if simulator.absmax is not None:
                learned.append(simulator.absmax)
        if learned:
            group: dict[str, object] = {"params": learned}
            if "weight_decay" in inner.defaults:
                group["weight_decay"] = 0.0  # a scale has no reason to shrink
            inner.add_param_group(group)
        return learned

    def connect(self, matched: Sequence[MatchedParameter], trainer: Trainer) -> None:
        """Points every parametrization at the control data of its parameter."""
        for index, m in enumerate(matched):
            simulator = self._of[m.parameter]
            simulator.num_bits, simulator.blend_ratio, simulator.step = trainer.control_of(index)

    def of(self, m: MatchedParameter) -> WeightSimulator:
        """Returns the parametrization of a parameter."""
        return self._of[m.parameter]

    def loaded(self, matched: Sequence[MatchedParameter]) -> list[int]:
        """Returns the numbers of the parameters that load_state_dict gave other values."""
        return [
            index
            for index, m in enumerate(matched)
            if (before := self._of[m.parameter].loaded_over) is not None
            and before != _digest(self.trained(m).values())
        ]

    def trained(self, m: MatchedParameter) -> dict[str, torch.Tensor]:
        """Returns a parameter, and its learned scales if it has some, by names for messages."""
        absmax = self._of[m.parameter].absmax
        trained: dict[str, torch.Tensor] = {m.name: m.parameter}
        if absmax is not None:
            trained[f"the learned scales of {m.name}"] = absmax
        return trained

    def accept_loaded(self) -> None:
        """Takes the values that the parameters have now for theirs."""
        for simulator in self._of.values():
            simulator.loaded_over = None

    def enable(self, enabled: bool) -> None:
        """Shows the simulated weights, or the parameters as they are."""
        for simulator in self._of.values():
            simulator.enabled = enabled


def _parametrize(module: nn.Module, simulator: WeightSimulator) -> None:
    """Puts a simulator before a module's weight, and leaves the Parameter as it is.

    torch resets the gradient accumulator of what it parametrizes, and DistributedDataParallel has
    its hooks there: it gets a stand-in for the time of the call.
    """
    weight = module._parameters["weight"]
    assert weight is not None
    module._parameters["weight"] = nn.Parameter(weight.detach(), weight.requires_grad)
    parametrize.register_parametrization(module, "weight", simulator, unsafe=True)
    chain: Any = module.parametrizations["weight"]  # type: ignore[index]
    chain.original = weight
    chain.register_load_state_dict_pre_hook(_remember_values)


def _remember_values(
    chain: Any, state_dict: Mapping[str, Any], prefix: str, *_arguments: object
) -> None:
    """Notes what a weight and its learned scales were before load_state_dict gives them others."""
    values = {name: value.detach() for name, value in chain.named_parameters()}
    for simulator in chain:
        if isinstance(simulator, WeightSimulator) and simulator.loaded_over is None:
            loaded = {name: state_dict.get(f"{prefix}{name}") for name in values}
            if any(
                new is not None and not _holds(values[name], new) for name, new in loaded.items()
            ):
                simulator.loaded_over = _digest([chain.original, *simulator.parameters()])


def _holds(value: torch.Tensor, loaded: object) -> bool:
    """Says whether a value is what is about to be loaded."""
    if not isinstance(loaded, torch.Tensor) or loaded.shape != value.shape:
        return False
    return torch.equal(loaded.to(value), value)


def _digest(values: Iterable[torch.Tensor]) -> bytes:
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def remove_left_over_simulators(model: nn.Module) -> None:
    """Removes the parametrizations that an earlier training has left in a model."""
    for module in model.modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        chain: Any = module.parametrizations["weight"]  # type: ignore[index]
        left = [s for s in chain if isinstance(s, WeightSimulator) and is_left_over(s)]
        for simulator in left:
            simulator.enabled = False
        if len(left) == len(chain):
            remove_parametrization(module, "weight")


def require_learnable(
    matched: Sequence[MatchedParameter], model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Refuses learned scales that others would know nothing of, which were made before them.

    Raises:
        ValueError: naming the first of them.
    """
    learned = [m.name for m in matched if m.spec.scale == "learned"]
    if not learned:
        return
    parallel = nn.parallel.DistributedDataParallel
    if any(isinstance(module, parallel) for module in model.modules()):
        raise ValueError(
            f"{learned[0]}: with scale 'learned' make MoQOptimizer of the plain model and wrap "
            "that in DistributedDataParallel afterwards: it reduces the gradients of the "
            "parameters that it finds, and the scales are made here"
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):  # as torch's schedulers ask themselves
        raise ValueError(
            f"{learned[0]}: with scale 'learned' make the learning-rate scheduler after "
            "MoQOptimizer, and of it: it moves the rates of the param groups that it finds, and "
            "that of the scales is made here. An optimizer that has had a scheduler keeps its "
            "mark: make a new one"
        )
