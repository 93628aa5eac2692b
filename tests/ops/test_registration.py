"""Every operator passes torch's own checks of its registration, on each device that has it."""

import pytest
import torch
from test_fake_quantize import random_weight
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

import moq  # noqa: F401  (registers the operators)

ops = torch.ops.moq


def codes_and_scales():
    return ops.quantize(random_weight(6, 32), 8, granularity="per_group", group_size=16)


SAMPLES = {
    "fake_quantize": lambda: (
        ops.fake_quantize,
        (random_weight(6, 32).requires_grad_(), 8),
        dict(granularity="per_group", group_size=16),
    ),
    "fake_quantize_without_grad": lambda: (
        ops.fake_quantize,
        (random_weight(6, 32), 4),
        dict(mode="asymmetric", rounding="stochastic", blend_ratio=0.5),
    ),
    "fake_quantize_transposed": lambda: (
        ops.fake_quantize,
        (random_weight(6, 32, transposed=True).requires_grad_(), 8),
        dict(transposed=True),
    ),
    "simulate": lambda: (
        ops.simulate,
        (random_weight(6, 32).requires_grad_(), torch.tensor([4], dtype=torch.int32)),
        dict(blend_ratio=torch.tensor([0.5]), step=torch.tensor([3]), rounding="stochastic"),
    ),
    "simulate_learned": lambda: (
        ops.simulate,
        (random_weight(6, 32, transposed=True).requires_grad_(), torch.tensor([3]).int()),
        dict(absmax=torch.full((6,), 0.03, requires_grad=True), transposed=True),
    ),
    "simulate_gradient": lambda: (
        ops.simulate_gradient,
        (
            torch.randn(6, 32, requires_grad=True),
            random_weight(6, 32),
            torch.tensor([3]).int(),
            torch.full((12,), 0.03),
        ),
        dict(granularity="per_group", group_size=16, blend_ratio=torch.tensor([0.5])),
    ),
    "simulate_tangent": lambda: (
        ops.simulate_tangent,
        (
            torch.randn(32, 6, requires_grad=True),
            torch.randn(6, requires_grad=True),
            random_weight(6, 32, transposed=True),
            torch.tensor([3]).int(),
            torch.full((6,), 0.03),
        ),
        dict(transposed=True),
    ),
    "foreach_fake_quantize": lambda: (
        ops.foreach_fake_quantize,
        ([random_weight(6, 32), random_weight(3, 8)], torch.tensor([8, 0], dtype=torch.int32)),
        dict(step=torch.tensor([3]), out=[torch.zeros(6, 32), torch.zeros(3, 8)]),
    ),
    "foreach_fake_quantize_of_parameters": lambda: (
        ops.foreach_fake_quantize,
        ([random_weight(6, 32).requires_grad_()], torch.tensor([8], dtype=torch.int32)),
        dict(out=[torch.zeros(6, 32)]),
    ),
    "foreach_adamw": lambda: (
        ops.foreach_adamw,
        (
            [torch.randn(6, 32), torch.randn(3)],
            [torch.randn(6, 32).bfloat16(), torch.randn(3)],
            [torch.zeros(6, 32), torch.zeros(3)],
            [torch.zeros(6, 32), torch.zeros(3)],
            [torch.zeros(()), torch.zeros(())],
        ),
        dict(lr=0.1, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, found_inf=torch.zeros(1)),
    ),
    "quantize": lambda: (ops.quantize, (random_weight(6, 32), 8), dict(granularity="per_tensor")),
    "quantize_wide": lambda: (ops.quantize, (random_weight(6, 32), 12), dict()),
    "dequantize": lambda: (ops.dequantize, codes_and_scales(), dict()),
    "dequantize_transposed": lambda: (
        ops.dequantize,
        codes_and_scales(),
        dict(transposed=True, dtype=torch.bfloat16),
    ),
    "quantize_activation": lambda: (ops.quantize_activation, (torch.randn(2, 3, 8),), dict()),
    "quantize_activation_static": lambda: (
        ops.quantize_activation,
        (torch.randn(3, 8), torch.tensor([0.1])),
        dict(),
    ),
    "quantize_activation_asymmetric": lambda: (
        ops.quantize_activation,
        (torch.randn(2, 3, 8),),
        dict(mode="asymmetric"),
    ),
    "quantize_activation_static_asymmetric": lambda: (
        ops.quantize_activation,
        (torch.randn(3, 8), torch.tensor([0.1]), torch.tensor([9], dtype=torch.int32)),
        dict(mode="asymmetric"),
    ),
    "fake_quantize_activation": lambda: (
        ops.fake_quantize_activation,
        (torch.randn(3, 8, requires_grad=True),),
        dict(),
    ),
    "fake_quantize_activation_static": lambda: (
        ops.fake_quantize_activation,
        (torch.randn(3, 8, requires_grad=True), torch.tensor([0.01])),
        dict(),
    ),
    "fake_quantize_activation_asymmetric": lambda: (
        ops.fake_quantize_activation,
        (torch.randn(3, 8, requires_grad=True),),
        dict(mode="asymmetric"),
    ),
    "fake_quantize_activation_static_asymmetric": lambda: (
        ops.fake_quantize_activation,
        (
            torch.randn(3, 8, requires_grad=True),
            torch.tensor([0.01]),
            torch.tensor([9], dtype=torch.int32),
        ),
        dict(mode="asymmetric"),
    ),
}


def codes_of_weight(groups=1):
    codes = torch.randint(-127, 128, (40, 64), dtype=torch.int8)
    return codes, torch.rand(40, groups) * 0.01 + 0.001


def heads(num_tokens, num_heads):
    return torch.randn(num_tokens, num_heads, 8)


PAGES = (3, 1, 64, 8)  # pages, kv heads, tokens of a page, head size
ROTATION = {
    "positions": torch.tensor([3, 4], dtype=torch.int32),
    "cos": torch.rand(9, 4),
    "sin": torch.rand(9, 4),
}
ROWS = torch.tensor([70, -1], dtype=torch.int32)
SEQUENCES = torch.tensor([[0, 2, 0, 0]], dtype=torch.int32)


def int8_pages():
    return (torch.zeros(PAGES, dtype=torch.int8) for _ in range(2))


# The operators of inference; "weight" is packed on the device.
INFERENCE = {
    "pack_linear": lambda: (ops.pack_linear, codes_of_weight(4), dict()),
    "pack_linear_float": lambda: (
        ops.pack_linear,
        (torch.randn(5, 9),),
        dict(format="float32"),
    ),
    "linear": lambda: (
        ops.linear,
        (torch.randn(3, 64), "weight", 40),
        dict(bias=torch.zeros(40), activation="relu", residual=torch.zeros(3, 40)),
    ),
    "linear_gated": lambda: (ops.linear, (torch.randn(3, 64), "weight", 40), dict(gated=True)),
    "linear_dynamic": lambda: (
        ops.linear,
        (torch.randn(3, 64), "weight", 40),
        dict(input_mode="dynamic_int8", dtype=torch.float32),
    ),
    "linear_static": lambda: (
        ops.linear,
        (torch.randn(3, 64), "weight", 40),
        dict(input_mode="static_int8", input_scale=0.02),
    ),
    "linear_dynamic_asymmetric": lambda: (
        ops.linear,
        (torch.randn(3, 64), "weight", 40),
        dict(input_mode="dynamic_asymmetric_int8"),
    ),
    "linear_static_asymmetric": lambda: (
        ops.linear,
        (torch.randn(3, 64), "weight", 40),
        dict(input_mode="static_asymmetric_int8", input_scale=0.02, input_zero_point=-5),
    ),
    "norm": lambda: (ops.norm, (torch.randn(3, 8), torch.ones(8), torch.zeros(8)), dict()),
    "norm_linear": lambda: (
        ops.norm_linear,
        (torch.randn(3, 64), torch.ones(64), None, "weight", 40),
        dict(norm="rms_norm", activation="silu", gated=True),
    ),
    "norm_linear_static": lambda: (
        ops.norm_linear,
        (torch.randn(3, 64), torch.ones(64), None, "weight", 40),
        dict(input_mode="static_int8", input_scale=0.02),
    ),
    "attention": lambda: (
        ops.attention,
        (heads(2, 4).flatten(1), SEQUENCES),
        dict(num_heads=2, num_kv_heads=1, max_tokens=2),
    ),
    "sample": lambda: (
        ops.sample,
        (torch.randn(3, 31), torch.randint(31, (3, 5))),
        dict(top_k=5, seed=1, repetition_penalty=1.5),
    ),
}
# Those that only a GPU has, or has in 16 bits.
ON_GPUS = {
    "qkv_linear": lambda: (
        ops.qkv_linear,
        (torch.randn(2, 64), "weight"),
        dict(num_heads=3, num_kv_heads=1, head_dim=8, norm="rms_norm", norm_weight=torch.ones(64)),
    ),
    "qkv_linear_cache": lambda: (
        ops.qkv_linear,
        (torch.randn(2, 64), "weight"),
        dict(
            num_heads=3,
            num_kv_heads=1,
            head_dim=8,
            key_pages=torch.zeros(PAGES),
            value_pages=torch.zeros(PAGES),
            cache_rows=ROWS,
            **ROTATION,
        ),
    ),
    "append_kv": lambda: (
        ops.append_kv,
        (heads(2, 6).flatten(1), torch.zeros(PAGES), torch.zeros(PAGES), ROWS),
        dict(num_heads=4, query_norm=torch.ones(8), **ROTATION),
    ),
    "paged_attention": lambda: (
        ops.paged_attention,
        (
            heads(2, 4),
            torch.zeros(PAGES),
            torch.zeros(PAGES),
            torch.tensor([[2, 1]], dtype=torch.int32),
            SEQUENCES,
        ),
        dict(max_tokens=2),
    ),
    "append_kv_int8": lambda: (
        ops.append_kv,
        (heads(2, 6).flatten(1), *int8_pages(), ROWS),
        dict(num_heads=4, key_scales=torch.ones(PAGES[:3]), value_scales=torch.ones(PAGES[:3])),
    ),
    "paged_attention_int8": lambda: (
        ops.paged_attention,
        (heads(2, 4), *int8_pages(), torch.tensor([[2, 1]], dtype=torch.int32), SEQUENCES),
        dict(max_tokens=2, key_scales=torch.ones(PAGES[:3]), value_scales=torch.ones(PAGES[:3])),
    ),
    "linear_half": lambda: (ops.linear, (torch.randn(3, 64).half(), "weight", 40), dict()),
    "norm_linear_half": lambda: (
        ops.norm_linear,
        (torch.randn(3, 64).half(), torch.ones(64), None, "weight", 40),
        dict(norm="rms_norm"),
    ),
    "attention_half": lambda: (
        ops.attention,
        (heads(2, 4).flatten(1).half(), SEQUENCES),
        dict(num_heads=2, num_kv_heads=1, max_tokens=2),
    ),
    "append_kv_half": lambda: (
        ops.append_kv,
        (heads(2, 6).flatten(1).half(), torch.zeros(PAGES).half(), torch.zeros(PAGES).half(), ROWS),
        dict(num_heads=4),
    ),
    "read_once": lambda: (
        ops.read_once,
        (torch.randn(1024), torch.zeros(1, dtype=torch.int64)),
        dict(prefetch=False),
    ),
}


def check_registration(sample, device):
    """opcheck of a sample whose tensors are moved to the device."""

    def move(tensor):
        moved = tensor.detach().to(device)
        return moved.requires_grad_(tensor.requires_grad)

    operator, arguments, keywords = tree_map_only(torch.Tensor, move, sample())
    packed = ops.pack_linear(*(tensor.to(device) for tensor in codes_of_weight()))
    arguments = tuple(packed if isinstance(argument, str) else argument for argument in arguments)
    results = opcheck(operator.default, arguments, keywords)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("sample", SAMPLES | INFERENCE)
def test_opcheck(sample, device):
    check_registration((SAMPLES | INFERENCE)[sample], device)


@pytest.mark.parametrize("sample", ON_GPUS)
def test_opcheck_on_gpus(sample, gpu):
    check_registration(ON_GPUS[sample], gpu)


def test_every_operator_has_a_sample():
    registered = {
        name.partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("moq::")
    }
    registered -= {"moq::read_bandwidth"}  # its result is no tensor, and nothing compiles it
    samples = SAMPLES | INFERENCE | ON_GPUS
    sampled = {sample()[0]._qualified_op_name for sample in samples.values()}
    assert sampled == registered


def test_fake_quantize_compiles_without_a_graph_break():
    weight = random_weight(8, 16)
    compiled = torch.compile(
        lambda w: ops.fake_quantize(w, 8) * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(weight), ops.fake_quantize(weight, 8) * 2)
