"""What cannot be exported is refused with a name, and nothing is written."""

import pytest
import torch
from exported import LLAMA_LINEARS, Spec, quantize_modules, tiny_llama

from moq import _C
from moq.export import QuantizedParameter, export_checkpoint

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture
def quantized(model):
    return quantize_modules(model, dict.fromkeys(LLAMA_LINEARS, Spec()))


def refuse(tmp_path, model, quantized, error, match):
    with pytest.raises(error, match=match):
        export_checkpoint(tmp_path / "out", model, quantized)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["master", "simulated"])
def test_a_nonfinite_weight_is_named(tmp_path, model, quantized, which, value):
    parameter = next(p for p in quantized if p.name == Q_PROJ)
    with torch.no_grad():
        getattr(parameter, which)[5, 7] = value
    pattern = f"{Q_PROJ}: expected finite {which} weights, got .* feature 5, input feature 7"
    refuse(tmp_path, model, quantized, _C.Error, pattern)


def test_a_nonfinite_parameter_that_is_not_quantized_is_named(tmp_path, model, quantized):
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    refuse(tmp_path, model, quantized, _C.Error, "model.norm.weight: expected finite values")


def test_a_weight_changed_after_the_last_step_is_named(tmp_path, model, quantized):
    with torch.no_grad():
        next(p for p in quantized if p.name == Q_PROJ).simulated[2, 3] += 1e-4
    pattern = f"{Q_PROJ}: expected the simulated weight to lie on the 8-bit grid.*input feature 3"
    refuse(tmp_path, model, quantized, _C.Error, pattern)


def test_a_weight_with_the_wrong_width_is_refused(tmp_path, model, quantized):
    narrow = QuantizedParameter(Q_PROJ, quantized[0].master, quantized[0].simulated, 4)
    refuse(tmp_path, model, [narrow], _C.Error, "4-bit grid of its master")


def test_an_unknown_parameter_is_named(tmp_path, model):
    weight = torch.zeros(2, 2)
    unknown = QuantizedParameter("no.such.weight", weight, weight, 8)
    refuse(tmp_path, model, [unknown], ValueError, "no.such.weight: expected a parameter")


def test_a_parameter_given_twice_is_named(tmp_path, model, quantized):
    refuse(tmp_path, model, [*quantized, quantized[0]], ValueError, "once, got it again")


def test_a_parameter_of_another_shape_is_named(tmp_path, model):
    weight = torch.zeros(2, 2)
    refuse(tmp_path, model, [QuantizedParameter(Q_PROJ, weight, weight, 8)], ValueError, "shape")


def test_two_dtypes_are_refused(tmp_path, model, quantized):
    first = quantized[0]
    half = QuantizedParameter(first.name, first.master, first.simulated.bfloat16(), 8)
    refuse(tmp_path, model, [half, *quantized[1:]], ValueError, "must have one dtype")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_bits": 1}, r"num_bits must lie in \[2, 16\], got 1"),
        ({"num_bits": 17}, r"num_bits must lie in \[2, 16\], got 17"),
        ({"mode": "quaternary"}, "mode must be one of"),
        ({"num_bits": 1, "mode": "ternary"}, r"num_bits must lie in \[2, 16\], got 1"),
        ({"scale": "max"}, "scale must be one of"),
        ({"granularity": "per_rows", "group_size": 3}, "divide the 2 output features, got 3"),
        ({"granularity": "per_row"}, "granularity must be one of"),
        ({"granularity": "per_group", "group_size": 3}, "divide the 4 input features, got 3"),
        ({"granularity": "per_group"}, "group_size must be positive"),
        ({"activations": "token"}, "activations must be None or one of .'dynamic', 'static', "),
        ({"activations": "static"}, "input_scale must be a positive normal number .*, got None"),
        ({"activations": "dynamic", "input_scale": 0.5}, "otherwise None, got 0.5"),
        ({"activations": "static", "input_scale": 0.0}, "input_scale must be a positive"),
        (
            {"activations": "static_asymmetric", "input_zero_point": 3},
            "input_scale must be a positive normal number .*, got None",
        ),
        (
            {"activations": "static_asymmetric", "input_scale": 0.5},
            r"input_zero_point must be an integer in \[-128, 127\] .*, got None",
        ),
        (
            {"activations": "static_asymmetric", "input_scale": 0.5, "input_zero_point": 128},
            r"input_zero_point must be an integer in \[-128, 127\] .*, got 128",
        ),
        (
            {"activations": "static_asymmetric", "input_scale": 0.5, "input_zero_point": 2.5},
            r"input_zero_point must be an integer in \[-128, 127\] .*, got 2.5",
        ),
        (
            {"activations": "static", "input_scale": 0.5, "input_zero_point": 3},
            "otherwise None, got 3",
        ),
        (
            {"activations": "static", "input_scale": 0.1, "scale_dtype": torch.bfloat16},
            "must be a positive normal number of torch.bfloat16",
        ),
        ({"scale_dtype": torch.float64}, "scale_dtype must be"),
        ({"master": torch.zeros(4, 3)}, "master must have the shape"),
        ({"simulated": torch.zeros(2, 4).double()}, "simulated must be float32"),
        ({"simulated": torch.zeros(4)}, "2 dimensions"),
    ],
)
def test_a_parameter_that_no_checkpoint_can_hold_is_refused(fields, match):
    plain = {"master": torch.zeros(2, 4), "simulated": torch.zeros(2, 4), "num_bits": 8}
    with pytest.raises(ValueError, match=match):
        QuantizedParameter("w.weight", **(plain | fields))


def test_a_directory_with_other_files_is_left_alone(tmp_path, model, quantized):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.txt"):
        export_checkpoint(tmp_path / "out", model, quantized)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_a_file_put_beside_a_checkpoint_is_not_deleted_with_it(tmp_path, model, quantized):
    export_checkpoint(tmp_path / "out", model, quantized)
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"got notes\.md in it"):
        export_checkpoint(tmp_path / "out", model, quantized)
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


def test_a_tokenizer_directory_without_a_tokenizer_is_refused(tmp_path, model, quantized):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="tokenizer files"):
        export_checkpoint(tmp_path / "out", model, quantized, tokenizer=tmp_path / "empty")
    assert not (tmp_path / "out").exists()
