"""DeepSpeed's configurations: the same schedule in true steps, and everything else said."""

import copy
import json
import random
import warnings

import pytest
from tiny_decoder import train_step, wrap

from moq import MoQConfig
from moq.cli import main
from moq.config import Timing
from moq.deepspeed import Conversion, convert


def old(start=16, target=8, period=1000, offset=1000, **more):
    return {
        "quantize_training": {
            "enabled": True,
            "quantize_bits": {"start_bits": start, "target_bits": target},
            "quantize_schedule": {"quantize_period": period, "schedule_offset": offset},
        }
        | more
    }


def new(*groups, offset=0, **shared):
    named = {
        f"wq{i}": {
            "params": {"start_bits": start, "target_bits": target, "quantization_period": period},
            "modules": modules,
        }
        for i, (start, target, period, modules) in enumerate(groups)
    }
    return {
        "compression_training": {
            "weight_quantization": {
                "shared_parameters": {"enabled": True, "schedule_offset": offset} | shared,
                "different_groups": named,
            }
        }
    }


def width_at(timing: Timing, step: int) -> int:
    return [bits for at, bits in sorted(timing.table.items()) if at <= step][-1]


def run_old(start, target, period, offset, steps):
    """DeepSpeed 0.4's Quantizer as it counts, for a model of one matrix.

    Returns the width after each step; 16 while it does not quantize at all.
    """
    counts, widths, quantizes = 0, [16 if offset else start], offset == 0
    for _ in range(steps):
        counts += 6
        if offset > 0 and counts >= offset:
            offset, counts, quantizes = 0, 0, True
        if quantizes and start != target and counts >= period:
            period <<= 1
            start -= 1
        widths.append(start if quantizes else 16)
    return widths


def run_new(start, target, period, offset, steps):
    """DeepSpeed 0.7's, whose scheduler switches quantization on after the step that it follows."""
    counts, widths, enabled = 0, [16 if offset else start], offset == 0
    quantizes = enabled
    for step in range(1, steps + 1):
        if enabled:
            counts, quantizes = counts + 1, True
            if start != target and counts >= period:
                period <<= 1
                start -= 1
        widths.append(start if quantizes else 16)
        enabled = enabled or step >= offset
    return widths


# DeepSpeed's own settings, and the optimizer step at which they reach 8 bits.
@pytest.mark.parametrize(
    ("settings", "arrival"),
    [
        ({"period": 400, "offset": 0}, 8534),
        ({}, 21501),
        ({"start": 12, "period": 10, "offset": 0}, 14),
        ({"start": 12, "period": 400, "offset": 0}, 534),
        ({"start": 12, "period": 64, "offset": 0}, 86),
    ],
)
def test_the_old_spelling_arrives_when_deepspeed_does(settings, arrival):
    config = convert(old(**settings)).config
    assert max(config.schedule.table) == arrival
    assert config.schedule.table[arrival] == config.target_bits == 8


@pytest.mark.parametrize("seed", range(30))
def test_the_old_spelling_has_the_widths_of_deepspeeds_counter(seed):
    rng = random.Random(seed)
    target = rng.randint(3, 14)
    start = rng.randint(target, 16)
    # Below a period of 6 several parameters of one step drop in turn: one matrix shows less.
    period, offset = rng.randint(6, 60), rng.choice([0, rng.randint(1, 80)])
    config = convert(old(start, target, period, offset)).config
    expected = run_old(start, target, period, offset, 400)
    assert [width_at(config.schedule, step) for step in range(401)] == expected


@pytest.mark.parametrize("seed", range(30))
def test_the_new_spelling_has_the_widths_of_deepspeeds_counter(seed):
    rng = random.Random(seed)
    target = rng.randint(3, 14)
    start = rng.randint(target, 16)
    period, offset = rng.randint(1, 40), rng.choice([0, rng.randint(1, 50)])
    config = convert(new((start, target, period, ["mlp"]), offset=offset)).config
    expected = run_new(start, target, period, offset, 300)
    timing = config.rules[1].schedule
    assert [width_at(timing, step) for step in range(301)] == expected


def test_a_period_shorter_than_a_steps_counts_makes_several_drops_in_a_step():
    table = convert(old(start=12, target=8, period=1, offset=0)).config.schedule.table
    assert table == {0: 12, 1: 9, 2: 8}


def test_groups_become_rules_and_the_rest_is_not_quantized(decoder):
    ds = new((12, 8, 2, ["up_proj", "gate_proj"]), (9, 4, 1, ["down_proj"]), offset=1)
    with pytest.warns(UserWarning, match="changed: the symmetric grid"):
        config = MoQConfig.from_deepspeed(ds)
    optimizer = wrap(decoder(), config, total_steps=40)
    assert sorted({name.split(".")[2] for name in optimizer.num_bits}) == [
        "down_proj", "gate_proj", "up_proj",
    ]  # fmt: skip
    plans = dict(zip(optimizer.schedule().block_names, optimizer.schedule().plan(), strict=True))
    fast = next(plan for name, plan in plans.items() if "16 to 4" in name)
    assert fast == [(0, 16), (2, 8), (3, 7), (5, 6), (9, 5), (17, 4)]


def test_a_group_of_everything_replaces_the_default_without_a_warning(decoder):
    with pytest.warns(UserWarning):
        config = MoQConfig.from_deepspeed(new((12, 8, 2, ["*"])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(wrap(decoder(), config, total_steps=40).num_bits) == 14


def test_everything_is_quantized_by_the_old_spelling_as_in_deepspeed(decoder):
    config = convert(old(start=9, target=8, period=12, offset=0)).config
    model = decoder()
    optimizer = wrap(model, config, total_steps=4)
    assert {"embedding.weight", "lm_head.weight"} <= optimizer.num_bits.keys()
    for step in range(3):
        train_step(model, optimizer, step)
        assert set(optimizer.num_bits.values()) == {9 if step < 1 else 8}


def test_quantize_weight_in_forward_goes_to_the_target_at_once():
    ds = new((16, 8, 50, ["*"]), offset=10, quantize_weight_in_forward=True)
    conversion = convert(ds)
    assert conversion.config.rules[1].schedule.table == {0: 16, 11: 8}
    assert any("quantize_weight_in_forward" in text for text in conversion.kept)
    assert not any("quantize_weight_in_forward" in text for text in conversion.changed)


def run_eigen(start, target, period, offset, layers, factors, steps):
    """DeepSpeed 0.4's with eigenvalues: every layer has its own period, all share the counter.

    Each of a layer's parameters asks in turn, so that a layer can drop several times in a step; a
    drop makes the period twice, and factor times, as long. Widths of each layer after each step.
    """
    counts, quantizes = 0, offset == 0
    bits, periods = [start] * len(factors), [period] * len(factors)
    widths = [list(bits)]
    for _ in range(steps):
        counts += 6 * layers
        if offset > 0 and counts >= offset:
            offset, counts, quantizes = 0, 0, True
        for layer, factor in enumerate(factors):
            while quantizes and bits[layer] != target and counts >= periods[layer]:
                periods[layer] = (periods[layer] << 1) * factor
                bits[layer] -= 1
        widths.append(list(bits))
    return widths


# DeepSpeed's own settings with eigenvalues, and the steps at which a layer that is not sensitive at
# all reaches 8 bits, and the most sensitive one.
@pytest.mark.parametrize(
    ("settings", "arrivals"),
    [
        ({"start": 12, "period": 10}, (2, 139)),  # MRPC
        ({"start": 12, "period": 8}, (1, 112)),  # CoLA, RTE, WNLI
        ({"start": 12, "period": 18}, (2, 250)),  # QQP
        ({"start": 14, "period": 12}, (6, 16_667)),  # MNLI
    ],
)
def test_with_eigenvalues_layers_arrive_when_deepspeeds_do(decoder, settings, arrivals):
    eigenvalue = {"enabled": True, "layer_num": 12}
    config = convert(old(offset=0, eigenvalue=eigenvalue, **settings)).config
    schedule = wrap(decoder(), config, total_steps=20_000).schedule()
    earliest, latest = schedule.bounds()
    assert {(low[-1][0], high[-1][0]) for low, high in zip(earliest, latest, strict=True)} == {
        arrivals
    }
    sensitivities = [0.0, 1.0, 0.6, *[1.0] * (schedule.num_blocks - 3)]
    schedule.set_sensitivities(0, sensitivities)
    factors = [1, 5, 3]
    start, target = settings["start"], 8
    widths = run_eigen(start, target, settings["period"], 0, 12, factors, arrivals[1])
    for step, expected in enumerate(widths):
        found = [schedule.bits_at(block, step) for block in range(3)]
        assert found == expected, step
    assert [plan[-1][0] for plan in schedule.plan()[:2]] == list(arrivals)


@pytest.mark.parametrize("seed", range(30))
def test_with_eigenvalues_layers_have_the_widths_of_deepspeeds_counter(decoder, seed):
    rng = random.Random(seed)
    layers, target = rng.randint(1, 24), rng.randint(3, 14)
    start = rng.randint(target, 16)
    period, offset = rng.randint(1, 300), rng.choice([0, rng.randint(1, 500)])
    ds = old(start, target, period, offset, eigenvalue={"enabled": True, "layer_num": layers})
    config = convert(ds, on_unfinished="allow").config
    schedule = wrap(decoder(), config, total_steps=400).schedule()
    sensitivities = [rng.random() for _ in range(schedule.num_blocks)]
    schedule.set_sensitivities(0, sensitivities)
    factors = [1 + int(4 * s) for s in sensitivities]
    expected = run_eigen(start, target, period, offset, layers, factors, 400)
    for step, widths in enumerate(expected):
        assert [schedule.bits_at(b, step) for b in range(len(factors))] == widths, step


def test_what_eigenvalues_change_is_said():
    eigenvalue = {"enabled": True, "layer_num": 12, "max_iter": 50, "tol": 0.05}
    conversion = convert(old(start=12, period=720, offset=144, eigenvalue=eigenvalue))
    config = conversion.config
    assert (config.schedule.period, config.schedule.counts_per_step) == (720, 72)
    assert config.schedule.offset == 2
    assert any("12 bits from the start" in text for text in conversion.changed)
    assert any("optimizer.probe measures once" in text for text in conversion.changed)
    assert any(
        "layer_name, stability, gas_boundary_resolution" in text for text in conversion.ignored
    )
    assert config.sensitivity.to_dict() == {
        "measure": "eigenvalue", "form": "auto", "rule": "stepped", "tolerance": 0.05,
        "max_products": 50, "max_cost": 0.02,
    }  # fmt: skip


def test_blending_lasts_as_long_as_the_ratio_takes_to_fall():
    mixed = {"enabled": True, "quantize_change_ratio": 0.001}
    assert convert(old(fp16_mixed_quantize=mixed)).config.blend_steps == 1000
    mixed["quantize_change_ratio"] = 0.3
    conversion = convert(old(fp16_mixed_quantize=mixed))
    assert conversion.config.blend_steps == 4
    assert any("fades into its grid over 4 steps" in text for text in conversion.changed)


def test_the_grid_is_taken_over():
    algorithm = {"q_type": "asymmetric", "rounding": "stochastic"}
    config = convert(old(quantize_algo=algorithm)).config
    assert (config.mode, config.rounding, config.granularity) == (
        "asymmetric", "stochastic", "per_tensor",
    )  # fmt: skip
    conversion = convert(new((8, 8, 1, ["*"]), quantize_groups=64, rounding="stochastic"))
    assert (conversion.config.granularity, conversion.config.groups) == ("per_group", 64)
    assert any("quantize_groups 64" in text for text in conversion.changed)


def test_two_bits_and_one_are_signs_as_in_deepspeed(decoder):
    ds = new((8, 2, 1, ["up_proj", "gate_proj"]), (8, 1, 1, ["down_proj"]))
    rules = convert(ds).config.rules
    assert [rule.mode for rule in rules] == [None, "ternary", "ternary", "binary"]
    model = decoder()
    optimizer = wrap(model, convert(ds).config, total_steps=80)
    for step in range(64):
        train_step(model, optimizer, step)
    assert optimizer.num_bits["layers.0.up_proj.weight"] == 2
    assert optimizer.num_bits["layers.1.down_proj.weight"] == 1
    assert len(model.layers[0].up_proj.weight.detach().unique()) == 3
    assert len(model.layers[1].down_proj.weight.detach().unique()) == 2


def test_keys_without_meaning_are_listed():
    ds = old(quantize_type="symmetric", quantize_verbose=True, quantizer_kernel=True)
    ds |= {"train_batch_size": 8, "fp16": {"enabled": True}}
    ignored = "\n".join(convert(ds).ignored)
    for key in ("quantize_type", "quantize_verbose", "quantizer_kernel", "train_batch_size, fp16"):
        assert key in ignored
    ds = new((8, 8, 1, ["*"]))
    ds["compression_training"]["row_pruning"] = {}
    assert "compression_training.row_pruning: only weight" in str(convert(ds))
    shared = {"enabled": True, "range_calibration": "static"}
    ds["compression_training"]["activation_quantization"] = {"shared_parameters": shared}
    assert "activation_quantization: write activations: static (8 bits)" in str(convert(ds))
    shared["quantization_type"] = "asymmetric"
    assert "write activations: static_asymmetric (8 bits)" in str(convert(ds))
    del shared["range_calibration"]  # DeepSpeed's default is dynamic
    assert "write activations: dynamic_asymmetric (8 bits)" in str(convert(ds))


def edited(ds: dict, path: str, value) -> dict:
    ds = copy.deepcopy(ds)
    *parents, key = path.split("/")
    inner = ds
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    return ds


OLD, NEW = "quantize_training", "compression_training/weight_quantization"


@pytest.mark.parametrize(
    ("ds", "error", "message"),
    [
        ({}, ValueError, "got none"),
        ({"quantize_training": {}}, ValueError, "DeepSpeed quantizes nothing"),
        (old() | new((8, 8, 1, ["*"])), ValueError, "got quantize_training and compression_train"),
        (edited(old(), f"{OLD}/quantize-algo", {}), ValueError, "did you mean 'quantize_algo'"),
        (edited(old(), f"{OLD}/enabled", "true"), TypeError, "enabled must be true or false"),
        (edited(old(), f"{OLD}/quantize_bits", {}), ValueError, "target_bits is missing"),
        (old(target=-1), ValueError, r"quantize_training: .*must .*\[1, 16\]"),
        (old(start=4), ValueError, r"start_bits must be at least target_bits \(8\), got 4"),
        (old(period=0), ValueError, "quantize_period must be >= 1, got 0"),
        (old(offset=-6), ValueError, "schedule_offset must be >= 0"),
        (old(quantize_algo={"q_type": "symetric"}), ValueError, "did you mean 'symmetric'"),
        (old(eigenvalue={"enabled": True}), ValueError, "layer_num must be the number of layers"),
        (old(eigenvalue={"enabled": True, "layers": 3}), ValueError, "eigenvalue.layers is not a"),
        (old(fp16_mixed_quantize={"quantize_change_ratio": 0.0}), ValueError, r"\(0, 1\], got 0"),
        (old(quantize_groups=0), ValueError, "quantize_groups must be >= 1"),
        (new(), ValueError, "different_groups must have at least one group"),
        (new((8, 8, 0, ["*"])), ValueError, "quantization_period must be >= 1"),
        (new((8, 8, 1, ["*"]), offset=-1), ValueError, "schedule_offset must be >= 0, got -1"),
        (new((8, 8, 1, ["("])), ValueError, "must be a regular expression"),
        (new((4, 8, 1, ["*"])), ValueError, "weight_quantization: start_bits must be at least"),
        (new((8, 2, 1, ["*"]), quantization_type="asymmetric"), ValueError, "'symmetric' for 2 b"),
        (new((8, 1, 1, ["*"]), rounding="stochastic"), ValueError, "rounding must be 'nearest'"),
        (old(target=1), ValueError, "quantize_training: target_bits must lie in"),
        (
            edited(new((8, 8, 1, ["*"])), f"{NEW}/different_groups/wq0/parms", {}),
            ValueError,
            r"different_groups\['wq0'\]\.parms is not a known key",
        ),
        ({"compression_training": 3}, TypeError, "compression_training must be a mapping, got 3"),
        ([], TypeError, r"ds_config must be a mapping, got \[\]"),
    ],
)
def test_what_deepspeed_would_have_swallowed_is_refused(ds, error, message):
    with pytest.raises(error, match=message):
        convert(ds)


def test_an_unfinished_schedule_is_refused_unless_told_otherwise(decoder):
    """The tutorial's example: MRPC, 345 steps, of which 16 to 8 bits would take 8,534."""
    ds = old(period=400, offset=0)
    config = convert(ds).config
    with pytest.raises(RuntimeError, match="total_steps >= 8534"):
        wrap(decoder(), config, total_steps=345)
    allowed = wrap(decoder(), convert(ds, on_unfinished="allow").config, total_steps=345)
    assert allowed.schedule().bits_at(0, 345) == 13


def test_the_schedule_command_shows_where_deepspeed_ends(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(old(period=400, offset=0)))
    command = ["schedule", str(path), "--steps", "345", "--deepspeed"]
    assert main(command) == 0
    captured = capsys.readouterr().out
    heading, row = (line.split() for line in captured.splitlines() if line.split()[1:2] in _COLUMNS)
    widths = dict(zip(heading[1:], row[1:], strict=True))
    assert widths["13"] != "-" and widths["12"] == "-" and widths["8"] == "-"
    assert "- and never: not within the training." in captured
    assert main([*command, "--on-unfinished", "error"]) == 1
    assert "total_steps >= 8534" in capsys.readouterr().err


_COLUMNS = (["16"], ["0"])


def test_a_pattern_that_matches_nothing_is_refused(decoder):
    config = convert(new((8, 8, 1, ["attention.self"]))).config
    with pytest.raises(ValueError, match="matches nothing"):
        wrap(decoder(), config)


def test_a_configuration_of_deepspeed_given_as_moqs_is_sent_to_its_reader(tmp_path, capsys):
    with pytest.raises(ValueError, match="MoQConfig.from_deepspeed reads it"):
        MoQConfig.load(old())
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(old(period=6, offset=0, start=10)))
    assert main(["schedule", str(path), "--steps", "10"]) == 1
    assert "--deepspeed" in capsys.readouterr().err
    assert main(["schedule", str(path), "--steps", "10", "--deepspeed"]) == 0
    captured = capsys.readouterr()
    row = next(line for line in captured.out.splitlines() if line.split()[:1] == ["*"])
    assert row.split() == ["*", "0", "1", "2"]
    assert not any(line.split()[:1] == ["default"] for line in captured.out.splitlines())
    assert "changed: quantize_period 6" in captured.err
    assert "kept: every weight matrix" in captured.err


def test_the_conversion_prints_every_line():
    conversion = Conversion(MoQConfig(), ("a", "b"), ("c",), ("d",))
    assert str(conversion) == "changed: a\nchanged: b\nignored: c\nkept: d"
