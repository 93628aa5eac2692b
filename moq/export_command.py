"""`moq export RUN -o DIR`: turns a saved training run into a checkpoint directory."""

from __future__ import annotations

import argparse
import re

from moq.export import export_checkpoint
from moq.saved_run import load_run
from moq.tokenizer_files import has_tokenizer

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Number of bytes of '500MB', '5GB' or '4096'.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


_EXAMPLES = """examples:
  moq export out/run -o out/model
  moq export out/run -o out/model --tokenizer out/tokenizer --max-shard-size 500MB

RUN is what optimizer.save("out/run") wrote. moq verify checks the result, moq generate and moq
encode run it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `moq export`."""
    parser.epilog = _EXAMPLES
    parser.add_argument("run", help="directory that MoQOptimizer.save wrote")
    parser.add_argument("-o", "--output", required=True, help="checkpoint directory to write")
    parser.add_argument(
        "--tokenizer", help="directory whose tokenizer files are copied instead of RUN's"
    )
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", help="size of a file (default: 5GB)"
    )


def run(options: argparse.Namespace) -> int:
    """Runs `moq export`."""
    saved = load_run(options.run)
    tokenizer = options.tokenizer
    if tokenizer is None and has_tokenizer(saved.directory):
        tokenizer = saved.directory
    directory = export_checkpoint(
        options.output,
        saved.model,
        saved.quantized,
        tokenizer=tokenizer,
        history=saved.history,
        max_shard_size=options.max_shard_size,
    )
    print(f"{directory}: {len(saved.quantized)} quantized weights; next: moq verify {directory}")
    return 0
