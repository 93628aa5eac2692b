"""Devices of the operator tests: `device` is the CPU and then, where there is one, a GPU."""

import pytest
import torch

from moq import _C


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        if _C.build_info()["cuda_architectures"] is None:
            pytest.skip("built without CUDA (MOQ_CUDA): the operator was not tested on a GPU")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here: the operator was not tested on a GPU")
    return request.param
