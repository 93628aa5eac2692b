"""The keystone: what a checkpoint stores is, bit for bit, what was trained."""

import pytest
import torch
from exported import Spec, quantize_modules
from reference.pack_quantized import dequantize
from transformers.pytorch_utils import Conv1D

from moq import _C
from moq.export import export_checkpoint

OUT, IN = 29, 60  # a prime, and a size that groups of 20 divide
STORED_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def make_weight(dtype: torch.dtype, seed: int = 1, rows: int = OUT) -> torch.Tensor:
    """Rows of very different sizes, and one of zeros."""
    weight = torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-4, 1, rows)[:, None]
    weight[3] = 0
    return weight.to(dtype)


def make_model(dtype: torch.dtype, widths, rows: int = OUT) -> torch.nn.Module:
    """Modules of each kind, one for every width, named linear_8 and so on."""
    model = torch.nn.Module()
    for num_bits in widths:
        modules = {
            "linear": torch.nn.Linear(IN, rows),
            "conv": Conv1D(rows, IN),
            "embedding": torch.nn.Embedding(rows, IN),
        }
        for name, module in modules.items():
            weight = make_weight(dtype, rows=rows)
            module.weight.data = weight.t().contiguous() if name == "conv" else weight
            model.add_module(f"{name}_{num_bits}", module)
    return model


def stored_weight(checkpoint: _C.Checkpoint, module: str, num_bits: int, dtype) -> torch.Tensor:
    """A module's weight as the reference reads it, in the module's storage order."""
    prefix = f"{module}."
    tensors = {
        name.removeprefix(prefix): checkpoint.read(name)
        for name in checkpoint.names()
        if name.startswith(prefix)
    }
    weight = dequantize(tensors, num_bits, dtype)
    return weight.t() if module.startswith("conv") else weight


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check(tmp_path, dtype, widths, **spec) -> None:
    model = make_model(dtype, widths, rows=28 if spec.get("granularity") == "per_rows" else OUT)
    specs = {name: Spec(int(name.rpartition("_")[2]), **spec) for name, _ in model.named_children()}
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, specs))
    checkpoint = _C.Checkpoint(str(tmp_path / "out"))
    for name, module in model.named_children():
        stored_bits = 8 if spec.get("activations") else STORED_BITS[specs[name].num_bits]
        if spec.get("activations") == "static":
            scale = checkpoint.read(f"{name}.input_scale")
            assert scale.dtype == dtype and scale.tolist() == [0.03125]
        found = stored_weight(checkpoint, name, stored_bits, dtype)
        assert torch.equal(bits_of(found), bits_of(module.weight.data)), name


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
MODES = pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
# Every mode with all its widths, and every way to find a scale that the mode has.
GRIDS = [
    ("symmetric", "absmax", range(2, 9)),
    ("symmetric", "mse", range(2, 9)),
    ("symmetric", "learned", range(2, 9)),
    ("asymmetric", "absmax", range(2, 9)),
    ("asymmetric", "mse", range(2, 9)),
    ("ternary", "absmax", range(2, 9)),
    ("binary", "absmax", range(1, 9)),
]
# One scale each: all weights, an output feature, 20 input features, 7 output features.
GRANULARITIES = {"per_tensor": 0, "per_channel": 0, "per_group": 20, "per_rows": 7}


@DTYPES
@pytest.mark.parametrize(("mode", "scale", "widths"), GRIDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("activations", [None, "dynamic", "static"])
def test_stored_codes_are_the_simulated_weights(
    tmp_path, dtype, mode, scale, widths, granularity, rounding, activations
):
    if rounding == "stochastic" and (mode in ("ternary", "binary") or scale == "learned"):
        pytest.skip("signs are not rounded, and learned scales have no gradient through draws")
    check(
        tmp_path,
        dtype,
        widths,
        mode=mode,
        scale=scale,
        granularity=granularity,
        group_size=GRANULARITIES[granularity],
        rounding=rounding,
        activations=activations,
    )


@pytest.mark.parametrize("num_bits", [9, 16])
def test_weights_above_8_bits_stay_in_the_dtype_of_the_model(tmp_path, num_bits):
    model = make_model(torch.bfloat16, [num_bits])
    specs = {name: Spec(num_bits) for name, _ in model.named_children()}
    export_checkpoint(tmp_path / "out", model, quantize_modules(model, specs))
    checkpoint = _C.Checkpoint(str(tmp_path / "out"))
    assert checkpoint.names() == sorted(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), value), name


@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (33, 1), (7, 33)], ids=str)
@pytest.mark.parametrize("mode", ["symmetric", "asymmetric"])
def test_odd_shapes_are_stored(tmp_path, shape, mode):
    torch.manual_seed(2)
    model = torch.nn.Module()
    model.linear = torch.nn.Linear(shape[1], shape[0])
    quantized = quantize_modules(model, {"linear": Spec(4, mode)})
    export_checkpoint(tmp_path / "out", model, quantized)
    checkpoint = _C.Checkpoint(str(tmp_path / "out"))
    tensors = {n.removeprefix("linear."): checkpoint.read(n) for n in checkpoint.names()}
    assert torch.equal(dequantize(tensors, 4, torch.float32), model.linear.weight.data)
