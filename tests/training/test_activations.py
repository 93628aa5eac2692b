"""INT8 activations: where rules place them, what they compute, and what is served of them."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from on_gpu import capture, side_stream
from overflows import scaled_step
from reference import quantize as reference
from tiny_decoder import assert_same, batch, loss_of, tiny_llama, train_step, weights, wrap
from torch import nn

transformers = pytest.importorskip("transformers")

import moq  # noqa: E402
from moq import cli  # noqa: E402
from moq.activations import ActivationQuantizer, exported_inputs  # noqa: E402
from moq.inference import Engine  # noqa: E402
from moq.input_grid import KINDS, InputGrid, is_asymmetric, is_static  # noqa: E402
from moq.saved_run import load_run  # noqa: E402
from moq.verify import verify_checkpoint  # noqa: E402

STEPS = 8
W8 = {"start_bits": 8, "target_bits": 8}
STATIC = [kind for kind in KINDS if is_static(kind)]


def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    return {
        name.removesuffix(".input_quantizer"): module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def test_rules_place_them(decoder):
    rules = [
        {"match": "*.down_proj", "activations": "dynamic"},
        {"match": "*.up_proj", "activations": "static"},
        {"match": "*.gate_proj", "activations": "static"},
    ]
    model = decoder()
    wrap(model, W8 | {"rules": rules})
    assert {name: q.kind for name, q in quantizers(model).items()} == {
        f"layers.{layer}.{part}": kind
        for layer in (0, 1)
        for part, kind in (("up_proj", "static"), ("gate_proj", "static"), ("down_proj", "dynamic"))
    }


def test_the_models_own_state_knows_nothing_of_them(decoder):
    model = decoder()
    keys = list(model.state_dict())
    wrap(model, W8 | {"activations": "static"})
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", ["none", *KINDS])
@pytest.mark.parametrize("copied", [False, True])
def test_a_model_is_wrapped_again_as_if_for_the_first_time(decoder, kind, copied):
    model = decoder()
    first = wrap(model, W8 | {"activations": "static"})
    train_step(model, first, 0)
    if copied:  # while the first training goes on
        model = copy.deepcopy(model)
    else:
        del first
    fresh = decoder()
    fresh.load_state_dict(model.state_dict())
    rules = [{"match": "layers.0.*", "activations": "none"}]
    config = W8 | {"target_bits": 4, "activations": kind, "rules": rules}
    optimizers = wrap(model, config), wrap(fresh, config)
    for step in range(1, 4):
        losses = map(train_step, (model, fresh), optimizers, (step, step))
        assert len(set(losses)) == 1
    assert {name: q.kind for name, q in quantizers(model).items()} == {
        name: q.kind for name, q in quantizers(fresh).items()
    }


def test_two_trainings_of_one_model_leave_each_others_alone(decoder):
    model = decoder()
    config = W8 | {"activations": "dynamic"}
    with pytest.warns(UserWarning, match="in no param group"):
        optimizers = [
            moq.MoQOptimizer(
                torch.optim.AdamW(layer.parameters()), model, config, total_steps=4, verbose=False
            )
            for layer in model.layers
        ]
    assert len(quantizers(model)) == 12
    assert [len(optimizer._activations.by_name) for optimizer in optimizers] == [6, 6]


def test_embeddings_cannot_have_them(decoder):
    rule = {"match": "embedding", "activations": "dynamic"}
    with pytest.raises(ValueError, match=r"embedding\.weight .*: activations must be 'none'"):
        wrap(decoder(), W8 | {"rules": [rule]})


def test_layers_of_one_weight_cannot_have_one_static_scale(decoder):
    model = decoder()
    model.layers[1].down_proj.weight = model.layers[0].down_proj.weight
    model.alias = model.layers[0].up_proj  # one layer under two names has one input
    both = r"layers\.0\.down_proj\.weight .*must not be 'static': layers\.1\.down_proj has the same"
    with pytest.raises(ValueError, match=both):
        wrap(model, W8 | {"activations": "static"})
    rules = [{"match": "*.down_proj", "activations": "dynamic"}]
    wrap(model, W8 | {"activations": "static", "rules": rules})
    kinds = [q.kind for name, q in quantizers(model).items() if "down_proj" in name]
    assert kinds == ["dynamic", "dynamic"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_never_called_cannot_have_them(kind):
    model = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(
        ValueError, match=r"self_attn\.out_proj\.weight .*: activations must be 'no"
    ):
        wrap(model, W8 | {"activations": kind})
    rules = [{"match": "self_attn.out_proj", "activations": "none"}]
    wrap(model, W8 | {"activations": kind, "rules": rules})
    assert list(quantizers(model)) == ["linear1", "linear2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_multiplies_the_points_of_the_grid(device, kind, keyword, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(16, 4).to(dtype)
    x = torch.randn(3, 5, 16, dtype=dtype)
    layer.to(device)
    wrap(layer, W8 | {"activations": kind})
    scale = zero_point = None
    if is_static(kind):  # the first batch is its own measure
        lowest, highest = x.float().aminmax()
        extent = (highest - lowest) / 255 if is_asymmetric(kind) else x.float().abs().max() / 127
        scale = extent.to(dtype).float().reshape(1)
        if is_asymmetric(kind):
            zero_point = (-128 - lowest * (1 / scale)).round().clamp(-128, 127).int()
    mode = "asymmetric" if is_asymmetric(kind) else "symmetric"
    rounded = reference.fake_quantize_activation(x, scale, zero_point, mode).to(device)
    expected = nn.functional.linear(rounded, layer.weight, layer.bias)
    found = layer(input=x.to(device)) if keyword else layer(x.to(device))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_int8_kernel_multiplies_the_same_codes(device, kind):
    torch.manual_seed(0)
    layer = nn.Linear(32, 8, bias=False).to(device)
    optimizer = wrap(layer, W8 | {"activations": kind})
    x = torch.randn(6, 32).to(device) + 0.75
    layer(x).sum().backward()
    optimizer.step()
    layer.eval()
    (exported,) = optimizer.quantized_parameters()
    assert (exported.input_zero_point is None) == (kind != "static_asymmetric")
    master = optimizer.state[layer.weight]["moq_master"].detach()
    codes, scales, _ = torch.ops.moq.quantize(master, 8)
    packed = torch.ops.moq.pack_linear(codes, scales)
    served = torch.ops.moq.linear(
        x,
        packed,
        8,
        input_mode=f"{kind}_int8",
        input_scale=exported.input_scale,
        input_zero_point=exported.input_zero_point,
    )
    torch.testing.assert_close(served, layer(x).detach())


def train_with_overflow(model: nn.Module, config: dict, captured: bool) -> dict[str, torch.Tensor]:
    """Trains for STEPS steps and one that overflows; returns all that a run leaves.

    `captured`: all steps but the first two are replays of one graph.
    """
    device = next(model.parameters()).device
    adamw = torch.optim.AdamW(
        model.parameters(), lr=1e-2, fused=True, capturable=device.type == "cuda"
    )
    optimizer = moq.MoQOptimizer(adamw, model, config, total_steps=STEPS, verbose=False)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0, growth_interval=1000)
    tokens, factor = batch(0).to(device), torch.ones((), device=device)
    step = scaled_step(model, optimizer, scaler, tokens, factor)

    def averages() -> torch.Tensor:
        return torch.cat([q.extent for q in quantizers(model).values()]).clone()

    with side_stream() if captured else nullcontext():
        step()
        tokens.copy_(batch(1))
        step()
    call = capture(step) if captured else step
    before = averages(), weights(model)
    # Steps 3, none, 4 (the last that is observed), 5, …
    for number in range(STEPS - 1):
        tokens.copy_(batch(number + 2))
        overflows = number == 1
        factor.fill_(float("inf") if overflows else 1.0)
        call()
        after = averages(), weights(model)
        assert torch.equal(*(side[0] for side in (before, after))) == (number not in (0, 2))
        if overflows:
            assert_same(after[1], before[1])
        before = after
    assert optimizer.steps == STEPS
    assert set(optimizer.num_bits.values()) == {4}
    states = {f"average {number}": value for number, value in enumerate(before[0])}
    return before[1] | states | {"scale": torch.tensor(scaler.get_scale())}


@pytest.mark.parametrize("kind", STATIC)
@pytest.mark.parametrize(
    "form",
    [{}, {"simulate": "autograd"}, {"simulate": "autograd", "scale": "learned"}],
    ids=["in_place", "autograd", "learned"],
)
def test_a_captured_step_follows_drops_overflows_and_the_observer(decoder, device, form, kind):
    """On a GPU every step but two is a replay; what is asserted of the steps holds on a CPU too."""
    config = form | {
        "start_bits": 8,
        "target_bits": 4,
        "activations": kind,
        "observer": {"momentum": 0.75, "freeze_at": 0.5},
        "schedule": {"finish_at": 0.75},
    }
    models = [decoder().to(device) for _ in range(2)]
    expected = train_with_overflow(models[0], config, captured=False)
    actual = train_with_overflow(models[1], config, captured=device == "cuda")
    assert_same(actual, expected)


def test_the_gradient_passes_but_where_a_static_scale_clips():
    layer = nn.Linear(4, 1, bias=False)
    optimizer = wrap(layer, W8 | {"activations": "static"}, lr=0.0)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    x = torch.tensor([[0.5, -0.25, 3.0, -1.5]], requires_grad=True)
    layer(x).sum().backward()
    weight = layer.weight.detach()
    assert torch.equal(x.grad, weight * torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_the_gradient_passes_but_where_a_static_grid_with_a_zero_point_clips():
    layer = nn.Linear(4, 1, bias=False)
    optimizer = wrap(layer, W8 | {"activations": "static_asymmetric"}, lr=0.0)
    layer(torch.tensor([[-0.5, 2.0, 1.0, 0.0]])).sum().backward()
    optimizer.step()
    x = torch.tensor([[1.5, -0.25, 3.0, -1.5]], requires_grad=True)
    layer(x).sum().backward()
    weight = layer.weight.detach()
    assert torch.equal(x.grad, weight * torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_inputs_behind_a_relu_have_twice_the_levels_with_a_zero_point():
    torch.manual_seed(0)
    x = torch.randn(64, 32).relu()
    errors = {}
    for kind in KINDS:
        layer = nn.Linear(32, 8)
        wrap(layer, W8 | {"activations": kind})
        errors[kind] = float((layer.input_quantizer(x) - x).norm())
    for kind in ("dynamic", "static"):
        assert errors[f"{kind}_asymmetric"] < 0.6 * errors[kind]


def test_full_precision_shows_the_activations_too(decoder):
    model = decoder()
    plain = copy.deepcopy(model)
    optimizer = wrap(model, W8 | {"activations": "dynamic", "target_bits": 4})
    with optimizer.full_precision():
        assert torch.equal(model(batch(0)), plain(batch(0)))
    assert not torch.equal(model(batch(0)), plain(batch(0)))


# ---------------------------------------------------------------------- training, saving, serving


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_bit_for_bit(decoder, kind):
    config = {
        "start_bits": 9,
        "activations": kind,
        "rounding": "stochastic",
        "observer": {"freeze_at": 0.6},
        "schedule": {"finish_at": 0.75},
    }
    straight, resumed = decoder(), decoder()
    optimizer, first = wrap(straight, config, STEPS), wrap(resumed, config, STEPS)
    for step in range(3):
        train_step(straight, optimizer, step)
        train_step(resumed, first, step)
    saved = json.loads(json.dumps(first.state_dict()["param_groups"][0]["moq"]))
    assert isinstance(saved, str)
    model = decoder()
    second = wrap(model, config, STEPS)
    model.load_state_dict(resumed.state_dict())
    second.load_state_dict(first.state_dict())
    for step in range(3, STEPS):
        assert train_step(straight, optimizer, step) == train_step(model, second, step)
    for a, b in zip(quantizers(straight).values(), quantizers(model).values(), strict=True):
        assert not is_static(kind) or torch.equal(a.extent, b.extent)
    for a, b in zip(straight.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_computes_the_same(decoder, kind):
    from torch.utils.checkpoint import checkpoint

    models = [decoder(), decoder()]
    for model in models:
        wrap(model, W8 | {"activations": kind})
    tokens = batch(0)
    loss_of(models[0], tokens).backward()
    for layer in models[1].layers:
        inner = layer.forward
        layer.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
    loss_of(models[1], tokens).backward()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_compiling_does_not_compile_again_at_a_drop(decoder, device, kind):
    from torch._dynamo.testing import CompileCounter

    model = decoder().to(device)
    optimizer = wrap(model, {"start_bits": 9, "target_bits": 5, "activations": kind}, STEPS)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(STEPS):
        loss_of(compiled, batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    torch._dynamo.reset()  # another decoder has the same code


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_answers_as_the_trained_model(tmp_path, kind):
    model = tiny_llama()
    optimizer = wrap(model, W8 | {"activations": kind}, STEPS)
    for step in range(3):
        loss = model(batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.export(tmp_path / "out")
    checks = verify_checkpoint(tmp_path / "out")
    assert all(check.passed for check in checks), checks
    group = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    activations = group["config_groups"]["group_0"]["input_activations"]
    assert activations["strategy"] == ("tensor" if is_static(kind) else "token")
    assert activations["dynamic"] == (not is_static(kind))
    assert activations["symmetric"] == (not is_asymmetric(kind))
    optimizer.save(tmp_path / "run")
    for mine, theirs in zip(
        optimizer.quantized_parameters(), load_run(tmp_path / "run").quantized, strict=True
    ):
        for field in ("activations", "input_scale", "input_zero_point"):
            assert getattr(mine, field) == getattr(theirs, field)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_a_layer_of_two_names_shows_its_exported_inputs_under_either(names):
    model, x = Twice(), torch.randn(3, 8)
    wrap(model, W8 | {"activations": "dynamic"})
    expected = model(x)
    with exported_inputs(model, dict.fromkeys(names, InputGrid("dynamic"))):
        assert len(model.first._forward_pre_hooks) == 2
        assert torch.equal(model(x), expected)
    assert len(model.first._forward_pre_hooks) == 1
    assert torch.equal(model(x), expected)


def test_exported_inputs_of_no_layer_leave_the_model_as_it_was():
    model, x = Twice(), torch.randn(3, 8)
    wrap(model, W8 | {"activations": "dynamic"})
    expected = model(x)
    with (
        pytest.raises(KeyError),
        exported_inputs(model, {"first": InputGrid("static", 0.5), "third": InputGrid("dynamic")}),
    ):
        pass
    assert len(model.first._forward_pre_hooks) == 1
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_multiplies_what_training_saw(tmp_path, kind, device):
    model = tiny_llama()
    optimizer = wrap(model, W8 | {"activations": kind}, STEPS, lr=1e-2)
    for step in range(3):
        model(batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.export(tmp_path / "out")
    model.eval()
    with torch.no_grad():
        expected = model(batch(5)).logits.flatten(0, 1)
        with optimizer.full_precision():
            floats = model(batch(5)).logits.flatten(0, 1)
    engine = Engine.from_pretrained(tmp_path / "out", device=device, compute_dtype="fp32")
    assert engine.core.activations == kind
    found = torch.cat(engine.forward(batch(5).tolist())).cpu()
    # Sums in another order may move an input over the edge between two codes.
    assert (found - expected).abs().max() < 0.1 * (floats - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_becomes_the_directory_that_the_model_does(tmp_path, kind, dtype):
    model = tiny_llama()
    for parameter in model.parameters():  # not the rotary frequencies, which stay float32
        parameter.data = parameter.data.to(dtype)
    optimizer = wrap(model, W8 | {"activations": kind}, STEPS)
    model(batch(0), labels=batch(0)).loss.backward()
    optimizer.step()
    optimizer.save(tmp_path / "run")
    optimizer.export(tmp_path / "direct")
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "through")]) == 0
    for path in (tmp_path / "direct").iterdir():
        assert path.read_bytes() == (tmp_path / "through" / path.name).read_bytes(), path.name
    assert model(batch(1)).logits.isfinite().all()  # the quantizers are at work again
    assert all(q.enabled and not q._forward_pre_hooks for q in quantizers(model).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_above_8_bits_are_exported_and_verified_without_int8_inputs(tmp_path, kind, dtype):
    model = tiny_llama().to(dtype)
    rules = [{"match": "*.layers.1.*", "start_bits": 12, "target_bits": 12}]
    optimizer = wrap(model, W8 | {"activations": kind, "rules": rules}, STEPS)
    model(batch(0), labels=batch(0)).loss.backward()
    optimizer.step()
    optimizer.export(tmp_path / "out")
    weights = json.loads((tmp_path / "out" / "moq.json").read_text())["weights"]
    for name, weight in weights.items():
        assert weight["activations"] == (kind if ".layers.0." in name else None)
    checks = verify_checkpoint(tmp_path / "out")
    assert all(check.passed for check in checks), checks
    wide = wrap(tiny_llama(), {"start_bits": 9, "target_bits": 9, "activations": kind}, STEPS)
    wide.model(batch(0), labels=batch(0)).loss.backward()
    wide.step()
    wide.export(tmp_path / "wide")
    checks = verify_checkpoint(tmp_path / "wide")
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_checkpoint_as_the_trained_model(tmp_path, kind):
    pytest.importorskip("compressed_tensors")
    model = tiny_llama()
    optimizer = wrap(model, W8 | {"activations": kind}, STEPS)
    model(batch(0), labels=batch(0)).loss.backward()
    optimizer.step()
    optimizer.export(tmp_path / "out")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    model.eval()
    with torch.no_grad():
        found, expected = read(batch(1)).logits, model(batch(1)).logits
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
