"""A frame in which a model computes in full float32, at the weights that it simulates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from moq.activations import ActivationQuantizer
from moq.sharding import is_sharded

HALF = (torch.float16, torch.bfloat16)


def widened(batch: Any) -> Any:
    """Returns a batch with its half-precision tensors as float32 ones."""
    if not any(isinstance(t, Tensor) and t.dtype in HALF for t in tree_leaves(batch)):
        return batch
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in HALF else t, batch)


def computes_in_half(model: nn.Module) -> bool:
    """Says whether fully_shard makes the model compute in half precision, which no frame changes.

    It does if the shards are of such a dtype, or if its mixed-precision policy says so.
    """
    if any(is_sharded(p) and p.dtype in HALF for p in model.parameters()):
        return True
    policies = [
        getattr(state, "_mp_policy", None)
        for module in model.modules()
        if (state := getattr(module, "_get_fsdp_state", lambda: None)()) is not None
    ]
    return any(getattr(policy, "param_dtype", None) in HALF for policy in policies)


@contextlib.contextmanager
def full_float32(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Lets a model compute in float32: no autocast, no TF32, no half-precision weights.

    Half-precision parameters have float32 parameters in their place meanwhile, and buffers too;
    parameters that fully_shard holds stay. Weights that a parametrization of moq simulates have
    their simulated values in the parameters and no parametrization; inputs that it rounds to INT8
    stay floats: rounding is flat nearly everywhere, so differences do not see through it.
    Afterwards everything is what it was, bit for bit.

    Yields:
        {parameter: what stands in its place}, of the parameters that are replaced.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_reduced_matmuls())
        for device in {p.device.type for p in model.parameters()}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_simulated_values(model))
        yield stack.enter_context(_wide_tensors(model))


@contextlib.contextmanager
def _no_reduced_matmuls() -> Iterator[None]:
    """Makes float32 products exact to float32, also where TF32 or BF16 was allowed for them."""
    backends = [
        getattr(library, kind)
        for library, kinds in (
            (torch.backends.cuda, ("matmul",)),
            (torch.backends.cudnn, ("conv", "rnn")),
            (torch.backends.mkldnn, ("matmul", "conv", "rnn")),
        )
        for kind in kinds
    ]
    saved = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision


@contextlib.contextmanager
def _simulated_values(model: nn.Module) -> Iterator[None]:
    """Moves simulated values from the forward pass into the parameters."""
    with contextlib.ExitStack() as restored:
        for module in model.modules():
            simulator = next(module.children(), None)
            if isinstance(module, ActivationQuantizer) and module.enabled:
                module.enabled = False
                restored.callback(setattr, module, "enabled", True)
            elif (
                isinstance(module, nn.utils.parametrize.ParametrizationList)
                and getattr(simulator, "is_weight_simulator", False)
                and simulator.enabled  # type: ignore[union-attr]
            ):
                assert simulator is not None
                original = module.original
                with torch.no_grad():
                    simulated = simulator(original)
                # Past autograd's eyes: a graph that saved the weight finds it as it was.
                restored.callback(original.data.copy_, original.detach().clone())
                original.data.copy_(simulated)
                simulator.enabled = False  # type: ignore[assignment]
                restored.callback(setattr, simulator, "enabled", True)
        yield


@contextlib.contextmanager
def _wide_tensors(model: nn.Module) -> Iterator[dict[Tensor, Tensor]]:
    """Puts float32 tensors in the place of half-precision ones.

    New parameters, not new memory for the old ones: autograd, and whatever gathers gradients, has
    noted the old ones' dtype.
    """
    replaced: dict[Tensor, Tensor] = {}

    def wide(tensor: Tensor) -> Tensor:
        if tensor not in replaced:
            new = tensor.detach().float()
            replaced[tensor] = (
                nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            )
        return replaced[tensor]

    with contextlib.ExitStack() as restored:
        for module in model.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for members in held:
                for name, tensor in members.items():
                    if tensor is not None and tensor.dtype in HALF and not is_sharded(tensor):
                        restored.callback(members.__setitem__, name, tensor)
                        members[name] = wide(tensor)
        yield replaced
