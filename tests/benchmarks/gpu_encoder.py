"""Speed of encoders on a GPU: BERT-base and -large shapes, 128 tokens a row, random weights.

Milliseconds from token ids to the last hidden states, by the engine with INT8 and FP16 weights
(activations FP16, exact weight-only arithmetic), against FP16 peers:

  graph      transformers (sdpa attention) in a CUDA graph
  compiled   the same encoder written by hand, its layer compiled by torch.compile (inductor, with
             coordinate-descent tuning), in a CUDA graph (gpu_peers.py)
  eager      transformers as it is

A call counts by wall clock, from the tensor of ids in the host's memory on, and ends when the
device has finished: for the graphs the copy of the ids to the device and the replay. "device" in a
note is what the graph alone takes there. Competitors take turns, the median of --turns counts. The
error is the largest of the last hidden states, relative to their largest number in float32.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import gpu_models
import torch
from gpu_peers import Encoder, bert_layer, capture, compile_for_speed
from report import Row, Target, print_rows
from torch import Tensor

from moq.inference import Engine

MODELS = {
    "bert-base": lambda: gpu_models.bert(768, 12, 12),
    "bert-large": lambda: gpu_models.bert(1024, 24, 16),
}
DTYPES = {"int8": "INT8", "fp16": "FP16"}
LEAST_RATIO = {1: 1.25, 8: 1.0, 32: 1.0}  # to every peer, of a batch of so many rows, INT8 weights
PEERS = ("graph", "compiled", "eager")
Forward = Callable[[Tensor], Tensor]


class Graph:
    """A forward pass captured for ids of one shape."""

    def __init__(self, forward: Forward, ids: Tensor) -> None:
        """Warms up and captures."""
        self.ids = ids.cuda()
        self.graph, self.states = capture(lambda: forward(self.ids))

    def __call__(self, ids: Tensor) -> Tensor:
        """The states of other ids."""
        self.ids.copy_(ids, non_blocking=True)
        self.graph.replay()
        return self.states

    def device_seconds(self) -> float:
        """Device seconds of a replay."""
        return statistics.median(gpu.replay_seconds(self.graph) for _ in range(15))


def load_transformers(directory: Path) -> Any:
    """transformers' encoder in FP16, or None, with a line that says so, where it is missing."""
    try:
        from transformers import AutoModel
    except ImportError:
        print("transformers is not installed: no rows against it", file=sys.stderr)
        return None
    model = AutoModel.from_pretrained(
        directory, dtype=torch.float16, attn_implementation="sdpa", add_pooling_layer=False
    )
    return model.cuda().eval()


class Bench:
    """One model's peers and engines."""

    def __init__(self, name: str, folder: Path, args: argparse.Namespace) -> None:
        """Writes the directory and loads everything from it."""
        shape = MODELS[name]()
        self.name, self.args = name, args
        directory = gpu_models.write(shape, folder / name)
        self.vocab = shape.config["vocab_size"]
        self.encoder = Encoder(shape.config, gpu_models.read(directory))
        self.engines = {
            d: Engine.from_pretrained(directory, device="cuda", dtype=d) for d in DTYPES
        }
        self.compiled_layer = compile_for_speed(bert_layer)
        self.transformers = None
        if {"graph", "eager"} & set(args.peers):
            self.transformers = load_transformers(directory)

    def random_ids(self, batch: int) -> Tensor:
        """Ids [batch, length] in page-locked memory."""
        generator = torch.Generator().manual_seed(batch)
        shape = (batch, self.args.length)
        return torch.randint(3, self.vocab, shape, generator=generator).pin_memory()

    def peers(self, ids: Tensor) -> dict[str, Forward]:
        """The FP16 competitors for ids of that shape."""
        model = self.transformers
        found: dict[str, Forward] = {}

        def states(device_ids: Tensor) -> Tensor:
            return model(device_ids).last_hidden_state

        if model is not None and "graph" in self.args.peers:
            found["graph"] = Graph(states, ids)
        if "compiled" in self.args.peers:
            found["compiled"] = Graph(
                lambda i: self.encoder.forward(i, layer=self.compiled_layer), ids
            )
        if model is not None and "eager" in self.args.peers:
            found["eager"] = lambda i: states(i.cuda())
        return found

    @torch.no_grad()
    def rows(self, batch: int) -> dict[str, list[Row]]:
        """Rows of one batch size, by peer."""
        ids = self.random_ids(batch)
        expected = self.encoder.forward(ids.cuda(), torch.float32)
        calls: dict[str, Callable[[], Any]] = {
            dtype: lambda e=engine: e.core.encode(ids) for dtype, engine in self.engines.items()
        }
        peers = self.peers(ids)
        calls |= {name: lambda p=peer: p(ids) for name, peer in peers.items()}
        gpu.progress(f"{self.name}, batch {batch}: ready")
        seconds = median_of_turns(calls, self.args.turns)
        errors = {
            dtype: gpu.relative_error(
                calls[dtype]().last_hidden_state.to(expected.device).view_as(expected), expected
            )
            for dtype in self.engines
        }
        errors |= {name: gpu.relative_error(calls[name](), expected) for name in peers}
        rows: dict[str, list[Row]] = {}
        for name, peer in peers.items():
            device = ""
            if isinstance(peer, Graph):
                device = f", device {1e3 * peer.device_seconds():.3f} ms"
            for dtype, label in DTYPES.items():
                note = f"(error {errors[dtype]:.1e}, peer's {errors[name]:.1e}{device})"
                case = f"{self.name}, batch {batch}, {label}"
                times = (1e3 * seconds[dtype], 1e3 * seconds[name])
                found = Row(case, *times, "ms", note)
                if dtype == "int8" and batch in LEAST_RATIO:
                    least = Target("ratio", found.ratio, LEAST_RATIO[batch], at_most=False)
                    found = replace(found, targets=gpu.targets(least))
                rows.setdefault(name, []).append(found)
        return rows


def median_of_turns(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median wall-clock seconds of each call; in every turn each is made twice, the second counts.

    So none pays for what another left behind: an eager model leaves a GPU that was mostly idle, and
    its own data in the processor's caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 3):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparisons and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="rows (1 8 32)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (128)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    gpu.arguments(parser)
    args = parser.parse_args(arguments)
    gpu.require()
    facts = gpu.facts() | {"activations": "FP16, exact weight-only"}
    titles = {"graph": "transformers in a graph", "compiled": "compiled", "eager": "transformers"}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            bench = Bench(name, Path(folder), args)
            tables: dict[str, list[Row]] = {}
            for batch in args.batch:
                for peer, rows in bench.rows(batch).items():
                    tables.setdefault(peer, []).extend(rows)
            for peer, rows in tables.items():
                title = f"{name}, {args.length} tokens a row"
                print_rows(title, f"{titles[peer]} FP16", rows, args.json, facts)
            del bench
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
