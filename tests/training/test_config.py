"""The configuration: what it accepts, and how it refuses the rest."""

import json

import pytest

from moq.config import MoQConfig, QuantSpec, Rule, ScheduleConfig, SensitivityConfig, Timing

FULL = {
    "start_bits": 12,
    "target_bits": 6,
    "mode": "asymmetric",
    "granularity": "per_group",
    "group_size": 32,
    "rounding": "stochastic",
    "blend_steps": 5,
    "rules": [
        {"match": "lm_head", "exclude": True},
        {"match": "re:.*mlp.*", "target_bits": 8, "modules": ["linear", "head"]},
        {"match": "*.o", "schedule": {"period": 3}},
    ],
    "schedule": {"table": {"0": 12, "30": 9, "50": 6}, "on_unfinished": "clamp"},
    "sensitivity": {"measure": "eigenvalue", "tolerance": 0.1},
    "seed": 7,
    "master_dtype": "parameter",
}


def test_all_fields_have_defaults_and_the_default_schedule_ends_at_sixty_percent():
    assert MoQConfig().schedule == ScheduleConfig(finish_at=0.6)
    assert MoQConfig().spec() == QuantSpec(start_bits=16, target_bits=8)


def test_dict_json_yaml_and_python_make_equal_configurations(tmp_path):
    yaml = pytest.importorskip("yaml")
    (tmp_path / "config.json").write_text(json.dumps(FULL))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FULL))
    from_python = MoQConfig(
        start_bits=12,
        target_bits=6,
        mode="asymmetric",
        granularity="per_group",
        group_size=32,
        rounding="stochastic",
        blend_steps=5,
        rules=(
            Rule("lm_head", exclude=True),
            Rule("re:.*mlp.*", target_bits=8, modules=("linear", "head")),
            Rule("*.o", schedule=Timing(period=3)),
        ),
        schedule=ScheduleConfig(table={0: 12, 30: 9, 50: 6}, on_unfinished="clamp"),
        sensitivity=SensitivityConfig(measure="eigenvalue", tolerance=0.1),
        seed=7,
        master_dtype="parameter",
    )
    assert MoQConfig.load(FULL) == from_python
    assert MoQConfig.load(tmp_path / "config.json") == from_python
    assert MoQConfig.load(str(tmp_path / "config.yaml")) == from_python
    assert MoQConfig.load(from_python) is from_python


def test_to_dict_survives_json():
    config = MoQConfig.load(FULL)
    assert MoQConfig.load(json.loads(json.dumps(config.to_dict()))) == config


def test_a_rule_inherits_what_it_does_not_say():
    config = MoQConfig(rounding="stochastic", rules=(Rule("*.mlp.*", target_bits=5),))
    assert config.spec(config.rules[0]) == QuantSpec(target_bits=5, rounding="stochastic")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"start_bit": 12}, ValueError, r"config\.start_bit is not a known key.*'start_bits'"),
        ({"schedule": {"finish": 1}}, ValueError, r"config\.schedule\.finish is .*'finish_at'"),
        ({"rules": [{"match": "*", "bits": 4}]}, ValueError, r"config\.rules\[0\]\.bits"),
        ({"rules": [{"target_bits": 4}]}, ValueError, r"config\.rules\[0\]\.match is missing"),
        ({"rules": {"match": "*"}}, TypeError, r"config\.rules must be a list"),
        ({"schedule": 3}, TypeError, r"config\.schedule must be a mapping, got 3"),
        ({"start_bits": "12"}, TypeError, r"config\.start_bits must be an integer, got '12'"),
        ({"start_bits": True}, TypeError, r"config\.start_bits must be an integer, got True"),
        ({"start_bits": 8.0}, TypeError, r"config\.start_bits must be an integer, got 8\.0"),
        ({"start_bits": 17}, ValueError, r"config\.start_bits must lie in \[2, 16\], got 17"),
        ({"target_bits": -1}, ValueError, r"config\.target_bits must lie in \[2, 16\], got -1"),
        ({"start_bits": 4}, ValueError, r"start_bits must be at least target_bits \(8\), got 4"),
        ({"mode": "symetric"}, ValueError, r"config\.mode .*did you mean 'symmetric'"),
        ({"mode": 3}, TypeError, r"config\.mode must be one of"),
        ({"granularity": "per_group"}, ValueError, r"config\.group_size must be at least 1"),
        (
            {"granularity": "per_group", "group_size": 8, "groups": 4},
            ValueError,
            r"config\.group_size must be 0 when groups says",
        ),
        (
            {"granularity": "per_group", "groups": -1},
            ValueError,
            r"config\.groups must be at least",
        ),
        ({"groups": 8}, ValueError, r"config\.groups must be 0 unless"),
        ({"mode": "ternary"}, ValueError, r"config\.target_bits must be 2 when mode is 'ternary'"),
        (
            {"mode": "binary", "target_bits": 2},
            ValueError,
            r"config\.target_bits must be 1 when mode is 'binary'",
        ),
        ({"target_bits": 1}, ValueError, r"lie in \[2, 16\] unless mode is 'binary', got 1"),
        (
            {"mode": "binary", "target_bits": 1, "rounding": "stochastic"},
            ValueError,
            r"config\.rounding must be 'nearest' when mode is 'binary'",
        ),
        ({"scale": "max"}, ValueError, r"config\.scale must be one of"),
        ({"group_size": 32}, ValueError, r"config\.group_size must be 0 unless"),
        ({"blend_steps": -1}, ValueError, r"config\.blend_steps"),
        ({"seed": -1}, ValueError, r"config\.seed"),
        ({"master_dtype": "float16"}, ValueError, r"config\.master_dtype must be one of"),
        ({"schedule": {"finish_at": 0.0}}, ValueError, r"config\.schedule\.finish_at .*\(0, 1\]"),
        ({"schedule": {"finish_at": 1.5}}, ValueError, r"config\.schedule\.finish_at .*\(0, 1\]"),
        (
            {"schedule": {"period": 0}},
            ValueError,
            r"config\.schedule\.period must lie in \[1, 2\^40",
        ),
        ({"schedule": {"offset": 9}}, ValueError, r"config\.schedule\.offset must be 0 unless"),
        ({"schedule": {"period": 9, "offset": -1}}, ValueError, r"config\.schedule\.offset"),
        ({"schedule": {"period": 9, "growth": 0.5}}, ValueError, r"config\.schedule\.growth"),
        ({"schedule": {"period": 9, "finish_at": 0.5}}, ValueError, r"exclude each other"),
        ({"schedule": {"counts_per_step": 6}}, ValueError, r"counts_per_step must be left out"),
        ({"schedule": {"period": 9, "counts_per_step": 0}}, ValueError, r"\[1, 2\^20\]"),
        ({"schedule": {"table": {"5": 16}}}, ValueError, r"table must begin at step 0"),
        ({"schedule": {"table": {"0": 16, "5": 0}}}, ValueError, r"table must hold widths"),
        ({"schedule": {"table": {"0": 8, "5": 8}}}, ValueError, r"table must fall strictly"),
        ({"schedule": {"table": {"x": 8}}}, TypeError, r"a key of table must be an integer"),
        ({"schedule": {"table": {"0": 12, "5": 8}}}, ValueError, r"start_bits must be the 12 bits"),
        ({"schedule": {"on_unfinished": "err"}}, ValueError, r"did you mean 'error'"),
        ({"sensitivity": {"measure": "hessian"}}, ValueError, r"config\.sensitivity\.measure"),
        ({"sensitivity": {"tolerance": 1.0}}, ValueError, r"config\.sensitivity\.tolerance"),
        ({"sensitivity": {"max_products": 0}}, ValueError, r"config\.sensitivity\.max_prod"),
        ({"block_pattern": "("}, ValueError, r"config\.block_pattern must be a regular"),
        ({"rules": [{"match": "re:("}]}, ValueError, r"rules\[0\]\.match must be a regular"),
        ({"rules": [{"match": ""}]}, ValueError, r"config\.rules\[0\]\.match must name"),
        ({"rules": [{"match": "*", "modules": []}]}, ValueError, r"modules must name at least"),
        (
            {"rules": [{"match": "*", "exclude": True, "target_bits": 4}]},
            ValueError,
            r"config\.rules\[0\]\.exclude must be false",
        ),
        (
            {"rules": [{"match": "*", "granularity": "per_group"}]},
            ValueError,
            r"config\.rules\[0\] \('\*'\)\.group_size must be at least 1",
        ),
        (
            {"schedule": {"table": {0: 16, 9: 8}}, "rules": [{"match": "*", "target_bits": 4}]},
            ValueError,
            r"config\.rules\[0\] \('\*'\)\.target_bits must be at least the 8 bits that schedule",
        ),
        (
            {
                "start_bits": 12,
                "schedule": {"table": {0: 12, 9: 8}},
                "rules": [{"match": "*", "start_bits": 14}],
            },
            ValueError,
            r"config\.rules\[0\] \('\*'\)\.start_bits must be at most the 12 bits that schedule",
        ),
        (
            {"rules": [{"match": "*", "schedule": {"offset": 3}}]},
            ValueError,
            r"config\.rules\[0\]\.schedule\.finish_at, period and table exclude .*got \[\]",
        ),
        (
            {"rules": [{"match": "*", "schedule": {"on_unfinished": "allow", "period": 3}}]},
            ValueError,
            r"config\.rules\[0\]\.schedule\.on_unfinished is not a known key",
        ),
        (
            {"rules": [{"match": "*", "schedule": {"table": {0: 16, 9: 4}}}]},
            ValueError,
            r"config\.rules\[0\] \('\*'\)\.target_bits must be the 4 bits of schedule.table, got 8",
        ),
        (
            {"rules": [{"match": "*", "exclude": True, "schedule": {"period": 3}}]},
            ValueError,
            r"config\.rules\[0\]\.exclude must be false .*got \['schedule'\]",
        ),
        ({"schedule": {"table": {0: 16, 2**70: 8}}}, ValueError, r"table must end by step 2\^40"),
        ({"schedule": {"finish_at": float("nan")}}, ValueError, r"finish_at must lie in \(0, 1\]"),
        ({"schedule": {"period": 3, "growth": float("nan")}}, ValueError, r"growth must lie in"),
        ({"schedule": {"period": 2**41}}, ValueError, r"period must lie in \[1, 2\^40\]"),
        (3, TypeError, r"config must be a MoQConfig, a mapping, a path or None, got 3"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_the_key(data, error, message):
    with pytest.raises(error, match=message):
        MoQConfig.load(data)


def test_wrong_types_are_refused_from_python_too():
    with pytest.raises(TypeError, match="period must be an integer, got 2.5"):
        ScheduleConfig(period=2.5)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ("c.yaml", "seed: 1\nseed: 2\n", "'seed' is given twice"),
        ("c.json", "{", r"c\.json"),
        ("c.yaml", "a: [", r"c\.yaml"),
        ("c.toml", "seed = 1", "must end in .json, .yaml or .yml"),
        ("c.json", '{"sed": 1}', r"c\.json\.sed is not a known key \(did you mean 'seed'"),
    ],
)
def test_an_unreadable_file_is_an_error_that_names_it(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        MoQConfig.load(tmp_path / name)


@pytest.mark.parametrize(("text", "value"), [("6e-1", 0.6), ("6E-1", 0.6), ("0.06e1", 0.6)])
def test_yaml_has_numbers_with_an_exponent_and_no_dot(tmp_path, text, value):
    path = tmp_path / "moq.yaml"
    path.write_text(f"schedule: {{finish_at: {text}}}\nrules: [{{match: 1e.x}}]\n")
    config = MoQConfig.load(path)
    assert config.schedule.finish_at == pytest.approx(value)
    assert config.rules[0].match == "1e.x"
