"""Which objective predicts what rounding a block of weights costs: the evidence for target bits.

Each block of a trained model is rounded alone, and what that does to the loss is compared, by rank
over all blocks, with what moq.target_bits could minimise:

  mean eigenvalue   1/2 trace / number of weights * squared error: the expectation to second order
                    for errors independent of the Hessian (moq's, and HAWQ-V2's but for 1/2)
  trace             trace * squared error: the same order where blocks are of one size
  squared error     no curvature at all
  trace alone       no rounding error at all

The change of the loss is taken in two ways: as it is, L(w + d) - L(w), and its part of second
order, (L(w + d) + L(w - d)) / 2 - L(w), in which the gradient's part, of either sign, cancels.
Traces and losses are of the same held-out text.

Then every objective chooses widths for all blocks under the same budgets, exactly, and the losses
of the whole model at these widths are compared: that is what an objective is for.

Weights are rounded per channel, symmetric. Blocks are single matrices, the attention and the
feed-forward half of each layer, or layers (of one size: the first two objectives agree). Models:

  decoder     a Llama of 4 layers of width 96 (matrices of 9,216 and 24,576 weights), trained on
              bytes of the State of the Union speeches up to 2000 with a rate that falls to zero
  minilm-l6   MiniLM-L6 fine-tuned on WordNet's glosses (147,456 and 589,824 weights)
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import gpu
import torch
from rank_correlation import rank_correlation
from report import machine
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from moq.budget import Budget
from moq.sensitivity import measure
from moq.target_bits import Candidates, Weight, choose

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

Batch = dict[str, Tensor]
Weights = dict[str, nn.Parameter]

#: Granularity -> name of the block of a weight.
BLOCKS: dict[str, Callable[[str, str], str]] = {
    "matrices": lambda layer, rest: f"{layer}.{rest}",
    "halves": lambda layer, rest: f"{layer}.{half_of(rest)}",
    "layers": lambda layer, rest: f"{layer}",
}
OBJECTIVES = ("mean eigenvalue", "trace", "squared error", "trace alone")
WIDTHS = (3, 4, 8)


class Subject(NamedTuple):
    """A trained model, its blocks of a granularity with their traces, and what its loss is of."""

    model: nn.Module
    blocks: dict[str, Weights]
    traces: dict[str, float]
    held_out: Sequence[Batch]
    granularity: str


def half_of(rest: str) -> str:
    """The half of a layer that a weight belongs to."""
    return "attention" if "attention" in rest or "attn" in rest else "feed-forward"


def minilm(args: argparse.Namespace) -> tuple[nn.Module, list[Batch]]:
    """The fine-tuned encoder and held-out batches."""
    from classify_text import BATCH_SIZE, make_batches, train
    from pretrained import load_encoder, wordnet_glosses

    data = wordnet_glosses()
    model, tokenizer = load_encoder(data.num_classes)
    shuffle = torch.Generator().manual_seed(args.seed)
    rows = torch.randperm(len(data.texts), generator=shuffle).tolist()
    held_out = make_batches(tokenizer, data, rows[: args.held_out])
    training = rows[args.held_out : args.held_out + args.steps * BATCH_SIZE]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    train(model, optimizer, make_batches(tokenizer, data, training), "FP32")
    return model, held_out


def decoder(args: argparse.Namespace) -> tuple[nn.Module, list[Batch]]:
    """A small decoder of bytes and held-out batches, of 32 rows of 64 bytes."""
    from pretrained import state_of_the_union

    texts = [torch.tensor(list(text.encode()), dtype=torch.int64) for text in state_of_the_union()]
    generator = torch.Generator().manual_seed(args.seed)

    def batch(text: Tensor) -> Batch:
        starts = torch.randint(len(text) - 64, (32,), generator=generator)
        rows = torch.stack([text[start : start + 64] for start in starts])
        return {"input_ids": rows, "labels": rows}

    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.steps, pct_start=0.05)
    for step in range(args.steps):
        loss = model(**batch(texts[0])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            gpu.progress(f"step {step + 1}: loss {loss.item():.3f}")
    return model, [batch(texts[1]) for _ in range(args.held_out // 32)]


MODELS = {"decoder": decoder, "minilm-l6": minilm}


def on(batches: Sequence[Batch], device: str) -> list[Batch]:
    """The batches on a device."""
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def quantized_weights(model: nn.Module, granularity: str) -> dict[str, Weights]:
    """{block: {name: weight}} of every matrix of the layers."""
    blocks: dict[str, Weights] = {}
    for name, module in model.named_modules():
        found = re.search(r"\.layers?\.(\d+)\.(.*)", name)
        if isinstance(module, nn.Linear) and found:
            block = BLOCKS[granularity](found[1], found[2])
            blocks.setdefault(block, {})[f"{name}.weight"] = module.weight
    return blocks


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean over all rows."""
    with torch.no_grad():
        losses = [len(b["labels"]) * float(model(**b).loss) for b in batches]
    return sum(losses) / sum(len(b["labels"]) for b in batches)


@contextmanager
def rounded(weights: Weights, bits: int, sign: int = 1) -> Iterator[None]:
    """Adds `sign` times the error of rounding to nearest, per channel, for the time of the body."""
    originals = {name: p.detach().clone() for name, p in weights.items()}
    with torch.no_grad():
        for p in weights.values():
            on_grid = torch.ops.moq.fake_quantize(p.float(), bits, granularity="per_channel")
            p.add_(sign * (on_grid.to(p.dtype) - p))
        try:
            yield
        finally:
            for name, p in weights.items():
                p.copy_(originals[name])


def squared_error(weights: Weights, bits: int) -> float:
    """As moq.target_bits counts it."""
    return sum(
        Weight(
            name=name,
            master=p.detach().float(),
            dtype=torch.float32,
            mode="symmetric",
            granularity="per_channel",
            group_size=0,
            transposed=False,
            scale="absmax",
            activations=None,
        ).squared_error(bits)
        for name, p in weights.items()
    )


def score(objective: str, trace: float, size: int, error: float) -> float:
    """What an objective says that rounding a block loses."""
    return {
        "mean eigenvalue": 0.5 * abs(trace) / size * error,
        "trace": abs(trace) * error,
        "squared error": error,
        "trace alone": abs(trace),
    }[objective]


def emit(args: argparse.Namespace, **row: object) -> None:
    """Prints one finding."""
    if args.json:
        facts = {"model": args.model, "seed": args.seed, "machine": machine()}
        print(json.dumps(row | facts), flush=True)
        return
    cells = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(", ".join(cells), flush=True)


def single_blocks(args: argparse.Namespace, subject: Subject) -> None:
    """Rounds each block alone."""
    model, blocks, traces, held_out, granularity = subject
    base = mean_loss(model, held_out)
    for bits in args.bits:
        increases, second_order = [], []
        for weights in blocks.values():
            losses = []
            for sign in (1, -1):
                with rounded(weights, bits, sign):
                    losses.append(mean_loss(model, held_out))
            increases.append(losses[0] - base)
            second_order.append(sum(losses) / 2 - base)
        scores: dict[str, list[float]] = {objective: [] for objective in OBJECTIVES}
        for name, weights in blocks.items():
            size, error = sum(p.numel() for p in weights.values()), squared_error(weights, bits)
            for objective in OBJECTIVES:
                scores[objective].append(score(objective, traces[name], size, error))
        factors = sorted(
            m / p for m, p in zip(second_order, scores["mean eigenvalue"], strict=True)
        )
        emit(
            args,
            case=f"{granularity}, {bits} bits, each alone",
            blocks=len(blocks),
            loss=base,
            sum_of_increases=sum(increases),
            sum_of_second_order=sum(second_order),
            sum_predicted=sum(scores["mean eigenvalue"]),
            second_order_over_predicted=[
                factors[round(q * (len(factors) - 1) / 4)] for q in range(5)
            ],
            **{
                f"rank correlation of {objective} with the {what}": rank_correlation(
                    scores[objective], measured
                )
                for what, measured in (("increase", increases), ("second order", second_order))
                for objective in OBJECTIVES
            },
        )


def whole_model(args: argparse.Namespace, subject: Subject) -> None:
    """Rounds all blocks at the widths that each objective chooses under a budget."""
    model, blocks, traces, held_out, granularity = subject
    base = mean_loss(model, held_out)
    errors = {
        name: tuple(squared_error(weights, bits) for bits in WIDTHS)
        for name, weights in blocks.items()
    }
    sizes = {name: sum(p.numel() for p in weights.values()) for name, weights in blocks.items()}
    for mean_bits in args.mean_bits:
        losses = {}
        for objective in OBJECTIVES[:3]:
            offered = [
                Candidates(
                    name,
                    # Candidates weighs an error with trace / number of weights.
                    {
                        "mean eigenvalue": traces[name],
                        "trace": traces[name] * sizes[name],
                        "squared error": float(sizes[name]),
                    }[objective],
                    sizes[name],
                    WIDTHS,
                    errors[name],
                    (0,) * len(WIDTHS),
                )
                for name in blocks
            ]
            chosen = choose(offered, Budget("mean_bits", Fraction(repr(mean_bits)))).target_bits
            with ExitStack() as stack:
                for name, bits in chosen.items():
                    stack.enter_context(rounded(blocks[name], bits))
                losses[objective] = mean_loss(model, held_out) - base
        emit(
            args,
            case=f"{granularity}, all blocks at mean {mean_bits:g} bits of {WIDTHS}",
            blocks=len(blocks),
            loss=base,
            **{f"increase by {objective}": value for objective, value in losses.items()},
        )


def main() -> None:
    """Trains or loads the model, and compares the objectives."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="decoder")
    add("--steps", type=int, default=1200, help="of the training in FP32 (1200)")
    add("--held-out", type=int, default=256, help="rows that traces and losses are of (256)")
    add("--products", type=int, default=64, help="for the traces, over all batches (64)")
    add("--bits", type=int, nargs="+", default=[4, 3])
    add("--mean-bits", type=float, nargs="*", default=[3.5, 4.0, 5.0])
    add("--granularities", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    add("--seed", type=int, default=0, help="of the shuffling and the training")
    add("--device", default="cpu")
    add("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, held_out = MODELS[args.model](args)
    model, held_out = model.to(args.device, torch.float64).eval(), on(held_out, args.device)
    started = time.perf_counter()
    matrices = {
        name: p for w in quantized_weights(model, "layers").values() for name, p in w.items()
    }
    found = measure(
        model,
        {name: [p] for name, p in matrices.items()},
        lambda batch: model(**batch).loss,
        held_out,
        form="exact",
        tolerance=1e-3,
        max_products=args.products,
        progress=False,
    )
    of_matrix = dict(zip(found.blocks, found.values, strict=True))
    errors = [e / abs(v) for e, v in zip(found.standard_error, found.values, strict=True)]
    emit(
        args,
        case="traces of matrices",
        blocks=len(matrices),
        products=found.products,
        seconds=time.perf_counter() - started,
        negative=sum(value < 0 for value in found.values),
        largest_relative_standard_error=max(errors),
    )
    for granularity in args.granularities:
        blocks = quantized_weights(model, granularity)
        traces = {block: sum(of_matrix[name] for name in w) for block, w in blocks.items()}
        subject = Subject(model, blocks, traces, held_out, granularity)
        single_blocks(args, subject)
        whole_model(args, subject)


if __name__ == "__main__":
    main()
