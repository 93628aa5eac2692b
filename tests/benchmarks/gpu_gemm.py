"""Speed of moq's linear layers on a GPU against its memory and against cuBLAS.

Four tables:

  gemv    INT8 weights times 1, 8 and 16 tokens, in GB/s of weights, against the best reading of
          device memory measured in the same run: the ratio is the share of the read bandwidth.
          Notes: the share in percent, and the time over that of one token.
  skinny  the same for 32 and 64 tokens.
  cublas  1 to 64 tokens, in microseconds, against cuBLAS with FP16 weights, which are twice as
          many bytes.
  large   128 to 4096 tokens, in TFLOP/s, against cuBLAS FP16: INT8 weights converted in registers,
          and FP16 weights.

Activations are FP16 and rounded nowhere else: "exact" weight-only arithmetic, as the engine's
default. A figure is device time inside a CUDA graph whose calls rotate through copies of the weight
that exceed sixteen times the L2 cache; the median of --turns counts, and competitors take turns.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import gpu
import torch
from report import Row, Target, print_rows

TABLES = ("gemv", "skinny", "cublas", "large")
# Output and input features: a feed-forward layer of hidden 12288, of the 17B shape, and the one of
# Llama-3.1-8B that reduces its width.
SHAPES = {"49152x12288": (49152, 12288), "17024x4256": (17024, 4256), "4096x14336": (4096, 14336)}
LARGE_SHAPES = ("17024x4256", "4096x14336")
# Percent of the read bandwidth, of one token; times its time, of more; cuBLAS's speed, of most.
LEAST_SHARE = {"49152x12288": 88, "17024x4256": 75, "4096x14336": 75}
MOST_OVER_ONE = {8: 1.25, 16: 1.5}
LEAST_OF_CUBLAS = {4096: 0.9}


class Weights:
    """Copies of one weight that outlive the cache, as moq packs them and as cuBLAS reads them."""

    def __init__(self, shape: tuple[int, int]) -> None:
        """Draws one weight and copies it."""
        self.n, self.k = shape
        self.copies = gpu.copies_of(self.n * self.k)
        self.half = [gpu.random_weight(self.n, self.k, 0)]
        self.packed = {f: [gpu.pack(self.half[0], f)] for f in ("int8", "float16")}
        for weights in (self.half, *self.packed.values()):
            weights += [weights[0].clone() for _ in range(self.copies - 1)]
        torch.cuda.synchronize()  # weights are ready, as the calls promise

    def call(self, x: torch.Tensor, format: str) -> gpu.Call:
        """moq's product with copy i."""
        linear, n, packed = torch.ops.moq.linear, self.n, self.packed[format]
        return lambda i: linear(x, packed[i], n, format=format, weight_is_ready=True)

    def cublas(self, x: torch.Tensor) -> gpu.Call:
        """The product of cuBLAS with copy i."""
        return lambda i: torch.mm(x, self.half[i].t())

    def error(self, x: torch.Tensor) -> str:
        """How far moq's INT8 and FP16 products are from the exact one, as a note."""
        exact = x.float() @ self.half[0].float().t()
        errors = [
            gpu.relative_error(self.call(x, format)(0), exact) for format in ("int8", "float16")
        ]
        return f"error INT8 {errors[0]:.1e}, FP16 {errors[1]:.1e}"


def random_rows(m: int, k: int) -> torch.Tensor:
    """FP16 activations [m, k]."""
    generator = torch.Generator(device="cuda").manual_seed(m)
    return torch.randn(m, k, device="cuda", generator=generator).half()


def streaming_rows(
    name: str, weights: Weights, tokens: Sequence[int], bandwidth: float, turns: int
) -> list[Row]:
    """Weights read per second, against the read bandwidth."""
    calls = {m: weights.call(random_rows(m, weights.k), "int8") for m in {1, *tokens}}
    seconds = gpu.median_of_calls(calls, weights.copies, turns)
    num_bytes = weights.n * weights.k
    rows = []
    for m in tokens:
        rate = num_bytes / seconds[m]
        share, over_one = 100 * rate / bandwidth, seconds[m] / seconds[1]
        note, wanted = f"{share:.0f} % of the read bandwidth", []
        if m == 1:
            wanted.append(Target("percent", share, LEAST_SHARE[name], at_most=False))
        else:
            note += f", {over_one:.2f}x the time of one token"
        if m in MOST_OVER_ONE:
            figure = "times one token's"
            wanted.append(Target(figure, over_one, MOST_OVER_ONE[m], at_most=True))
        case, rates = f"INT8 {name}, M = {m}:", (rate / 1e9, bandwidth / 1e9)
        rows.append(Row(case, *rates, "GB/s", note, gpu.targets(*wanted)))
    return rows


def cublas_rows(name: str, weights: Weights, turns: int) -> list[Row]:
    """Few tokens, in microseconds."""
    rows = []
    for m in (1, 8, 16, 32, 64):
        x = random_rows(m, weights.k)
        calls = {
            "int8": weights.call(x, "int8"),
            "float16": weights.call(x, "float16"),
            "cublas": weights.cublas(x),
        }
        seconds = gpu.median_of_calls(calls, weights.copies, turns)
        for format, label in (("int8", "INT8"), ("float16", "FP16")):
            times = [1e6 * seconds[which] for which in (format, "cublas")]
            rows.append(Row(f"{label} {name}, M = {m}", *times, "us"))
    return rows


def large_rows(name: str, weights: Weights, turns: int) -> list[Row]:
    """Many tokens, in TFLOP/s."""
    rows = []
    for m in (128, 256, 512, 1024, 2048, 4096):
        x = random_rows(m, weights.k)
        calls = {
            "int8": weights.call(x, "int8"),
            "float16": weights.call(x, "float16"),
            "cublas": weights.cublas(x),
        }
        seconds = gpu.median_of_calls(calls, weights.copies, max(turns // 2, 3))
        rate = {which: 2e-12 * m * weights.n * weights.k / s for which, s in seconds.items()}
        note = f"({weights.error(x)})" if m == 128 else ""
        for format, label in (("int8", "INT8"), ("float16", "FP16")):
            case = f"{label} weights {name}, M = {m}"
            found = Row(case, rate[format], rate["cublas"], "TFLOPS", note)
            if m in LEAST_OF_CUBLAS:
                least = Target("ratio", found.ratio, LEAST_OF_CUBLAS[m], at_most=False)
                found = replace(found, targets=gpu.targets(least))
            rows.append(found)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    gpu.arguments(parser)
    args = parser.parse_args(arguments)
    gpu.require()
    facts = gpu.facts() | {"activations": "FP16, exact weight-only"}
    bandwidth = gpu.read_bandwidth()
    rows: dict[str, list[Row]] = {table: [] for table in TABLES}
    for name in args.shapes:
        weights = Weights(SHAPES[name])
        if "gemv" in args.tables:
            rows["gemv"] += streaming_rows(name, weights, (1, 8, 16), bandwidth, args.turns)
        if "skinny" in args.tables:
            rows["skinny"] += streaming_rows(name, weights, (32, 64), bandwidth, args.turns)
        if "cublas" in args.tables:
            rows["cublas"] += cublas_rows(name, weights, args.turns)
        if "large" in args.tables and name in LARGE_SHAPES:
            rows["large"] += large_rows(name, weights, args.turns)
        del weights
        torch.cuda.empty_cache()
    peers = {"gemv": "read bandwidth", "skinny": "read bandwidth"}
    for table, found in rows.items():
        if found:
            peer = peers.get(table, "cuBLAS FP16")
            print_rows(f"INT8 and FP16 GEMM: {table}", peer, found, args.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
