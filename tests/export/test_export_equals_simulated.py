"""The keystone: what a checkpoint stores is, bit for bit, what was trained."""

import json

import pytest
import torch
from exported import Spec, quantize_modules
from reference.pack_quantized import dequantize
from transformers.pytorch_utils import Conv1D

from moq import _C, MoQOptimizer
from moq.export import export_checkpoint
from moq.input_grid import KINDS

OUT, IN = 29, 60  # a prime, and a size that groups of 20 divide
STORED_BITS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def make_weight(dtype: torch.dtype, seed: int = 1, rows: int = OUT) -> torch.Tensor:
    """Rows of very different sizes, and one of zeros."""
    weight = torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-4, 1, rows)[:, None]
    weight[3] = 0
    return weight.to(dtype)


def make_model(
    dtype: torch.dtype, widths, rows: int = OUT, embeddings: bool = True
) -> torch.nn.Module:
    """Modules of each kind, one for every width, named linear_8 and so on."""
    model = torch.nn.Module()
    for num_bits in widths:
        modules = {"linear": torch.nn.Linear(IN, rows), "conv": Conv1D(rows, IN)}
        if embeddings:
            modules["embedding"] = torch.nn.Embedding(rows, IN)
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


def require_stored(directory, model, activations=None) -> None:
    """Requires of every module what its name says: that its codes are its weight."""
    checkpoint = _C.Checkpoint(str(directory))
    aliases = json.loads((directory / "moq.json").read_text())["aliases"]
    for name, module in model.named_children():
        dtype, num_bits = module.weight.dtype, int(name.rpartition("_")[2])
        stored_bits = 8 if activations else STORED_BITS[num_bits]
        stored = aliases.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
        found = stored_weight(checkpoint, stored, stored_bits, dtype)
        assert torch.equal(bits_of(found), bits_of(module.weight.detach())), name


FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the masters and of the model; half-precision models have float32 masters unless told otherwise.
PRECISIONS = [("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16",) * 2]
# Every mode with all its widths, every way to find a scale that the mode has, and to round.
GRIDS = [
    ("symmetric", "absmax", range(2, 9), "nearest"),
    ("symmetric", "absmax", range(2, 9), "stochastic"),
    ("symmetric", "mse", range(2, 9), "nearest"),
    ("symmetric", "mse", range(2, 9), "stochastic"),
    ("symmetric", "learned", range(2, 9), "nearest"),
    ("asymmetric", "absmax", range(2, 9), "nearest"),
    ("asymmetric", "absmax", range(2, 9), "stochastic"),
    ("asymmetric", "mse", range(2, 9), "nearest"),
    ("asymmetric", "mse", range(2, 9), "stochastic"),
    ("ternary", "absmax", range(2, 9), "nearest"),
    ("ternary", "mse", range(2, 9), "nearest"),
    ("binary", "absmax", range(1, 9), "nearest"),
    ("binary", "mse", range(1, 9), "nearest"),
]
# Where scales are learned, the parameters are the masters.
CASES = {
    f"{precision[0]} masters, {precision[1]}, {'-'.join((mode, scale, rounding))}": (
        *precision, mode, scale, widths, rounding
    )
    for precision in PRECISIONS
    for mode, scale, widths, rounding in GRIDS
    if scale != "learned" or precision[0] == precision[1]
}  # fmt: skip
# One scale each: all weights, an output feature, 20 input features, 7 output features.
GRANULARITIES = {"per_tensor": 0, "per_channel": 0, "per_group": 20, "per_rows": 7}


def rows_for(granularity: str) -> int:
    return 28 if granularity == "per_rows" else OUT


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activations", [None, *KINDS])
def test_stored_codes_are_the_simulated_weights(tmp_path, case, granularity, activations):
    master_dtype, dtype, mode, scale, widths, rounding = CASES[case]
    # An embedding reads token ids, which nobody rounds.
    model = make_model(FLOATS[master_dtype], widths, rows_for(granularity), not activations)
    grid = {"mode": mode, "scale": scale, "granularity": granularity, "rounding": rounding}
    specs = {
        name: Spec(
            int(name.rpartition("_")[2]),
            group_size=GRANULARITIES[granularity],
            activations=activations,
            **grid,
        )
        for name, _ in model.named_children()
    }
    quantized = quantize_modules(model, specs, FLOATS[dtype])
    export_checkpoint(tmp_path / "out", model, quantized)
    require_stored(tmp_path / "out", model, activations=activations)
    checkpoint = _C.Checkpoint(str(tmp_path / "out"))
    for name, _ in model.named_children():
        assert (f"{name}.input_scale" in checkpoint) == (activations or "").startswith("static")
        assert (f"{name}.input_zero_point" in checkpoint) == (activations == "static_asymmetric")
        if f"{name}.input_scale" in checkpoint:
            input_scale = checkpoint.read(f"{name}.input_scale")
            assert input_scale.dtype == FLOATS[dtype] and input_scale.tolist() == [0.03125]
        if f"{name}.input_zero_point" in checkpoint:
            zero_point = checkpoint.read(f"{name}.input_zero_point")
            assert zero_point.dtype == torch.int8 and zero_point.tolist() == [-37]


def train(model: torch.nn.Module, config: dict) -> MoQOptimizer:
    """The first two steps of a training that begins with the width in each module's name."""
    least = {"ternary": 2, "binary": 1}.get(config["mode"])
    rules = []
    for name, _ in model.named_children():
        width = int(name.rpartition("_")[2])
        rules.append({"match": name, "start_bits": width, "target_bits": least or width})
    sgd = torch.optim.SGD(model.parameters(), lr=1e-2)
    config = config | {"rules": rules, "target_bits": least or 8}
    optimizer = MoQOptimizer(sgd, model, config, total_steps=1_000_000, verbose=False)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer


# Every granularity of the default for half precision, and every precision per channel.
TRAINED = [
    pytest.param(case, granularity, id=f"{case}, {granularity}")
    for granularity in GRANULARITIES
    for case, (masters, dtype, *_) in CASES.items()
    if granularity == "per_channel" or (masters, dtype) == ("fp32", "bf16") or "learned" in case
]


@pytest.mark.parametrize(("case", "granularity"), TRAINED)
@pytest.mark.filterwarnings("ignore:MoQOptimizer.export. .* have not reached their target")
def test_stored_codes_are_what_a_training_leaves_in_the_model(tmp_path, case, granularity):
    """Masters, grids and scales are the optimizer's; a head has the weight of each embedding."""
    master_dtype, dtype, mode, scale, widths, rounding = CASES[case]
    model = make_model(FLOATS[dtype], widths, rows_for(granularity))
    for num_bits in widths:
        head = torch.nn.Linear(IN, rows_for(granularity), bias=False)
        head.weight = model.get_submodule(f"embedding_{num_bits}").weight
        model.add_module(f"head_{num_bits}", head)
    config = {
        "mode": mode,
        "scale": scale,
        "rounding": rounding,
        "granularity": "per_group" if granularity == "per_rows" else granularity,
        "group_size": 20 if granularity == "per_group" else 0,
        "groups": 4 if granularity == "per_rows" else 0,
        "simulate": "autograd" if scale == "learned" else "in_place",
        "master_dtype": "float32" if master_dtype == "fp32" else "parameter",
    }
    optimizer = train(model, config)
    optimizer.export(tmp_path / "out")
    quantized = optimizer.quantized_parameters()
    assert {q.master.dtype for q in quantized} == {FLOATS[master_dtype]}
    assert {q.num_bits for q in quantized} == set(widths)
    assert len(quantized) == 3 * len(widths)
    require_stored(tmp_path / "out", model)


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
