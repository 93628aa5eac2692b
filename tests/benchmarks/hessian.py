"""What second-order sensitivity costs, in Hessian-vector products: moq's solvers and other loops.

Top eigenvalues of each layer of an encoder. moq: Lanczos (moq.sensitivity's). Peer: the loop of
moq's ancestor, DeepSpeed (runtime/eigenvalue.py): power iteration from a normal vector,
stopped where the value changes by less than a hundredth, after 100 products at most. Its products
cost more besides: each goes through the whole graph, retained at every backward pass. The
reference, from which errors are counted, is a long Lanczos run. Counted are

  own rules        the products until each stops by itself, with the error that it stops at
  equal accuracy   the products until the error is below a bound, and stays there; where the power
                   iteration does not get there, its 100 products count

Traces of all layers. moq: one product for all (Hutchinson), stopped at a standard error of a tenth.
Peers: the ancestor's loop above, which a trace replaces as measure of sensitivity, and Hutchinson's
estimator layer by layer with the rule of PyHessian (a mean that changes by less than a thousandth,
100 products at most).

Then values beside those of PyHessian, if it is installed (pip install --no-deps pyhessian), on the
same layers and data. (What Lanczos holds in memory, tests/cpp/hessian asserts.)

  bert-base   the shape, weights drawn at random, layers trained for --train-steps on one batch
  minilm-l6   real weights, trained for as many steps on WordNet's glosses (packages of the demo)
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gpu
import torch
from report import Row, print_rows
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step_cpu import NUM_LABELS
from transformers import BertConfig, BertForSequenceClassification

from moq import _C
from moq.estimators import DEFAULT_TOLERANCE
from moq.sensitivity import find_blocks, measure

ANCESTOR_TOLERANCE, ANCESTOR_PRODUCTS, ANCESTOR_STABILITY = 1e-2, 100, 1e-6
PYHESSIAN_TOLERANCE, PYHESSIAN_PRODUCTS = 1e-3, 100
ACCURACIES = (1e-1, 1e-2, 1e-3)
Batch = dict[str, Tensor]


# --------------------------------------------------------------------------------- the problem


def bert_base(args: argparse.Namespace) -> tuple[nn.Module, list[Batch]]:
    """BERT-base's shape with random weights, and random tokens."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=args.layers, num_labels=NUM_LABELS)
    model = BertForSequenceClassification(config)
    shape = (args.batch, args.seq)
    batch = {
        "input_ids": torch.randint(model.config.vocab_size, shape),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.randint(model.config.num_labels, (args.batch,)),
    }
    return model, [batch]


def minilm(args: argparse.Namespace) -> tuple[nn.Module, list[Batch]]:
    """MiniLM-L6 and glosses, the first batch of which is measured on."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
    from pretrained import load_encoder, wordnet_glosses

    torch.manual_seed(0)
    data = wordnet_glosses()
    model, tokenizer = load_encoder(data.num_classes)
    rows = torch.randperm(len(data.texts), generator=torch.Generator().manual_seed(0)).tolist()
    size = args.batch
    batches = []
    for start in range(0, size * max(args.train_steps, 1), size):
        chosen = rows[start : start + size]
        tokens = tokenizer(
            [data.texts[row] for row in chosen],
            padding="max_length",
            truncation=True,
            max_length=args.seq,
            return_tensors="pt",
        )
        batches.append({**tokens, "labels": torch.tensor([data.labels[row] for row in chosen])})
    return model, batches


MODELS = {"bert-base": bert_base, "minilm-l6": minilm}


def prepared(args: argparse.Namespace) -> tuple[nn.Module, Batch]:
    """The model, trained for some steps and in eval mode, and the batch that is measured on."""
    model, batches = MODELS[args.model](args)
    model.to(args.device)
    batches = [{k: v.to(args.device) for k, v in batch.items()} for batch in batches]
    model.bert.embeddings.requires_grad_(False)
    train(args, model, batches, args.train_steps)
    return model.eval(), batches[0]


def train(args: argparse.Namespace, model: nn.Module, batches: list[Batch], steps: int) -> None:
    """Trains what requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gpu.progress(f"step {step + 1}: loss {loss.item():.3f}")


def synchronise(device: str) -> None:
    """Waits for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class Layers:
    """The Hessian of each layer, as a product that counts.

    Args:
        model: In eval mode.
        batch: What the loss is taken of.
    """

    def __init__(self, model: nn.Module, batch: Batch, device: str) -> None:
        """Makes the graph of the gradient, once for all products."""
        self.device = device
        self.blocks = {
            name: parameters
            for name, parameters in find_blocks(model).items()
            if name.rpartition(".")[2].isdigit()
        }
        self.parameters = [p for block in self.blocks.values() for p in block]
        self.seconds = 0.0
        self.count = 0
        started = time.perf_counter()
        with sdpa_kernel(SDPBackend.MATH):
            self.operator = _C.HvpOperator(model(**batch).loss, self.parameters)
        synchronise(device)
        self.graph_seconds = time.perf_counter() - started

    def indices(self, name: str) -> list[int]:
        """Numbers of a layer's parameters."""
        members = {id(p) for p in self.blocks[name]}
        return [i for i, p in enumerate(self.parameters) if id(p) in members]

    def product(self, name: str, vectors: Sequence[Tensor]) -> list[Tensor]:
        """H v of one layer."""
        started = time.perf_counter()
        result = self.operator.product(self.indices(name), list(vectors))
        synchronise(self.device)
        self.seconds += time.perf_counter() - started
        self.count += 1
        return result

    def flat_product(self, name: str) -> Callable[[Tensor], Tensor]:
        """The same on flat vectors."""
        members = self.blocks[name]
        sizes = [p.numel() for p in members]

        def product(x: Tensor) -> Tensor:
            vectors = [v.view_as(p).to(p) for v, p in zip(x.split(sizes), members, strict=True)]
            return torch.cat([piece.reshape(-1) for piece in self.product(name, vectors)])

        return product

    def lanczos(self, name: str, max_iterations: int, tolerance: float) -> _C.LanczosResult:
        """Of moq."""
        size = sum(p.numel() for p in self.blocks[name])
        return _C.lanczos(
            self.flat_product(name),
            size,
            dtype=torch.float32,
            max_iterations=max_iterations,
            tolerance=tolerance,
            seed=0,
        )


# --------------------------------------------------------------------------------- the ancestor


def normalised(v: Sequence[Tensor]) -> list[Tensor]:
    """The vector over its length, as the ancestor's loop has it."""
    length = math.sqrt(sum(float((x * x).sum()) for x in v)) + ANCESTOR_STABILITY
    return [x / length for x in v]


def ancestor_iteration(layers: Layers, name: str) -> Iterator[float]:
    """The values of 100 power iterations."""
    torch.manual_seed(0)
    v = normalised([torch.randn_like(p) for p in layers.blocks[name]])
    for _ in range(ANCESTOR_PRODUCTS):
        product = [torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in layers.product(name, v)]
        yield sum(float((x * y).sum()) for x, y in zip(product, v, strict=True))
        v = normalised(product)


def ancestor_stop(values: Sequence[float]) -> int:
    """After how many of these values the loop would have stopped."""
    previous = 1.0
    for count, current in enumerate(values, start=1):
        if current == 0.0 or abs((current - previous) / current) < ANCESTOR_TOLERANCE:
            return count
        previous = current
    return ANCESTOR_PRODUCTS


# --------------------------------------------------------------------------------- eigenvalues


def products_until(values: Sequence[float], reference: float, accuracy: float) -> int | None:
    """Products after which the relative error is at most `accuracy`, for good."""
    wrong = [i for i, v in enumerate(values) if abs(v - reference) > accuracy * abs(reference)]
    first = wrong[-1] + 2 if wrong else 1
    return first if first <= len(values) else None


def eigenvalue_rows(args: argparse.Namespace, layers: Layers) -> tuple[list[Row], dict[str, int]]:
    """Rows of the layers asked for, and the products of the ancestor's loop in each."""
    rows, ancestor = [], {}
    totals = {accuracy: [0, 0, 0] for accuracy in ACCURACIES}
    own = [0, 0]
    for name in chosen(args, layers):
        layers.seconds, layers.count = 0.0, 0
        started = time.perf_counter()
        found = layers.lanczos(name, 30, DEFAULT_TOLERANCE["eigenvalue"])
        lanczos_seconds, product_seconds = time.perf_counter() - started, layers.seconds
        longer = layers.lanczos(name, args.reference, 1e-6)
        reference = longer["dominant"]
        gpu.progress(
            f"{name}: {found['iterations']} products in {lanczos_seconds:.2f} s "
            f"({product_seconds:.2f} s without the solver), reference {reference:.6g} "
            f"(residual {longer['residual'] / abs(reference):.1e})"
        )
        values = list(ancestor_iteration(layers, name))
        stopped = ancestor_stop(values)
        ancestor[name] = stopped
        error = abs(found["dominant"] / reference - 1)
        ancestor_error = abs(values[stopped - 1] / reference - 1)
        rows.append(
            Row(
                f"{name}, own rules",
                found["iterations"],
                stopped,
                "products",
                f"(error {error:.1e}; peer's {ancestor_error:.1e}; value {reference:.4g})",
            )
        )
        own = [own[0] + found["iterations"], own[1] + stopped]
        for accuracy in ACCURACIES:
            moq = products_until(longer["history"], reference, accuracy)
            peer = products_until(values, reference, accuracy)
            note = "" if peer else "(peer not there after 100)"
            rows.append(
                Row(f"{name}, error {accuracy:g}", moq, peer or len(values), "products", note)
            )
            total = totals[accuracy]
            totals[accuracy] = [
                total[0] + moq,
                total[1] + (peer or len(values)),
                total[2] + (peer is None),
            ]
        gpu.progress(f"{name}: power iteration stops after {stopped}")
    count = len(ancestor)
    rows.append(Row(f"{count} layers, own rules", *own, "products"))
    for accuracy, (moq, peer, capped) in totals.items():
        note = f"(peer not there after 100 in {capped} of {count})" if capped else ""
        rows.append(Row(f"{count} layers, error {accuracy:g}", moq, peer, "products", note))
    return rows, ancestor


def chosen(args: argparse.Namespace, layers: Layers) -> list[str]:
    """Names of the layers whose eigenvalues are computed, evenly spread."""
    names = list(layers.blocks)
    count = min(args.blocks or len(names), len(names))
    return [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]


# --------------------------------------------------------------------------------- traces


def pyhessian_products(samples: Sequence[float]) -> int:
    """After how many samples PyHessian's trace() would stop."""
    mean = 0.0
    for count in range(1, len(samples) + 1):
        new = sum(samples[:count]) / count
        # PyHessian divides by the signed mean; by its magnitude, negative traces do not end it.
        if abs(new - mean) / (abs(mean) + 1e-6) < PYHESSIAN_TOLERANCE:
            return count
        mean = new
    return len(samples)


def trace_rows(
    args: argparse.Namespace,
    model: nn.Module,
    batch: Batch,
    layers: Layers,
    ancestor: dict[str, int],
) -> list[Row]:
    """One product for all layers beside loops layer by layer."""
    found = measure(
        model, layers.blocks, lambda b: model(**b).loss, [batch], form="exact", progress=False
    )
    gpu.progress(f"traces: {found.products} products, converged: {found.converged}")
    blocks, begin = [], 0
    for parameters in layers.blocks.values():
        blocks.append(list(range(begin, begin + len(parameters))))
        begin += len(parameters)
    started = time.perf_counter()
    samples, _ = layers.operator.traces(
        blocks, tolerance=1e-9, min_products=2, max_products=PYHESSIAN_PRODUCTS, seed=1
    )
    synchronise(args.device)
    seconds = (time.perf_counter() - started) / len(samples)
    columns = list(zip(*samples, strict=True))
    means = [sum(column) / len(column) for column in columns]
    largest = max(map(abs, means))
    error = max(abs(v - m) for v, m in zip(found.values, means, strict=True)) / largest
    by_layer = sum(map(pyhessian_products, columns))
    count = len(layers.blocks)
    loop = sum(ancestor.values()) * count / len(ancestor)
    note = f"(largest error {error:.1e} of the largest trace; {seconds:.2f} s a product)"
    estimated = "" if len(ancestor) == count else f", from {len(ancestor)} layers"
    rows = [
        Row(f"{count} traces, ancestor's loop{estimated}", found.products, loop, "products", note),
        Row(
            f"{count} traces, that loop to its limit",
            found.products,
            ANCESTOR_PRODUCTS * count,
            "products",
        ),
        Row(
            f"{count} traces, Hutchinson layer by layer, PyHessian's rule",
            found.products,
            by_layer,
            "products",
        ),
        Row(
            f"{count} traces, Hutchinson layer by layer, as many samples",
            found.products,
            found.products * count,
            "products",
        ),
    ]
    return rows


# --------------------------------------------------------------------------------- PyHessian


class Logits(nn.Module):
    """Token ids to logits, as PyHessian calls a model."""

    def __init__(self, model: nn.Module, attention_mask: Tensor) -> None:
        """Takes the mask of the one batch that there is."""
        super().__init__()
        self.model, self.mask = model, attention_mask

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns logits [batch, labels]."""
        return self.model(input_ids=input_ids, attention_mask=self.mask).logits


@contextmanager
def only_trainable(model: nn.Module, block: Sequence[Tensor]):
    """Freezes everything else, since PyHessian measures all that trains."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    members = {id(p) for p in block}
    for p, _ in flags:
        p.requires_grad_(id(p) in members)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None


def pyhessian_rows(
    args: argparse.Namespace, model: nn.Module, batch: Batch, layers: Layers
) -> list[Row]:
    """Values of both on the same layers."""
    if importlib.util.find_spec("pyhessian") is None:
        gpu.progress("PyHessian is not installed: no comparison with its values")
        return []
    from pyhessian import hessian

    rows = []
    for name in chosen(args, layers)[: args.pyhessian_blocks]:
        found = layers.lanczos(name, 30, 1e-3)
        samples, _ = layers.operator.traces(
            [layers.indices(name)], tolerance=1e-9, min_products=2, max_products=100, seed=1
        )
        trace = sum(sample[0] for sample in samples) / len(samples)
        (error,) = _C.standard_errors(samples)
        with only_trainable(model, layers.blocks[name]), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(0)
            peer = hessian(
                Logits(model, batch["attention_mask"]),
                nn.functional.cross_entropy,
                data=(batch["input_ids"], batch["labels"]),
                cuda=args.device == "cuda",
            )
            (value,), _ = peer.eigenvalues(maxIter=100, tol=1e-3)
            # Divides by the signed mean, and so stops where that has become negative.
            peer_samples = peer.trace(maxIter=100, tol=1e-9)
            del peer
        peer_trace = sum(peer_samples) / len(peer_samples)
        (peer_error,) = _C.standard_errors([[float(s)] for s in peer_samples])
        rows.append(
            Row(
                f"{name}, eigenvalue of largest magnitude",
                found["dominant"],
                value,
                "of the loss",
                f"(difference {abs(found['dominant'] / value - 1):.1e})",
            )
        )
        sigmas = abs(trace - peer_trace) / math.hypot(error, peer_error)
        rows.append(
            Row(
                f"{name}, trace of 100 samples (peer: {len(peer_samples)})",
                trace,
                float(peer_trace),
                "of the loss",
                f"(± {error:.2g}; peer's ± {peer_error:.2g}; {sigmas:.1f} standard errors apart)",
            )
        )
        gpu.progress(f"{name}: beside PyHessian")
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="bert-base")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--layers", type=int, default=12, help="of bert-base")
    add("--seq", type=int, default=64, help="tokens of a row (64)")
    add("--batch", type=int, default=4, help="rows (4)")
    add("--blocks", type=int, default=0, help="layers whose eigenvalues are computed (all)")
    add("--pyhessian-blocks", type=int, default=2, help="of these, compared with PyHessian (2)")
    add("--train-steps", type=int, default=10)
    add("--learning-rate", type=float, default=5e-5)
    add("--reference", type=int, default=80, help="products of the reference (80)")
    add("--threads", type=int, help="of torch on a CPU")
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda":
        gpu.require()
    model, batch = prepared(args)
    layers = Layers(model, batch, args.device)
    gpu.progress(f"graph of the gradient: {layers.graph_seconds:.2f} s")
    facts = gpu.facts_on(args.device)
    title = (
        f"{args.model}, {len(layers.blocks)} layers, {args.batch} x {args.seq} tokens, "
        f"{args.train_steps} steps"
    )
    rows, ancestor = eigenvalue_rows(args, layers)
    print_rows(f"Top eigenvalues, {title}", "power iteration", rows, args.json, facts)
    rows = trace_rows(args, model, batch, layers, ancestor)
    print_rows(f"Traces, {title}", "loops", rows, args.json, facts)
    rows = pyhessian_rows(args, model, batch, layers)
    if rows:
        print_rows(f"Values, {title}", "PyHessian", rows, args.json, facts)


if __name__ == "__main__":
    main()
