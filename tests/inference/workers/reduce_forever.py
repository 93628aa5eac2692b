"""One rank: reduces until something ends it."""

import torch

from moq.inference.distributed import connect

communicator = connect()
tensor = torch.zeros(576)
communicator.all_reduce_sum(tensor)
print(f"rank {communicator.rank} reduces", flush=True)
while True:
    communicator.all_reduce_sum(tensor)
