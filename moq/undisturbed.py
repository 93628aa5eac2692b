"""A frame in which a model can be evaluated as if nothing had happened."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn


@contextlib.contextmanager
def undisturbed(model: nn.Module, others: Iterable[Tensor] = ()) -> Iterator[None]:
    """Runs the body with the model in eval mode, and restores what the body may have changed.

    Restored bit for bit: the training flag of every module, every buffer (identity and values), the
    gradient that each parameter holds, and the random states of Python, NumPy, the CPU and the
    model's CUDA devices. Hooks on gradients of parameters, a user's that scales them or an
    optimizer's that follows them, do not run in the body.

    A DistributedDataParallel model does not synchronise in the body, so that ranks may evaluate it
    any number of times; its ranks must all enter. A model of fully_shard does, whatever
    set_requires_gradient_sync said, and is sharded before and after.

    Args:
        model: What the body evaluates.
        others: Leaves that are treated as its parameters are.

    Raises:
        RuntimeError: if fully_shard holds gradients that have not been reduced yet.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_random_states(model))
        stack.enter_context(_buffers(model))
        stack.enter_context(_training_flags(model))
        stack.enter_context(_sharded(model))
        stack.enter_context(without_gradients([*model.parameters(), *others]))
        stack.enter_context(_no_collectives(model))
        model.eval()
        yield


@contextlib.contextmanager
def _no_collectives(model: nn.Module) -> Iterator[None]:
    parallel = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
    saved = [(m, m.require_backward_grad_sync, m.require_forward_param_sync) for m in parallel]
    for module in parallel:
        # The first forward after the first backward does this, once; here all ranks are present.
        module.reducer._rebuild_buckets()
        module.require_backward_grad_sync = module.require_forward_param_sync = False
    try:
        yield
    finally:
        for module, backward, forward in saved:
            module.require_backward_grad_sync = backward
            module.require_forward_param_sync = forward


@contextlib.contextmanager
def _random_states(model: nn.Module) -> Iterator[None]:
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    saved = [(module, dict(module._buffers)) for module in model.modules()]
    values = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    try:
        yield
    finally:
        for module, buffers in saved:
            module._buffers.clear()
            module._buffers.update(buffers)
        for buffer, value in values.items():
            # Whatever it compares as: 0.0 equals -0.0. Past autograd's eyes: a graph that saved the
            # buffer finds it as it was. A tensor of inference mode cannot have been written.
            if not buffer.is_inference():
                _written_part(buffer.data, buffer).copy_(_written_part(value, buffer))


def _written_part(tensor: Tensor, buffer: Tensor) -> Tensor:
    """The part of a tensor that has memory of its own if it is expanded as a buffer is."""
    if buffer.layout is torch.strided:
        for dim, (size, stride) in enumerate(zip(buffer.shape, buffer.stride(), strict=True)):
            if stride == 0 and size > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


@contextlib.contextmanager
def _training_flags(model: nn.Module) -> Iterator[None]:
    saved = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in saved:
            module.training = training


@contextlib.contextmanager
def without_gradients(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Lets leaves begin the body without gradients, and no hook on these run in it.

    Afterwards they have the gradients and hooks that they had.
    """
    saved = [(leaf, leaf.grad) for leaf in dict.fromkeys(leaves)]
    # Autograd has these very dicts.
    hooks = [
        own
        for leaf, _ in saved
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
        if (own := getattr(leaf, kind, None))
    ]
    emptied = [(own, dict(own)) for own in hooks]
    for leaf, _ in saved:
        leaf.grad = None
    for own in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, entries in emptied:
            own.clear()
            own.update(entries)
        for leaf, gradient in saved:
            leaf.grad = gradient


@contextlib.contextmanager
def _sharded(model: nn.Module) -> Iterator[None]:
    """Shards the parameters that a forward pass has left whole, and lets gradients be reduced."""
    modules = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    states = [module._get_fsdp_state() for module in modules]  # type: ignore[operator]
    groups = [group for state in states if (group := state._fsdp_param_group)]
    if any(p.unsharded_accumulated_grad is not None for group in groups for p in group.fsdp_params):
        raise RuntimeError(
            "sensitivity: gradients that fully_shard accumulates must have been reduced, got some "
            "that set_requires_gradient_sync(False) has put off: measure between two steps"
        )
    saved = [(group, group.reduce_grads, group.all_reduce_grads) for group in groups]
    try:
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = True
            group.reshard()
        yield
    finally:
        for group, reduce, all_reduce in saved:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce
            group.reshard()
