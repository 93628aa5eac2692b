"""What only a GPU engine has: graphs, pages, its own cache dtype, its errors."""

import os
import subprocess
import sys

import models
import pytest
import torch
from models import greedy, open_fp32, relative_error, sequences

from moq import _C
from moq.inference import Engine

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pair(model_directory, gpu) -> tuple[Engine, Engine]:
    """One model on both devices."""
    directory = model_directory("llama")
    return open_fp32(directory, "cpu"), open_fp32(directory, gpu)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 16, 17, 33])
def test_every_batch_size_draws_the_tokens_of_the_cpu(rows, pair):
    prompts = sequences(*[1 + 5 * i % 40 for i in range(rows)])
    cpu, gpu = (engine.generate(prompts, 24, max_batch=rows) for engine in pair)
    assert [g.token_ids for g in gpu] == [g.token_ids for g in cpu]


def test_a_captured_step_serves_the_next_generations_too(pair):
    _, engine = pair
    first = engine.generate(sequences(7), 30)
    for _ in range(3):
        assert engine.generate(sequences(7), 30) == first
    longer = engine.generate(sequences(60), 30)  # other lengths, the same graph
    assert longer == pair[0].generate(sequences(60), 30)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"repetition_penalty": 1.4},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2},
    ],
)
def test_sampling_draws_the_tokens_of_the_cpu(options, pair):
    prompts = sequences(4, 11, 30)
    cpu, gpu = (engine.generate(prompts, 40, seed=11, **options) for engine in pair)
    assert [g.token_ids for g in gpu] == [g.token_ids for g in cpu]


def test_prompts_that_join_a_running_batch_draw_the_tokens_of_the_cpu(pair):
    prompts = sequences(*range(1, 30))
    cpu, gpu = (engine.generate(prompts, 20, max_batch=4) for engine in pair)
    assert [g.token_ids for g in gpu] == [g.token_ids for g in cpu]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "qwen3", "gpt_neox"])
def test_an_int8_cache_costs_little_accuracy(name, model_directory, gpu):
    directory = model_directory(name)
    (row,) = sequences(70)
    exact = open_fp32(directory, gpu)
    rounded = open_fp32(directory, gpu, kv_cache_dtype="int8")
    cache = rounded.core.make_cache(1, 96)
    slot = cache.allocate()
    pieces = [row[:40], row[40:41], row[41:]]
    logits = torch.cat([rounded.core.forward([piece], [], cache, [slot]) for piece in pieces])
    assert 1e-5 < relative_error(logits, exact.core.forward([row])) < 0.05


def test_forked_pages_are_copied_when_one_of_their_owners_writes(pair):
    _, engine = pair
    core = engine.core
    (row,) = sequences(70)  # more than a page
    cache = core.make_cache(3, 96)
    parent = cache.allocate()
    core.forward([row], [], cache, [parent])
    first, second = cache.fork(parent), cache.fork(parent)
    core.forward([[5, 6, 7], [8], [9, 10]], [], cache, [parent, first, second])
    logits = core.forward([[11], [11], [11]], [], cache, [parent, first, second])
    for i, tail in enumerate([[5, 6, 7], [8], [9, 10]]):
        alone = core.forward([[*row, *tail, 11]])[-1]
        assert relative_error(logits[i], alone) < 5e-6


def test_memory_report_says_what_is_allocated(model_directory, gpu):
    directory = model_directory("llama")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    engine = open_fp32(directory, gpu, dtype="int8")
    engine.generate(sequences(9), 4)
    report = engine.memory_report()
    allocated = torch.cuda.memory_allocated() - before
    assert report["total"] == report["weights"] + report["kv_cache"] + report["workspace"]
    assert abs(allocated - report["total"]) < 0.02 * report["total"] + 512 * 200  # rounding


def test_int8_weights_take_a_byte_each(smollm2, gpu):
    before = torch.cuda.memory_allocated()
    engine = Engine.from_pretrained(smollm2[0], device=gpu, dtype="int8")
    model = smollm2[1]
    projections = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    table = model.get_input_embeddings().weight.numel() * 2
    assert engine.memory_report()["weights"] < 1.03 * (projections + table)
    assert torch.cuda.memory_allocated() - before < 1.04 * (projections + table)


def test_a_cache_that_does_not_fit_says_what_would(model_directory, gpu):
    engine = Engine.from_pretrained(model_directory("llama"), device=gpu)
    with pytest.raises(_C.Error, match=r"the KV cache must fit .* got .* free: .* would fit"):
        engine.core.make_cache(1 << 27, 96)
    engine.generate(sequences(5), 3)


def test_a_cache_of_another_device_is_refused(pair):
    cpu, gpu = pair
    cache = cpu.core.make_cache(1, 16)
    with pytest.raises(_C.Error, match="must be one of this engine's make_cache"):
        gpu.core.forward(sequences(3), [], cache, [cache.allocate()])


def test_logits_that_are_no_numbers_are_an_error_and_the_engine_goes_on(tmp_path, gpu):
    model = models.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    models.save("llama", model, tmp_path)
    engine = open_fp32(tmp_path, gpu)
    with pytest.raises(_C.Error, match="a NaN or an infinity in row 0"):
        engine.generate([3, 7, 4], 5)
    (row,) = ([t for t in r if t != 7] for r in sequences(9))
    tokens = engine.generate(row, 1).token_ids
    assert tokens == greedy(model, row, tokens)


def test_bad_requests_leave_the_engine_usable(pair):
    _, engine = pair
    expected = engine.generate(sequences(6), 5)
    for prompt, message in [([97], "outside|lie in"), ([-1], "lie in"), ([], "at least one token")]:
        with pytest.raises(_C.Error, match=message):
            engine.generate(prompt, 5)
    with pytest.raises(_C.Error, match="must fit into the model's 96 positions"):
        engine.generate(sequences(90), 7)
    assert engine.generate(sequences(6), 5) == expected


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ
        | environment
        | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


BREAK_THE_GPU = """
import sys, torch
from moq import _C
from moq.inference import Engine
engine = Engine.from_pretrained(sys.argv[1], device="cuda")
engine.generate([3, 4], 3)
try:
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")]
    torch.cuda.synchronize()
except Exception:
    pass
for _ in range(2):
    try:
        engine.generate([3, 4], 3)
    except Exception as error:
        print(type(error).__name__, error)
sys.stdout.flush()
import os
os._exit(0)
"""


def test_after_an_error_of_the_gpu_the_engine_says_that_it_is_unusable(model_directory, gpu):
    result = run_script(BREAK_THE_GPU, str(model_directory("llama")))
    first, second = [line for line in result.stdout.splitlines() if line.startswith("Error")]
    assert "must be made anew, in a new process, after an error of the GPU" in first
    assert second == first


OLDER_GPU = """
import sys, json
from moq.inference import Engine
engine = Engine.from_pretrained(sys.argv[1], device="cuda", dtype=sys.argv[2])
print(json.dumps(engine.generate(json.loads(sys.argv[3]), 30).token_ids))
"""


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_an_older_gpus_path_decides_as_the_newest(dtype, smollm2, gpu):
    (row,) = sequences(12)
    scripts = [
        run_script(OLDER_GPU, str(smollm2[0]), dtype, str(row), **environment)
        for environment in ({}, {"MOQ_GPU_ARCH": "80"})
    ]
    assert scripts[0].returncode == 0, scripts[0].stderr
    assert scripts[0].stdout == scripts[1].stdout, scripts[1].stderr


def test_kernels_that_may_not_overlap_give_the_same_tokens(model_directory, gpu):
    (row,) = sequences(12)
    scripts = [
        run_script(OLDER_GPU, str(model_directory("llama")), "fp16", str(row), **environment)
        for environment in ({}, {"MOQ_GPU_OVERLAP": "0"})
    ]
    assert scripts[0].returncode == 0, scripts[0].stderr
    assert scripts[0].stdout == scripts[1].stdout, scripts[1].stderr
