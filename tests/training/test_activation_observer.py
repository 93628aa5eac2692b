"""Static INT8 activations: how their grids follow what training sees."""

import copy

import pytest
import torch
from tiny_decoder import wrap
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moq
from moq.input_grid import KINDS, is_static, static_grid

STEPS = 8
W8 = {"start_bits": 8, "target_bits": 8}
STATIC = [kind for kind in KINDS if is_static(kind)]


@pytest.fixture
def observed(device):
    layer = nn.Linear(4, 2).to(device)
    observer = {"momentum": 0.75, "freeze_at": 0.5}
    return layer, wrap(layer, W8 | {"activations": "static", "observer": observer}, STEPS)


def average_of(layer: nn.Module) -> float:
    below, above = layer.input_quantizer.extent.tolist()
    assert below == above  # of a symmetric grid
    return above


def step_over(layer, optimizer, *largest: float) -> float:
    for value in largest:
        layer(torch.full((2, 4), value, device=layer.weight.device)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return average_of(layer)


def test_the_average_follows_the_largest_magnitude_of_each_step_until_it_freezes(observed):
    layer, optimizer = observed
    assert step_over(layer, optimizer, -8.0) == 8.0
    assert step_over(layer, optimizer, 1.0, -4.0, 2.0) == 0.75 * 8 + 0.25 * 4
    assert step_over(layer, optimizer, 0.0) == 7.0  # nothing was seen
    assert step_over(layer, optimizer, 3.0) == 6.0  # step 4, the last at freeze_at 0.5 of 8
    assert step_over(layer, optimizer, 100.0) == 6.0
    scale = optimizer.quantized_parameters()[0].input_scale
    assert scale == float(torch.tensor(6.0) / 127)


def test_the_ends_of_an_asymmetric_grid_are_followed_apart(device):
    layer = nn.Linear(4, 2).to(device)
    observer = {"momentum": 0.75, "freeze_at": 0.5}
    config = W8 | {"activations": "static_asymmetric", "observer": observer}
    optimizer = wrap(layer, config, STEPS)
    wanted = []
    for lowest, highest in [(-8.0, 2.0), (1.0, 4.0), (0.0, 0.0), (-3.0, -1.0), (-100.0, 100.0)]:
        x = torch.tensor([[lowest, highest, highest, lowest]], device=device)
        layer(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(layer.input_quantizer.extent.tolist())
    # Nothing below 0 in the second step, nothing at all in the third, the fourth is the last.
    third = [0.75 * 8, 0.75 * 2 + 0.25 * 4]
    fourth = [0.75 * third[0] + 0.25 * 3, 0.75 * third[1]]
    assert wanted == [[8.0, 2.0], third, third, fourth, fourth]
    (exported,) = optimizer.quantized_parameters()
    scale = torch.tensor(sum(fourth)) / 255
    assert exported.input_scale == float(scale)
    assert exported.input_zero_point == round(-128 + fourth[0] * float(1 / scale))
    assert optimizer._activations.state() == {"": fourth[1], ".below": fourth[0]}


class Operations(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_frozen_scale_costs_nothing_in_a_step_and_moves_again_in_an_earlier_state(observed):
    layer, optimizer = observed
    early = copy.deepcopy(optimizer.state_dict())
    step_over(layer, optimizer, -8.0, 4.0)
    for _ in range(3):
        step_over(layer, optimizer, 4.0)
    frozen = step_over(layer, optimizer, 5.0)
    layer(torch.full((2, 4), 9.0, device=layer.weight.device))
    step = optimizer._masters.trainer.step_on_device
    with Operations() as operations:
        optimizer._activations.update(step, None)
    assert [name for name in operations.names if "_local_scalar_dense" not in name] == []
    assert optimizer._activations.state() == {"": frozen}
    optimizer.load_state_dict(early)
    assert step_over(layer, optimizer, 3.0) == 3.0


def test_evaluation_is_not_observed(observed):
    layer, optimizer = observed
    step_over(layer, optimizer, 2.0)
    layer.eval()
    layer(torch.full((2, 4), 50.0, device=layer.weight.device))
    layer.train()
    assert step_over(layer, optimizer, 2.0) == 2.0


def test_a_step_with_an_overflow_is_not_observed(observed):
    layer, optimizer = observed
    step_over(layer, optimizer, 2.0)
    device = layer.weight.device
    layer(torch.full((2, 4), 50.0, device=device))
    two = torch.tensor([2], device=device)
    optimizer._activations.update(two, torch.tensor(1.0, device=device))
    assert average_of(layer) == 2.0
    layer(torch.full((2, 4), float("inf"), device=device))
    optimizer._activations.update(two, None)
    assert average_of(layer) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_spoils_no_measure(fused, dtype):
    layer = nn.Linear(4, 2).to(dtype)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.0, fused=fused)
    config = W8 | {"activations": "static", "observer": {"momentum": 0.0, "freeze_at": 1.0}}
    optimizer = moq.MoQOptimizer(sgd, layer, config, total_steps=STEPS, verbose=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    # (largest input, whether its gradient overflows) -> average after the step
    skipped = (
        4.0 if fused or dtype == torch.float16 else 16.0
    )  # a step that is not made leaves its batch to the next one
    for value, overflow, expected in [
        (4.0, False, 4.0),
        (float("inf"), True, 4.0),
        (2.0, False, 2.0),
        (4.0, False, 4.0),
        (16.0, True, 4.0),
        (4.0, False, skipped),
        (4.0, False, 4.0),
    ]:
        scaler.scale(layer(torch.full((2, 4), value, dtype=dtype)).sum()).backward()
        if overflow:
            layer.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert average_of(layer) == expected
    assert optimizer.steps == 5


def test_a_static_scale_that_saw_nothing_is_not_exported(observed):
    with pytest.raises(RuntimeError, match="must have seen inputs other than 0, got none"):
        observed[1].quantized_parameters()


def test_one_step_is_enough_to_be_observed():
    layer = nn.Linear(4, 2)
    optimizer = wrap(layer, W8 | {"activations": "static"}, total_steps=1)
    with pytest.raises(RuntimeError, match="^MoQOptimizer: the model: a static scale"):
        optimizer.quantized_parameters()
    assert step_over(layer, optimizer, 2.0) == 2.0
    assert optimizer.quantized_parameters()[0].input_scale == float(torch.tensor(2.0) / 127)


@pytest.mark.parametrize("kind", STATIC)
def test_a_scale_is_a_number_of_the_dtype_that_stores_it(kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale, _ = static_grid(torch.tensor([1.7, 3.3]), kind, dtype)
        assert scale.dtype == torch.float32
        assert torch.equal(scale, scale.to(dtype).float())
    scale, zero_point = static_grid(torch.tensor([0.0, 1e-9]), kind, torch.float16)
    assert float(scale) == 2.0**-14
    assert zero_point is None or int(zero_point) == -128


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        ({"momentum": 1.0}, r"config\.observer\.momentum must lie in \[0, 1\), got 1.0"),
        ({"freeze_at": 0.0}, r"config\.observer\.freeze_at must lie in \(0, 1\], got 0.0"),
        ({"freeze": 0.5}, r"did you mean 'freeze_at'"),
    ],
)
def test_an_observer_out_of_range_is_refused(observer, message):
    with pytest.raises((ValueError, TypeError), match=message):
        wrap(nn.Linear(4, 2), W8 | {"observer": observer})
