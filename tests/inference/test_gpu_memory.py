"""What a GPU engine takes of the GPU's memory, and what it says where that is not enough."""

import copy
import gc
import re

import pytest
import rounded_models
import torch
from little_memory import little_memory, memory_limit
from models import open_fp32, relative_error, sequences

from moq import _C
from moq.inference import Engine

pytestmark = pytest.mark.gpu


def number_in(error, pattern):
    """The number that a message names."""
    match = re.search(pattern, str(error.value))
    assert match, str(error.value)
    return int(match[1])


def test_memory_report_says_what_is_allocated(gpu, smollm2):
    gc.collect()
    before = torch.cuda.memory_allocated()
    engine = Engine.from_pretrained(smollm2[0], device=gpu, dtype="int8")
    engine.generate(sequences(9, 300), 4)
    report = engine.memory_report()
    allocated = torch.cuda.memory_allocated() - before
    assert report["total"] == report["weights"] + report["kv_cache"] + report["workspace"]
    assert abs(allocated - report["total"]) < 0.02 * report["total"]


def test_int8_weights_take_a_byte_each(gpu, smollm2):
    before = torch.cuda.memory_allocated()
    engine = Engine.from_pretrained(smollm2[0], device=gpu, dtype="int8")
    model = smollm2[1]
    projections = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    table = model.get_input_embeddings().weight.numel() * 2
    assert engine.memory_report()["weights"] < 1.03 * (projections + table)
    assert torch.cuda.memory_allocated() - before < 1.04 * (projections + table)


def test_a_cache_that_does_not_fit_says_what_would(gpu, smollm2):
    engine = Engine.from_pretrained(smollm2[0], device=gpu, dtype="fp16")
    with memory_limit(1 << 30):
        with pytest.raises(_C.Error, match=r"the KV cache must fit .* got .* free: ") as error:
            engine.core.make_cache(64, 8192)
        few = number_in(error, r"; (\d+) such sequences would fit")
        short = number_in(error, r" such sequences would fit, or 64 of (\d+) tokens")
        assert few > 1
        assert short > 100
        engine.core.make_cache(few, 8192)
        engine.core.make_cache(64, short)
    engine.generate(sequences(5), 3)


def test_an_engine_that_ran_out_of_memory_goes_on(model_directory, gpu):
    engine = open_fp32(model_directory("llama"), gpu)
    few, many = sequences(6), sequences(*[60] * 64)
    expected = engine.generate(few, 5)
    logits = engine.forward(few)[0]
    with little_memory():
        with pytest.raises(_C.Error, match="the workspace must fit .* tokens at once would fit"):
            engine.forward(sequences(*[1] * 2048))
        with pytest.raises(_C.Error, match="the KV cache must fit"):
            engine.generate(many, 20, max_batch=64)
        assert engine.generate(few, 5) == expected
    assert relative_error(engine.forward(few)[0], logits) < 5e-6
    assert engine.generate(few, 5) == expected
    assert len(engine.generate(many, 20, max_batch=64)) == 64


def test_a_result_that_does_not_fit_says_what_would(gpu, smollm2):
    engine = Engine.from_pretrained(smollm2[0], device=gpu, dtype="fp16")
    with memory_limit(200 << 20):
        with pytest.raises(_C.Error, match="the result must fit .* free: about") as error:
            engine.forward([[5] * 2000])
        few = number_in(error, r"about (\d+) tokens or sequences at once would fit, got 2000")
        assert few > 500
        assert len(engine.forward([[5] * few])[0]) == few


def test_a_cache_forgets_the_tokens_whose_result_did_not_fit(gpu, smollm2):
    core = Engine.from_pretrained(smollm2[0], device=gpu, dtype="fp16").core
    cache = core.make_cache(1, 2000)
    slot = cache.allocate()
    core.forward([[7, 8]], [], cache, [slot])
    with memory_limit(200 << 20), pytest.raises(_C.Error, match="the result must fit"):
        core.forward([[5] * 1900], [], cache, [slot])
    assert cache.length(slot) == 2
    logits = core.forward([[9]], [], cache, [slot])
    assert relative_error(logits[-1], core.forward([[7, 8, 9]])[-1]) < 0.02


def test_logits_take_no_memory_beside_the_result(gpu, smollm2):
    engine = Engine.from_pretrained(smollm2[0], device=gpu, dtype="fp16")
    (logits,) = engine.forward([[5] * 64])
    assert engine.memory_report()["workspace"] < logits.nbytes / 2


def test_a_model_that_does_not_fit_is_refused_with_what_would(gpu, smollm2, tmp_path):
    copy.deepcopy(smollm2[1]).half().save_pretrained(tmp_path)
    model = smollm2[1]
    table = 4 * model.get_input_embeddings().weight.numel() / 2**20
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    projections = 4 * sum(weight.numel() for weight in linears) / 2**20  # MiB, the head among them
    with memory_limit(300 << 20):
        with pytest.raises(_C.Error, match="the weights must fit .* were free at first") as error:
            Engine.from_pretrained(tmp_path, device=gpu, dtype="fp32")
        taken = number_in(error, r"the model takes about (\d+)\.\d+ MiB, and ")
        assert abs(taken - (table + projections)) < 2
        assert number_in(error, r'dtype="int8" would fit, with about (\d+)') < 200
        gpus = number_in(error, r"; (\d+) GPUs with as much free would")
        usable = 300 - 300 / 16  # without what the allocator's pieces may take
        assert gpus == int(projections / (usable - table)) + 1  # each has the whole table
        engine = Engine.from_pretrained(tmp_path, device=gpu, dtype="int8")
        assert len(engine.generate([1, 2, 3], 2, stop_token_ids=[]).token_ids) == 2


def test_integers_that_are_expanded_count_as_the_floats_they_become(gpu, smollm2, tmp_path):
    model = copy.deepcopy(smollm2[1])
    rounded_models.export(model, tmp_path / "out", "4 bits per group")
    linears = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    elements = sum(w.numel() for w in [*linears, model.get_input_embeddings().weight])
    with memory_limit(250 << 20):
        with pytest.raises(_C.Error, match="the weights must fit") as error:
            Engine.from_pretrained(tmp_path / "out", device=gpu, dtype="fp16")
        taken = number_in(error, r"the model takes about (\d+)\.\d+ MiB, and ")
        assert abs(taken - 2 * elements / 2**20) < 2


def test_the_kept_cache_does_not_grow_to_the_most_and_the_longest(gpu, smollm2):
    engine = Engine.from_pretrained(smollm2[0], device=gpu, dtype="fp16")
    engine.generate(sequences(4000), 2)
    long = engine.memory_report()["kv_cache"]
    engine.generate(sequences(*[8] * 16), 2)
    assert engine.memory_report()["kv_cache"] <= 2 * long
    engine.generate(sequences(3000), 2)
    assert engine.memory_report()["kv_cache"] <= 2 * long
