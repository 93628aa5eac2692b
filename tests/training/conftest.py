"""What the tests of training share beside `device` and `gpu` of tests/conftest.py."""

from collections.abc import Callable, Iterator

import pytest
import torch
from attention_net import Net
from probe_clock import Clock
from tiny_decoder import Decoder

from moq import measurement, probe_cost, probing, record, sensitivity


@pytest.fixture
def decoder() -> Callable[..., Decoder]:
    """Returns a function that makes the same small decoder each time."""

    def make(dtype: torch.dtype = torch.float32, **sizes: int) -> Decoder:
        torch.manual_seed(0)
        return Decoder(**sizes).to(dtype)

    return make


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps its settings in a process-wide object."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def net() -> Net:
    """The same net of attention each time."""
    torch.manual_seed(4)
    return Net()


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for it: two rows of three tokens, and their classes."""
    torch.manual_seed(5)
    return torch.randn(2, 3, 4, requires_grad=True).detach(), torch.randint(0, 3, (6,))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What measurements take their time from."""
    clock = Clock()
    for module in (measurement, probe_cost, probing, record, sensitivity):
        monkeypatch.setattr(module, "time", clock)
    return clock
