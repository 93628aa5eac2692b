"""Devices of the tests: `device` is the CPU and then, where there is one, a GPU."""

import os

import pytest
import torch

from moq import _C

# What is printed must not depend on the terminal that the tests are started from.
os.environ["COLUMNS"] = "200"


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        require_gpu()
    return request.param


@pytest.fixture(scope="session")
def gpu() -> str:
    """The GPU of tests that have no CPU half; their modules carry the marker gpu.

    Named before what takes long to make, which is not made then where there is no GPU.
    """
    require_gpu()
    return "cuda"


def require_gpu() -> None:
    if _C.build_info()["cuda_architectures"] is None:
        pytest.skip("built without CUDA (MOQ_CUDA): not tested on a GPU")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: not tested on a GPU")
