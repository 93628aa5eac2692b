"""The two values of a quantized parameter: what each step makes of them."""

import json
import warnings

import pytest
import torch
from on_gpu import never_waiting
from tiny_decoder import (
    FALLING,
    Decoder,
    assert_same,
    assert_simulated,
    batch,
    loss_of,
    masters,
    train_step,
    weights,
    wrap,
)
from torch import nn

import moq
from moq import _C, MoQOptimizer

NOTHING = {"rules": [{"match": "*", "exclude": True}]}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "grid",
    [
        {"granularity": "per_tensor"},
        {"granularity": "per_channel"},
        {"granularity": "per_channel", "mode": "asymmetric"},
        {"granularity": "per_group", "group_size": 4},
        {"granularity": "per_group", "group_size": 2, "mode": "asymmetric"},
    ],
    ids=lambda grid: "-".join(map(str, grid.values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_simulated_values_are_the_masters_on_the_grid_after_every_step(
    decoder, dtype, grid, rounding
):
    model = decoder(dtype)
    optimizer = wrap(model, FALLING | grid | {"rounding": rounding, "seed": 3}, total_steps=6)
    assert_simulated(optimizer)
    for step in range(6):
        train_step(model, optimizer, step)
        assert_simulated(optimizer)
    assert set(optimizer.num_bits.values()) == {4}


@pytest.mark.parametrize("scale_rule", ["absmax", "mse"])
def test_scales_that_ranks_share_are_collected_without_waiting_for_the_device(device, scale_rule):
    torch.manual_seed(0)
    bits = {"row": 8, "one": 5, "two": 3}  # "row" has scales of its own
    granularity = {name: "per_channel" if name == "row" else "per_tensor" for name in bits}
    masters = {name: torch.randn(6, 10, device=device) for name in bits}
    weights = {name: nn.Parameter(torch.zeros_like(master)) for name, master in masters.items()}

    def trained(block, name):
        words = torch.zeros(_C.COLLECTION_WORDS, dtype=torch.int64, device=device)
        return _C.TrainedParameter(
            name=name,
            parameter=weights[name],
            master=masters[name],
            simulated=weights[name].detach(),
            full_precision=masters[name],
            block=block,
            granularity=granularity[name],
            mode="symmetric",
            rounding="nearest",
            group_size=0,
            transposed=False,
            blend_steps=0,
            first_element=0,
            unsharded_cols=10,
            scale_rule=scale_rule,
            collected=None if name == "row" else words,
        )

    blocks = [_C.ScheduledBlock.from_table(name, {0: width}) for name, width in bits.items()]
    parameters = [trained(block, name) for block, name in enumerate(bits)]
    trainer = _C.Trainer(parameters, _C.Schedule(blocks, 4), seed=0)
    stages = []
    trainer.set_reduction(stages.append)
    trainer.write_simulated()
    for master in masters.values():
        master.mul_(1.5)
    with never_waiting(device):
        trainer.begin_step()
        trainer.end_step()
    assert len(stages) > 1
    for name, weight in weights.items():
        arguments = {"granularity": granularity[name], "scale_rule": scale_rule}
        expected = torch.ops.moq.fake_quantize(masters[name], bits[name], **arguments)
        assert torch.equal(weight, expected), name


def test_conv1d_is_quantized_along_its_output_features():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(7, 40), Conv1D(3, 7))
    optimizer = wrap(model, {"start_bits": 4, "target_bits": 4})
    optimizer.step()
    assert_simulated(optimizer)
    weight = model[0].weight.detach()  # [40 input features, 7 output features]
    assert max(len(column.unique()) for column in weight.T) <= 15
    assert len(weight.unique()) > 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_at_the_simulated_value_is_applied_to_the_master(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False).to(dtype)
    before = layer.weight.detach().clone().float()
    optimizer = MoQOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.5),
        layer,
        {"start_bits": 3, "target_bits": 3},
        total_steps=1,
        verbose=False,
    )
    layer(torch.randn(4, 5, dtype=dtype)).square().sum().backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()
    assert torch.equal(masters(optimizer)["weight"], before - 0.5 * gradient.float())


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p, f: torch.optim.AdamW(p, lr=1e-2, foreach=f),
        lambda p, f: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5, foreach=f),
        lambda p, f: torch.optim.Adagrad(p, lr=1e-2, foreach=f),
        lambda p, f: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1, foreach=f),
        lambda p, f: torch.optim.Rprop(p, lr=1e-2, foreach=f),
    ],
    ids=["AdamW", "SGD", "Adagrad", "NAdam", "Rprop"],
)
def test_without_quantized_parameters_the_trajectory_is_the_plain_optimizers(
    decoder, make, foreach
):
    plain, wrapped = decoder(), decoder()
    plain_optimizer = make(plain.parameters(), foreach)
    optimizer = MoQOptimizer(
        make(wrapped.parameters(), foreach), wrapped, NOTHING, total_steps=5, verbose=False
    )
    optimizer.state_dict()  # asking for state before the first step must leave no trace
    for step in range(5):
        assert train_step(plain, plain_optimizer, step) == train_step(wrapped, optimizer, step)
    assert_same(weights(wrapped), weights(plain))


def test_masters_follow_the_plain_optimizer_when_gradients_are_the_same(decoder):
    plain, wrapped = decoder(), decoder()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    optimizer = wrap(wrapped, FALLING)
    optimizer.state_dict()
    for step in range(4):
        torch.manual_seed(step)
        for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        plain_optimizer.step()
        optimizer.step()
    expected = weights(plain)
    assert_same(
        {name: value.detach() for name, value in masters(optimizer).items()},
        {name: expected[name] for name in masters(optimizer)},
    )


def test_drops_happen_exactly_as_planned(decoder):
    model = decoder(hidden=80, intermediate=80)  # more input features than levels of 6 bits
    config = FALLING | {"rules": [{"match": "layers.1.down_proj", "target_bits": 6}]}
    optimizer = wrap(model, config, total_steps=15)
    names = optimizer.schedule().block_names
    assert names == ["layers.0", "layers.1 (9 to 4 bits)", "layers.1 (9 to 6 bits)"]
    plan = optimizer.schedule().plan()
    block = {
        "layers.0.q_proj.weight": 0,
        "layers.1.v_proj.weight": 1,
        "layers.1.down_proj.weight": 2,
    }
    for step in range(16):
        for name, number in block.items():
            planned = [bits for at, bits in plan[number] if at <= step][-1]
            assert optimizer.num_bits[name] == planned
            rows = model.get_parameter(name).detach()
            assert max(len(row.unique()) for row in rows) <= 2**planned - 1
            if planned <= 6:
                assert max(len(row.unique()) for row in rows) > 2 ** (planned - 1) - 1
        assert_simulated(optimizer)
        train_step(model, optimizer, step)
    assert plan[0][-1] == (12, 4)


def test_a_printed_schedule_shows_no_ranges_of_steps_that_were_made(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING, total_steps=15)
    assert "Ranges: " in str(optimizer.schedule())
    for step in range(15):
        train_step(model, optimizer, step)
    lines = str(optimizer.schedule()).splitlines()
    assert lines[0] == "First step at each bit width, of 15 steps, 15 of them made"
    (row,) = [line.split() for line in lines if "layers" in line]
    assert row[1:] == [str(at) for at, _ in optimizer.schedule().plan()[0]]


def test_addresses_and_identities_of_parameters_never_change(decoder):
    model = decoder()
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    optimizer = wrap(model, FALLING)
    for step in range(3):
        train_step(model, optimizer, step)
    with optimizer.full_precision():
        pass
    optimizer.load_state_dict(optimizer.state_dict())
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before


def test_parameters_that_no_rule_matches_are_left_to_the_inner_optimizer(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    quantized = set(optimizer.num_bits)
    assert "embedding.weight" not in quantized
    assert "lm_head.weight" not in quantized
    assert "layers.0.q_proj.bias" not in quantized
    assert len(quantized) == 12


def test_full_precision_shows_the_masters_and_gives_the_simulated_values_back(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING | {"rounding": "stochastic"})
    train_step(model, optimizer, 0)
    before = weights(model)
    with optimizer.full_precision():
        for name, master in masters(optimizer).items():
            assert torch.equal(model.get_parameter(name), master)
            assert not torch.equal(model.get_parameter(name), before[name])
        with pytest.raises(RuntimeError, match="outside full_precision"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="must not be nested"), optimizer.full_precision():
            pass
    assert_same(weights(model), before)


def test_full_precision_ends_when_its_body_fails(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    before = weights(model)
    with pytest.raises(KeyError), optimizer.full_precision():
        raise KeyError
    assert_same(weights(model), before)
    train_step(model, optimizer, 0)


def test_a_blend_fades_to_the_grid_over_its_steps_after_each_drop():
    torch.manual_seed(0)
    layer = nn.Linear(16, 4, bias=False)
    optimizer = MoQOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.0),
        layer,
        {"start_bits": 6, "target_bits": 3, "blend_steps": 4, "schedule": {"table": {0: 6, 2: 3}}},
        total_steps=8,
        verbose=False,
    )
    master = masters(optimizer)["weight"].detach().clone()
    on_grid = {b: torch.ops.moq.fake_quantize(master, b) for b in (6, 3)}
    for step, ratio in enumerate([0, 0, 1, 0.75, 0.5, 0.25, 0, 0, 0]):
        bits = 6 if step < 2 else 3
        expected = ratio * master + (1 - ratio) * on_grid[bits]
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=1e-7)
        layer.weight.grad = torch.ones_like(layer.weight)
        if 2 <= step < 6:
            with pytest.raises(RuntimeError, match="still blends .* until step 6"):
                optimizer.quantized_parameters()
        optimizer.step()


def test_a_blend_that_would_not_end_is_refused(decoder):
    with pytest.raises(ValueError, match="blend_steps"):
        wrap(decoder(), {"blend_steps": 6, "schedule": {"finish_at": 0.6}}, total_steps=12)


def test_quantized_parameters_carry_both_values(decoder):
    model = decoder(torch.bfloat16)
    optimizer = wrap(model, FALLING)
    train_step(model, optimizer, 0)
    listed = {q.name: q for q in optimizer.quantized_parameters()}
    assert listed.keys() == optimizer.num_bits.keys()
    q = listed["layers.0.up_proj.weight"]
    assert torch.equal(q.simulated, model.layers[0].up_proj.weight)
    assert torch.equal(q.master, masters(optimizer)[q.name])
    assert (q.num_bits, q.mode, q.granularity) == (
        optimizer.num_bits[q.name],
        "symmetric",
        "per_channel",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(decoder, value):
    model = decoder()
    with torch.no_grad():
        model.layers[1].up_proj.weight[3, 2] = value
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj\.weight: weights must be finite"):
        wrap(model, FALLING)


def test_a_schedule_that_cannot_finish_is_refused_before_training(decoder):
    with pytest.raises(moq.Error, match="layers"):
        wrap(decoder(), {"schedule": {"period": 5}, "sensitivity": {"rule": "none"}})


LATE = {
    "start_bits": 9,
    "target_bits": 4,
    "rounding": "stochastic",
    "sensitivity": {"rule": "none"},
    "rules": [{"match": "layers.1.*", "schedule": {"period": 1, "growth": 1.0}}],
}


# Layer 0 would need 15 steps at a period of 3; clamp gives it the 10 that there are.
@pytest.mark.parametrize(
    ("policy", "widths"),
    [("clamp", [9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4]), ("allow", [9, 9, 9, 8, 8, 8, 7, 7, 7, 6, 6])],
)
def test_a_late_schedule_is_trained_to_its_end_under_each_policy(decoder, tmp_path, policy, widths):
    section = {"period": 3, "growth": 1.0}
    with pytest.raises(moq.Error, match="'layers.0', arrives at step 15"):
        wrap(decoder(), LATE | {"schedule": section}, total_steps=10)
    model = decoder()
    config = LATE | {"schedule": section | {"on_unfinished": policy}}
    optimizer = wrap(model, config, total_steps=10)
    for step, width in enumerate(widths):
        assert optimizer.num_bits["layers.0.q_proj.weight"] == width
        assert optimizer.num_bits["layers.1.q_proj.weight"] == max(9 - step, 4)
        assert_simulated(optimizer)
        if step < 10:
            train_step(model, optimizer, step)
    assert optimizer.schedule().finished(10) == (policy == "clamp")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        optimizer.export(tmp_path / "out")
    early = [str(w.message) for w in warned if "have not reached" in str(w.message)]
    assert len(early) == (policy == "allow")
    assert all("6 of 12 weights" in text and "at 6 of 4 bits" in text for text in early)
    manifest = json.loads((tmp_path / "out" / "moq.json").read_text())
    assert {w["trained_bits"] for w in manifest["weights"].values()} == {widths[-1], 4}


def test_loss_falls_while_bits_fall():
    torch.manual_seed(0)
    model = Decoder()
    optimizer = wrap(model, FALLING, total_steps=60)
    losses = []
    for _ in range(60):
        loss = loss_of(model, batch(0))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
