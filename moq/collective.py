"""What all ranks of a training must agree on, in a few lines of torch.distributed."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch.distributed as dist

from moq import _C

T = TypeVar("T")


def all_gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks in order of rank; [value] without torch.distributed.

    Values travel pickled, so floats arrive bit for bit and every rank computes the same from them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    if "gloo" in dist.get_backend_config(group):
        # all_gather_object sends tensors that a thread of gloo's may still hold when the process
        # exits, which aborts then.
        ranks = dist.group.WORLD if group is None else group
        assert ranks is not None  # it is initialized
        gathered = _C.all_gather_bytes(ranks.group_name, pickle.dumps(value))
        return [pickle.loads(other) for other in gathered]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def raise_together(group: dist.ProcessGroup | None = None) -> AbstractContextManager[None]:
    """Lets an exception on one rank raise on all, instead of leaving the others waiting for it.

    Raises:
        RuntimeError: on ranks that had no exception of their own, naming the first that had.
    """
    return raise_over([group])


@contextmanager
def raise_over(groups: Iterable[dist.ProcessGroup | None]) -> Iterator[None]:
    """Does so on all ranks of several groups, given in the same order by all; None has everyone."""
    own: Exception | None = None
    report = None
    try:
        yield
    except Exception as error:
        own = error
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        report = f"rank {rank} failed: {type(error).__name__}: {error}"
    for group in groups:
        report = next((other for other in all_gather(report, group) if other is not None), None)
    if own is not None:
        raise own
    if report is not None:
        raise RuntimeError(report)
