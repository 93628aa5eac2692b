"""Warnings name the line of the script that they concern, however deep in moq they arise."""

import copy
import linecache
import threading
from pathlib import Path

import pytest
import torch
from tiny_decoder import FALLING, batch, loss_of, train_step, wrap
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from moq import MoQConfig, MoQOptimizer


@pytest.fixture
def warned_line(recwarn):
    """Returns a function that says which line of this file the only warning names."""

    def line():
        (warning,) = recwarn.list
        assert warning.filename == __file__
        return linecache.getline(warning.filename, warning.lineno).strip()

    return line


def test_a_wrapper_that_warns_names_the_call_that_made_it(decoder, warned_line):
    model = decoder()
    adamw = torch.optim.AdamW(model.layers[0].parameters())
    MoQOptimizer(adamw, model, FALLING, total_steps=12, verbose=False)
    assert warned_line() == "MoQOptimizer(adamw, model, FALLING, total_steps=12, verbose=False)"


def test_a_rule_that_decides_nothing_names_the_call_of_the_wrapper(decoder, warned_line):
    model = decoder()
    adamw = torch.optim.AdamW(model.parameters())
    config = {"rules": [{"match": "*.q_proj"}, {"match": "*", "target_bits": 6}]}
    MoQOptimizer(adamw, model, config, total_steps=12, verbose=False)
    assert warned_line().startswith("MoQOptimizer(")


def with_a_weight_replaced(model):
    """An optimizer whose next step warns: a weight was changed from outside."""
    optimizer = wrap(model, FALLING)
    train_step(model, optimizer, 0)
    with torch.no_grad():
        model.layers[0].q_proj.weight.add_(1)
    loss_of(model, batch(1)).backward()
    return optimizer


def test_a_step_that_warns_names_the_call_of_step(decoder, warned_line):
    optimizer = with_a_weight_replaced(decoder())
    optimizer.step()
    assert warned_line() == "optimizer.step()"


def test_a_state_that_torch_loads_names_the_call_of_torch(decoder, warned_line):
    model = decoder()
    optimizer = wrap(model, FALLING)
    train_step(model, optimizer, 0)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    for name in [name for name in state["state"] if name.startswith("layers.0")]:
        del state["state"][name]
    other = decoder()
    other.layers[0].requires_grad_(False)
    resumed = wrap(other, FALLING)
    set_optimizer_state_dict(other, resumed, state)
    assert warned_line() == "set_optimizer_state_dict(other, resumed, state)"


def test_a_deepspeed_configuration_names_the_call_that_reads_it(warned_line):
    training = {"enabled": True, "quantize_bits": {"start_bits": 12, "target_bits": 8}}
    schedule = {"quantize_schedule": {"quantize_period": 1, "schedule_offset": 0}}
    MoQConfig.from_deepspeed({"quantize_training": training | schedule})
    assert warned_line().startswith("MoQConfig.from_deepspeed(")


def test_a_step_in_a_thread_names_what_ran_it(decoder, recwarn):
    optimizer = with_a_weight_replaced(decoder())
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    (warning,) = recwarn.list
    assert Path(warning.filename).name != "caller_warning.py"
    assert "moq" not in Path(warning.filename).parts
