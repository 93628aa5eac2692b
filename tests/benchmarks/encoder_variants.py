"""Which of several builds, or settings of one, encodes faster: BERT-base and -large shapes.

A variant is LABEL or LABEL=NAME:VALUE,NAME:VALUE: environment variables of a process of its own,
such as PYTHONPATH for another build. All processes stay, and take turns: what a GPU's clock or the
rest of the machine does meanwhile happens to all of them. Differences of 1 % can be seen so, where
separate runs differ by 3 %.

  encoder_variants.py old=PYTHONPATH:/tmp/before/python new --shapes 1x128 8x128

Microseconds by wall clock from a tensor of ids to hidden states (for --json, "peer" is the first
variant), the median of --turns medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import gpu
import gpu_models
import torch
from gpu_encoder import MODELS
from report import Row, print_rows

from moq.inference import Engine

WARM_UP, CALLS = 8, 60


def serve(device: str, directories: dict[str, str], dtypes: Sequence[str]) -> None:
    """Reads [model, dtype, rows, length] and writes the median time of a call."""
    engines = {
        (name, dtype): Engine.from_pretrained(directory, device=device, dtype=dtype)
        for name, directory in directories.items()
        for dtype in dtypes
    }
    print("ready", flush=True)
    for line in sys.stdin:
        name, dtype, rows, length = json.loads(line)
        ids = torch.randint(3, 30_000, (rows, length))
        seconds = []
        for call in range(WARM_UP + CALLS):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            engines[name, dtype].core.encode(ids)
            if device == "cuda":
                torch.cuda.synchronize()
            if call >= WARM_UP:
                seconds.append(time.perf_counter() - start)
        print(1e6 * statistics.median(seconds), flush=True)


class Variant:
    """A process with an environment of its own."""

    def __init__(self, text: str, device: str, directories: dict[str, str], dtypes: Sequence[str]):
        """Starts it."""
        self.label, _, settings = text.partition("=")
        changes = dict(setting.split(":", 1) for setting in settings.split(",") if setting)
        path = changes.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        changes["PYTHONPATH"] = os.pathsep.join([*filter(None, [path]), str(Path(__file__).parent)])
        served = json.dumps([device, directories, list(dtypes)])
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve", served],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | changes,
        )

    def read(self) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"variant {self.label} ended with exit status {self.process.wait()}")
        return line

    def time(self, *work: object) -> float:
        """Microseconds of a call."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        return float(self.read())


def shape_of(text: str) -> tuple[int, int]:
    """ROWSxLENGTH."""
    rows, _, length = text.partition("x")
    try:
        return int(rows), int(length)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ROWSxLENGTH, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the turns and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=["itself"], metavar="LABEL[=NAME:VALUE,...]")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["int8", "fp16"], help="int8 fp16")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape_of,
        default=[(1, 128), (8, 128)],
        help="rows x tokens (1x128 8x128)",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    gpu.arguments(parser, turns=5)
    args = parser.parse_args(arguments)
    if args.serve:
        serve(*json.loads(args.serve))
        return 0
    facts = {}
    if args.device == "cuda":
        gpu.require()
        facts = gpu.facts()
    with tempfile.TemporaryDirectory() as folder:
        directories = {
            name: str(gpu_models.write(MODELS[name](), Path(folder) / name, args.device))
            for name in args.models
        }
        variants = [Variant(v, args.device, directories, args.dtypes) for v in args.variants]
        for variant in variants:
            if variant.read() != "ready":
                sys.exit(f"variant {variant.label} did not start")
        for name in args.models:
            rows = []
            for dtype in args.dtypes:
                for shape in args.shapes:
                    turns = [
                        [v.time(name, dtype, *shape) for v in variants] for _ in range(args.turns)
                    ]
                    first, *others = map(statistics.median, zip(*turns, strict=True))
                    case = f"{name}, {dtype}, {shape[0]} x {shape[1]}"
                    for variant, own in zip(
                        variants[1:] or variants, others or [first], strict=True
                    ):
                        rows.append(Row(f"{case}, {variant.label}", own, first, "us"))
            print_rows(name, variants[0].label, rows, args.json, facts)
        for variant in variants:
            variant.process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
