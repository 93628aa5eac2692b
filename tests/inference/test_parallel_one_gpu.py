"""Two ranks on one GPU, which exchange through the host: they get what one rank gets."""

import models
import pytest
import torch
from launch import WORKERS, run_gpu_ranks

pytestmark = pytest.mark.gpu

FP32 = {"dtype": "fp32"}
INT8 = {"dtype": "int8", "compute_dtype": "fp32", "activations": "dynamic_asymmetric"}
FP16 = {"dtype": "fp16"}
# Sums in another order may move an INT8 activation to the next code.
VARIANTS = [(FP32, 1e-5), (INT8, 2e-2), (FP16, 2e-2)]


# Unequal shares of heads, columns and vocabulary.
@pytest.mark.parametrize("name", ["nine_heads", "gpt2", "bert", "bert_masked_lm"])
def test_two_ranks_on_one_gpu_get_what_one_gets(name, tmp_path, gpu):
    (tmp_path / name).mkdir()
    models.save(name, models.build(name), tmp_path / name)
    one, two = (
        # Nothing that passes through the host can be captured.
        run_gpu_ranks(
            WORKERS / worker,
            ranks,
            tmp_path,
            [options for options, _ in VARIANTS],
            MOQ_GPU_GRAPHS="0",
        )
        for worker, ranks in (("gpu_rank.py", 1), ("one_gpu_rank.py", 2))
    )
    for options, tolerance in VARIANTS:
        expected, found = (results[f"{name} {options}"] for results in (one, two))
        if "runs" in expected:
            expected, found = expected["runs"][0], found["runs"][0]
        elif options is not FP16:
            assert found["tokens"] == expected["tokens"]
            assert found["graphs"] == expected["graphs"] == [0, 0]
        kinds = expected.keys() - {"tokens", "graphs"}
        assert len(kinds) >= 2
        for kind in kinds:
            values = (torch.tensor(results[kind]) for results in (found, expected))
            assert models.relative_error(*values) < tolerance
