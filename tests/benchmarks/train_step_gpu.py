"""What moq adds to a training step of a decoder on one GPU or several (train_step.py)."""

import contextlib
import gc
import itertools
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import gpu
import torch
import torch.distributed as dist
from report import Row, print_rows
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from train_step_common import LEARNING_RATE, Step, step_of, wrap
from transformers import GPT2Config, GPT2LMHeadModel

import moq

DECODER = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
BATCH = (8, 512)
MODES = ["eager", "compiled"]
ROUNDINGS = ["nearest", "stochastic"]
PARALLEL = ["ddp", "fsdp"]
INNER = {"moq": torch.optim.AdamW, "moq.AdamW": moq.AdamW}  # of the competitors that are moq's
RUN = 4  # steps between two CUDA events


def decoder() -> GPT2LMHeadModel:
    """A decoder with the same random weights each time, BF16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = GPT2LMHeadModel(GPT2Config(**DECODER, use_cache=False))
    return model.to(torch.bfloat16)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class MasterAdamW:
    """Fused AdamW over float32 masters of some parameters, as mixed-precision training has them."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        """Makes masters of the parameters named; the others are updated as they are."""
        named = dict(model.named_parameters())
        self.parameters = [p for name, p in named.items() if name in names]
        self.masters = [p.detach().float() for p in self.parameters]
        self.others = [p for name, p in named.items() if name not in names]
        trained = self.masters + self.others
        self.adamw = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        """Casts the gradients, steps, and casts the masters back."""
        gradients = [p.grad for p in self.parameters]
        casts = [torch.empty_like(g, dtype=torch.float32) for g in gradients]
        torch._foreach_copy_([local(c) for c in casts], [local(g) for g in gradients])
        for master, cast in zip(self.masters, casts, strict=True):
            master.grad = cast
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        torch._foreach_copy_([local(p) for p in self.parameters], [local(m) for m in self.masters])

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for p in self.parameters + self.others:
            p.grad = None


def rank() -> int:
    """This process's rank; 0 where torchrun did not start it."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def ranks(parallel: str | None) -> Iterator[None]:
    """The job's process group over NCCL, each rank on its own GPU."""
    if parallel is None:
        yield
        return
    if "LOCAL_RANK" not in os.environ:
        sys.exit("--parallel takes ranks: start this with torchrun --nproc-per-node gpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model with the parameters of every layer, and all others, sharded over the ranks.

    A layer's weights are Conv1D's, [in, out], and are sharded by output features.
    """
    for block in model.transformer.h:
        fully_shard(block, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    return fully_shard(model)


@dataclass(frozen=True)
class Case:
    """A way to train the decoder on GPUs."""

    rounding: str
    compiled: bool
    parallel: str | None  # one of PARALLEL

    def __str__(self) -> str:
        """What a row is called."""
        ranks = f", {self.parallel} of {dist.get_world_size()} ranks" if self.parallel else ""
        mode = "compiled" if self.compiled else "eager"
        return f"355M BF16 batch 8 x 512{ranks}, {mode}, {self.rounding}"

    def model(self) -> GPT2LMHeadModel:
        """The decoder, its parameters where they are while it is trained."""
        model = decoder()
        return sharded(model) if self.parallel == "fsdp" else model

    def called(self, model: GPT2LMHeadModel) -> nn.Module:
        """What a step calls; to be made after the optimizer."""
        if self.parallel == "ddp":
            model = DistributedDataParallel(
                model, device_ids=[torch.cuda.current_device()], gradient_as_bucket_view=True
            )
        return torch.compile(model) if self.compiled else model


def rows(turns: int, case: Case) -> Iterator[Row]:
    """Rows of the decoder against the plain step of the same precision and against pure BF16."""
    torch.manual_seed(1 + rank())
    tokens = torch.randint(GPT2Config().vocab_size, BATCH, device="cuda")
    batch = {"input_ids": tokens, "labels": tokens}
    calls: dict[str, Step] = {}
    memory: dict[str, tuple[int, int]] = {}
    names: set[str] = set()
    unit = torch.ones(16, 16, device="cuda", dtype=torch.bfloat16)
    unit @ unit  # the workspace of products is nobody's
    for name in (*INNER, "plain", "pure"):
        held = torch.cuda.memory_allocated()
        model = case.model()
        if name in INNER:
            steps = 4 + RUN * (turns + 1)
            optimizer = wrap(model, case.rounding, steps, inner=INNER[name], fused=True)
            names = set(optimizer.num_bits)
        elif name == "plain":
            optimizer = MasterAdamW(model, names)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        calls[name] = step_of(case.called(model), optimizer, batch)
        for _ in range(3):
            calls[name]()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_rest = torch.cuda.memory_allocated()
        calls[name]()
        memory[name] = (at_rest - held, torch.cuda.max_memory_allocated() - at_rest)
        if rank() == 0:
            gpu.progress(f"{case}, {name}: ready")
    seconds = timed(calls, turns)
    masters = [local(p) for n, p in model.named_parameters() if n in names]
    numel = sum(p.numel() for p in masters)
    peers = {"plain": "plain step, same masters", "pure": "pure BF16 step"}
    for own, (peer, label) in itertools.product(INNER, peers.items()):
        times = [1e3 * statistics.median(seconds[name]) for name in (own, peer)]
        pairs = zip(seconds[own], seconds[peer], strict=True)
        ratios = statistics.quantiles([mine / other for mine, other in pairs], n=4)
        rest, peak = ((memory[own][i] - memory[peer][i]) / 2**20 for i in range(2))
        note = (
            f"({ratios[1]:.3f} times, half of the turns {ratios[0]:.3f} to {ratios[2]:.3f}; "
            f"memory {rest:+.0f} MiB kept, {peak:+.0f} MiB in a step; "
            f"the masters are {numel / 2**18:.0f} MiB)"
        )
        yield Row(f"{case}, {own}, {label}", *times, "ms", note)


def timed(calls: dict[str, Step], turns: int) -> dict[str, list[float]]:
    """Seconds of a step of each competitor in every turn, host included.

    A GPU's clocks change with its load and temperature within seconds: a turn is short, and who
    comes first changes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(RUN):
                calls[name]()
            end.record()
            end.synchronize()
            if turn:
                seconds[name].append(start.elapsed_time(end) / 1e3 / RUN)
    return seconds


def measure(
    turns: int, modes: list[str], roundings: list[str], parallel: str | None, as_json: bool
) -> None:
    """Prints the rows of all modes and roundings; of a job, rank 0 does."""
    gpu.require()
    with ranks(parallel):
        facts = gpu.facts()
        if parallel:
            facts["machine"] = f"{dist.get_world_size()} x {facts['machine']}"
        measured: list[Row] = []
        for mode, rounding in itertools.product(modes, roundings):
            found = list(rows(turns, Case(rounding, mode == "compiled", parallel)))
            if as_json and rank() == 0:  # a run that is stopped later has told these
                print_rows("training step", "peer", found, True, facts)
            measured += found
            gc.collect()
            torch.cuda.empty_cache()
        if not as_json and rank() == 0:
            print_rows("training step", "peer", measured, False, facts)
