"""One rank: reduces until something ends it. Argument: the transport (auto)."""

import sys

import torch

from moq.inference.distributed import connect

communicator = connect(transport=sys.argv[1] if len(sys.argv) > 1 else "auto")
tensor = torch.zeros(576)
communicator.all_reduce_sum(tensor)
print(f"rank {communicator.rank} reduces", flush=True)
while True:
    communicator.all_reduce_sum(tensor)
