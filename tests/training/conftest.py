"""What the tests of training share beside `device` and `gpu` of tests/conftest.py."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny_decoder import Decoder


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
