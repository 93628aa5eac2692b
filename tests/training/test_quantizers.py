"""Every grid that a weight can be trained on: its points at every step, and its checkpoint."""

import pytest
import torch
from tiny_decoder import assert_simulated, batch, tiny_llama, train_step, wrap
from torch import nn

import moq
from moq import cli
from moq.config import MoQConfig, Rule
from moq.verify import verify_checkpoint

STEPS = 8
GRIDS = {
    "symmetric": dict(target_bits=4),
    "asymmetric": dict(target_bits=3, mode="asymmetric"),
    "stochastic": dict(target_bits=4, rounding="stochastic"),
    "ternary": dict(target_bits=2, mode="ternary"),
    "binary": dict(target_bits=1, mode="binary"),
    "mse": dict(target_bits=3, scale="mse"),
}
GROUPINGS = {
    "per_tensor": dict(granularity="per_tensor"),
    "per_channel": dict(granularity="per_channel"),
    "per_group": dict(granularity="per_group", group_size=4),
    "groups": dict(granularity="per_group", groups=4),
}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_step_leaves_the_points_of_the_grid(decoder, device, grid, grouping):
    widths = {"start_bits": 6, "schedule": {"finish_at": 0.75}}
    optimizer = wrap(decoder().to(device), widths | GRIDS[grid] | GROUPINGS[grouping], STEPS)
    for step in range(STEPS):
        assert_simulated(optimizer)
        train_step(optimizer.model, optimizer, step)
    assert_simulated(optimizer)
    assert set(optimizer.num_bits.values()) == {GRIDS[grid]["target_bits"]}


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_was_trained_is_exported_and_verified(
    tmp_path, decoder, device, grid, grouping, dtype
):
    config = {"start_bits": 6, "schedule": {"finish_at": 0.5}}
    optimizer = wrap(decoder(dtype).to(device), config | GRIDS[grid] | GROUPINGS[grouping], STEPS)
    for step in range(STEPS):
        train_step(optimizer.model, optimizer, step)
    optimizer.export(tmp_path / "out")
    checks = verify_checkpoint(tmp_path / "out")
    assert [check.passed for check in checks[:3]] == [True, True, True], checks


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("grid", GRIDS)
def test_the_engine_answers_as_what_was_trained(tmp_path, grid, grouping):
    pytest.importorskip("transformers")
    model = tiny_llama()
    bits = {"start_bits": GRIDS[grid]["target_bits"]}
    optimizer = wrap(model, bits | GRIDS[grid] | GROUPINGS[grouping], STEPS)
    model(batch(0), labels=batch(0)).loss.backward()
    optimizer.step()
    optimizer.export(tmp_path / "out")
    checks = verify_checkpoint(tmp_path / "out")
    assert all(check.passed for check in checks), checks


def test_a_layer_of_zeros_stays_zero_in_every_mode():
    for grid in GRIDS.values():
        layer = nn.Linear(8, 4, bias=False)
        nn.init.zeros_(layer.weight)
        layer.weight.data[0] = 1.0
        optimizer = wrap(layer, {"start_bits": grid["target_bits"]} | grid, STEPS)
        assert not layer.weight[1:].any(), grid
        assert layer.weight[0].eq(layer.weight[0, 0]).all(), grid
        assert optimizer.num_bits == {"weight": grid["target_bits"]}


# ------------------------------------------------------------------------- DeepSpeed's groups


@pytest.mark.parametrize(
    ("groups", "granularity", "group_size"),
    [
        (1, "per_tensor", 0),
        (3, "per_rows", 4),
        (12, "per_channel", 0),
        (48, "per_group", 5),
    ],
)
@pytest.mark.parametrize("conv1d", [False, True])
def test_groups_are_consecutive_weights(groups, granularity, group_size, conv1d):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(12, 20) if conv1d else nn.Linear(20, 12)
    config = {
        "start_bits": 4,
        "target_bits": 4,
        "granularity": "per_group",
        "groups": groups,
    }
    optimizer = wrap(layer, config, STEPS, lr=0.0)
    (m,) = optimizer._masters.matched
    assert (m.granularity, m.group_size) == (granularity, group_size)
    master = optimizer.state[layer.weight]["moq_master"].detach()
    runs = (master.t() if conv1d else master).reshape(groups, -1)
    step = runs.abs().amax(1, keepdim=True) / 7
    expected = (runs * (1.0 / step)).round() * step
    actual = (layer.weight.detach().t() if conv1d else layer.weight.detach()).reshape(groups, -1)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("groups", [5, 18, 36])
def test_groups_that_cut_output_features_are_refused_at_start(groups):
    config = {"granularity": "per_group", "groups": groups}
    with pytest.raises(ValueError, match=r"weight \(rule 'default'\): groups must divide its 12"):
        wrap(nn.Linear(20, 12), config, STEPS)


def test_a_rule_can_choose_between_a_size_and_a_number_of_groups():
    config = MoQConfig(
        granularity="per_group",
        group_size=16,
        rules=(Rule("a", groups=4), Rule("b", granularity="per_channel"), Rule("c", mode="binary")),
    )
    a, b, c = (config.spec(rule) for rule in config.rules)
    assert (a.group_size, a.groups) == (0, 4)
    assert (b.group_size, b.groups) == (0, 0)
    assert (c.target_bits, c.group_size) == (1, 16)


def test_the_start_table_names_the_grid(decoder, capsys):
    config = {
        "mode": "ternary",
        "target_bits": 2,
        "granularity": "per_group",
        "groups": 4,
        "scale": "mse",
    }
    model = decoder()
    moq.MoQOptimizer(torch.optim.AdamW(model.parameters()), model, config, total_steps=STEPS)
    assert "per_rows of 3, ternary, mse" in capsys.readouterr().out


def test_moq_verify_and_inspect_read_binary_checkpoints(tmp_path, decoder, capsys):
    optimizer = wrap(decoder(), {"start_bits": 1, **GRIDS["binary"]}, STEPS)
    train_step(optimizer.model, optimizer, 0)
    optimizer.export(tmp_path / "out")
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "1→2b" in capsys.readouterr().out
