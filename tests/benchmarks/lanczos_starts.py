"""Whether blocks' top eigenvalues take fewer products when products of the whole matrix start them.

One product with the whole Hessian serves all blocks, but couples them. Starts of a block's Lanczos:

  random          what moq does
  whole           of SHARED Lanczos steps with the whole Hessian, from a random vector: the top
                  eigenvector of what their Krylov space knows of the block
  whole+random    that and a random vector, both of length 1
  whole+outside   that and the top vector of a random search outside of that space: as many more
                  products with the whole Hessian, each block orthogonalised in itself
  earlier         (--more-steps) the block's eigenvector before so many further training steps
  earlier+random  that and a random vector, both of length 1

Networks: hessian.py's, its peer too, which is DeepSpeed's power iteration; over all layers, the
products until the error stays below a bound, and until the solver's own rule (residual 0.01) ends.
The shared products count among them, though each takes the time of several of a layer's.

--model made: matrices of 12 blocks coupled through the same 12 rows, where the tops of one or all
blocks are other eigenvectors, which the coupling has no part in. Counted are the products by the
own rule, and the blocks of all seeds whose top eigenvalue is more than 2 % wrong.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import gpu
import hessian
import torch
from report import Row, print_rows
from torch import Tensor

TOLERANCE, MOST, SHARED, MISSED = 1e-2, 30, 8, 0.02
Product = Callable[[Tensor], Tensor]


class Matrix(Protocol):
    """A symmetric matrix of blocks, as products."""

    sizes: list[int]

    def block(self, index: int, x: Tensor) -> Tensor:
        """Product with one diagonal block."""

    def whole(self, x: Tensor) -> Tensor:
        """Product with everything."""

    def random(self, size: int, seed: int) -> Tensor:
        """A random unit vector where the products are computed."""


def unit(x: Tensor) -> Tensor:
    """The vector over its length."""
    return x / torch.linalg.vector_norm(x, dtype=torch.float64).to(x.dtype)


# --------------------------------------------------------------------------------- the matrices


class Network:
    """The layers of a network.

    Args:
        layers: Of hessian.py.
    """

    def __init__(self, layers: hessian.Layers) -> None:
        """Computes nothing."""
        self.layers, self.names = layers, list(layers.blocks)
        self.sizes = [sum(p.numel() for p in block) for block in layers.blocks.values()]
        self.seconds = {"block": 0.0, "whole": 0.0}
        self.counts = {"block": 0, "whole": 0}

    def block(self, index: int, x: Tensor) -> Tensor:
        """Product with one layer's Hessian."""
        return self._timed("block", self.layers.flat_product(self.names[index]), x)

    def whole(self, x: Tensor) -> Tensor:
        """Product with that of all layers."""

        def product(x: Tensor) -> Tensor:
            parameters = self.layers.parameters
            pieces = x.split([p.numel() for p in parameters])
            vectors = [v.view_as(p) for v, p in zip(pieces, parameters, strict=True)]
            found = self.layers.operator.product(list(range(len(parameters))), vectors)
            hessian.synchronise(self.layers.device)
            return torch.cat([piece.reshape(-1) for piece in found])

        return self._timed("whole", product, x)

    def random(self, size: int, seed: int) -> Tensor:
        """A random unit vector."""
        generator = torch.Generator().manual_seed(seed)
        return unit(torch.randn(size, generator=generator).to(self.layers.device))

    def _timed(self, kind: str, product: Product, x: Tensor) -> Tensor:
        started = time.perf_counter()
        result = product(x)
        self.seconds[kind] += time.perf_counter() - started
        self.counts[kind] += 1
        return result


class Made:
    """12 blocks D + J' J of curvature through the same 12 outputs, coupled by J_b' J_c.

    Args:
        kind: Where eigenvectors lie that the coupling has no part in, each a row of D: ``one``
            block, ``all``, ``negative`` (one), ``cluster`` (ten of one) or ``uncoupled`` (J = 0).
        ratio: Of their eigenvalue to the top one of J' J in that block, roughly.
        seed: Of everything.
    """

    BLOCKS, ROWS, RANK = 12, 30000, 12

    def __init__(self, kind: str, ratio: float, seed: int) -> None:
        """Draws the matrix."""
        generator = torch.Generator().manual_seed(seed)
        self.sizes = [self.ROWS] * self.BLOCKS
        curvature = torch.logspace(0, -1.3, self.RANK, dtype=torch.float64)
        tops = [(1 + 0.3 * b / self.BLOCKS) ** 2 for b in range(self.BLOCKS)]
        self.j, self.d = [], []
        for top in tops:
            rows = torch.randn(self.RANK, self.ROWS, generator=generator, dtype=torch.float64)
            scale = (curvature * top / self.ROWS).sqrt()
            self.j.append(rows * scale[:, None] * (kind != "uncoupled"))
            bulk = torch.rand(self.ROWS, generator=generator, dtype=torch.float64)
            self.d.append(0.2 * bulk - 0.1)
        for b in range(self.BLOCKS) if kind in ("all", "uncoupled") else [5]:
            count = 10 if kind == "cluster" else 1
            spread = torch.linspace(1, 0.95, count, dtype=torch.float64)
            self.d[b][:count] = ratio * tops[b] * spread * (-1 if kind == "negative" else 1)
            if kind == "uncoupled":
                self.d[b][1:3] = torch.tensor([0.6, -0.5]) * tops[b]

    def block(self, index: int, x: Tensor) -> Tensor:
        """Product with one diagonal block."""
        return self.d[index] * x + self.j[index].T @ (self.j[index] @ x)

    def whole(self, x: Tensor) -> Tensor:
        """Product with everything."""
        parts = x.split(self.sizes)
        outputs = torch.stack([j @ v for j, v in zip(self.j, parts, strict=True)]).sum(0)
        products = zip(self.d, self.j, parts, strict=True)
        return torch.cat([d * v + j.T @ outputs for d, j, v in products])

    def random(self, size: int, seed: int) -> Tensor:
        """A random unit vector."""
        generator = torch.Generator().manual_seed(seed)
        return unit(torch.randn(size, generator=generator, dtype=torch.float64))


# --------------------------------------------------------------------------------- the solvers


class Lanczos:
    """The Lanczos process with full reorthogonalisation.

    Args:
        product: With the matrix.
        start: Not zero.
    """

    def __init__(self, product: Product, start: Tensor) -> None:
        """Makes no product."""
        self.product, self.basis = product, [unit(start)]
        self.alpha: list[float] = []
        self.beta: list[float] = []

    def step(self, tolerance: float = TOLERANCE) -> tuple[float, bool]:
        """One product; returns the dominant value, and whether moq's rule ends here."""
        rest = self.product(self.basis[-1])
        for repeat in range(2):
            for v in reversed(self.basis):
                part = torch.dot(v, rest)
                rest = rest.sub_(part * v) if repeat else rest - part * v
                if not repeat and v is self.basis[-1]:
                    self.alpha.append(float(part))
        self.beta.append(float(torch.linalg.vector_norm(rest, dtype=torch.float64)))
        self.basis.append(rest / self.beta[-1])
        values, vectors = torch.linalg.eigh(self.tridiagonal())
        order = values.abs().argsort()
        residuals = self.beta[-1] * vectors[-1].abs()
        top = order[-1]
        other = 0 if values[top] > 0 else -1
        ends = residuals[top] <= tolerance * values[top].abs() and (
            values[other].abs() + residuals[other] <= (1 + tolerance) * values[top].abs()
        )
        return float(values[top]), bool(ends)

    def tridiagonal(self) -> Tensor:
        """T [j, j]."""
        off = torch.tensor(self.beta[:-1], dtype=torch.float64)
        diagonal = torch.tensor(self.alpha, dtype=torch.float64)
        return torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)

    def top(self) -> Tensor:
        """The dominant Ritz vector."""
        values, vectors = torch.linalg.eigh(self.tridiagonal())
        s = vectors[:, values.abs().argmax()].to(self.basis[0])
        return torch.stack(self.basis[:-1], 1) @ s


def starts_of_whole(matrix: Matrix, process: Lanczos) -> list[Tensor]:
    """What the Krylov space Q of the whole matrix knows of each block: its top eigenvector.

    Of A, Q knows P A + A P - P A P = Q M Q' with P = Q Q', where M is T and the next beta, and of a
    block Q_b M Q_b'.
    """
    count = len(process.beta)
    known = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    known[:count, :count] = process.tridiagonal()
    known[count, count - 1] = known[count - 1, count] = process.beta[-1]
    parts = zip(*(v.split(matrix.sizes) for v in process.basis), strict=True)
    starts = []
    for block in parts:
        basis = torch.stack(block, 1)
        squares, u = torch.linalg.eigh((basis.T @ basis).double().cpu())
        lengths = squares.clamp(min=1e-12 * float(squares[-1])).sqrt()
        root = u * lengths @ u.T
        values, vectors = torch.linalg.eigh(root @ known @ root)
        s = u / lengths @ u.T @ vectors[:, values.abs().argmax()]
        starts.append(unit(basis @ s.to(basis)))
    return starts


def starts_outside(matrix: Matrix, process: Lanczos, seed: int) -> list[Tensor]:
    """The top vectors of a random search of all blocks at once, outside of Q_b.

    A product with the whole matrix is taken for one with each block: outside of Q_b the blocks are
    hardly coupled.
    """
    parts = zip(*(v.split(matrix.sizes) for v in process.basis), strict=True)
    inside = [torch.linalg.qr(torch.stack(block, 1)).Q for block in parts]
    bases: list[list[Tensor]] = [[] for _ in matrix.sizes]
    products: list[list[Tensor]] = [[] for _ in matrix.sizes]

    def outside(block: int, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x - inside[block] @ (inside[block].T @ x)
            for v in bases[block]:
                x = x - torch.dot(v, x) * v
        return unit(x)

    following = list(matrix.random(sum(matrix.sizes), seed).split(matrix.sizes))
    for _ in process.beta:
        for block, x in enumerate(following):
            bases[block].append(outside(block, x))
        following = list(matrix.whole(torch.cat([b[-1] for b in bases])).split(matrix.sizes))
        for block, x in enumerate(following):
            products[block].append(x)
    starts = []
    for basis, found in zip(bases, products, strict=True):
        projected = (torch.stack(basis) @ torch.stack(found, 1)).double().cpu()
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        starts.append(unit(torch.stack(basis, 1) @ vectors[:, values.abs().argmax()].to(x)))
    return starts


# --------------------------------------------------------------------------------- the counts


@dataclass
class Run:
    """All blocks from one kind of start; histories end with the own rule."""

    shared: int = 0  # products with the whole matrix
    histories: list[list[float]] = field(default_factory=list)
    tops: list[Tensor] = field(default_factory=list)

    @property
    def products(self) -> int:
        """By the own rule."""
        return self.shared + sum(map(len, self.histories))

    @property
    def values(self) -> list[float]:
        """Of the blocks, at the end."""
        return [history[-1] for history in self.histories]


def run(
    matrix: Matrix,
    starts: list[Tensor],
    shared: int = 0,
    *,
    tolerance: float = TOLERANCE,
    most: int = MOST,
    keep: bool = False,
) -> Run:
    """Lanczos of each block."""
    found = Run(shared)
    for index, start in enumerate(starts):
        process = Lanczos(lambda x, index=index: matrix.block(index, x), start)
        history, ends = [], False
        while not ends and len(history) < most:
            value, ends = process.step(tolerance)
            history.append(value)
        found.histories.append(history)
        if keep:
            found.tops.append(process.top())
    return found


def random_starts(matrix: Matrix, seed: int) -> list[Tensor]:
    """One of each block."""
    return [matrix.random(n, 1000 * seed + i) for i, n in enumerate(matrix.sizes)]


def runs(matrix: Matrix, seed: int) -> Iterator[tuple[str, Run]]:
    """Every kind of start."""
    fresh = random_starts(matrix, seed + 1)
    yield "random", run(matrix, random_starts(matrix, seed), keep=True)
    process = Lanczos(matrix.whole, matrix.random(sum(matrix.sizes), seed))
    for _ in range(SHARED):
        process.step()
    whole = starts_of_whole(matrix, process)
    yield "whole", run(matrix, whole, SHARED)
    yield "whole+random", run(matrix, mixed(whole, fresh), SHARED)
    outside = starts_outside(matrix, process, seed + 1)
    del process
    yield "whole+outside", run(matrix, mixed(whole, outside), 2 * SHARED)


def mixed(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Sums."""
    return [x + y for x, y in zip(first, second, strict=True)]


def peer_histories(layers: hessian.Layers, references: list[float]) -> list[list[float]]:
    """Of the ancestor's loop, ended where the most accurate bound has been met three times."""
    histories = []
    for name, reference in zip(layers.blocks, references, strict=True):
        history: list[float] = []
        bound = min(hessian.ACCURACIES) * abs(reference)
        for value in hessian.ancestor_iteration(layers, name):
            history.append(value)
            if len(history) >= 3 and all(abs(v - reference) <= bound for v in history[-3:]):
                break
        histories.append(history)
        gpu.progress(f"{name}: power iteration, {len(history)} products")
    return histories


def count_missed(found: Run, references: list[float]) -> int:
    """Blocks whose value is more than 2 % wrong."""
    pairs = zip(found.values, references, strict=True)
    return sum(abs(value / reference - 1) > MISSED for value, reference in pairs)


def network_rows(network: Network, found: dict[str, Run]) -> list[Row]:
    """Products of all layers, by kind of start and bound."""
    references = [
        max((r.histories[i][-1] for r in found.values()), key=abs)
        for i in range(len(network.sizes))
    ]
    peers = peer_histories(network.layers, references)
    rows = []
    for name, result in found.items():
        missed = count_missed(result, references)
        rows.append(
            Row(
                f"{name}, own rules",
                result.products,
                sum(map(hessian.ancestor_stop, peers)),
                "products",
                f"({missed} of {len(references)} more than 2 % wrong)",
            )
        )
        for accuracy in hessian.ACCURACIES:
            own, peer = (
                sum(
                    hessian.products_until(history, reference, accuracy) or most
                    for history, reference in zip(histories, references, strict=True)
                )
                for histories, most in (
                    (result.histories, MOST),
                    (peers, hessian.ANCESTOR_PRODUCTS),
                )
            )
            rows.append(Row(f"{name}, error {accuracy:g}", result.shared + own, peer, "products"))
    return rows


def measure_network(args: argparse.Namespace) -> None:
    """Prints the rows of a network, and of the same after further training."""
    facts = gpu.facts() if args.device == "cuda" else None
    args.blocks = 0
    model, batch = hessian.prepared(args)
    network = Network(hessian.Layers(model, batch, args.device))
    title = f"{args.model}, {len(network.sizes)} layers, {args.batch} x {args.seq} tokens"
    for seed in range(args.seeds):
        found = dict(runs(network, 10 * seed))
        gpu.progress(", ".join(f"{name} {r.products}" for name, r in found.items()))
        steps = f"{args.train_steps} steps, seed {seed}"
        rows = network_rows(network, found)
        print_rows(f"Starts, {title}, {steps}", "power iteration", rows, args.json, facts)
    each = {kind: network.seconds[kind] / network.counts[kind] for kind in network.counts}
    gpu.progress(f"a product: {each['block']:.3f} s of a layer, {each['whole']:.3f} s of all")
    if not args.more_steps:
        return
    earlier = found["random"].tops
    # The graph holds the weights as they were.
    del network
    hessian.train(args, model, [batch], args.more_steps)
    network = Network(hessian.Layers(model.eval(), batch, args.device))
    fresh = random_starts(network, 7)
    later = {
        "random": run(network, random_starts(network, 5)),
        "earlier": run(network, earlier),
        "earlier+random": run(network, mixed(earlier, fresh)),
    }
    rows = network_rows(network, later)
    title = f"Starts, {title}, {args.more_steps} steps later"
    print_rows(title, "power iteration", rows, args.json, facts)


def measure_made(args: argparse.Namespace) -> None:
    """Prints the rows of matrices of known spectra; the peer is the random start."""
    kinds = [("one", 1.1), ("one", 1.5), ("one", 2), ("all", 1.5), ("all", 3)]
    for kind, ratio in [*kinds, ("negative", 1.5), ("cluster", 1.5), ("uncoupled", 1)]:
        products: dict[str, int] = {}
        missed: dict[str, int] = {}
        for seed in range(args.seeds):
            matrix = Made(kind, ratio, seed)
            found = dict(runs(matrix, 10 * seed))
            exact = run(matrix, random_starts(matrix, 10 * seed + 7), tolerance=1e-5, most=120)
            for name, r in found.items():
                missed[name] = missed.get(name, 0) + count_missed(r, exact.values)
            for name, r in found.items():
                products[name] = products.get(name, 0) + r.products
        of = Made.BLOCKS * args.seeds
        rows = [
            Row(name, total / args.seeds, None, "products", f"({missed[name]} of {of} wrong)")
            for name, total in products.items()
        ]
        title = f"Starts, made: {kind}, {ratio} times, {args.seeds} seeds"
        print_rows(title, "random", rows, args.json)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=[*hessian.MODELS, "made"], default="bert-base")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--layers", type=int, default=12, help="of bert-base")
    add("--seq", type=int, default=16, help="tokens of a row (16)")
    add("--batch", type=int, default=4, help="rows (4)")
    add("--train-steps", type=int, default=10)
    add("--learning-rate", type=float, default=5e-5)
    add("--more-steps", type=int, default=0, help="after which earlier vectors start (none)")
    add("--seeds", type=int, default=1)
    add("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    if args.device == "cuda":
        gpu.require()
    if args.model == "made":
        measure_made(args)
    else:
        measure_network(args)


if __name__ == "__main__":
    main()
