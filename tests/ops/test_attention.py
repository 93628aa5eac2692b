"""torch.ops.moq.attention, paged_attention, append_kv and qkv_linear against their definitions."""

import math

import pytest
import torch
from products import dequantized, random_codes, random_input
from torch.nn import functional as F

import moq  # noqa: F401  (registers the operators)

ops = torch.ops.moq
PAGE = 64  # tokens of a page


def exact_attention(query, keys, values, past, causal, scale=None, slopes=None):
    """[tokens, heads, dim] over [keys, kv heads, dim], in float64."""
    query, keys, values = (t.detach().cpu().double() for t in (query, keys, values))
    group = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)
    scale = 1 / math.sqrt(query.shape[2]) if scale is None else scale
    scores = scale * torch.einsum("thd,khd->htk", query, keys)
    distance = (
        torch.arange(keys.shape[0])[None] - torch.arange(past, past + query.shape[0])[:, None]
    )
    if slopes is not None:
        scores -= slopes.double()[:, None, None] * distance.abs()
    if causal:
        scores = scores.masked_fill(distance > 0, -torch.inf)
    return torch.einsum("htk,khd->thd", scores.softmax(-1), values)


def assert_close_to_naive(output, exact, dtype):
    """Twice the rounding of a computation in the same dtype; probabilities are rounded too."""
    unit = torch.finfo(dtype).eps
    bound = 2 * unit * exact.abs().max().item() + 1e-6
    assert (output.cpu().double() - exact).abs().max().item() <= bound


def packed_sequences(lengths, device):
    """Rows of `sequences` for sequences that follow each other."""
    begin, rows = 0, []
    for length in lengths:
        rows.append([begin, length, 0, 0])
        begin += length
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 4)


HEADS = [(1, 1, 8), (6, 2, 36), (25, 25, 64), (8, 1, 128), (28, 28, 152)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1,), (5, 1, 0, 130), (64, 63)], ids=str)
def test_packed_rows_are_attended_to(place, heads, causal, lengths):
    num_heads, num_kv_heads, dim = heads
    qkv = random_input(sum(lengths), (num_heads + 2 * num_kv_heads) * dim, place)
    output = ops.attention(
        qkv,
        packed_sequences(lengths, place[0]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_tokens=max(lengths),
        causal=causal,
    )
    assert output.dtype == qkv.dtype and output.shape == (sum(lengths), num_heads, dim)
    query, keys, values = (
        part.unflatten(1, (-1, dim))
        for part in qkv.split([n * dim for n in (num_heads, num_kv_heads, num_kv_heads)], dim=1)
    )
    for i, (begin, length, _, _) in enumerate(packed_sequences(lengths, "cpu").tolist()):
        rows = slice(begin, begin + length)
        exact = exact_attention(query[rows], keys[rows], values[rows], 0, causal)
        if lengths[i]:
            assert_close_to_naive(output[rows], exact, qkv.dtype)


def test_a_scale_and_slopes_change_the_scores(place):
    qkv = random_input(17, 3 * 4 * 16, place)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    output = ops.attention(
        qkv,
        packed_sequences([17], place[0]),
        num_heads=4,
        num_kv_heads=4,
        max_tokens=17,
        causal=True,
        scale=0.5,
        alibi_slopes=slopes.to(place[0]),
    )
    query, keys, values = (part.unflatten(1, (4, 16)) for part in qkv.chunk(3, dim=1))
    exact = exact_attention(query, keys, values, 0, True, 0.5, slopes)
    assert_close_to_naive(output, exact, qkv.dtype)


class Cache:
    """A cache in pages that lie anywhere, with random contents."""

    def __init__(self, pasts, news, num_kv_heads, dim, dtype, device, seed=5):
        generator = torch.Generator().manual_seed(seed)
        per_slot = max(-(-(p + n) // PAGE) for p, n in zip(pasts, news, strict=True))
        pages = per_slot * len(pasts) + 2
        shape = (pages, num_kv_heads, PAGE, dim)
        self.keys = torch.randn(shape, generator=generator).to(device, dtype)
        self.values = torch.randn(shape, generator=generator).to(device, dtype)
        places = torch.randperm(pages, generator=generator)[: per_slot * len(pasts)]
        self.table = places.view(len(pasts), per_slot).to(torch.int32).to(device)
        rows, begin = [], 0
        for slot, (past, new) in enumerate(zip(pasts, news, strict=True)):
            rows.append([begin, new, past, slot])
            begin += new
        self.sequences = torch.tensor(rows, dtype=torch.int32, device=device)
        positions = [range(p, p + n) for p, n in zip(pasts, news, strict=True)]
        table = self.table.tolist()
        self.rows = torch.tensor(
            [
                table[slot][i // PAGE] * PAGE + i % PAGE
                for slot, places in enumerate(positions)
                for i in places
            ],
            dtype=torch.int32,
            device=device,
        )
        self.positions = torch.tensor(
            [i for places in positions for i in places], dtype=torch.int32, device=device
        )

    def read(self, pages, slot, length):
        """[length, num_kv_heads, dim] of a slot."""
        tokens = pages[self.table[slot].long()].transpose(1, 2).flatten(0, 1)
        return tokens[:length]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    ("pasts", "news"),
    [([0], [1]), ([63, 64, 700], [1, 1, 1]), ([0, 130], [70, 3]), ([1000], [1])],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ready", [False, True], ids=["waits", "past_is_ready"])
def test_pages_are_attended_to(gpu, ready, dtype, heads, pasts, news):
    num_heads, num_kv_heads, dim = heads
    cache = Cache(pasts, news, num_kv_heads, dim, dtype, gpu)
    query = random_input(sum(news), num_heads * dim, (gpu, dtype)).unflatten(1, (num_heads, dim))
    if ready:
        torch.cuda.synchronize()
    output = ops.paged_attention(
        query,
        cache.keys,
        cache.values,
        cache.table,
        cache.sequences,
        max_tokens=max(news),
        past_is_ready=ready,
    )
    for begin, new, past, slot in cache.sequences.tolist():
        keys, values = (cache.read(p, slot, past + new) for p in (cache.keys, cache.values))
        exact = exact_attention(query[begin : begin + new], keys, values, past, True)
        assert_close_to_naive(output[begin : begin + new], exact, dtype)


def rotation_tables(positions, rotary_dim, device):
    """Cosines and sines [positions, rotary_dim / 2]."""
    frequency = 1e4 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos().to(device), angle.sin().to(device)


def rotated(heads, positions, cos, sin):
    """[tokens, heads, dim] in float64, by the half-split form."""
    half = cos.shape[1]
    c, s = (t.cpu().double()[positions.cpu().long()][:, None] for t in (cos, sin))
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat([first * c - second * s, second * c + first * s, rest], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rotary_dim", [0, 16, 32])
@pytest.mark.parametrize("head_norm", [False, True])
def test_append_kv_normalises_rotates_and_appends(gpu, dtype, rotary_dim, head_norm):
    num_heads, num_kv_heads, dim = 6, 2, 32
    cache = Cache([5, 63], [3, 2], num_kv_heads, dim, dtype, gpu)
    qkv = random_input(5, (num_heads + 2 * num_kv_heads) * dim, (gpu, dtype))
    before = qkv.cpu().double().unflatten(1, (-1, dim))
    query, keys, values = before.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    weights = [1 + 0.1 * torch.randn(dim).to(gpu) for _ in range(2)] if head_norm else [None] * 2
    if head_norm:
        query, keys = (
            F.rms_norm(heads, (dim,), weight.cpu().double(), 1e-6)
            for heads, weight in zip((query, keys), weights, strict=True)
        )
    options = {}
    if rotary_dim:
        cos, sin = rotation_tables(128, rotary_dim, gpu)
        options = {"positions": cache.positions, "cos": cos, "sin": sin}
        query, keys = (rotated(heads, cache.positions, cos, sin) for heads in (query, keys))
    untouched = cache.keys.clone()
    ops.append_kv(
        qkv,
        cache.keys,
        cache.values,
        cache.rows,
        num_heads=num_heads,
        query_norm=weights[0],
        key_norm=weights[1],
        epsilon=1e-6,
        **options,
    )
    unit = torch.finfo(dtype).eps
    close = {"rtol": 2 * unit, "atol": 4 * unit}
    after = qkv.cpu().double().unflatten(1, (-1, dim))
    torch.testing.assert_close(after[:, :num_heads], query, **close)
    rows = cache.rows.long()
    stored = cache.keys[rows // PAGE, :, rows % PAGE].cpu().double()
    torch.testing.assert_close(stored, keys, **close)
    stored = cache.values[rows // PAGE, :, rows % PAGE].cpu().double()
    torch.testing.assert_close(stored, values, rtol=0, atol=0)
    untouched[rows // PAGE, :, rows % PAGE] = cache.keys[rows // PAGE, :, rows % PAGE]
    assert torch.equal(untouched, cache.keys)


def test_int8_pages_hold_codes_of_each_head(gpu):
    cache = Cache([5], [4], 2, 32, torch.int8, gpu)
    qkv = random_input(4, 10 * 32, (gpu, torch.float16))
    scales = [torch.zeros(cache.keys.shape[:3], device=gpu) for _ in range(2)]
    ops.append_kv(
        qkv,
        cache.keys,
        cache.values,
        cache.rows,
        num_heads=6,
        key_scales=scales[0],
        value_scales=scales[1],
    )
    rows = cache.rows.long()
    keys = qkv.unflatten(1, (-1, 32))[:, 6:8].float()
    stored = cache.keys[rows // PAGE, :, rows % PAGE].float()
    scale = scales[0][rows // PAGE, :, rows % PAGE]
    torch.testing.assert_close(scale, keys.abs().amax(-1) / 127, rtol=1e-6, atol=0)
    assert ((stored * scale[..., None] - keys).abs() <= 0.501 * scale[..., None]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 3, 12])
@pytest.mark.parametrize("rotary_dim", [0, 16])
@pytest.mark.parametrize("norm", [None, "layer_norm", "rms_norm"])
def test_qkv_linear_is_the_chain_of_its_parts(gpu, dtype, m, rotary_dim, norm):
    num_heads, num_kv_heads, dim, k = 6, 2, 32, 96
    heads = num_heads + 2 * num_kv_heads
    codes, scales, _ = random_codes(heads * dim, k, 1, 8)
    x = random_input(m, k, (gpu, dtype))
    bias = torch.linspace(-1, 1, heads * dim).to(x)
    cache = Cache([60], [m], num_kv_heads, dim, dtype, gpu)
    options, rows = {}, x.cpu().double()
    if norm is not None:
        weight = 1 + 0.1 * torch.randn(k, device=gpu)
        options |= {"norm": norm, "norm_weight": weight}
        apply = F.layer_norm if norm == "layer_norm" else F.rms_norm
        rows = apply(rows, (k,), weight.cpu().double(), eps=1e-5)
    product = (rows @ dequantized(codes, scales).T + bias.cpu().double()).unflatten(1, (heads, dim))
    query, keys, values = product.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if rotary_dim:
        # What is rotated together must lie together: dimensions i and i + rotary_dim / 2.
        half = rotary_dim // 2
        order = [i // 2 + half * (i % 2) for i in range(rotary_dim)] + list(range(rotary_dim, dim))
        per_head = torch.arange((num_heads + num_kv_heads) * dim).view(-1, dim)[:, order]
        places = torch.cat([per_head.flatten(), torch.arange(per_head.numel(), heads * dim)])
        codes, scales, bias = codes[places], scales[places], bias[places.to(gpu)]
        cos, sin = rotation_tables(128, rotary_dim, gpu)
        options |= {"positions": cache.positions, "cos": cos, "sin": sin}
        query, keys = (rotated(heads, cache.positions, cos, sin) for heads in (query, keys))
    output = ops.qkv_linear(
        x,
        ops.pack_linear(codes.to(gpu), scales.to(gpu)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        bias=bias,
        key_pages=cache.keys,
        value_pages=cache.values,
        cache_rows=cache.rows,
        **options,
    )
    assert output.shape == (m, num_heads * dim)
    unit = torch.finfo(dtype).eps
    close = {"rtol": 2 * unit, "atol": 4 * unit * product.abs().max().item()}
    torch.testing.assert_close(output.cpu().double(), query.flatten(1), **close)
    rows = cache.rows.long()
    for pages, expected in ((cache.keys, keys), (cache.values, values)):
        stored = pages[rows // PAGE, :, rows % PAGE].cpu().double()
        torch.testing.assert_close(stored, expected, **close)


def test_qkv_linear_without_a_cache_returns_all_three(gpu):
    codes, scales, _ = random_codes(10 * 32, 64, 1, 8)
    x = random_input(3, 64, (gpu, torch.float16))
    packed = ops.pack_linear(codes.to(gpu), scales.to(gpu))
    output = ops.qkv_linear(x, packed, num_heads=6, num_kv_heads=2, head_dim=32)
    expected = x.cpu().double() @ dequantized(codes, scales).T
    torch.testing.assert_close(output.cpu().double(), expected, rtol=1e-3, atol=1e-3)


# Arguments of append_kv that are refused: a change of the right ones, and what is said.
APPEND_KV_REFUSALS = {
    "qkv dtype": (
        {"qkv": lambda t: t.double()},
        TypeError,
        "append_kv: qkv must be float32, float16 or bfloat16, got float64",
    ),
    "qkv strides": (
        {"qkv": lambda t: t.t().contiguous().t()},
        ValueError,
        r"append_kv: qkv must be contiguous, got strides \[1, 3\]",
    ),
    "heads": (
        {"num_heads": lambda n: 5},
        ValueError,
        r"append_kv: qkv must have the columns of 9 heads",
    ),
    "rows dtype": (
        {"cache_rows": lambda t: t.long()},
        TypeError,
        "append_kv: cache_rows must be int32, got int64",
    ),
    "rows shape": (
        {"cache_rows": lambda t: t[:2]},
        ValueError,
        r"append_kv: cache_rows must be \[3\], got \[2\]",
    ),
    "rows device": (
        {"cache_rows": lambda t: torch.zeros(3, dtype=torch.int32)},
        ValueError,
        "append_kv: cache_rows must be on .*, got cpu",
    ),
    "pages dtype": (
        {"key_pages": lambda t: t.float()},
        TypeError,
        "append_kv: key_pages must be int8 or as the activations float16, got float32",
    ),
    "pages shape": (
        {"value_pages": lambda t: t[:, :, :32].contiguous()},
        ValueError,
        r"append_kv: value_pages must be \[.*\], got",
    ),
    "norm": (
        {"query_norm": lambda t: t[:16]},
        ValueError,
        r"append_kv: query_norm must be \[32\], got \[16\]",
    ),
    "key norm": (
        {"key_norm": lambda t: t.half()},
        TypeError,
        "append_kv: key_norm must be float32, got float16",
    ),
    "positions": (
        {"positions": lambda t: t.long()},
        TypeError,
        "append_kv: positions must be int32, got int64",
    ),
    "cos": (
        {"cos": lambda t: torch.cat([t, t], 1)},
        ValueError,
        r"append_kv: cos must be \[positions, rotary_dim / 2\] with .* <= 32, got \[9, 32\]",
    ),
    "sin": (
        {"sin": lambda t: t[:5]},
        ValueError,
        r"append_kv: sin must be \[9, 16\], got \[5, 16\]",
    ),
    "some of a rotation": (
        {"sin": lambda t: None},
        ValueError,
        "append_kv: positions, cos and sin must come together",
    ),
}


class TestRefusals:
    def test_attention(self, place):
        qkv, sequences = random_input(4, 3 * 32, place), packed_sequences([4], place[0])
        options = {"num_heads": 2, "num_kv_heads": 2, "max_tokens": 4}
        with pytest.raises(TypeError, match="attention: qkv must be float32.*, got"):
            ops.attention(qkv.double(), sequences, **options)
        with pytest.raises(ValueError, match="attention: qkv must have the columns of 7 heads"):
            ops.attention(qkv, sequences, **options | {"num_heads": 3})
        with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads"):
            ops.attention(qkv, sequences, **options | {"num_heads": 4, "num_kv_heads": 10})
        with pytest.raises(TypeError, match="sequences must be int32, got int64"):
            ops.attention(qkv, sequences.long(), **options)
        with pytest.raises(ValueError, match="sequences must be \\[1, 4\\], got \\[1, 3\\]"):
            ops.attention(qkv, sequences[:, :3].contiguous(), **options)
        with pytest.raises(ValueError, match="max_tokens must be >= 0, got -1"):
            ops.attention(qkv, sequences, **options | {"max_tokens": -1})
        with pytest.raises(ValueError, match="alibi_slopes must be \\[2\\], got \\[3\\]"):
            ops.attention(qkv, sequences, **options, alibi_slopes=torch.ones(3).to(place[0]))

    def test_sequences_are_looked_at_on_the_cpu(self):
        qkv = random_input(4, 3 * 32)
        for row in ([1, 4, 0, 0], [-1, 2, 0, 0], [0, 2, 3, 0]):
            with pytest.raises(ValueError, match="a sequence must have at most 4 of the 4 tokens"):
                ops.attention(
                    qkv,
                    torch.tensor([row], dtype=torch.int32),
                    num_heads=1,
                    num_kv_heads=1,
                    max_tokens=4,
                )

    def test_pages_need_a_gpu(self):
        query, pages = torch.zeros(1, 2, 8), torch.zeros(1, 2, PAGE, 8)
        table = torch.zeros(1, 1, dtype=torch.int32)
        with pytest.raises(NotImplementedError, match="paged_attention: .* on a CUDA device, got"):
            ops.paged_attention(
                query, pages, pages, table, packed_sequences([1], "cpu"), max_tokens=1
            )
        with pytest.raises(NotImplementedError, match="append_kv: .* on a CUDA device, got cpu"):
            ops.append_kv(torch.zeros(1, 48), pages, pages.clone(), table[0], num_heads=2)
        with pytest.raises(NotImplementedError, match="qkv_linear: .* on a CUDA device, got cpu"):
            packed = torch.zeros(1, dtype=torch.uint8)
            ops.qkv_linear(torch.zeros(1, 8), packed, num_heads=1, num_kv_heads=1, head_dim=8)

    def test_pages_must_fit(self, gpu):
        cache = Cache([3], [1], 2, 32, torch.float16, gpu)
        query = random_input(1, 4 * 32, (gpu, torch.float16)).view(1, 4, 32)

        def attend(**changes):
            arguments = {
                "query": query,
                "key_pages": cache.keys,
                "value_pages": cache.values,
                "page_table": cache.table,
                "sequences": cache.sequences,
            }
            ops.paged_attention(**arguments | changes, max_tokens=1)

        with pytest.raises(ValueError, match="query must be \\[num_tokens, num_heads, head_dim\\]"):
            attend(query=query.flatten(1))
        with pytest.raises(ValueError, match="value_pages must be \\[.*\\], got"):
            attend(value_pages=cache.values[:1])
        with pytest.raises(TypeError, match="key_pages must be int8 or as the activations float16"):
            attend(key_pages=cache.keys.float())
        with pytest.raises(ValueError, match="key_scales and value_scales must come with int8"):
            attend(key_pages=cache.keys.to(torch.int8), value_pages=cache.values.to(torch.int8))
        with pytest.raises(TypeError, match="page_table must be int32, got int64"):
            attend(page_table=cache.table.long())
        with pytest.raises(ValueError, match="page_table must be on cuda:0 .*, got cpu"):
            attend(page_table=cache.table.cpu())

    @pytest.mark.parametrize("where", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("case", APPEND_KV_REFUSALS)
    def test_append_kv(self, case, where, request):
        if where == "cuda":
            request.getfixturevalue("gpu")
        half, single = ({"device": where, "dtype": t} for t in (torch.float16, torch.float32))
        right = {
            "qkv": torch.zeros(3, 8 * 32, **half),
            "key_pages": torch.zeros(1, 2, PAGE, 32, **half),
            "value_pages": torch.zeros(1, 2, PAGE, 32, **half),
            "cache_rows": torch.zeros(3, device=where, dtype=torch.int32),
            "num_heads": 4,
            "query_norm": torch.ones(32, **single),
            "key_norm": torch.ones(32, **single),
            "positions": torch.zeros(3, device=where, dtype=torch.int32),
            "cos": torch.ones(9, 16, **single),
            "sin": torch.zeros(9, 16, **single),
        }
        ops.append_kv(**right)
        changes, error, message = APPEND_KV_REFUSALS[case]
        wrong = {name: change(right[name]) for name, change in changes.items()}
        with pytest.raises(error, match=message):
            ops.append_kv(**right | wrong)

    def test_qkv_linear(self, gpu):
        codes, scales, _ = random_codes(10 * 32, 64, 1, 8)
        packed = ops.pack_linear(codes.to(gpu), scales.to(gpu))
        x = random_input(3, 64, (gpu, torch.float16))
        options = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 32}
        with pytest.raises(ValueError, match="head_dim must be positive and even, got 31"):
            ops.qkv_linear(x, packed, **options | {"head_dim": 31})
        with pytest.raises(ValueError, match="norm and norm_weight must come together"):
            ops.qkv_linear(x, packed, **options, norm="rms_norm")
        with pytest.raises(ValueError, match="positions, cos and sin must come together"):
            ops.qkv_linear(x, packed, **options, cos=torch.zeros(4, 16, device=gpu))
        pages = torch.zeros(1, 2, PAGE, 32, dtype=torch.float16, device=gpu)
        with pytest.raises(ValueError, match="key_pages and value_pages must come together"):
            ops.qkv_linear(x, packed, **options, key_pages=pages)
        options |= {"key_pages": pages, "value_pages": pages.clone()}
        with pytest.raises(ValueError, match="cache_rows must come with key_pages"):
            ops.qkv_linear(x, packed, **options)
        rows = torch.zeros(3, dtype=torch.int32, device=gpu)
        with pytest.raises(TypeError, match="qkv_linear: cache_rows must be int32, got int64"):
            ops.qkv_linear(x, packed, **options, cache_rows=rows.long())
        with pytest.raises(ValueError, match=r"cache_rows must be \[3\], got \[1\]"):
            ops.qkv_linear(x, packed, **options, cache_rows=rows[:1])
        with pytest.raises(ValueError, match="cache_rows must be on cuda:0 .*, got cpu"):
            ops.qkv_linear(x, packed, **options, cache_rows=rows.cpu())
        options["cache_rows"] = rows
        rotation = {"cos": torch.ones(4, 16, device=gpu), "sin": torch.zeros(4, 16, device=gpu)}
        with pytest.raises(TypeError, match="qkv_linear: positions must be int32, got int64"):
            ops.qkv_linear(x, packed, **options, **rotation, positions=rows.long())
        rotation["sin"] = rotation["sin"].half()
        with pytest.raises(TypeError, match="qkv_linear: sin must be float32, got float16"):
            ops.qkv_linear(x, packed, **options, **rotation, positions=rows)
