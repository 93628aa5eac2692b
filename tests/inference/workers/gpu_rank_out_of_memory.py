"""One of two ranks on GPUs, of which rank 1 runs out of memory: prints the error it got.

Arguments: the directory of a model.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from little_memory import little_memory

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
sys.stdout.write(f"rank {engine.core.rank}: went on\n")
