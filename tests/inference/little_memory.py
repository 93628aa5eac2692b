"""Want of GPU memory, for tests of what happens then."""

import contextlib
import gc
from collections.abc import Iterator

import torch

_PIECE = 20 << 20  # what torch's allocator takes at once for 1 to 10 MiB


@contextlib.contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Leaves this process so many more bytes of the current GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Leaves the current GPU 10 MiB: enough for tensors below 1 MiB, too little for larger ones."""
    with memory_limit(4 * _PIECE + _PIECE // 2):
        pieces = []
        with contextlib.suppress(torch.OutOfMemoryError):
            while True:
                pieces.append(torch.empty(_PIECE, dtype=torch.uint8, device="cuda"))
        yield
