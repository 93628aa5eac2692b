"""State of the wrapper: what is saved, what a resumed run does, what is refused."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_decoder import (
    FALLING_STOCHASTIC,
    assert_same,
    batch,
    loss_of,
    masters,
    through_a_file,
    train_step,
    train_steps,
    weights,
    wrap,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from moq import MoQOptimizer

FALLING = FALLING_STOCHASTIC | {"seed": 5}
STEPS = 10


def spread(optimizer: MoQOptimizer) -> None:
    """Feeds the schedule as a probe does, without the cost of measuring."""
    optimizer._masters.trainer.set_sensitivities([1.0, 0.2])


@pytest.mark.parametrize("saved_at", [0, 1, 4, 7, STEPS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(decoder, dtype, saved_at):
    whole = decoder(dtype)
    reference = wrap(whole, FALLING, STEPS)
    spread(reference)
    expected = train_steps(whole, reference, range(STEPS))

    model = decoder(dtype)
    optimizer = wrap(model, FALLING, STEPS)
    spread(optimizer)
    losses = train_steps(model, optimizer, range(saved_at))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})

    torch.manual_seed(99)
    other = decoder(dtype)
    for p in other.parameters():
        nn.init.normal_(p)
    resumed = wrap(other, FALLING, STEPS)
    other.load_state_dict(saved["model"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(saved["optimizer"])
        losses += train_steps(other, resumed, range(saved_at, STEPS))
    assert losses == expected
    assert_same(weights(other), weights(whole))
    assert_same(masters(resumed), masters(reference))
    assert resumed.num_bits == reference.num_bits
    assert resumed.schedule().plan() == reference.schedule().plan()


def test_the_simulated_weights_come_from_the_optimizers_state_alone(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_steps(model, optimizer, range(3))
    other = decoder()
    resumed = wrap(other, FALLING)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for name in masters(optimizer):
        assert torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_the_state_dict_has_torchs_form_with_masters_and_one_json_record(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_steps(model, optimizer, range(2))
    state = optimizer.state_dict()
    assert state.keys() == {"state", "param_groups"}
    assert sorted(state["state"]) == list(range(len(list(model.parameters()))))
    quantized = [entry for entry in state["state"].values() if "moq_master" in entry]
    assert len(quantized) == 12
    assert quantized[0].keys() == {"step", "exp_avg", "exp_avg_sq", "moq_master"}
    record = json.loads(state["param_groups"][0]["moq"])
    assert (record["step"], record["seed"]) == (2, 5)
    assert record["parameters"]["layers.0.q_proj.weight"]["target_bits"] == 4


def test_asking_for_state_never_advances_anything(decoder):
    asked, silent = decoder(), decoder()
    first, second = wrap(asked, FALLING), wrap(silent, FALLING)
    for step in range(4):
        first.state_dict()
        get_optimizer_state_dict(asked, first)
        assert first.steps == step
        assert train_step(asked, first, step) == train_step(silent, second, step)
    assert_same(weights(asked), weights(silent))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_of_zeros_by_which_tools_create_state_is_no_step(decoder, momentum):
    model = decoder()
    optimizer = MoQOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, dampening=0.5),
        model,
        FALLING,
        total_steps=10,
        verbose=False,
    )
    twin = decoder()
    untouched = MoQOptimizer(
        torch.optim.SGD(twin.parameters(), lr=0.1, momentum=momentum, dampening=0.5),
        twin,
        FALLING,
        total_steps=10,
        verbose=False,
    )
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.zero_grad()
        assert optimizer.steps == step
        assert train_step(model, optimizer, step) == train_step(twin, untouched, step)
    assert_same(weights(model), weights(twin))


def test_an_optimizer_without_state_is_asked_for_it_once(decoder, monkeypatch):
    model = decoder()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = MoQOptimizer(sgd, model, FALLING, total_steps=10, verbose=False)
    asked = []
    monkeypatch.setattr("moq.optimizer.make_blank_state", asked.append)
    for step in range(3):
        assert all(entry.keys() <= {"moq_master"} for entry in optimizer.state.values())
        train_step(model, optimizer, step)
        optimizer.state_dict()
    assert asked == [sgd]


def test_an_optimizer_without_state_of_its_own_is_resumed_too(decoder):
    model, twin = decoder(), decoder()
    optimizers = [
        MoQOptimizer(
            torch.optim.SGD(m.parameters(), lr=0.1), m, FALLING, total_steps=10, verbose=False
        )
        for m in (model, twin)
    ]
    train_steps(model, optimizers[0], range(3))
    optimizers[1].load_state_dict(through_a_file(optimizers[0].state_dict()))
    twin.load_state_dict(model.state_dict())
    assert train_steps(model, optimizers[0], range(3, 6)) == train_steps(
        twin, optimizers[1], range(3, 6)
    )


@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(),
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
    ],
    ids=["plain", "full", "flattened"],
)
@pytest.mark.parametrize("saved_at", [0, 3])
def test_distributed_checkpoint_saves_and_resumes_everything(decoder, tmp_path, options, saved_at):
    whole = decoder()
    reference = wrap(whole, FALLING, STEPS)
    expected = train_steps(whole, reference, range(STEPS))

    model = decoder()
    optimizer = wrap(model, FALLING, STEPS)
    losses = train_steps(model, optimizer, range(saved_at))
    states = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=tmp_path)

    torch.manual_seed(1)
    other = decoder()
    for p in other.parameters():
        nn.init.normal_(p)
    resumed = wrap(other, FALLING, STEPS)
    states = get_state_dict(other, resumed, options=options)
    dcp.load({"model": states[0], "optimizer": states[1]}, checkpoint_id=tmp_path)
    set_state_dict(
        other,
        resumed,
        model_state_dict=states[0],
        optim_state_dict=states[1],
        options=options,
    )
    assert resumed.steps == saved_at
    losses += train_steps(other, resumed, range(saved_at, STEPS))
    assert losses == expected
    assert_same(weights(other), weights(whole))


def test_set_optimizer_state_dict_takes_names_in_another_order(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_steps(model, optimizer, range(3))
    state = get_optimizer_state_dict(model, optimizer)
    other = decoder()
    reversed_adamw = torch.optim.AdamW(list(other.parameters())[::-1], lr=1e-2)
    resumed = MoQOptimizer(reversed_adamw, other, FALLING, total_steps=12, verbose=False)
    set_optimizer_state_dict(other, resumed, copy.deepcopy(state))
    assert_same(masters(resumed), masters(optimizer))


def test_a_plain_optimizers_state_is_refused_with_the_remedy(decoder):
    model = decoder()
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="load it into that optimizer before wrapping it"):
        wrap(model, FALLING).load_state_dict(plain.state_dict())


def test_a_state_of_other_param_groups_is_refused_with_their_sizes(decoder):
    model = decoder()
    halves = [list(layer.parameters()) for layer in model.layers]
    rest = [model.embedding.weight, model.lm_head.weight]
    several = torch.optim.AdamW([{"params": params} for params in [*halves, rest]])
    saved = MoQOptimizer(several, model, FALLING, total_steps=12, verbose=False).state_dict()
    resumed = wrap(decoder(), FALLING)
    before = weights(resumed.model)
    with pytest.raises(ValueError, match=r"must have \[24\] parameters, got \[11, 11, 2\]"):
        resumed.load_state_dict(saved)
    assert_same(weights(resumed.model), before)


def test_a_resumed_training_prints_the_drops_to_come_and_no_earlier_ones(decoder, capsys):
    config = FALLING | {"schedule": {"table": {0: 9, 2: 7, 5: 6, 8: 4}}}
    model = decoder()
    optimizer = wrap(model, config)
    train_steps(model, optimizer, range(5))
    other = decoder()
    resumed = wrap(other, config, verbose=True)
    assert "arrives at step" in capsys.readouterr().out
    resumed.load_state_dict(optimizer.state_dict())
    train_steps(other, resumed, range(5, 10))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("moq: step")]
    assert [line.split(":")[1] for line in lines] == [" step 8"]


def smaller(model: nn.Module) -> nn.Module:
    model.layers[1].down_proj = nn.Linear(20, 12, bias=False)
    return model


def wider(model: nn.Module) -> nn.Module:
    model.layers[1].down_proj = nn.Linear(21, 12)
    return model


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (smaller, {}, r"only there: layers\.1\.down_proj\.bias; only here: none"),
        (wider, {}, r"master of layers\.1\.down_proj\.weight must have shape \[12, 21\]"),
        (None, {"rules": [{"match": "*.down_proj", "exclude": True}]}, "same parameters must be q"),
        (None, {"granularity": "per_tensor"}, r"q_proj\.weight must be as it was saved.*per_tens"),
        (None, {"target_bits": 5}, r"target_bits 5 \(saved: 4\)"),
        (None, {"seed": 6}, "seed must be the saved 5, got 6"),
        (None, {"schedule": {"finish_at": 0.4}}, "must agree with what happened"),
    ],
)
def test_state_of_another_model_or_configuration_is_refused_and_says_what_differs(
    decoder, change, config, message
):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_steps(model, optimizer, range(6))
    other = change(decoder()) if change else decoder()
    resumed = wrap(other, FALLING | config)
    before = weights(other)
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict(optimizer.state_dict())
    assert resumed.steps == 0
    assert_same(weights(other), before)


def test_a_longer_training_may_continue_if_its_schedule_agrees_with_the_past(decoder):
    config = FALLING | {"schedule": {"table": {0: 9, 2: 6, 8: 4}}}
    model = decoder()
    optimizer = wrap(model, config, total_steps=10)
    train_steps(model, optimizer, range(5))
    resumed = wrap(decoder(), config, total_steps=20)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.steps == 5


def test_a_frozen_master_that_the_checkpoint_left_out_is_named(decoder):
    model = decoder()
    model.layers[0].requires_grad_(False)
    optimizer = wrap(model, FALLING)
    train_steps(model, optimizer, range(2))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    for name in list(state["state"]):
        if name.startswith("layers.0"):
            del state["state"][name]
    other = decoder()
    other.layers[0].requires_grad_(False)
    resumed = wrap(other, FALLING)
    with pytest.warns(UserWarning, match=r"no masters of the frozen layers\.0\.q_proj"):
        set_optimizer_state_dict(other, resumed, state)
    assert_same(masters(resumed), masters(optimizer))


def test_a_state_of_another_number_of_steps_is_refused_with_the_remedy(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING, 20)
    train_steps(model, optimizer, range(12))
    resumed = wrap(decoder(), FALLING, 40)
    remedy = r"total_steps was 20 and is 40 now: give the 20 of before, or train with .*period"
    with pytest.raises(ValueError, match=remedy):
        resumed.load_state_dict(optimizer.state_dict())


def test_a_training_by_periods_without_sensitivities_may_be_trained_longer(decoder):
    config = FALLING | {"schedule": {"period": 2, "growth": 1.0}, "sensitivity": {"rule": "none"}}
    model = decoder()
    optimizer = wrap(model, config, 20)
    train_steps(model, optimizer, range(6))
    longer = wrap(decoder(), config, 40)
    longer.load_state_dict(optimizer.state_dict())
    assert longer.steps == 6


def test_a_missing_master_is_refused_by_name(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][1]["moq_master"]
    with pytest.raises(ValueError, match=r"hold a master of layers\.0\.q_proj\.weight, got none"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fingerprints_are_equal_for_equal_masters_and_plans_only(decoder, dtype):
    config = FALLING | {"master_dtype": "parameter"}
    same = [wrap(decoder(dtype), config) for _ in range(2)]
    assert same[0].fingerprint() == same[1].fingerprint()
    spread(same[0])
    assert same[0].fingerprint() != same[1].fingerprint()
    model = decoder(dtype)
    with torch.no_grad():
        model.layers[1].up_proj.weight[2, 3] *= 1.25
    assert wrap(model, config).fingerprint() != same[1].fingerprint()


def test_state_dict_hooks_run(decoder):
    optimizer = wrap(decoder(), FALLING)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save", "load", "loaded"]


def test_it_refuses_to_be_pickled_or_copied(decoder):
    optimizer = wrap(decoder(), FALLING)
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="use state_dict"):
            duplicate(optimizer)


def test_loading_within_full_precision_takes_effect_at_its_end(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_steps(model, optimizer, range(2))
    expected = weights(model)
    other = decoder()
    resumed = wrap(other, FALLING)
    with resumed.full_precision():
        resumed.load_state_dict(optimizer.state_dict())
    for name in masters(optimizer):
        assert torch.equal(other.get_parameter(name), expected[name])


def test_loss_of_a_resumed_model_is_that_of_the_saved_one(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_steps(model, optimizer, range(4))
    other = decoder()
    resumed = wrap(other, FALLING)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert loss_of(other, batch(9)).item() == loss_of(model, batch(9)).item()


@pytest.mark.parametrize("written", [None, 0, 99])
def test_a_state_of_another_format_is_refused_with_the_remedy(decoder, written):
    optimizer = wrap(decoder(), FALLING)
    state = optimizer.state_dict()
    record = json.loads(state["param_groups"][0]["moq"])
    if written is None:
        del record["format"]
    else:
        record["format"] = written
    state["param_groups"][0]["moq"] = json.dumps(record)
    with pytest.raises(ValueError, match=rf"got {written}: continue with the version of moq that"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("state", [{}, {"state": {}}, {"model": 1}])
def test_what_is_no_state_of_an_optimizer_is_refused_with_what_it_has(decoder, state):
    optimizer = wrap(decoder(), {})
    found = next(iter(state), "none")
    with pytest.raises(ValueError, match=f"keys 'state' and 'param_groups', got {found}$"):
        optimizer.load_state_dict(state)


def test_the_path_of_a_run_is_no_state(decoder):
    with pytest.raises(
        TypeError, match=r"what state_dict\(\) gave, got str: read it with torch\.load"
    ):
        wrap(decoder(), FALLING).load_state_dict("out/run")
