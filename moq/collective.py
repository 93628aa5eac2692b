"""What all ranks of a training must agree on, in a few lines of torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def all_gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks in order of rank; [value] without torch.distributed.

    Values travel pickled, so floats arrive bit for bit and every rank computes the same from them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def raise_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Lets an exception on one rank raise on all, instead of leaving the others waiting for it.

    Raises:
        RuntimeError: on ranks that had no exception of their own, naming the first that had.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    reports = all_gather(None if own is None else f"{type(own).__name__}: {own}", group)
    if own is not None:
        raise own
    for rank, report in enumerate(reports):
        if report is not None:
            raise RuntimeError(f"rank {rank} failed: {report}")
