"""`bench`: the speed of a checkpoint directory on this machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

from moq.inference.api import Engine
from moq.inference.options import add_engine_arguments, describe, is_first_rank, open_engine

_EXAMPLES = """examples:
  python -m moq.inference bench out/model --threads 2
  torchrun --standalone --nproc-per-node 2 -m moq.inference bench out/model --json

Random prompts of --context tokens; the best of --repeats runs, since other work on the machine can
only slow a run down."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_engine_arguments(parser)
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--context", type=int, help="tokens of a prompt (256, or as many as the model has room for)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens drawn (32)")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once (1)")
    parser.add_argument("--repeats", type=int, default=3, help="runs, the best counts (3)")
    parser.add_argument(
        "--profile", action="store_true", help="on a GPU: a decode step kernel by kernel"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def random_prompts(engine: Engine, batch: int, length: int) -> list[list[int]]:
    """Token ids without a meaning, the same each time."""
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        0, engine.core.vocab_size, (batch, length), generator=generator
    ).tolist()
    return prompts


def _profile(engine: Engine, args: argparse.Namespace) -> int:
    from moq.inference.profile import profile_decode, read_bandwidth, table

    prompts = random_prompts(engine, args.batch, args.context)
    kernels, step_time = profile_decode(engine, prompts, args.new_tokens)
    bandwidth = read_bandwidth(engine.core.device)
    if is_first_rank() and args.json:
        shared = {
            "step_microseconds": step_time,
            "context": args.context,
            "batch": args.batch,
            "read_bandwidth": bandwidth,
            **describe(engine),
        }
        for kernel in kernels:
            rate = kernel.terabytes_per_second
            rates = {"terabytes_per_second": rate, "share_of_read": rate / bandwidth}
            print(json.dumps(asdict(kernel) | rates | shared))
    elif is_first_rank():
        print(table(kernels, step_time, bandwidth))
    return 0


def measure(
    engine: Engine, context: int, new_tokens: int, batch: int, repeats: int
) -> dict[str, float]:
    """Best prefill and decode speed over several runs, tokens per second over the whole batch."""
    prompts = random_prompts(engine, batch, context)
    best = {"prefill_tokens_per_second": 0.0, "decode_tokens_per_second": 0.0}
    for _ in range(repeats):
        engine.generate(prompts, new_tokens, stop_token_ids=[], max_batch=batch)
        for key in best:
            best[key] = max(best[key], getattr(engine.timing, key))
    return best


def _context(args: argparse.Namespace, positions: int) -> int:
    """Length of the prompts: what --context says, else 256 or what fits before the new tokens."""
    room = positions - args.new_tokens
    context: int = args.context or max(1, min(256, room))
    if context > room:
        raise ValueError(
            f"--context and --new-tokens together must be at most {positions}, the model's "
            f"positions, got {context} and {args.new_tokens}"
        )
    return context


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status."""
    # The first new token is drawn by the step that reads the prompt: decoding begins with a second.
    for option, least in {"context": 1, "new_tokens": 2, "batch": 1, "repeats": 1}.items():
        if (value := getattr(args, option)) is not None and value < least:
            raise ValueError(f"--{option.replace('_', '-')} must be >= {least}, got {value}")
    engine = open_engine(args)
    args.context = _context(args, engine.core.max_positions)
    if args.profile:
        return _profile(engine, args)
    speed = measure(engine, args.context, args.new_tokens, args.batch, args.repeats)
    if is_first_rank():
        result = {"context": args.context, "batch": args.batch, **speed, **describe(engine)}
        if args.json:
            print(json.dumps(result))
        else:
            width = max(map(len, result))
            for key, value in result.items():
                print(f"{key:{width}}  {f'{value:.1f}' if isinstance(value, float) else value}")
    return 0
