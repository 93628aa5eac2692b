"""What each form of the curvature costs, and how far it lies from the exact Hessian.

A real model and real text, the same random vectors for all forms: MiniLM-L6 with a fresh head on
eight WordNet glosses, or SmolLM2-135M on 128 tokens of a speech.

    python tests/benchmarks/curvature_forms.py --model encoder [--device cuda] [--json]

For each form: seconds of the graph and of a product over all layers (median), the largest
difference of a block's trace from the exact one over the largest trace (finite differences), the
rank correlation of all traces with the exact ones, and gradient-equivalents of a product.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rank_correlation import rank_correlation
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from pretrained import load_decoder, load_encoder, state_of_the_union, wordnet_glosses

from moq import _C
from moq.curvature import FORMS, Curvature, Form
from moq.estimators import indices_of
from moq.sensitivity import find_blocks, gradient_seconds, measure
from moq.undisturbed import undisturbed

TOKENS, EXAMPLES = 128, 8


def encoder() -> tuple[nn.Module, Any, Callable[[Form], Callable[[Any], Any]]]:
    """MiniLM-L6, a batch, and its loss for each form."""
    torch.manual_seed(0)
    data = wordnet_glosses()
    model, tokenizer = load_encoder(data.num_classes)
    step = len(data.texts) // EXAMPLES
    batch = dict(tokenizer(data.texts[::step][:EXAMPLES], padding=True, return_tensors="pt"))
    labels = torch.tensor(data.labels[::step][:EXAMPLES])

    def loss_fn(form: Form) -> Callable[[Any], Any]:
        def loss(inputs: Any) -> Any:
            logits = model(**inputs).logits
            reduction = "none" if form == "fisher" else "mean"
            target = labels.to(logits.device)
            value = nn.functional.cross_entropy(logits, target, reduction=reduction)
            return (value, logits) if form == "gauss_newton" else value

        return loss

    return model, batch, loss_fn


def decoder() -> tuple[nn.Module, Any, Callable[[Form], Callable[[Any], Any]]]:
    """SmolLM2-135M, as `encoder`; its examples are four pieces of the text."""
    model, tokenizer = load_decoder()
    text = state_of_the_union()[1][:4000]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS].view(4, -1)

    def loss_fn(form: Form) -> Callable[[Any], Any]:
        def loss(tokens: Tensor) -> Any:
            logits = model(input_ids=tokens).logits[:, :-1]
            value = nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
            )
            if form == "fisher":
                return value.view(len(tokens), -1).mean(1)
            return (value.mean(), logits) if form == "gauss_newton" else value.mean()

        return loss

    return model, ids, loss_fn


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run(name: str, device: str, products: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Measures all forms of one model, one after the other."""
    model, batch, loss_fn = {"encoder": encoder, "decoder": decoder}[name]()
    model.to(device)
    batch = (
        {k: v.to(device) for k, v in batch.items()} if isinstance(batch, dict) else batch.to(device)
    )
    blocks = {
        name: [p for p in members if p.dim() == 2]
        for name, members in find_blocks(model).items()
        if name.rsplit(".", 1)[-1].isdigit()
    }
    parameters = [p for members in blocks.values() for p in members]
    block = sum(indices_of(blocks), [])
    gradient = min(
        gradient_seconds(model, loss_fn("exact"), [batch], "exact") for _ in range(rounds)
    )
    exact: list[float] = []
    for form in FORMS[1:]:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        curvature = Curvature(form, model, parameters, loss_fn(form), None)
        seconds = []
        with undisturbed(model), curvature.frame():
            started = time.perf_counter()
            operator = curvature.operator(batch, 0)
            wait(device)
            graph = time.perf_counter() - started
            for _ in range(rounds + 1):
                vectors = [torch.randn_like(p) for p in parameters]
                started = time.perf_counter()
                operator.product(block, vectors)
                wait(device)
                seconds.append(time.perf_counter() - started)
            if isinstance(operator, _C.FisherOperator):
                seconds = [s / operator.examples for s in seconds]
            del operator
        found = measure(
            model,
            blocks,
            loss_fn(form),
            [batch],
            form=form,
            max_products=products,
            tolerance=1e-9,
            progress=False,
        )
        values = list(found.values)
        exact = exact or values
        largest = max(map(abs, exact))
        product = statistics.median(seconds[1:])  # the first also finds a step
        yield {
            "model": name,
            "form": form,
            "device": device,
            "graph_seconds": graph,
            "product_seconds": product,
            "product_in_gradients": product / gradient,
            "products": found.products,
            "seconds": found.seconds,
            "trace_difference": max(
                abs(a - b) / largest for a, b in zip(values, exact, strict=True)
            ),
            "rank_correlation": rank_correlation(
                [abs(value) for value in values], [abs(value) for value in exact]
            ),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("encoder", "decoder"), default="encoder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--products", type=int, default=12, help="of each trace")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each product")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for row in run(args.model, args.device, args.products, args.rounds):
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{row['model']:8} {row['form']:18} graph {row['graph_seconds']:.2f} s, product "
                f"{row['product_seconds']:.2f} s = {row['product_in_gradients']:.1f} gradients, "
                f"trace differs {row['trace_difference']:.1e}, rank correlation "
                f"{row['rank_correlation']:.2f} ({row['products']} products, "
                f"{row['seconds']:.1f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
