"""A training step on a GPU never makes the host wait, as torch.profiler and the clock see it.

The device is kept busy while steps are made, as a large model does: whatever reads a number that
only the device knows, or copies from it into pageable memory, would end after it.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny_decoder import batch, loss_of
from torch.autograd import DeviceType

from moq import MoQOptimizer
from moq.loggers import CsvLogger

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BUSY = 300_000_000  # cycles: some 0.15 seconds
SPAN = "moq: the step that is looked at"
LATE = "the host, until the device had done it all"
# A drop at every step that is looked at and at those before, so that the host hears of some.
FALLING = {
    "start_bits": 10,
    "target_bits": 4,
    "schedule": {"table": {0: 10, 3: 9, 4: 8, 5: 7, 6: 6, 7: 5, 8: 4}},
}
BLEND = {"blend_steps": 2}
AUTOGRAD = {"simulate": "autograd"}
LEARNED = AUTOGRAD | {"scale": "learned"}

# name -> (configuration, dtype of the parameters, fused, gradients scaled, verbose, logged)
CASES = {
    "float32": ({}, torch.float32, False, False, False, False),
    "stochastic": ({"rounding": "stochastic"}, torch.float32, False, False, False, False),
    "searched scales": ({"scale": "mse"}, torch.float32, False, False, False, False),
    "float32 masters of bfloat16": ({}, torch.bfloat16, False, False, False, False),
    "bfloat16 masters": ({"master_dtype": "parameter"}, torch.bfloat16, True, False, False, False),
    "float32 masters of float16": ({}, torch.float16, True, True, False, False),
    "blend": (BLEND, torch.float32, False, False, False, False),
    "autograd": (AUTOGRAD | BLEND, torch.float32, False, False, False, False),
    "autograd logged": (AUTOGRAD, torch.float32, True, False, True, True),
    "learned": (LEARNED, torch.float32, False, False, False, False),
    "learned, scaled and logged": (LEARNED, torch.float32, True, True, True, True),
    "static activations": ({"activations": "static"}, torch.float32, True, True, False, False),
    "frozen activations": (
        {"activations": "static", "observer": {"freeze_at": 0.25}},
        torch.float32,
        False,
        False,
        False,
        False,
    ),
    "static asymmetric activations": (
        {"activations": "static_asymmetric"},
        torch.float32,
        True,
        True,
        False,
        False,
    ),
    "dynamic activations": ({"activations": "dynamic"}, torch.bfloat16, False, False, False, False),
    "fused and scaled": ({}, torch.float32, True, True, False, False),
    "verbose": ({}, torch.float32, False, False, True, False),
    "logged": ({}, torch.float32, False, False, False, True),
    "everything": (  # but a scaler, which torch has none of for bfloat16
        BLEND | {"activations": "static", "rounding": "stochastic"},
        torch.bfloat16,
        True,
        False,
        True,
        True,
    ),
}


def waits(run: Callable[[], object]) -> list[str]:
    """Returns what made the host wait for the busy device in `run`."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(SPAN):
            behind = still_busy_after(run)
    events = profiler.events()
    span = next(
        event.time_range
        for event in events
        if event.name == SPAN and event.device_type == DeviceType.CPU
    )
    called = [event.name for event in events if span.start <= event.time_range.start <= span.end]
    assert any(name.startswith("cudaLaunchKernel") for name in called)  # calls are seen at all
    found = [name for name in called if "Synchronize" in name or name in ("cudaMemcpy", "cudaFree")]
    # The profiler itself ends with a cudaDeviceSynchronize; the device copies when it comes to it.
    found += [event.name for event in events if "Pageable" in event.name]
    return found + ([] if behind else [LATE])


def still_busy_after(run: Callable[[], object]) -> bool:
    """Keeps the device busy, runs something, and says whether the host was ready first."""
    done = torch.cuda.Event()
    torch.cuda._sleep(BUSY)
    run()
    done.record()
    return not done.query()


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_made_while_the_device_is_busy(decoder, tmp_path, capsys, case):
    config, dtype, fused, scaled, verbose, logged = CASES[case]
    model = decoder(dtype, layers=1).cuda()
    optimizer = MoQOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, fused=fused),
        model,
        FALLING | config,
        total_steps=12,
        verbose=verbose,
        loggers=CsvLogger(tmp_path / "log.csv") if logged else (),
        log_every=1,
    )
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0, enabled=scaled)
    batches = [batch(step).cuda() for step in range(8)]

    def step(number: int) -> None:
        loss = loss_of(model, batches[number])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if logged:
            optimizer.log({"loss": loss})

    for number in range(4):
        step(number)
    torch.cuda.synchronize()
    # Kernels are loaded when they are first launched, which waits; some only a busy device needs.
    for number in (4, 5):
        still_busy_after(partial(step, number))
        torch.cuda.synchronize()
    capsys.readouterr()
    # One at a time: a device takes about a thousand kernels ahead, and then lets the host wait.
    for number in (6, 7):
        assert waits(partial(step, number)) == []
    told = capsys.readouterr().out
    assert ("moq: step 6: " in told) == verbose  # heard of while nothing waits
    assert optimizer.steps == 8
    assert set(optimizer.num_bits.values()) == {4}
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    if logged:
        optimizer.flush_logs()
        text = (tmp_path / "log.csv").read_text()
        assert all(f"\n{number},moq/bits," in text for number in range(1, 9))


@pytest.mark.parametrize(
    "wait",
    [
        torch.Tensor.item,
        torch.Tensor.cpu,
        torch.Tensor.nonzero,
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.current_stream().synchronize(),
        lambda x: torch.empty_like(x, device="cpu").copy_(x, non_blocking=True),
    ],
    ids=["item", "cpu", "nonzero", "upload", "device", "stream", "pageable"],
)
def test_a_wait_would_be_seen(wait):
    x = torch.zeros((), device="cuda")
    wait(x)
    found = waits(lambda: wait(x.add_(1)))
    assert found[-1] == LATE
    assert len(found) > 1  # the profiler says which call it was
