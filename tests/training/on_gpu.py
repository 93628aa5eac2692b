"""What the tests on a GPU share: CUDA graphs, and code that must not wait for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def never_waiting(device: str = "cuda") -> Iterator[None]:
    """Whatever makes the host wait for the GPU fails here; on a CPU nothing is watched."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def side_stream() -> Iterator[None]:
    """Where torch wants the first runs of what is captured afterwards."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Records a step as a CUDA graph; returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
