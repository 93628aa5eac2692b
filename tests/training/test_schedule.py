"""The schedule as Python sees it: plans, states, tables, and what rules make of a configuration."""

import json
import random
import re

import pytest
import torch

from moq._C import (
    Error,
    Schedule,
    ScheduledBlock,
    TrainedParameter,
    Trainer,
    stretch,
    stretch_rules,
)
from moq.blocks import blend_end
from moq.config import MoQConfig
from moq.outlook import Width, outlook_of, rules_outlook


def adaptive(total_steps=425):
    """Two layers of 16 to 8 bits, one twice as slow, and a fixed table."""
    return Schedule(
        [
            ScheduledBlock("layers.0", finish_at=0.6),
            ScheduledBlock("layers.1", period=2, finish_at=0.6),
            ScheduledBlock.from_table("head", {0: 16, 5: 8}),
        ],
        total_steps,
        stretch_rule="stepped",
    )


def test_the_default_block_falls_from_16_to_8_bits_within_finish_at():
    schedule = Schedule([ScheduledBlock("layers.0", finish_at=0.6)], 425)
    expected = [(2**k - 1, 16 - k) for k in range(9)]
    assert schedule.plan() == [expected]
    assert [schedule.bits_at(0, step) for step in (0, 1, 126, 127, 255, 425)] == [
        16, 15, 10, 9, 8, 8,
    ]  # fmt: skip
    assert not schedule.finished(254)
    assert schedule.finished(255)


def test_a_state_that_went_through_json_resumes_bit_for_bit():
    schedule = adaptive()
    schedule.set_sensitivities(17, [0.3, 1.0, 0.0])
    resumed = Schedule.from_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert resumed.plan() == schedule.plan()
    assert resumed.state_dict() == schedule.state_dict()
    for each in (schedule, resumed):
        each.set_sensitivities(90, [1.0, 0.1, 0.5])
    assert resumed.plan() == schedule.plan()


def test_what_a_trainer_sees_step_by_step_is_the_plan():
    measurements = {0: [0.1, 0.9, 0.0], 40: [1.0, 0.2, 0.0], 41: [0.0, 1.0, 1.0]}
    walked, seen = adaptive(), []
    for step in range(walked.total_steps + 1):
        seen.append([walked.bits_at(block, step) for block in range(3)])
        if step in measurements:
            walked.set_sensitivities(step, measurements[step])
    planned = adaptive()
    for step, sensitivities in measurements.items():
        planned.set_sensitivities(step, sensitivities)
    assert seen == [
        [planned.bits_at(block, step) for block in range(3)] for step in range(len(seen))
    ]


def test_a_measurement_lies_within_the_bounds_given_before():
    schedule = adaptive()
    earliest, latest = schedule.bounds()
    schedule.set_sensitivities(0, [1.0, 0.0, 0.5])
    for low, drops, high in zip(earliest, schedule.plan(), latest, strict=True):
        assert all(a[0] <= b[0] <= c[0] + 1 for a, b, c in zip(low, drops, high, strict=True))


def test_unfinished_blocks_are_described():
    schedule = Schedule([ScheduledBlock("layers.0", period=10)], 2000, on_unfinished="allow")
    assert schedule.unfinished() == [
        {"block": "layers.0", "arrival": 2550, "bits": 9, "largest_period": 7}
    ]


def test_errors_have_their_own_type_and_say_what_to_change():
    with pytest.raises(Error, match=r"'a', arrives at step 2550.*period <= 7.*total_steps >= 2550"):
        Schedule([ScheduledBlock("a", period=10)], 2000)
    with pytest.raises(Error, match="on_unfinished must be"):
        Schedule([], 10, on_unfinished="warn")
    with pytest.raises(Error, match=r"sensitivity: \{rule: none\}"):
        Schedule([ScheduledBlock("a")], 300, stretch_rule="stepped")


def test_a_state_of_another_version_is_refused():
    state = adaptive().state_dict() | {"version": 99}
    with pytest.raises(Error, match="version must be 3, got 99"):
        Schedule.from_state_dict(state)


@pytest.mark.parametrize(
    "key", ["version", "blocks", "total_steps", "stretch_rule", "measurements"]
)
def test_a_state_without_a_key_is_refused_with_its_name(key):
    state = adaptive().state_dict()
    del state[key]
    with pytest.raises(Error, match=f"schedule state: expected the key '{key}'"):
        Schedule.from_state_dict(state)


def test_a_block_without_a_key_is_refused_with_its_name():
    state = adaptive().state_dict()
    del state["blocks"][1]["finish_at"]
    with pytest.raises(Error, match=r"blocks\[1\]: expected the key 'finish_at'"):
        Schedule.from_state_dict(state)


def test_a_printed_schedule_has_a_row_for_each_pace():
    lines = str(adaptive()).splitlines()
    assert lines[0] == "First step at each bit width, of 425 steps"
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["head"] == ["0", "5"]
    assert rows["layers.1"][-1] == "102-255"
    assert lines[-1] == (
        "Ranges: the step follows the measured sensitivities. Without a probe it is the later "
        "one with finish_at where all layers have equal periods, the earlier one with period; "
        "optimizer.schedule().plan() has it."
    )


def test_of_steps_that_were_made_the_printed_schedule_says_what_happened():
    schedule = adaptive()
    plan = schedule.plan()[1]
    schedule.completed_steps = plan[2][0]
    lines = str(schedule).splitlines()
    assert lines[0] == f"First step at each bit width, of 425 steps, {plan[2][0]} of them made"
    row = next(line for line in lines if "layers.1" in line).split()[1:]
    assert row[:3] == [str(step) for step, _ in plan[:3]]
    assert row[3].startswith(f"{plan[2][0] + 1}-")
    schedule.completed_steps = 425
    rows = [line.split() for line in str(schedule).splitlines()[4:] if line.strip()]
    assert rows[1][1:] == [str(step) for step, _ in plan]
    assert not any("-" in cell for row in rows for cell in row)


@pytest.mark.parametrize("done", [0, 1, 50, 101, 102, 254])
@pytest.mark.parametrize("sensitivities", [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
def test_a_measurement_between_two_steps_moves_drops_within_the_ranges_shown_then(
    done, sensitivities
):
    schedule = adaptive()
    schedule.completed_steps = done
    shown = outlook_of(schedule)
    schedule.set_sensitivities(done, sensitivities)
    for block, drops in zip(shown, schedule.plan(), strict=True):
        for width, (step, bits) in zip(block.widths, drops, strict=True):
            assert width.bits == bits
            assert width.earliest <= step <= width.latest


def test_completed_steps_are_no_state_and_not_negative():
    schedule = adaptive()
    schedule.completed_steps = 3
    assert schedule.state_dict() == adaptive().state_dict()
    with pytest.raises(Error, match="completed_steps must be >= 0, got -1"):
        schedule.completed_steps = -1


def test_without_a_probe_the_later_step_holds_for_finish_at_and_the_earlier_for_periods():
    alike = [ScheduledBlock(name, finish_at=0.6) for name in "ab"]
    schedule = Schedule(alike, 425, stretch_rule="stepped")
    assert schedule.plan() == schedule.bounds()[1] != schedule.bounds()[0]
    schedule = Schedule([ScheduledBlock("a", period=2, start_bits=10)], 425, stretch_rule="stepped")
    assert schedule.plan() == schedule.bounds()[0] != schedule.bounds()[1]


def test_a_printed_schedule_has_the_very_steps_once_they_are_measured():
    schedule = adaptive()
    assert not schedule.measured
    schedule.set_sensitivities(0, [0.0, 1.0, 0.0])
    assert schedule.measured
    plan = schedule.plan()[0]
    row = next(line for line in str(schedule).splitlines() if "layers.0" in line)
    assert row.split()[1:-2] == [str(step) for step, _ in plan]
    assert "Ranges" not in str(schedule)


def test_a_schedule_draws_itself(tmp_path):
    pytest.importorskip("matplotlib")
    adaptive().plot(tmp_path / "plan.svg")
    assert "layers.1" in (tmp_path / "plan.svg").read_text()
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        adaptive().plot(tmp_path / "plan.pdf")


def trained_parameter(block=0):
    values = torch.ones(2, 4)
    return TrainedParameter(
        name="layers.0.weight",
        parameter=values,
        master=values.clone(),
        simulated=values,
        full_precision=values.clone(),
        block=block,
        granularity="per_channel",
        mode="symmetric",
        rounding="nearest",
        group_size=0,
        transposed=False,
        blend_steps=0,
        first_element=0,
        unsharded_cols=4,
    )


@pytest.mark.parametrize(
    ("wide", "width"),
    [
        (ScheduledBlock("a", start_bits=32, target_bits=8), 32),
        (ScheduledBlock("a", start_bits=8, target_bits=1), 1),
        (ScheduledBlock.from_table("a", {0: 17, 5: 8}), 17),
    ],
)
def test_a_trainer_refuses_widths_that_have_no_grid(wide, width):
    schedule = Schedule([wide], 100, on_unfinished="allow")
    message = rf"planned for layers.0.weight must lie in \[2, 16\] bits, got {width}"
    with pytest.raises(Error, match=message):
        Trainer([trained_parameter()], schedule, seed=0)
    trainer = Trainer([trained_parameter()], Schedule([ScheduledBlock("a")], 255), seed=0)
    with pytest.raises(Error, match=message):
        trainer.restore(schedule, 0)
    assert trainer.schedule.plan()[0][0] == (0, 16)


def test_the_rules_of_the_configuration_are_those_of_the_schedule():
    assert stretch_rules() == ["none", "stepped", "linear"]
    for rule in stretch_rules():
        MoQConfig.from_dict({"sensitivity": {"rule": rule}})


def test_an_outlook_marks_drops_beyond_the_training():
    schedule = Schedule(
        [ScheduledBlock("a", period=10, start_bits=10)],
        60,
        on_unfinished="allow",
        stretch_rule="stepped",
    )
    assert outlook_of(schedule)[0].widths == (
        Width(10, 0, 0),
        Width(9, 10, 50),
        Width(8, 30, None),
    )
    assert [str(width) for width in outlook_of(schedule)[0].widths] == ["0", "10-50", "30 or never"]


def test_rules_are_planned_for_several_layers_each():
    config = MoQConfig.from_dict(
        {"rules": [{"match": "*.mlp.*", "target_bits": 4}, {"match": "*.o", "exclude": True}]}
    )
    outlook = rules_outlook(config, 400)
    assert [block.name for block in outlook] == ["default", "*.mlp.*"]
    arrival = outlook[1].widths[-1]
    assert (arrival.bits, arrival.latest) == (4, 240)
    assert arrival.earliest < 240


@pytest.mark.parametrize("every", [{"exclude": True}, {"target_bits": 4}])
def test_the_default_is_not_planned_where_a_rule_takes_every_layer(every):
    rules = [{"match": "*"} | every, {"match": "*.mlp.*", "target_bits": 6}]
    names = [block.name for block in rules_outlook(MoQConfig.from_dict({"rules": rules}), 400)]
    assert names == (["*.mlp.*"] if "exclude" in every else ["*", "*.mlp.*"])


def test_rules_that_exclude_every_layer_cannot_be_planned():
    config = MoQConfig.from_dict({"rules": [{"match": "*", "exclude": True}]})
    with pytest.raises(ValueError, match="at least one must quantize"):
        rules_outlook(config, 400)


def test_rules_have_schedules_of_their_own():
    config = MoQConfig.from_dict(
        {
            "start_bits": 10,
            "schedule": {"finish_at": 0.5},
            "sensitivity": {"rule": "none"},
            "rules": [
                {"match": "*.mlp.*", "schedule": {"period": 7, "offset": 3, "growth": 1.0}},
                {"match": "*.o", "start_bits": 16, "schedule": {"table": {0: 16, 11: 8}}},
                {"match": "*.q", "target_bits": 9, "schedule": {"finish_at": 0.25}},
            ],
        }
    )
    steps = {
        block.name: [(width.latest, width.bits) for width in block.widths]
        for block in rules_outlook(config, 100)
    }
    assert steps == {
        "default": [(0, 10), (17, 9), (50, 8)],
        "*.mlp.*": [(0, 10), (10, 9), (17, 8)],
        "*.o": [(0, 16), (11, 8)],
        "*.q": [(0, 10), (25, 9)],
    }


def random_config(seed: int) -> dict:
    """A configuration of random shape, with rules that deviate in every way."""
    rng = random.Random(seed)

    def timing(start: int, target: int) -> dict:
        shape = rng.choice(["finish_at", "period", "table"])
        if shape == "finish_at":
            return {"finish_at": rng.randint(30, 100) / 100}
        if shape == "period":
            growth = rng.choice([1.0, 1.3, 2.0])
            return {"period": rng.randint(1, 40), "offset": rng.randint(0, 20), "growth": growth}
        widths = sorted(rng.sample(range(target + 1, start), k=min(2, start - target - 1)))[::-1]
        steps = sorted(rng.sample(range(1, 400), k=len(widths) + 1))
        return {"table": {0: start} | dict(zip(steps, [*widths, target], strict=True))}

    def widths() -> dict:
        target = rng.randint(2, 15)
        return {"target_bits": target, "start_bits": rng.randint(target + 1, 16)}

    own = widths()
    rules = [
        (bits := widths())
        | {"match": f"*.{name}", "schedule": timing(*sorted(bits.values())[::-1])}
        for name in rng.sample(["q", "k", "v", "o"], k=rng.randint(0, 4))
    ]
    section = timing(own["start_bits"], own["target_bits"])
    section["on_unfinished"] = rng.choice(["error", "clamp", "allow"])
    rule = rng.choice(["none", "stepped", "linear"])
    return own | {"rules": rules, "schedule": section, "sensitivity": {"rule": rule}}


def with_targets_of_at_least(config: dict, bits: int) -> dict:
    """The configuration whose widths end at so many bits, or at their starts below."""

    def raised(widths: dict) -> dict:
        target = max(widths["target_bits"], min(widths["start_bits"], bits))
        table = widths["schedule"].get("table")
        kept: dict[int, int] = {}
        for step, width in (table or {}).items():
            if max(width, target) not in kept.values():
                kept[step] = max(width, target)
        schedule = widths["schedule"] | ({"table": kept} if table else {})
        return widths | {"target_bits": target, "schedule": schedule}

    return raised(config) | {"rules": [raised(rule) for rule in config["rules"]]}


@pytest.mark.parametrize("seed", range(60))
def test_any_configuration_finishes_or_is_refused_with_what_would_help(seed):
    drawn = random_config(seed)
    config = MoQConfig.from_dict(drawn)
    assert MoQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    policy = config.schedule.on_unfinished
    try:
        outlook = rules_outlook(config, 300)
    except Error as error:
        assert policy == "error"
        change = re.search(r"total_steps >= (\d+)", str(error))
        assert rules_outlook(config, int(change.group(1)))
        with pytest.raises(Error):  # no smaller one would do
            rules_outlook(config, int(change.group(1)) - 1)
        reached = int(re.search(r"target_bits >= (\d+)", str(error)).group(1))
        assert rules_outlook(MoQConfig.from_dict(with_targets_of_at_least(drawn, reached)), 300)
        with pytest.raises(Error):
            rules_outlook(MoQConfig.from_dict(with_targets_of_at_least(drawn, reached - 1)), 300)
        return
    for block in outlook:
        bits = [width.bits for width in block.widths]
        assert bits == sorted(set(bits), reverse=True)
        latest = [width.latest for width in block.widths]
        made = [step for step in latest if step is not None]
        assert made == sorted(made)
        if policy != "allow":
            assert made == latest
            assert latest[-1] <= 300


def test_a_measured_schedule_shows_what_measuring_changed():
    blocks = [ScheduledBlock(f"h.{i}", start_bits=10, finish_at=0.6) for i in range(3)]
    schedule = Schedule(blocks, 1000, stretch_rule="stepped")
    assert "unmeasured" not in str(schedule)
    schedule.set_sensitivities(0, [1.0, 0.3, 0.3])
    sensitive, other, _ = outlook_of(schedule)
    assert (sensitive.stretch, other.stretch) == (5.0, 2.0)
    assert sensitive.unmeasured == other.unmeasured == 600
    assert sensitive.widths[-1] == Width(8, 600, 600)
    assert other.widths[-1].latest < 600
    rows = [line.split() for line in str(schedule).splitlines() if line.strip().startswith("h.")]
    assert [(row[0], row[-2], row[-1]) for row in rows] == [
        ("h.0", "x5", "600"),
        ("h.{1-2}", "x2", "600"),
    ]
    assert rows[1][-3] == str(other.widths[-1])


@pytest.mark.parametrize(
    ("rule", "factors"),
    [("none", [1, 1, 1, 1]), ("stepped", [1, 1, 3, 5]), ("linear", [1, 1.5, 3, 5])],
)
def test_a_rule_is_a_named_function_of_the_sensitivity(rule, factors):
    assert [stretch(rule, s) for s in (0.0, 0.125, 0.5, 1.0)] == factors
    with pytest.raises(Error, match="'none', 'stepped' or 'linear', got 'cubic'"):
        stretch("cubic", 0.5)


@pytest.mark.parametrize(
    ("step", "end"), [(0, 0), (2, 0), (3, 8), (6, 8), (7, 12), (8, 13), (40, 13)]
)
def test_a_blend_ends_so_many_steps_after_the_last_drop_so_far(step, end):
    assert blend_end([(0, 9), (3, 8), (7, 7), (8, 6)], 5, step) == end
