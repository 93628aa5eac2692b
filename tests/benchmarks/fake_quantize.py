"""Speed of one multi-tensor fake-quantize over all linear weights of the demo's models.

The training step reads the masters and writes the simulated weights once, so a plain copy of the
same tensors is what it can at best cost. Peers, in turn:

  copy   torch._foreach_copy_ of the weights
  torch  torch.fake_quantize_per_channel_affine, with the scales' absmax, weight by weight

Values are drawn at random; what counts is the shapes. Competitors take turns, the best turn of each
is printed.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from report import Row, print_rows

import moq  # noqa: F401  (registers the operators)

# Output and input features of the linear layers, and how often they occur.
MODELS = {
    "SmolLM2-135M": {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30},
    "MiniLM-L6": {(384, 384): 24, (1536, 384): 6, (384, 1536): 6},
}
CASES = {
    "nearest": {},
    "nearest, Conv1D storage": {"transposed": True},
    "nearest, asymmetric": {"quant_mode": "asymmetric"},
    "nearest, per group of 64": {"granularity": "per_group", "group_size": 64},
    "nearest, per tensor": {"granularity": "per_tensor"},
    "stochastic": {"rounding": "stochastic"},
}

Call = Callable[[], object]


def weights_of(model: str, device: str) -> list[torch.Tensor]:
    """One float32 weight [out_features, in_features] for each linear layer."""
    generator = torch.Generator().manual_seed(0)
    return [
        (0.02 * torch.randn(*shape, generator=generator)).to(device)
        for shape, count in MODELS[model].items()
        for _ in range(count)
    ]


def best_of_turns(competitors: dict[str, Call], turns: int, device: str) -> dict[str, float]:
    """Best milliseconds of each competitor; every turn calls each once, the first uncounted."""
    best = dict.fromkeys(competitors, float("inf"))
    for turn in range(turns + 1):
        for name, call in competitors.items():
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn > 0:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def per_channel_affine(weights: list[torch.Tensor]) -> None:
    """The same simulated weights from torch's own operator."""
    for weight in weights:
        scale = weight.abs().amax(1) / 127
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -127, 127)


def moq_call(weights: list[torch.Tensor], arguments: dict[str, object]) -> Call:
    """One call of moq's kernel; Conv1D storage is that of the transposed weights."""
    stored = (
        [weight.t().contiguous() for weight in weights] if "transposed" in arguments else weights
    )
    out = [torch.empty_like(weight) for weight in stored]
    num_bits = torch.full((len(weights),), 8, dtype=torch.int32, device=weights[0].device)
    return lambda: torch.ops.moq.foreach_fake_quantize(stored, num_bits, **arguments, out=out)


def measure(model: str, turns: int, device: str) -> tuple[list[Row], list[Row]]:
    """Rows against the copy and rows against torch."""
    weights = weights_of(model, device)
    copies = [torch.empty_like(weight) for weight in weights]
    against_copy = []
    for case, arguments in CASES.items():
        competitors = {
            "moq": moq_call(weights, arguments),
            "copy": lambda: torch._foreach_copy_(copies, weights),
        }
        best = best_of_turns(competitors, turns, device)
        against_copy.append(Row(f"{model} {case}", best["moq"], best["copy"], "ms"))
    competitors = {"moq": moq_call(weights, {}), "torch": lambda: per_channel_affine(weights)}
    best = best_of_turns(competitors, turns, device)
    return against_copy, [Row(f"{model} nearest", best["moq"], best["torch"], "ms")]


def main() -> int:
    """Measures and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (CPU)")
    parser.add_argument("--turns", type=int, default=7, help="turns that each number is best of")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = "GPU" if options.device == "cuda" else f"{options.threads} threads"
    tables: tuple[list[Row], list[Row]] = ([], [])
    for model in MODELS:
        for table, rows in zip(tables, measure(model, options.turns, options.device), strict=True):
            table.extend(rows)
    print_rows(f"Fake-quantize against a copy, {where}", "copy", tables[0], options.json)
    print_rows(f"Fake-quantize against torch, {where}", "torch", tables[1], options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
