"""What training with the wrapper allocates: masters, a cast of the gradients, and no more."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

from moq import MoQOptimizer

LAYERS, SIZE = 6, 128
NUMEL = LAYERS * SIZE * SIZE
SLACK = 64 << 10  # control data of a few numbers for each parameter; a layer has as many bytes
FALLING = {"start_bits": 8, "target_bits": 4, "schedule": {"finish_at": 0.8}}


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the CPU that a call keeps, and the most that it has at once."""
    gc.collect()  # what earlier tests left is freed now, not while this call is watched
    gc.disable()
    try:
        with torch.profiler.profile(profile_memory=True) as profiler:
            result = call()
    finally:
        gc.enable()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    )
    now = peak = 0
    for _, num_bytes in changes:
        now += num_bytes
        peak = max(peak, now)
    del result
    return now, peak


def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(LAYERS)))
    return model.to(dtype)


def wrapped(model: nn.Module, config: dict) -> MoQOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)  # keeps no state of its own
    return MoQOptimizer(sgd, model, FALLING | config, total_steps=8, verbose=False)


@pytest.mark.parametrize(
    ("dtype", "config", "master_bytes"),
    [
        (torch.float32, {}, 4),
        (torch.bfloat16, {}, 4),
        (torch.float16, {}, 4),
        (torch.bfloat16, {"master_dtype": "parameter"}, 2),
        (torch.float32, {"rounding": "stochastic", "blend_steps": 2}, 4),
        (torch.float32, {"simulate": "autograd"}, 0),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_one_copy_of_the_weights_is_kept(dtype, config, master_bytes):
    model = model_of(dtype)
    kept, _ = allocated(lambda: wrapped(model, config))
    assert master_bytes * NUMEL <= kept <= master_bytes * NUMEL + SLACK


@pytest.mark.parametrize(
    ("dtype", "config", "cast_bytes"),
    [
        (torch.float32, {}, 0),
        (torch.bfloat16, {}, 4),
        (torch.bfloat16, {"master_dtype": "parameter"}, 0),
        (torch.float32, {"rounding": "stochastic", "blend_steps": 2}, 0),
        (torch.float32, {"mode": "asymmetric", "granularity": "per_tensor"}, 0),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_step_needs_no_more_than_a_cast_of_the_gradients(dtype, config, cast_bytes):
    model = model_of(dtype)
    optimizer = wrapped(model, config)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        kept, peak = allocated(optimizer.step)
        assert cast_bytes * NUMEL <= peak <= cast_bytes * NUMEL + SLACK
        assert abs(kept) <= SLACK


class Silent:
    def log(self, scalars, *, step):
        pass


@pytest.mark.parametrize("form", ["in_place", "autograd"])
@pytest.mark.parametrize(("bits", "code_bytes"), [(8, 1), (12, 2)])
def test_a_measured_step_keeps_codes_and_looks_at_one_weight_after_the_other(
    bits, code_bytes, form, monkeypatch
):
    monkeypatch.setattr("moq.scalars.CHUNK_ELEMENTS", 1)
    model = model_of(torch.float32)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer = MoQOptimizer(
        sgd, model, FALLING | {"start_bits": bits, "target_bits": bits, "simulate": form},
        total_steps=8, verbose=False, loggers=Silent(), log_every=1,
    )  # fmt: skip
    of_one = code_bytes + 4 + 8 + (4 if form == "autograd" else 0)  # codes, errors, float64, value
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        kept, peak = allocated(optimizer.step)
        assert code_bytes * NUMEL <= peak <= code_bytes * NUMEL + of_one * SIZE * SIZE + SLACK
        assert abs(kept) <= SLACK
