"""What the graph of a loss reaches, without changing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def reached_by(loss: Tensor) -> tuple[list[Tensor], set[torch.dtype]]:
    """Looks at the graph of a loss.

    What lies behind a reentrant checkpoint is not seen: its graph is made in the backward pass, see
    `recomputed_dtypes`.

    Args:
        loss: With a graph.

    Returns:
        (the tensors into which ``loss.backward()`` accumulates gradients, the dtypes of all that
        it computes gradients of)
    """
    if loss.grad_fn is None:
        return [loss], {loss.dtype}
    leaves: list[Tensor] = []
    dtypes: set[torch.dtype] = set()
    seen: set[Any] = set()
    ahead: list[Any] = [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        dtypes.update(output.dtype for output in getattr(node, "_input_metadata", ()))
        ahead += [function for function, _ in node.next_functions]
    return leaves, dtypes


@contextlib.contextmanager
def recomputed_dtypes() -> Iterator[set[torch.dtype]]:
    """Looks at the graphs that reentrant checkpoints make in a backward pass.

    Yields:
        The dtypes of all that they save, filled meanwhile.
    """
    dtypes: set[torch.dtype] = set()

    def pack(tensor: Tensor) -> Tensor:
        dtypes.add(tensor.dtype)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield dtypes
