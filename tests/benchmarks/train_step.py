"""What moq adds to a training step.

Models of the same weights take turns on the same batch, so that load of the machine hits all alike:

  moq             MoQOptimizer around the optimizer, all linear weights falling
  moq.AdamW       the same around moq.AdamW, which casts no gradients (GPU)
  plain           the optimizer with the same master precision: what moq's masters cost anyway
  pure            the optimizer on the model's parameters (half-precision models only)
  eager modules   fake-quantize modules in the forward pass, as eager QAT has them (CPU)
  logged          moq that prints its drops and measures for TensorBoard and CSV at every step; by
                  default it measures at every tenth (CPU)

CPU: BERT-base's shape, FP32, batch 8 x 128, AdamW; wall time is what counts, and processor time,
which other processes disturb less, tells what a busy machine's wall time hides. Both are split into
the passes, which do the same work in all models, and the update, which is where moq works: other
processes disturb the passes by more than what moq adds, so that the update tells most about it.
GPU: GPT-2 medium's shape (355M), BF16, batch 8 x 512, fused AdamW, eager and compiled; time
between CUDA events around a run of steps, and the memory of each.
Several GPUs, a rank on each, every rank with a batch of its own:

  torchrun --nproc-per-node gpu tests/benchmarks/train_step.py --device cuda --parallel ddp

All competitors are then replicated (ddp) or sharded layer by layer (fsdp: fully_shard); rank 0
prints what it measured.
"""

import argparse
import sys

import gpu
import torch
import train_step_cpu as on_cpu
import train_step_gpu as on_gpu
from report import Row, print_rows


def main() -> int:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(on_cpu.ENCODERS), default=["bert-base"])
    parser.add_argument(
        "--cases", nargs="+", choices=on_cpu.CASES, default=on_cpu.CASES, help="(CPU)"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=on_gpu.MODES, default=on_gpu.MODES, help="(GPU)"
    )
    parser.add_argument(
        "--roundings", nargs="+", choices=on_gpu.ROUNDINGS, default=on_gpu.ROUNDINGS, help="(GPU)"
    )
    parser.add_argument(
        "--parallel", choices=on_gpu.PARALLEL, help="over the ranks that torchrun starts (GPU)"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (CPU)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each competitor (CPU)")
    gpu.arguments(parser)
    options = parser.parse_args()
    if options.device == "cuda":
        on_gpu.measure(
            options.turns, options.modes, options.roundings, options.parallel, options.json
        )
        return 0
    if options.parallel:
        parser.error("--parallel is for --device cuda")
    torch.set_num_threads(options.threads)
    facts = gpu.facts_on("cpu")
    tables: dict[str, list[Row]] = {}
    for name in options.models:
        for table, row in on_cpu.rows(name, options.cases, options.steps):
            tables.setdefault(table, []).append(row)
    for table, rows in tables.items():
        print_rows(table, "plain step", rows, options.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
