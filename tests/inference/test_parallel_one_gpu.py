"""Two ranks on one GPU, which exchange through the host: they get what one rank gets."""

import models
import pytest
import torch
from launch import WORKERS, run_gpu_ranks

pytestmark = pytest.mark.gpu

FP32 = {"dtype": "fp32"}
INT8 = {"dtype": "int8", "compute_dtype": "fp32", "activations": "dynamic_asymmetric"}
FP16 = {"dtype": "fp16"}
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-2}


# Unequal shares of heads, columns and vocabulary.
@pytest.mark.parametrize("name", ["nine_heads", "gpt2", "qwen3", "bert"])
def test_two_ranks_on_one_gpu_get_what_one_gets(name, tmp_path, gpu):
    (tmp_path / name).mkdir()
    models.save(name, models.build(name), tmp_path / name)
    one, two = (
        # Nothing that passes through the host can be captured.
        run_gpu_ranks(WORKERS / worker, ranks, tmp_path, [FP32, INT8, FP16], MOQ_GPU_GRAPHS="0")
        for worker, ranks in (("gpu_rank.py", 1), ("one_gpu_rank.py", 2))
    )
    if name != "bert":
        for options in (FP32, INT8):
            expected, found = (results[f"{name} {options}"] for results in (one, two))
            assert found["tokens"] == expected["tokens"]
            assert found["graphs"] == expected["graphs"] == [0, 0]
    for options in (FP32, FP16):
        expected, found = (results[f"{name} {options}"] for results in (one, two))
        if name == "bert":
            expected, found = expected["runs"][0], found["runs"][0]
        kinds = {"logits", "logits of steps", "states", "pooled"} & expected.keys()
        assert len(kinds) >= 2
        for kind in kinds:
            error = models.relative_error(torch.tensor(found[kind]), torch.tensor(expected[kind]))
            assert error < TOLERANCES[options["dtype"]]
