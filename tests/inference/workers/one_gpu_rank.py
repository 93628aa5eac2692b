"""As gpu_rank.py, but all ranks on one GPU, which NCCL refuses: gloo carries what they exchange."""

import torch
import torch.distributed as dist
from workers.gpu_rank import run_all

from moq.inference import distributed

dist.init_process_group("gloo")
device = torch.device("cuda:0")
name = distributed.device_group_name(distributed.connect(device=device), None, device)
backend = dist.distributed_c10d._resolve_process_group(name)._get_backend(torch.device("cuda"))
assert backend.name() == "nccl"  # and so it would be
distributed._group_for = lambda *_: dist.group.WORLD
run_all("cuda:0")
