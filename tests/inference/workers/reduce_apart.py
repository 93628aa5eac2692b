"""One rank: sums [1 + rank, 576], and expects to be told that the others sum something else."""

import torch

from moq import _C
from moq.inference.distributed import connect

communicator = connect()
tensor = torch.ones(1 + communicator.rank, 576)
try:
    communicator.all_reduce_sum(tensor)
    raise AssertionError("ranks with different tensors must get an error")
except _C.Error as error:
    expected = (
        "all_reduce_sum: all 2 ranks must make the same calls in the same order, got "
        "all_reduce_sum of 2304 bytes on rank 0 and all_reduce_sum of 4608 bytes on rank 1"
    )
    assert str(error) == expected, str(error)
assert bool((tensor == 1).all())
