"""Where the operator tests run, beside `device` and `gpu` of tests/conftest.py."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that asks for a GPU carries the marker."""
    for item in items:
        if "gpu" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.float32), id="cpu-float32"),
        *(
            pytest.param(("cuda", dtype), id=f"cuda-{name}", marks=pytest.mark.gpu)
            for name, dtype in (
                ("float16", torch.float16),
                ("bfloat16", torch.bfloat16),
                ("float32", torch.float32),
            )
        ),
    ]
)
def place(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """A device and a dtype that activations have there."""
    device, dtype = request.param
    return (request.getfixturevalue("gpu") if device == "cuda" else device), dtype
