"""Command-line options that every serving command shares."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from moq.inference.api import ACTIVATIONS, DTYPES, Engine
from moq.inference.distributed import broadcast_text


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the directory and the options of Engine.from_pretrained."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("directory", type=Path, help="exported moq or plain Hugging Face directory")
    group = parser.add_argument_group("how the model is loaded")
    group.add_argument(
        "--device", help="cpu (default), cuda or cuda:N; ranks on cuda take a GPU each"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what the weights are kept in (default: as stored; int8 quantizes a plain directory)",
    )
    group.add_argument(
        "--compute-dtype",
        choices=["fp32", "fp16", "bf16"],
        help="what activations are kept in (default: fp32 on the CPU; on a GPU as float weights, "
        "beside integers bf16 if the directory's floats are, else fp16)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=["int8"],
        help="what a GPU keeps keys and values in (default: as activations)",
    )
    group.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        help="round activations to INT8 per token, without a zero point or with one (default: "
        "exact, unless trained for INT8)",
    )
    group.add_argument(
        "--keep-head",
        action="store_true",
        help="with --dtype int8: leave the language-model head as stored",
    )
    group.add_argument("--policy", type=Path, help="JSON policy of an architecture moq lacks")
    group.add_argument("--threads", type=int, help="threads of each process (default: torch's)")


def open_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options ask for.

    Raises:
        ValueError: if --threads is below 1.
    """
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be >= 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    return Engine.from_pretrained(
        args.directory,
        device=args.device,
        dtype=args.dtype,
        compute_dtype=args.compute_dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        activations=args.activations,
        quantize_head=False if args.keep_head else None,
        policy=args.policy,
    )


def describe(engine: Engine) -> dict[str, object]:
    """How the engine computes: what a speed figure must be read with."""
    core = engine.core
    on_gpus = core.device.startswith("cuda") and core.tp_size > 1
    return {
        "architecture": core.architecture,
        "device": core.device,
        "compute_dtype": core.compute_dtype,
        "kv_cache_dtype": core.kv_cache_dtype,
        "weights": core.weight_format,
        "head": core.head_format,
        "activations": core.activations,
        "tp_size": core.tp_size,
        "transport": "nccl" if on_gpus else core.transport,
        "threads": torch.get_num_threads(),
        "weight_bytes": core.weight_bytes,
    }


def read_standard_input(engine: Engine) -> str:
    """Standard input on every rank: the ranks of torchrun share one, so rank 0 alone reads it."""
    return broadcast_text(engine.core.communicator, sys.stdin.read() if is_first_rank() else "")


def is_first_rank() -> bool:
    """True for the one process of a job that prints."""
    return os.environ.get("RANK", "0") == "0"
