"""Speed of generation on a GPU: GPT-2 XL, the 17B layer shape x 12, Llama-3.1-8B; random weights.

A decode step of a batch whose rows hold --context tokens, on average over --new-tokens steps, by
the engine's own timing of generate (its sampling and the token's way to the host included), with
INT8 and with FP16 weights. Peers, in the same process and in turn with it:

  compiled FP16, compiled INT8   a hand-written PyTorch model with a static KV cache, its parts
                                 compiled by torch.compile, the whole step one CUDA graph (see
                                 gpu_peers.py); INT8 weight-only with the scale behind the product,
                                 head included. Replayed back to back: nothing is read by the host.
  transformers                   its generate, eager, FP16 (left out where it is not installed)

and, for the 17B shape, reading a prompt of 4096 tokens, and the logits of all of them (whose peer
leaves them in FP16; moq's are float32). The median of --turns counts. Notes: tokens a second, or
milliseconds a step; "wall", the step by wall clock of generate, long minus short; the largest error
of a decode step's logits, relative to the largest logit of a float32 computation, moq's and the
peer's. "exact" is weight-only arithmetic, what generate uses by default.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gpu
import gpu_models
import torch
from gpu_peers import Compiled, CompiledStep, Decoder, capture, compile_for_speed
from report import Row, Target, print_rows
from torch import Tensor

from moq.inference import Engine

CONTEXT = 512  # tokens of a row
PROMPT = 4096  # tokens of the prefill row
MODELS: dict[str, Callable[[], gpu_models.Shape]] = {
    "gpt2-xl": lambda: gpu_models.gpt2(1600, 48, 25, positions=1024),
    "17b-x12": lambda: gpu_models.gpt2(4256, 12, 28, positions=PROMPT + 64),
    "llama-3.1-8b": lambda: gpu_models.llama(4096, 32, 32, 8, 14336, 128256),
}
DTYPES = {"int8": "INT8", "fp16": "FP16"}
# Of one row: at most so many milliseconds a token, at least so many tokens a second.
MOST_MILLISECONDS = {
    ("gpt2-xl", "int8"): 0.95,
    ("gpt2-xl", "fp16"): 1.5,
    ("17b-x12", "int8"): 1.15,
    ("17b-x12", "fp16"): 1.75,
}
LEAST_RATE = {("llama-3.1-8b", "int8"): 360}
LEAST_RATIO_OF_PROMPT = 1.0
SHORT = 2  # new tokens of the run that wall clock subtracts
Seconds = Callable[[], float]


@dataclass
class Competitor:
    """Something that decodes: how long a step takes, and its last logits."""

    seconds: Seconds
    error: float
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.times)


class Bench:
    """One model: its directory, its prompts, and the float32 logits of a decode step."""

    def __init__(self, name: str, folder: Path, context: int, new_tokens: int) -> None:
        """Writes the directory, unless it is there."""
        self.name, self.shape = name, MODELS[name]()
        self.directory = folder / name
        self.context, self.new_tokens = context, new_tokens
        if not (self.directory / "config.json").exists():
            gpu_models.write(self.shape, self.directory)
            gpu.progress(f"{name}: written")
        self.weights: dict[str, Tensor] = gpu_models.read(self.directory)
        self.expected = self._float32_logits()
        gpu.progress(f"{name}: float32 logits computed")

    def prompts(self, batch: int, length: int) -> list[list[int]]:
        """Random prompts of that length."""
        generator = torch.Generator().manual_seed(batch)
        vocab = self.shape.config["vocab_size"]
        return torch.randint(3, vocab, (batch, length), generator=generator).tolist()

    def decoder(self, length: int) -> Decoder:
        """The peer, with room for so many tokens."""
        return Decoder(self.shape.config, self.weights, length)

    @torch.no_grad()
    def _float32_logits(self) -> Tensor:
        decoder = self.decoder(self.context)
        tokens = torch.tensor(self.prompts(1, self.context), device="cuda")
        positions = torch.arange(self.context, device="cuda")
        cache = decoder.make_cache(1, torch.float32)
        logits, _ = decoder.forward(tokens, positions, cache, torch.float32, from_start=True)
        return logits[0, -1]

    # ----------------------------------------------------------------------------------- the engine

    def engine(self, dtype: str) -> Engine:
        """moq's, with that dtype of weights."""
        return Engine.from_pretrained(self.directory, device="cuda", dtype=dtype)

    def engine_error(self, engine: Engine) -> float:
        """Error of a decode step's logits, after a prompt that fills the rest of the context."""
        (prompt,) = self.prompts(1, self.context)
        cache = engine.core.make_cache(1, self.context)
        slots = [cache.allocate()]
        engine.core.forward([prompt[:-1]], cache=cache, slots=slots)
        logits = engine.core.forward([prompt[-1:]], cache=cache, slots=slots)
        return gpu.relative_error(logits[-1].to(self.expected.device), self.expected)

    def generate(self, engine: Engine, batch: int, new_tokens: int) -> None:
        """Greedy generation around the context."""
        prompts = self.prompts(batch, self.context - self.new_tokens // 2)
        engine.generate(prompts, new_tokens, stop_token_ids=[], max_batch=batch)

    def engine_seconds(self, engine: Engine, batch: int) -> Seconds:
        """Seconds of a step, by the engine's timing."""
        self.generate(engine, batch, self.new_tokens)  # captures its graph

        def seconds() -> float:
            self.generate(engine, batch, self.new_tokens)
            return engine.timing.decode_seconds / (engine.timing.decode_tokens / batch)

        return seconds

    def wall_seconds(self, engine: Engine, batch: int) -> float:
        """Seconds of a step, by wall clock: a long generation minus a short one."""
        times = []
        for length in (SHORT, self.new_tokens):
            start = time.perf_counter()
            self.generate(engine, batch, length)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / (self.new_tokens - SHORT)

    # ------------------------------------------------------------------------------------ the peers

    @torch.no_grad()
    def compiled(self, decoder: Decoder, batch: int, whole_model: bool) -> Competitor:
        """The compiled peer at the last position of the context."""
        cache = decoder.make_cache(batch)
        step = CompiledStep(decoder, cache, whole_model)
        prompts = self.prompts(1, self.context) * batch
        tokens = torch.tensor(prompts, device="cuda")
        positions = torch.arange(self.context, device="cuda")
        for row in range(batch):  # row by row: a batch of prompts may not fit beside the weights
            rows = [(keys[row : row + 1], values[row : row + 1]) for keys, values in cache]
            decoder.forward(tokens[row : row + 1, :-1], positions[:-1], rows)
        step.set(tokens[:, -1:], self.context - 1)
        step.graph.replay()
        error = gpu.relative_error(step.logits[0, -1], self.expected)
        return Competitor(lambda: gpu.replay_seconds(step.graph, times=20), error)

    def transformers(self, batch: int) -> Competitor | None:
        """transformers' generate, or None where it is not installed."""
        try:
            from transformers import AutoModelForCausalLM
        except ImportError:
            print("transformers is not installed: no such rows", file=sys.stderr)
            return None
        model = AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float16).to("cuda")
        ids = torch.tensor(self.prompts(batch, self.context), device="cuda")
        with torch.no_grad():
            error = gpu.relative_error(model(ids[:1]).logits[0, -1], self.expected)

        def run(length: int) -> float:
            start = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length,
                min_new_tokens=length,
                do_sample=False,
                pad_token_id=0,
            )
            torch.cuda.synchronize()
            return time.perf_counter() - start

        run(SHORT)
        long = 10
        return Competitor(lambda: (run(long) - run(SHORT)) / (long - SHORT), error)


def describe(engine: Engine) -> str:
    """What an engine's figure must be read with."""
    core = engine.core
    activations = "exact" if core.activations == "weight_only" else core.activations
    gigabytes = core.weight_bytes / 1e9
    return (
        f"{core.compute_dtype} activations, {activations}, {core.head_format} head, "
        f"{gigabytes:.2f} GB of weights"
    )


def row(
    name: str, batch: int, label: str, times: tuple[float, float], what: str, in_rate: bool
) -> Row:
    """One comparison: in milliseconds a token for one row, in tokens a second for more."""
    case = f"{name}, batch {batch}, {label}"
    rates = [batch / seconds for seconds in times]
    steps = [1e3 * seconds for seconds in times]
    if in_rate:
        return Row(case, *rates, "tokens/s", f"({steps[0]:.3f} ms a step, {what})")
    return Row(case, *steps, "ms/token", f"({rates[0]:.0f} tokens/s, {what})")


def targets_of(name: str, dtype: str, seconds: float) -> Sequence[Target]:
    """What a step of one row is to reach."""
    wanted, key = [], (name, dtype)
    if key in MOST_MILLISECONDS:
        wanted.append(Target("ms/token", 1e3 * seconds, MOST_MILLISECONDS[key], at_most=True))
    if key in LEAST_RATE:
        wanted.append(Target("tokens/s", 1 / seconds, LEAST_RATE[key], at_most=False))
    return gpu.targets(*wanted)


def decode_rows(
    bench: Bench,
    batch: int,
    args: argparse.Namespace,
    engines: dict[str, Engine],
    decoders: dict[str, Decoder],
) -> dict[str, list[Row]]:
    """Rows of one batch size, by peer."""
    contestants = {
        dtype: Competitor(bench.engine_seconds(engine, batch), bench.engine_error(engine))
        for dtype, engine in engines.items()
    }
    gpu.progress(f"batch {batch}: moq ready")
    for name, decoder in decoders.items():
        contestants[name] = bench.compiled(decoder, batch, args.whole_model)
        gpu.progress(f"batch {batch}: {name} ready")
    for _ in range(args.turns):
        for contestant in contestants.values():
            contestant.times.append(contestant.seconds())
    walls = {dtype: bench.wall_seconds(engine, batch) for dtype, engine in engines.items()}
    notes = {dtype: describe(engine) for dtype, engine in engines.items()}
    peers = list(decoders)
    if args.eager and batch == 1 and (eager := bench.transformers(batch)) is not None:
        eager.times = [eager.seconds() for _ in range(3)]
        contestants["transformers eager FP16"] = eager
        peers.append("transformers eager FP16")
    rows: dict[str, list[Row]] = {}
    for peer in peers or [""]:
        for dtype in args.dtypes:
            moq = contestants[dtype]
            other = contestants[peer] if peer else moq
            what = (
                f"wall {1e3 * walls[dtype]:.3f} ms, {notes[dtype]}, "
                f"logit error {moq.error:.1e}, peer's {other.error:.1e}"
            )
            in_rate = batch > 1 or bench.name.startswith("llama")
            times = (moq.median, other.median)
            found = row(bench.name, batch, DTYPES[dtype], times, what, in_rate)
            if batch == 1 and args.context == CONTEXT:
                found = replace(found, targets=targets_of(bench.name, dtype, moq.median))
            rows.setdefault(peer, []).append(found)
    return rows


def prompt_seconds(engine: Engine, prompt: list[int], all_logits: bool) -> float:
    """Seconds until a prompt's next token, or the logits of all its tokens, are there."""
    if not all_logits:
        engine.generate(prompt, 1, stop_token_ids=[])
        return engine.timing.prefill_seconds
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.forward([prompt])
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def prefill_rows(
    bench: Bench, turns: int, engines: dict[str, Engine], decoder: Decoder, all_logits: bool
) -> list[Row]:
    """A prompt of 4096 tokens, or logits of all of them, against the compiled peer in a graph."""
    cache = decoder.make_cache(1)
    (prompt,) = bench.prompts(1, PROMPT)
    tokens = torch.tensor([prompt], device="cuda")
    positions = torch.arange(PROMPT, device="cuda")
    compiled = Compiled.of(decoder)
    if all_logits:

        def score(*inputs: Any) -> tuple[Tensor, Tensor]:
            logits = decoder.score(*inputs)
            return logits, logits  # in place of tokens: nothing is drawn

        compiled = replace(compiled, predict=compile_for_speed(score))
    graph, _ = capture(
        lambda: decoder.forward(
            tokens, positions, cache, last_only=not all_logits, from_start=True, compiled=compiled
        )
    )
    rows = []
    for dtype, engine in engines.items():
        seconds, peer = [], []
        for _ in range(turns + 1):
            seconds.append(prompt_seconds(engine, prompt, all_logits))
            peer.append(gpu.replay_seconds(graph))
        times = [1e3 * statistics.median(found[1:]) for found in (seconds, peer)]
        what = "logits of" if all_logits else "prompt of"
        note = f"({describe(engine)}{', logits float32, the peer FP16' if all_logits else ''})"
        found = Row(f"{bench.name}, {what} {PROMPT} tokens, {DTYPES[dtype]}", *times, "ms", note)
        least = Target("ratio", found.ratio, LEAST_RATIO_OF_PROMPT, at_most=False)
        rows.append(replace(found, targets=gpu.targets(least)))
    return rows


def run(name: str, folder: Path, args: argparse.Namespace, facts: dict[str, str]) -> None:
    """All rows of one model."""
    bench = Bench(name, folder, args.context, args.new_tokens)
    length = args.context + args.new_tokens // 2
    decoders = {}
    if "compiled" in args.peers:
        decoders = {
            "compiled FP16": bench.decoder(length),
            "compiled INT8": bench.decoder(length).quantize(),
        }
    reader = bench.decoder(PROMPT) if name == "17b-x12" and args.prefill else None
    bench.weights = {}
    torch.cuda.empty_cache()
    engines = {dtype: bench.engine(dtype) for dtype in args.dtypes}
    gpu.progress(f"{name}: moq's weights loaded")
    if reader is not None:
        for all_logits in (False, True):
            rows = prefill_rows(bench, args.turns, engines, reader, all_logits)
            print_rows(f"{name}, prefill", "compiled FP16", rows, args.json, facts)
        reader = None
        gpu.progress(f"{name}: prompts read")
    for batch in args.batch:
        for peer, rows in decode_rows(bench, batch, args, engines, decoders).items():
            title = f"{name}, batch {batch}, context {args.context}"
            print_rows(title, peer or "itself", rows, args.json, facts)
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparisons and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="shapes (all)"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="rows (1 8 32)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a row (512)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens drawn (128)")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="weights (all)"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=["compiled", "eager"],
        default=["compiled", "eager"],
        help="PyTorch compiled, transformers eagerly (both)",
    )
    parser.add_argument(
        "--no-prefill", dest="prefill", action="store_false", help="leaves out the long prompt"
    )
    parser.add_argument(
        "--whole-model",
        action="store_true",
        help="compile the peer's step as a whole: the same kernels, minutes of compilation",
    )
    parser.add_argument("--directory", type=Path, help="keeps the models' files there")
    gpu.arguments(parser, turns=7)
    args = parser.parse_args(arguments)
    args.eager = "eager" in args.peers
    gpu.require()
    facts = gpu.facts()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            run(name, args.directory or Path(folder), args, facts)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
