"""Every operator of the quantizers passes torch's own checks of its registration."""

import pytest
import torch
from test_fake_quantize import random_weight
from torch.library import opcheck

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
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    operator, arguments, keywords = SAMPLES[sample]()
    results = opcheck(operator.default, arguments, keywords)
    assert set(results.values()) == {"SUCCESS"}


def test_fake_quantize_compiles_without_a_graph_break():
    weight = random_weight(8, 16)
    compiled = torch.compile(
        lambda w: ops.fake_quantize(w, 8) * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(weight), ops.fake_quantize(weight, 8) * 2)
