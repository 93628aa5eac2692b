"""One of two ranks on GPUs, of which rank 1 runs out of memory: prints the errors it got.

Arguments: the directory of a small model, and of one of about 100 MiB.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from little_memory import little_memory, memory_limit

from moq import _C
from moq.inference import Engine

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
engine = Engine.from_pretrained(sys.argv[1], device="cuda", dtype="fp32")
few, many = [[3, 4, 5]], [[7] * 60] * 128
expected = engine.generate(few, 5)
with little_memory() if engine.core.rank == 1 else contextlib.nullcontext():
    for _ in range(2):
        try:
            engine.generate(many, 20, max_batch=len(many))
        except _C.Error as error:
            sys.stdout.write(f"rank {engine.core.rank}: {error}\n")
    assert engine.generate(few, 5) == expected
assert len(engine.generate(many, 20, max_batch=len(many))) == len(many)
rank = engine.core.rank
del engine
with memory_limit(30 << 20) if rank == 1 else contextlib.nullcontext():
    try:
        Engine.from_pretrained(sys.argv[2], device="cuda", dtype="fp32")
    except _C.Error as error:
        sys.stdout.write(f"rank {rank}: {error}\n")
large = Engine.from_pretrained(sys.argv[2], device="cuda", dtype="fp32")
assert len(large.generate(few, 5)) == len(few)
sys.stdout.write(f"rank {rank}: went on\n")
