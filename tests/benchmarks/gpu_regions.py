"""The four fused regions of a transformer layer on a GPU against unfused kernels.

  1   input norm + QKV projection + bias + append to the KV cache
  2   attention: one token a row over a cache of --context tokens ("decode"), and 128 tokens of each
      row over themselves ("prompt"), without a transposed copy of q, k or v
  3   norm + up projection + bias + GELU
  4a  attention output projection + bias + residual
  4b  down projection + bias + residual

The peer is what PyTorch runs without fusion: one kernel for the norm, cuBLAS FP16, and one
elementwise kernel for each of bias, activation, residual, scale and mask; for region 2 copies that
transpose, batched cuBLAS products and a softmax. With INT8 weights the peer reads FP16 ones all the
same. Both sides compute the same numbers (the error is how far moq is from the peer, relative to
the largest number), inside one CUDA graph whose calls rotate through copies that exceed
sixteen times the L2 cache. Notes:

  weights   moq's time over what reading the weights (or keys and values) takes at the read
            bandwidth of the same run
  bound     the largest ratio that reading them once allows: the peer's time over that of a kernel
            that reads as many bytes and does nothing else, launched and timed the same way (the
            better of plain loads and bulk copies); and moq's time over the latter
  eager     the ratio to the peer launched kernel by kernel, without a graph
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gpu
import torch
from report import Row, Target, print_rows
from torch import Tensor
from torch.nn import functional as F

REGIONS = ("1", "2", "3", "4a", "4b")
# The factors that the source article reports, and the most of the time that reading weights takes,
# of one row and FP16 weights.
LEAST_RATIO = {"1": 1.5, "2": 2.9, "3": 3.0, "4a": 1.2, "4b": 1.2}
MOST_OVER_READING = 1.25
HEADS = {1024: 16, 1600: 25, 4256: 28, 12288: 96}  # of a hidden size
FORMATS = {"fp16": "float16", "int8": "int8"}
PAGE = 64  # tokens of a page of moq's cache
PROMPT = 128  # tokens of a row in region 2's second form
EPSILON = 1e-5

ops_module = torch.ops.moq


@dataclass
class Region:
    """A region's two sides on copy i, and the bytes that must be read."""

    moq: gpu.Call
    peer: gpu.Call
    copies: int
    num_bytes: int
    result: Callable[[], tuple[Tensor, Tensor]]  # what both sides compute, on copy 0


class Layer:
    """Sizes of a layer, and random numbers for a batch of one token a row."""

    def __init__(self, hidden: int, batch: int, context: int) -> None:
        """Draws the activations."""
        self.hidden, self.batch, self.context = hidden, batch, context
        self.heads = HEADS[hidden]
        self.head_dim = hidden // self.heads
        self.x = self.random(batch, hidden)
        self.norm = 1 + 0.1 * self.random(hidden).float()
        self.norm_bias = 0.1 * self.random(hidden).float()

    def random(self, *shape: int) -> Tensor:
        """FP16 numbers of unit variance."""
        generator = torch.Generator(device="cuda").manual_seed(math.prod(shape))
        return torch.randn(*shape, device="cuda", generator=generator).half()

    def weights(self, n: int, k: int, format: str) -> tuple[list[Tensor], list[Tensor], int]:
        """Copies of a weight for moq and for the peer, and moq's bytes of one."""
        half = gpu.random_weight(n, k, 0)
        packed = gpu.pack(half, format)
        num_bytes = n * k * (1 if format == "int8" else 2)
        copies = gpu.copies_of(num_bytes)
        return (
            [packed, *(packed.clone() for _ in range(copies - 1))],
            [half, *(half.clone() for _ in range(copies - 1))],
            num_bytes,
        )

    def normalised(self) -> Tensor:
        """The peer's norm: one kernel."""
        return F.layer_norm(self.x, (self.hidden,), self.half_norm, self.half_bias, EPSILON)

    @property
    def half_norm(self) -> Tensor:
        """The norm's weight as PyTorch wants it beside FP16 activations."""
        return self.__dict__.setdefault("_half_norm", self.norm.half())

    @property
    def half_bias(self) -> Tensor:
        """Its bias."""
        return self.__dict__.setdefault("_half_bias", self.norm_bias.half())


def cache_slots(layer: Layer) -> tuple[Tensor, Tensor]:
    """Page table [batch, pages] and the cache row of the token at position context - 1."""
    pages = -(-layer.context // PAGE)
    table = torch.arange(layer.batch * pages, dtype=torch.int32, device="cuda").view(-1, pages)
    last = layer.context - 1
    return table, (table[:, last // PAGE] * PAGE + last % PAGE).contiguous()


def region_1(layer: Layer, format: str) -> Region:
    """Norm, QKV, bias, append."""
    hidden, heads, head_dim = layer.hidden, layer.heads, layer.head_dim
    packed, half, num_bytes = layer.weights(3 * hidden, hidden, format)
    bias = layer.random(3 * hidden)
    table, rows = cache_slots(layer)
    shape = (table.numel(), heads, PAGE, head_dim)
    pages = [torch.zeros(shape, dtype=torch.float16, device="cuda") for _ in range(2)]
    shape = (layer.batch, heads, layer.context, head_dim)
    caches = [torch.zeros(shape, dtype=torch.float16, device="cuda") for _ in range(2)]
    output = torch.zeros(layer.batch, heads, head_dim, dtype=torch.float16, device="cuda")

    def moq(i: int) -> Tensor:
        return ops_module.qkv_linear(
            layer.x,
            packed[i],
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            format=format,
            bias=bias,
            norm="layer_norm",
            norm_weight=layer.norm,
            norm_bias=layer.norm_bias,
            epsilon=EPSILON,
            key_pages=pages[0],
            value_pages=pages[1],
            cache_rows=rows,
            weight_is_ready=True,
        )

    def peer(i: int) -> Tensor:
        qkv = torch.mm(layer.normalised(), half[i].t()).add_(bias)
        query, key, value = qkv.view(layer.batch, 3, heads, head_dim).unbind(1)
        caches[0][:, :, layer.context - 1].copy_(key)
        caches[1][:, :, layer.context - 1].copy_(value)
        return output.copy_(query)

    def result() -> tuple[Tensor, Tensor]:
        query = moq(0).flatten()
        stored = [p.transpose(1, 2).flatten(0, 1)[rows.long()].flatten() for p in pages]
        expected = peer(0).flatten()
        kept = [c[:, :, layer.context - 1].flatten() for c in caches]
        return torch.cat([query, *stored]), torch.cat([expected, *kept])

    return Region(moq, peer, len(packed), num_bytes, result)


def region_2_decode(layer: Layer) -> Region:
    """One token a row over a cache."""
    batch, heads, head_dim, context = layer.batch, layer.heads, layer.head_dim, layer.context
    num_bytes = 2 * 2 * batch * heads * context * head_dim
    copies = gpu.copies_of(num_bytes)
    table, _ = cache_slots(layer)
    length = table.shape[1] * PAGE
    caches = [layer.random(2, batch, heads, length, head_dim)]
    caches += [caches[0].clone() for _ in range(copies - 1)]
    # A page holds 64 tokens of all heads, a row of the peer's cache all tokens of a head.
    pages = [
        c.unflatten(3, (-1, PAGE)).transpose(2, 3).flatten(1, 2).contiguous() for c in caches[:1]
    ]
    pages += [pages[0].clone() for _ in range(copies - 1)]
    query = layer.random(batch, heads, head_dim)
    sequences = torch.tensor(
        [[row, 1, context - 1, row] for row in range(batch)], dtype=torch.int32, device="cuda"
    )
    mask = torch.zeros(length, dtype=torch.float16, device="cuda")
    mask[context:] = -torch.inf
    scale = head_dim**-0.5

    def moq(i: int) -> Tensor:
        keys, values = pages[i]
        return ops_module.paged_attention(
            query, keys, values, table, sequences, max_tokens=1, past_is_ready=True
        )

    def peer(i: int) -> Tensor:
        keys, values = caches[i]
        rows = query.unsqueeze(2).contiguous()  # [batch, heads, 1, head_dim]
        scores = torch.matmul(rows, keys.transpose(2, 3)).mul_(scale).add_(mask)
        return torch.matmul(scores.softmax(-1), values).transpose(1, 2).contiguous()

    return Region(moq, peer, copies, num_bytes, lambda: (moq(0).flatten(), peer(0).flatten()))


def region_2_prompt(layer: Layer) -> Region:
    """All tokens of a row over each other; the rows of q, k and v are packed."""
    batch, heads, head_dim = layer.batch, layer.heads, layer.head_dim
    num_bytes = 3 * 2 * batch * PROMPT * layer.hidden
    copies = gpu.copies_of(num_bytes)
    qkv = [layer.random(batch * PROMPT, 3 * layer.hidden)]
    qkv += [qkv[0].clone() for _ in range(copies - 1)]
    sequences = torch.tensor(
        [[row * PROMPT, PROMPT, 0, 0] for row in range(batch)], dtype=torch.int32, device="cuda"
    )
    scale = head_dim**-0.5

    def moq(i: int) -> Tensor:
        return ops_module.attention(
            qkv[i], sequences, num_heads=heads, num_kv_heads=heads, max_tokens=PROMPT
        )

    def peer(i: int) -> Tensor:
        query, key, value = qkv[i].view(batch, PROMPT, 3, heads, head_dim).unbind(2)
        query = query.transpose(1, 2).contiguous()
        key = key.permute(0, 2, 3, 1).contiguous()
        value = value.transpose(1, 2).contiguous()
        scores = torch.matmul(query, key).mul_(scale)
        return torch.matmul(scores.softmax(-1), value).transpose(1, 2).contiguous()

    return Region(moq, peer, copies, num_bytes, lambda: (moq(0).flatten(), peer(0).flatten()))


def region_3(layer: Layer, format: str) -> Region:
    """Norm, up projection, bias, GELU."""
    n = 4 * layer.hidden
    packed, half, num_bytes = layer.weights(n, layer.hidden, format)
    bias = layer.random(n)

    def moq(i: int) -> Tensor:
        return ops_module.norm_linear(
            layer.x,
            layer.norm,
            layer.norm_bias,
            packed[i],
            n,
            epsilon=EPSILON,
            format=format,
            bias=bias,
            activation="gelu_tanh",
            weight_is_ready=True,
        )

    def peer(i: int) -> Tensor:
        return F.gelu(torch.mm(layer.normalised(), half[i].t()).add_(bias), approximate="tanh")

    return Region(moq, peer, len(packed), num_bytes, lambda: (moq(0), peer(0)))


def region_4(layer: Layer, format: str, widening: int) -> Region:
    """A projection back to the hidden size, bias, residual."""
    n, k = layer.hidden, widening * layer.hidden
    packed, half, num_bytes = layer.weights(n, k, format)
    bias, rows, residual = layer.random(n), layer.random(layer.batch, k), layer.x

    def moq(i: int) -> Tensor:
        return ops_module.linear(
            rows, packed[i], n, format=format, bias=bias, residual=residual, weight_is_ready=True
        )

    def peer(i: int) -> Tensor:
        return torch.mm(rows, half[i].t()).add_(bias).add_(residual)

    return Region(moq, peer, len(packed), num_bytes, lambda: (moq(0), peer(0)))


def regions_of(layer: Layer, name: str, format: str) -> dict[str, Region]:
    """What a region is measured as."""
    if name == "1":
        return {"": region_1(layer, format)}
    if name == "2":
        decode, prompt = region_2_decode(layer), region_2_prompt(layer)
        return {f" decode, context {layer.context}": decode, f" prompt of {PROMPT}": prompt}
    if name == "3":
        return {"": region_3(layer, format)}
    return {"": region_4(layer, format, 1 if name == "4a" else 4)}


def eager_seconds(call: gpu.Call, copies: int) -> float:
    """Wall-clock seconds of one call, launched kernel by kernel."""
    for i in range(min(copies, 8)):
        call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(copies):
        call(i)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / copies


def measure(layer: Layer, name: str, weights: str, read_rate: float, turns: int) -> list[Row]:
    """Rows of one region at one hidden size and batch."""
    rows = []
    for label, region in regions_of(layer, name, FORMATS[weights]).items():
        torch.cuda.synchronize()  # weights are ready, as the calls promise
        error = gpu.relative_error(*region.result())
        if not error < 0.1:
            raise AssertionError(f"region {name}: moq and the peer must agree, got {error:.2e}")
        calls = {"moq": region.moq, "peer": region.peer, **gpu.readings(region.num_bytes)}
        seconds = gpu.median_of_calls(calls, region.copies, turns)
        reading = min(seconds["loads"], seconds["copies"])
        eager = eager_seconds(region.peer, region.copies)
        bound = seconds["peer"] / reading
        over_reading = seconds["moq"] * read_rate / region.num_bytes
        note = (
            f"(weights {over_reading:.2f}x, "
            f"bound {bound:.2f}x at {seconds['moq'] / reading:.2f}x, "
            f"eager {eager / seconds['moq']:.1f}x, error {error:.0e})"
        )
        stored = "" if name == "2" else f", {weights} weights"
        case = f"region {name}{label}, hidden {layer.hidden}, batch {layer.batch}{stored}"
        wanted = []
        if layer.batch == 1 and weights == "fp16":
            if layer.hidden > 1600:
                if name != "2":  # which reads no weights
                    most = Target("over reading", over_reading, MOST_OVER_READING, at_most=True)
                    wanted.append(most)
            elif bound > LEAST_RATIO[name]:  # reading the weights leaves time enough
                ratio = seconds["peer"] / seconds["moq"]
                wanted.append(Target("ratio", ratio, LEAST_RATIO[name], at_most=False))
        times = (1e6 * seconds["moq"], 1e6 * seconds["peer"])
        rows.append(Row(case, *times, "us", note, gpu.targets(*wanted)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regions", nargs="+", choices=REGIONS, default=REGIONS)
    parser.add_argument("--hidden", nargs="+", type=int, choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="rows (1 8)")
    parser.add_argument("--weights", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache (512)")
    gpu.arguments(parser)
    args = parser.parse_args(arguments)
    gpu.require()
    facts = gpu.facts() | {"activations": "FP16, exact weight-only"}
    bandwidth = gpu.read_bandwidth()
    facts["read_bandwidth"] = f"read bandwidth {bandwidth / 1e12:.2f} TB/s"
    for name in args.regions:
        rows = []
        for hidden in args.hidden:
            for batch in args.batch:
                layer = Layer(hidden, batch, args.context)
                for weights in ["fp16"] if name == "2" else args.weights:
                    rows += measure(layer, name, weights, bandwidth, args.turns)
                    torch.cuda.empty_cache()
        print_rows(f"region {name}", "unfused", rows, args.json, facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
