"""Whether Hutch++ pays: its error beside that of Hutchinson's estimator after as many products.

Hutch++ (Meyer, Musco, Musco and Woodruff, 2021) spends a third of its products on a sketch of the
range, a third on the trace within it, which is exact, and a third on Hutchinson's estimate of the
rest. Here both get the products of one layer alone, which is the best case for Hutch++: a product
with the vectors of all layers serves every layer's Hutchinson, but the trace within a sketch is
exact only by products of one layer at a time.

Hutchinson's error is the deviation of its samples over the root of their number; that of Hutch++
the deviation over repeated estimates. Both over the layer's trace.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import gpu
import torch
from hessian import MODELS, Layers, chosen, prepared
from report import Row, print_rows
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def signs(size: int, generator: torch.Generator) -> Tensor:
    """A Rademacher vector."""
    return torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).float()


def hutch_plus_plus(product: Product, size: int, count: int, generator: torch.Generator) -> float:
    """The trace by `count` products, which three must divide."""
    third = count // 3
    sketch = torch.stack([product(signs(size, generator)) for _ in range(third)], dim=1)
    basis = torch.linalg.qr(sketch)[0]
    within = sum(float(q @ product(q)) for q in basis.T.contiguous())
    rest = 0.0
    for _ in range(third):
        g = signs(size, generator)
        g -= basis @ (basis.T @ g)
        rest += float(g @ product(g)) / third
    return within + rest


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="minilm-l6")
    add("--layers", type=int, default=12, help="of bert-base")
    add("--blocks", type=int, default=3, help="layers that are measured (3)")
    add("--seq", type=int, default=16, help="tokens of a row (16)")
    add("--batch", type=int, default=4, help="rows (4)")
    add("--train-steps", type=int, default=60)
    add("--learning-rate", type=float, default=2e-4)
    add("--products", type=int, nargs="+", default=[12, 30, 90], help="multiples of three")
    add("--repeats", type=int, default=10, help="estimates of Hutch++ (10)")
    add("--samples", type=int, default=100, help="of Hutchinson's estimator (100)")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    args.device = "cpu"
    model, batch = prepared(args)
    layers = Layers(model, batch, args.device)
    rows = []
    for name in chosen(args, layers):
        product = layers.flat_product(name)
        size = sum(p.numel() for p in layers.blocks[name])
        generator = torch.Generator().manual_seed(0)
        samples = []
        for _ in range(args.samples):
            g = signs(size, generator)
            samples.append(float(g @ product(g)))
        trace, deviation = torch.tensor(samples).mean(), torch.tensor(samples).std()
        for count in args.products:
            found = torch.tensor(
                [hutch_plus_plus(product, size, count, generator) for _ in range(args.repeats)]
            )
            gpu.progress(f"{name}, {count} products: {found.mean():.4g} and {trace:.4g}")
            rows.append(
                Row(
                    f"{name}, {count} products",
                    float(deviation / math.sqrt(count) / trace.abs()),
                    float(found.std() / trace.abs()),
                    "of the trace",
                    f"(trace {trace:.4g}; Hutch++ {found.mean():.4g})",
                )
            )
    facts = gpu.facts_on("cpu")
    title = f"Errors of traces, {args.model}, {args.batch} x {args.seq} tokens"
    print_rows(title, "Hutch++", rows, args.json, facts)


if __name__ == "__main__":
    main()
