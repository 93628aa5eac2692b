"""Speed of moq's linear kernels on the CPU against the machine's memory and against torch.

Four tables:

  gemv    one row times an INT8 weight, against the best read loop over the same bytes: 1.00x is
          the read bandwidth of the machine. Two panels of the weight are streamed at once, which
          some machines serve faster than one plain loop: then the ratio is above 1.
  torch   the same product by torch._weight_int8pack_mm (BF16 input: its fast form).
  gemm    32 and 256 rows, against torch's dynamic INT8 linear (the fastest of its engines) and
          torch._int_mm (which gets INT8 input for nothing and leaves the result in INT32).
  decode  the layers of GPT-2 124M with one row, against torch's dynamic INT8 linear.

"exact" rows multiply the float32 input itself (the engine's default), "dynamic" rows round it to
INT8 first; both include everything from float32 input to float32 output. Weights rotate through
more than eight times the last-level cache, and competitors take turns call by call: the best call
of each is printed. Other load on the machine lowers all of them: see the last line.
"""

import argparse
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from report import Row, print_rows

import moq  # noqa: F401  (registers the operators)

TABLES = ("gemv", "torch", "gemm", "decode")
MODES = {
    "exact": "float32",
    "dynamic": "dynamic_int8",
    "asymmetric": "dynamic_asymmetric_int8",
}
READ_BYTES = 512 << 20
# Output and input features of each linear layer of GPT-2 124M, and of its head.
GPT2_LAYERS = {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)}
GPT2_HEAD = (50257, 768)

Call = Callable[[], object]


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MB where the kernel does not tell."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]])
    return max(sizes)


def seconds(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best_of_turns(competitors: dict[str, Sequence[Call]], turns: int) -> dict[str, float]:
    """Best seconds of each competitor; in every turn each makes its next call once."""
    calls = {name: itertools.cycle(sequence) for name, sequence in competitors.items()}
    best = dict.fromkeys(competitors, float("inf"))
    for turn in range(turns + 1):
        for name, cycle in calls.items():
            elapsed = seconds(next(cycle))
            if turn > 0:  # the first call of each allocates and picks its code
                best[name] = min(best[name], elapsed)
    return best


class Weights:
    """Copies of one INT8 weight, enough to outlive the cache, as moq and as torch pack them."""

    def __init__(self, n: int, k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n, self.k = n, k
        self.copies = 2 * (8 * last_level_cache() // (n * k) + 1)
        self.codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        self.scales = torch.rand(n, 1, generator=generator) * 0.01 + 0.001
        self.packed = [torch.ops.moq.pack_linear(self.codes, self.scales)]
        self.packed += [self.packed[0].clone() for _ in range(self.copies - 1)]

    def moq_calls(self, x: torch.Tensor) -> dict[str, list[Call]]:
        """One call for each copy and mode; the modes take turns, copies of others between."""
        linear, n = torch.ops.moq.linear, self.n
        calls = {}
        for number, (mode, name) in enumerate(MODES.items()):
            first = number * self.copies // len(MODES)
            copies = self.packed[first:] + self.packed[:first]
            calls[mode] = [lambda p=p, i=name: linear(x, p, n, input_mode=i) for p in copies]
        return calls

    def int8pack_calls(self, x: torch.Tensor) -> list[Call]:
        """torch._weight_int8pack_mm on each of as many copies."""
        x, scales = x.bfloat16(), self.scales[:, 0].bfloat16()
        codes = [self.codes.clone() for _ in range(self.copies // 2)]
        return [lambda w=w: torch._weight_int8pack_mm(x, w, scales) for w in codes]

    def torch_dynamic_calls(self, x: torch.Tensor, engine: str) -> list[Call]:
        """torch's dynamic INT8 linear by one of its engines."""
        torch.backends.quantized.engine = engine
        zeros = torch.zeros(self.n, dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(
            self.codes, self.scales[:, 0].double(), zeros, 0
        )
        packed = [torch.ops.quantized.linear_prepack(weight, None) for _ in range(self.copies // 2)]
        return [lambda p=p: torch.ops.quantized.linear_dynamic(x, p) for p in packed]

    def int_mm_calls(self, m: int) -> list[Call]:
        """torch._int_mm, whose input is INT8 already."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(-127, 128, (m, self.k), dtype=torch.int8, generator=generator)
        codes = [self.codes.clone().t() for _ in range(self.copies // 2)]
        return [lambda w=w: torch._int_mm(x, w) for w in codes]


def dynamic_engines() -> list[str]:
    """torch's engines for dynamic INT8 linear layers on x86."""
    return [e for e in ("fbgemm", "onednn") if e in torch.backends.quantized.supported_engines]


def random_rows(m: int, k: int) -> torch.Tensor:
    """An input [m, k]."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(2))


def read_calls(bytes_per_call: int) -> dict[str, list[Call]]:
    """Plain and prefetching reads of slices of a large buffer, half of the buffer apart."""
    parts = torch.ones(READ_BYTES, dtype=torch.uint8).split(bytes_per_call)
    parts = [part for part in parts if part.numel() == bytes_per_call]
    halves = parts[len(parts) // 2 :] + parts[: len(parts) // 2]
    read = torch.ops.moq.read_bandwidth
    return {
        "read": [lambda p=p: read(p, prefetch=False) for p in parts],
        "prefetching read": [lambda p=p: read(p, prefetch=True) for p in halves],
    }


def gemv_rows(turns: int) -> tuple[list[Row], list[Row]]:
    """GEMV against the read bandwidth, and against torch."""
    against_memory, against_torch = [], []
    for n, k in ((4096, 4096), (16384, 4096)):
        weights, x = Weights(n, k), random_rows(1, k)
        competitors = weights.moq_calls(x)
        competitors |= read_calls(n * k) | {"torch": weights.int8pack_calls(x)}
        best = best_of_turns(competitors, turns)
        rate = {name: n * k / elapsed / 1e9 for name, elapsed in best.items()}
        memory = max(rate["read"], rate["prefetching read"])
        for mode in MODES:
            case = f"INT8-weight GEMV {n}x{k}, {mode} input"
            against_memory.append(Row(case, rate[mode], memory, "GB/s"))
            against_torch.append(Row(case, rate[mode], rate["torch"], "GB/s"))
    return against_memory, against_torch


def gemm_rows(turns: int) -> tuple[list[Row], list[Row]]:
    """GEMM against torch's dynamic INT8 linear, and against torch._int_mm."""
    against_dynamic, against_int_mm = [], []
    n = k = 4096
    weights = Weights(n, k)
    for m in (32, 256):
        x = random_rows(m, k)
        competitors = weights.moq_calls(x)
        for engine in dynamic_engines():
            competitors[engine] = weights.torch_dynamic_calls(x, engine)
        competitors["int_mm"] = weights.int_mm_calls(m)
        best = best_of_turns(competitors, turns)
        rate = {name: 2 * m * n * k / elapsed / 1e9 for name, elapsed in best.items()}
        dynamic = max(rate[engine] for engine in dynamic_engines())
        for mode in reversed(MODES):
            case = f"INT8 GEMM m={m} {n}x{k}, {mode} input"
            against_dynamic.append(Row(case, rate[mode], dynamic, "GOPS"))
            against_int_mm.append(Row(case, rate[mode], rate["int_mm"], "GOPS"))
    return against_dynamic, against_int_mm


def decode_rows(turns: int) -> list[Row]:
    """Each kind of layer of GPT-2 124M, and the sum of a whole step."""
    rows = []
    step = dict.fromkeys(("moq", "torch"), 0.0)
    for name, (n, k) in (GPT2_LAYERS | {"head": GPT2_HEAD}).items():
        weights, x = Weights(n, k), random_rows(1, k)
        competitors = weights.moq_calls(x)
        for engine in dynamic_engines():
            competitors[engine] = weights.torch_dynamic_calls(x, engine)
        best = best_of_turns(competitors, max(turns, 2 * weights.copies))
        peer = min(best[engine] for engine in dynamic_engines())
        for mode in MODES:
            case = f"GPT-2 124M {name} {n}x{k}, {mode} input"
            rows.append(Row(case, best[mode] * 1e6, peer * 1e6, "us"))
        times = 1 if name == "head" else 12
        step["moq"] += times * best["exact"] * 1e6
        step["torch"] += times * peer * 1e6
    rows.append(
        Row("GPT-2 124M, linear layers of a token, exact", step["moq"], step["torch"], "us")
    )
    return rows


def main() -> int:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=40, help="calls of each competitor (40)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    threads = f"{arguments.threads} thread" + ("s" if arguments.threads > 1 else "")

    def show(title: str, peer: str, rows: list[Row]) -> None:
        print_rows(f"{title}, {threads}", peer, rows, arguments.json)

    if {"gemv", "torch"} & set(arguments.tables):
        against_memory, against_torch = gemv_rows(arguments.turns)
        if "gemv" in arguments.tables:
            show("GEMV against memory", "read bandwidth", against_memory)
        if "torch" in arguments.tables:
            show("GEMV against torch", "torch._weight_int8pack_mm", against_torch)
    if "gemm" in arguments.tables:
        against_dynamic, against_int_mm = gemm_rows(arguments.turns)
        show("GEMM against torch", "torch dynamic INT8", against_dynamic)
        show("GEMM against torch", "torch._int_mm", against_int_mm)
    if "decode" in arguments.tables:
        show("decode", "torch dynamic INT8", decode_rows(arguments.turns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
