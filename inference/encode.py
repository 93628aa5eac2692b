"""`encode`: sentence vectors and class predictions from a checkpoint directory."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.progress import Progress

from moq.inference.api import Engine
from moq.inference.options import (
    add_engine_arguments,
    is_first_rank,
    open_engine,
    read_standard_input,
)
from moq.inference.results import Encoding

_TEXTS_AT_ONCE = 32

_EXAMPLES = """examples:
  python -m moq.inference encode out/encoder --text "a small dog" --text "a big house"
  python -m moq.inference encode out/encoder --pooling pooled < sentences.txt

Prints one JSON object per text: its vector, or, if the checkpoint has a sequence-classification
head, its label and logits. Lines are printed while later ones are still computed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_engine_arguments(parser)
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "--text", action="append", help="text to encode, may be repeated (default: lines of stdin)"
    )
    parser.add_argument(
        "--pooling",
        choices=["mean", "pooled"],
        default="mean",
        help="the vector: mean over tokens, or the model's pooled output (default: %(default)s)",
    )
    parser.add_argument(
        "--truncation", action="store_true", help="leave out what the model has no positions for"
    )


def run(args: argparse.Namespace) -> int:
    """Encodes and prints; returns the exit status."""
    engine = open_engine(args)
    texts = args.text
    if not texts:
        texts = [line for line in read_standard_input(engine).split("\n") if line.strip()]
    if not texts:
        raise ValueError("encode needs a text: give --text, or lines on standard input")
    batches = [texts[i : i + _TEXTS_AT_ONCE] for i in range(0, len(texts), _TEXTS_AT_ONCE)]
    # On a terminal the printed lines show the progress themselves. The bar leaves standard output
    # alone: rich would write to its own console what is printed meanwhile.
    hidden = not sys.stderr.isatty() or sys.stdout.isatty() or not is_first_rank()
    with Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=False, disable=hidden
    ) as progress:
        for batch in progress.track(batches, description="encode"):
            encoding = engine.encode(batch, truncation=args.truncation)
            if args.pooling == "pooled" and encoding.pooled is None:
                raise ValueError(
                    f"{args.directory} must have a pooler for --pooling pooled, got none: use "
                    "--pooling mean"
                )
            if is_first_rank():
                _print(engine, batch, encoding, args.pooling)
    return 0


def _print(engine: Engine, texts: list[str], encoding: Encoding, pooling: str) -> None:
    vectors = encoding.mean if pooling == "mean" else encoding.pooled
    assert vectors is not None
    labels = engine.labels
    for i, text in enumerate(texts):
        result: dict[str, object] = {"text": text}
        if encoding.logits is not None:
            label = int(encoding.logits[i].argmax())
            result |= {
                "label": labels.get(label, str(label)),
                "logits": encoding.logits[i].tolist(),
            }
        else:
            result["vector"] = vectors[i].tolist()
        print(json.dumps(result, ensure_ascii=False), flush=True)
