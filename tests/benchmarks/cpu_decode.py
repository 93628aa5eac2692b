"""Speed of a decode step of the engine on the CPU: GPT-2 124M shape, random weights, INT8.

Milliseconds per token of one row after a prompt of --context tokens, with INT8 weights and an INT8
head, against CTranslate2 4.8 INT8 (pip install -r requirements/bench.in; rows without it are left
out) and transformers FP32. Ranks: two processes of one thread against our own two threads.

A figure is the difference between a long and a short generation, so that the prompt's share drops
out. The competitors take turns, and the best of --repeats counts: other work on the machine can
only slow a run down. "exact" is what generate uses by default: activations stay float32;
"dynamic" rounds them to INT8 per token, as CTranslate2 does. The note of a row is the largest error
of the logits, relative to the largest FP32 logit, of the mode and of the peer.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from report import Row, print_rows
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from moq.inference import Engine

SHORT = 2  # new tokens of the run that is subtracted
SEED = 0
Generate = Callable[[int], object]


def save_model(folder: Path) -> GPT2LMHeadModel:
    """A random GPT-2 of 124M parameters, saved as a Hugging Face directory."""
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    model.save_pretrained(folder)
    return model


def save_for_ctranslate2(model: GPT2LMHeadModel, folder: Path) -> None:
    """The same weights as a CTranslate2 INT8 model; token i of its vocabulary is named ti."""
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(copy.deepcopy(model))  # quantized in place
    spec.register_vocabulary([f"t{i}" for i in range(model.config.vocab_size)])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "t0", "t1", "t2"
    spec.validate()
    spec.optimize(quantization="int8")
    folder.mkdir()
    spec.save(str(folder))


def milliseconds_per_token(
    competitors: dict[str, Generate], new_tokens: int, repeats: int
) -> dict[str, float]:
    """Best decode time of each competitor; in every turn each runs once."""
    best = dict.fromkeys(competitors, float("inf"))
    for _ in range(repeats):
        for name, generate in competitors.items():
            times = []
            for length in (SHORT, new_tokens):
                start = time.perf_counter()
                generate(length)
                times.append(time.perf_counter() - start)
            per_token = (times[1] - times[0]) / (new_tokens - SHORT) * 1e3
            best[name] = min(best[name], per_token)
    return best


def relative_error(logits: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


class Competitors:
    """The engines under comparison, all with the same weights and the same prompt."""

    def __init__(self, folder: Path, context: int) -> None:
        """Saves the model in each engine's form."""
        self.model = save_model(folder / "model")
        self.directory = folder / "model"
        self.converted: Path | None = None
        generator = torch.Generator().manual_seed(SEED)
        size = self.model.config.vocab_size
        self.prompt = torch.randint(3, size, (context,), generator=generator).tolist()
        try:
            save_for_ctranslate2(self.model, folder / "ctranslate2")
            self.converted = folder / "ctranslate2"
        except ImportError:
            print("ctranslate2 is not installed: no such rows", file=sys.stderr)
        with torch.no_grad():
            self.logits = self.model(torch.tensor([self.prompt])).logits[0]

    def engine(self, activations: str | None) -> Engine:
        """moq at INT8 weights and head."""
        return Engine.from_pretrained(self.directory, dtype="int8", activations=activations)

    def moq(self, engine: Engine) -> Generate:
        """Greedy generation by moq."""
        return lambda length: engine.generate(self.prompt, length, stop_token_ids=[])

    def ctranslate2(self, threads: int) -> tuple[Generate, float]:
        """Greedy generation by CTranslate2, and the error of its logits."""
        import ctranslate2

        peer = ctranslate2.Generator(
            str(self.converted), compute_type="int8", intra_threads=threads, inter_threads=1
        )
        prompt = [f"t{token}" for token in self.prompt]
        logits = torch.from_numpy(np.array(peer.forward_batch([prompt])))[0]

        def generate(length: int) -> object:
            return peer.generate_batch(
                [prompt],
                max_length=length,
                min_length=length,
                sampling_topk=1,
                include_prompt_in_result=False,
            )

        return generate, relative_error(logits, self.logits)

    def transformers(self, length: int) -> object:
        """Greedy generation by transformers in FP32."""
        ids = torch.tensor([self.prompt])
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )


def decode_rows(
    competitors: Competitors, threads: int, new_tokens: int, repeats: int
) -> tuple[list[Row], list[Row]]:
    """Rows against CTranslate2 and against transformers, at so many threads."""
    torch.set_num_threads(threads)
    engines = {"exact": competitors.engine(None), "dynamic": competitors.engine("dynamic")}
    runs = {mode: competitors.moq(engine) for mode, engine in engines.items()}
    peer_error = None
    if competitors.converted is not None:
        runs["ctranslate2"], peer_error = competitors.ctranslate2(threads)
    best = milliseconds_per_token(runs, new_tokens, repeats)
    runs = {"transformers": competitors.transformers}
    best |= milliseconds_per_token(runs, new_tokens, min(repeats, 2))
    plural = "s" if threads > 1 else ""
    against_peer, against_transformers = [], []
    for mode, engine in engines.items():
        error = relative_error(engine.forward([competitors.prompt])[0], competitors.logits)
        case = f"decode, {threads} thread{plural}, {mode}"
        note = f"logit error {error:.1e}"
        if peer_error is not None:
            note_both = f"{note}, peer's {peer_error:.1e}"
            against_peer.append(Row(case, best[mode], best["ctranslate2"], "ms/token", note_both))
        against_transformers.append(Row(case, best[mode], best["transformers"], "ms/token", note))
    return against_peer, against_transformers


def rank_rows(competitors: Competitors, new_tokens: int, repeats: int) -> list[Row]:
    """Two ranks of one thread against two threads, both through the bench command."""
    bench = [
        "-m",
        "moq.inference",
        "bench",
        str(competitors.directory),
        "--dtype",
        "int8",
        "--json",
    ]
    bench += ["--context", str(len(competitors.prompt)), "--new-tokens", str(new_tokens)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    commands = {
        "ranks": [*torchrun, *bench, "--threads", "1"],
        "threads": [*bench, "--threads", "2"],
    }
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(repeats):
        for name, command in commands.items():
            output = subprocess.run(
                [sys.executable, *command],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            ).stdout
            speed = json.loads(output.splitlines()[-1])["decode_tokens_per_second"]
            best[name] = min(best[name], 1e3 / speed)
    return [Row("decode, 2 ranks of 1 thread, exact", best["ranks"], best["threads"], "ms/token")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparisons and prints them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="(1 2)")
    parser.add_argument("--context", type=int, default=448, help="tokens of the prompt (448)")
    parser.add_argument("--new-tokens", type=int, default=34, help="tokens drawn (34)")
    parser.add_argument("--repeats", type=int, default=5, help="turns, the best counts (5)")
    parser.add_argument("--no-ranks", action="store_true", help="leave the two-rank row out")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    title = f"GPT-2 124M shape, context {args.context}, INT8 weights and head"
    with tempfile.TemporaryDirectory() as folder:
        competitors = Competitors(Path(folder), args.context)
        for threads in args.threads:
            peer, baseline = decode_rows(competitors, threads, args.new_tokens, args.repeats)
            if peer:
                print_rows(title, "CTranslate2 INT8", peer, args.json)
            print_rows(title, "transformers FP32", baseline, args.json)
        if not args.no_ranks:
            rows = rank_rows(competitors, args.new_tokens, max(args.repeats // 2, 1))
            print_rows(title, "moq, 2 threads", rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
