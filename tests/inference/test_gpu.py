"""What only a GPU engine has: graphs, pages, its own cache dtype, its errors, its sizes."""

import gc
import json
import re

import models
import pytest
import torch
from decoders import write_decoder
from models import (
    CACHE_TOLERANCES,
    DECODE_STEPS,
    cached_logits,
    greedy,
    open_decoding_by,
    open_fp32,
    reference_logits,
    relative_error,
    sequences,
)
from scripts import run_script
from torch.profiler import ProfilerActivity, profile

from moq import _C
from moq.inference import Engine
from moq.inference.profile import profile_decode

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
def test_an_int8_cache_costs_little_accuracy_as_simulated(name, model_directory, gpu):
    (row,) = sequences(70)
    rounded = open_fp32(model_directory(name), gpu, kv_cache_dtype="int8")
    assert rounded.core.kv_cache_dtype == "int8"
    logits = cached_logits(rounded.core, [row[:40], row[40:41], row[41:]])
    model = models.build(name)
    with torch.no_grad():
        simulated = model(torch.tensor([row]), past_key_values=models.Int8Cache()).logits[0]
    cost = relative_error(simulated, reference_logits(model, row))
    assert 1e-3 < cost < 0.05
    # Where sums in two orders lie on both sides of an edge between two codes, a code differs.
    assert relative_error(logits, simulated) < 0.5 * cost


@pytest.mark.parametrize("kv_cache_dtype", CACHE_TOLERANCES)
def test_forked_pages_are_copied_when_one_of_their_owners_writes(
    kv_cache_dtype, model_directory, gpu
):
    core = open_fp32(model_directory("llama"), gpu, kv_cache_dtype=kv_cache_dtype).core
    (row,) = sequences(70)  # more than a page
    cache = core.make_cache(3, 96)
    parent = cache.allocate()
    core.forward([row], [], cache, [parent])
    first, second = cache.fork(parent), cache.fork(parent)
    core.forward([[5, 6, 7], [8], [9, 10]], [], cache, [parent, first, second])
    logits = core.forward([[11], [11], [11]], [], cache, [parent, first, second])
    for i, tail in enumerate([[5, 6, 7], [8], [9, 10]]):
        alone = cached_logits(core, [[*row, *tail, 11]])[-1]
        assert relative_error(logits[i], alone) < CACHE_TOLERANCES[kv_cache_dtype]


def test_a_cache_of_another_engine_is_refused(model_directory, pair):
    cpu, gpu = pair
    half = Engine.from_pretrained(model_directory("llama"), device="cuda", dtype="fp16")
    for other in (cpu, half):
        cache = other.core.make_cache(1, 16)
        with pytest.raises(_C.Error, match="must be one of this engine's make_cache"):
            gpu.core.forward(sequences(3), [], cache, [cache.allocate()])


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_asymmetric"])
def test_more_sequences_than_are_computed_at_once_are_classified(kind, model_directory, gpu):
    engine = open_fp32(model_directory("bert"), gpu, dtype="int8", activations=kind)
    rows = sequences(*[1] * 2500)
    encoding = engine.encode(rows)
    for i in (0, 1500, 2499):
        alone = engine.encode([rows[i]])
        assert relative_error(encoding.pooled[i], alone.pooled[0]) < 2e-2
        assert relative_error(encoding.logits[i], alone.logits[0]) < 2e-2


@pytest.mark.parametrize("name", ["llama", "bert_masked_lm"])
def test_more_tokens_than_are_computed_at_once_have_the_logits_of_the_cpu(
    name, model_directory, gpu
):
    directory = model_directory(name)
    rows = sequences(*[90 - i % 3 for i in range(64)])
    expected, logits = (
        torch.cat(open_fp32(directory, device).forward(rows)) for device in ("cpu", gpu)
    )
    assert relative_error(logits, expected) < 1e-5
    half = torch.cat(Engine.from_pretrained(directory, device=gpu, dtype="fp16").forward(rows))
    assert relative_error(half, expected) < 0.02


def test_a_cache_serves_in_inference_mode_and_out_of_it(pair):
    _, engine = pair
    row = sequences(12)[0]
    with torch.inference_mode():
        cache = engine.core.make_cache(1, 96)
        slot = cache.allocate()
        first = engine.core.forward([row[:5]], [], cache, [slot])
    rest = engine.core.forward([row[5:]], [], cache, [slot])
    assert relative_error(torch.cat([first, rest]), engine.forward([row])[0]) < 5e-6


def test_results_are_safe_from_the_call_of_another_stream(pair):
    _, engine = pair
    row, other = sequences(90, 80)
    expected = engine.forward([row])[0].clone()
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        logits = engine.forward([row])[0]
        with torch.cuda.stream(torch.cuda.Stream()):
            engine.forward([other])
        results.append(logits.clone())
    assert all(relative_error(result, expected) < 5e-6 for result in results)


def test_logits_that_are_no_numbers_are_an_error_and_the_engine_goes_on(tmp_path, gpu):
    model = models.build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    models.save("llama", model, tmp_path)
    engine = open_fp32(tmp_path, gpu)
    with pytest.raises(_C.Error, match="a NaN or an infinity for new token 0 of prompt 1"):
        engine.generate([[3, 4], [3, 7, 4]], 5)
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


BREAK_THE_GPU = """
import os, sys, threading, time, torch
from moq.inference import Engine
engine = Engine.from_pretrained(sys.argv[1], device="cuda")
engine.generate([3, 4], 3)
zeros = torch.zeros(9, device="cuda")
behind = torch.zeros(1 << 27, dtype=torch.int64, device="cuda")
behind[-1] = 5  # is read late: what is launched meanwhile waits behind the kernel that fails
zeros[behind]  # loads the kernel, for which CUDA may wait
torch.cuda.synchronize()
def fail(seconds):
    time.sleep(seconds)
    try:
        zeros[:1][behind]
        torch.cuda.synchronize()
    except Exception as error:
        print(error, file=sys.stderr, flush=True)
if sys.argv[2] == "before":
    fail(0)
elif sys.argv[2] == "behind a step":  # the error comes when it has been launched
    torch.cuda._sleep(int(1e9))
    zeros[:1][behind]
else:  # amid the launches of a step
    threading.Thread(target=fail, args=(0.5,)).start()
for _ in range(2):
    try:
        for _ in range(1000):
            engine.generate([3, 4], 90, stop_token_ids=[])
    except Exception as error:
        print(type(error).__name__, error)
sys.stdout.flush()
os._exit(0)
"""


def errors_of_a_broken_gpu(directory, when, **environment):
    """What two calls of an engine say after an error of the GPU."""
    result = run_script(BREAK_THE_GPU, str(directory), when, **environment)
    errors = [line for line in result.stdout.splitlines() if re.match(r"\w*Error ", line)]
    assert len(errors) == 2, result.stderr
    return errors


def test_after_an_error_of_the_gpu_the_engine_says_that_it_is_unusable(model_directory, gpu):
    first, second = errors_of_a_broken_gpu(model_directory("llama"), "before")
    assert "must be made anew, in a new process, after an error of the GPU" in first
    assert second == first


def test_an_error_of_the_gpu_during_a_step_is_told_with_its_remedy(model_directory, gpu):
    first, second = errors_of_a_broken_gpu(model_directory("llama"), "behind a step")
    assert re.match(r"Error engine: .* of 2 tokens must succeed on cuda:0, got \"", first)
    assert "MOQ_GPU_GRAPHS=0 CUDA_LAUNCH_BLOCKING=1 tells which" in first
    assert "must be made anew, in a new process, after an error of the GPU" in second


def test_an_error_names_kernel_shape_and_device_where_launches_block(model_directory, gpu):
    """Of whatever kernel an error is met at, here another thread's."""
    for _ in range(4):  # for it may come between the last kernel of a step and the next step
        first, second = errors_of_a_broken_gpu(
            model_directory("llama"), "amid", MOQ_GPU_GRAPHS="0", CUDA_LAUNCH_BLOCKING="1"
        )
        assert "must be made anew, in a new process, after an error of the GPU" in second
        if "CUDA: kernel" in first:
            break
    assert re.match(
        r"Error engine: \w.* of \d+ x \d+ on cuda:0: CUDA: kernel \w+_kernel\b.* must run", first
    )


def test_heads_wider_than_any_kernels_are_refused_at_once(tmp_path, gpu):
    policy = write_decoder(tmp_path, head_dim=264)
    with pytest.raises(_C.Error, match="head_dim must be <= 256 on a GPU, got 264"):
        Engine.from_pretrained(tmp_path, device=gpu, policy=policy)
    engine = Engine.from_pretrained(tmp_path, device="cpu", policy=policy)
    assert len(engine.generate([1, 2, 3], 2).token_ids) == 2


def test_a_vocabulary_too_large_to_draw_from_is_refused_before_the_prompt(tmp_path, gpu):
    policy = write_decoder(
        tmp_path, vocab_size=1 << 19, hidden_size=8, head_dim=4, intermediate_size=32
    )
    cpu, on_gpu = (
        Engine.from_pretrained(tmp_path, device=device, dtype="fp32", policy=policy)
        for device in ("cpu", gpu)
    )
    with pytest.raises(_C.Error, match="vocab_size must be <= 524287 on a GPU, got 524288"):
        on_gpu.generate([1, 2, 3], 2)
    expected = cpu.forward([[1, 2, 3]])[0]
    assert relative_error(on_gpu.forward([[1, 2, 3]])[0], expected) < 5e-6


SWITCHED = """
import json, sys, torch
from torch.profiler import ProfilerActivity, profile
from moq.inference import Engine
engine = Engine.from_pretrained(sys.argv[1], device="cuda", dtype=sys.argv[2])
row = json.loads(sys.argv[3])
tokens = engine.generate(row, 30).token_ids
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
    assert engine.generate(row, 30).token_ids == tokens
events = profiler.events()
kernels = sorted(
    (event.time_range.start, event.time_range.end, event.name)
    for event in events
    if event.device_type == torch.autograd.DeviceType.CUDA
    and "_kernel" in event.name
)
early = sum(start < end for (_, end, _), (start, _, _) in zip(kernels, kernels[1:]))
print(json.dumps({
    "tokens": tokens,
    "kernels": sorted({name for _, _, name in kernels}),
    "early": early / len(kernels),
    "graphs": sum(event.name == "cudaGraphLaunch" for event in events),
    "waits": sum("Synchronize" in e.name or e.name == "cudaMemcpy" for e in events),
}))
"""


def switched(directory, dtype, **environment):
    """What a process with these variables draws, and by which kernels."""
    (row,) = sequences(12, seed=10)  # each token of which is far from a tie
    result = run_script(SWITCHED, str(directory), dtype, str(row), **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


newest_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
    reason="needs compute capability 9.0, whose path is switched off",
)


@newest_gpus
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_an_older_gpus_path_decides_as_the_newest(dtype, gpu, smollm2):
    newest, older = (switched(smollm2[0], dtype, **e) for e in ({}, {"MOQ_GPU_ARCH": "80"}))
    assert any("stream_kernel" in name for name in newest["kernels"])
    assert not any("stream_kernel" in name for name in older["kernels"])
    assert not any("plain_linear" in name for name in older["kernels"])
    assert newest["tokens"] == older["tokens"]


@newest_gpus
@pytest.mark.parametrize(("tokens", "together"), [(8, False), (9, True), (128, True), (129, False)])
def test_few_tokens_are_projected_and_attended_to_by_one_kernel(
    tokens, together, model_directory, gpu
):
    engine = Engine.from_pretrained(model_directory("bert_wide_heads"), device=gpu, dtype="fp16")
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.forward(sequences(tokens))
    kernels = {event.name for event in profiler.events()}
    assert any("qkv_attention_kernel" in name for name in kernels) == together


@newest_gpus
def test_kernels_that_may_not_overlap_give_the_same_tokens(gpu, smollm2):
    free, bound = (switched(smollm2[0], "fp16", **e) for e in ({}, {"MOQ_GPU_OVERLAP": "0"}))
    assert free["early"] > 0.1 > bound["early"]
    assert free["tokens"] == bound["tokens"]


def test_steps_without_graphs_give_the_same_tokens(gpu, smollm2):
    captured, single = (switched(smollm2[0], "fp16", **e) for e in ({}, {"MOQ_GPU_GRAPHS": "0"}))
    assert captured["graphs"] >= 29 and single["graphs"] == 0
    assert captured["tokens"] == single["tokens"]


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_the_host_waits_once_a_step_for_its_token(graphs, gpu, smollm2):
    run = switched(smollm2[0], "int8", MOQ_GPU_GRAPHS=graphs)
    # One step a token. The profiler itself waits when it begins and ends.
    assert 30 <= run["waits"] <= 34


# ---- the kernels of a step


def kernels_of_a_step(engine) -> list[str]:
    return [what for what, *_ in engine.core.decode_kernels()]


@newest_gpus
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama_wide_heads", "gpt2_wide_heads"])
def test_a_layer_of_up_to_eight_rows_is_five_kernels(name, rows, model_directory, gpu):
    directory = model_directory(name)
    engine = Engine.from_pretrained(
        directory, device=gpu, dtype="fp16", policy=models.policy_in(directory)
    )
    profile_decode(engine, sequences(*[9] * rows), 6)  # an error if the GPU ran any others
    layer = [
        "QKV projection",
        "attention",
        "attention output projection",
        "up projection",
        "down projection",
    ]
    assert kernels_of_a_step(engine) == ["inputs", "embedding", *layer, *layer, "head", "sampling"]


# ---- a step of one token as one kernel


@newest_gpus
def test_layers_of_one_token_run_in_one_kernel_wherever_they_can(model_directory, gpu, monkeypatch):
    directory = model_directory("gpt2_wide_heads")
    (row,) = sequences(12)
    engines = {path: open_decoding_by(path, monkeypatch, directory) for path in DECODE_STEPS}
    unforced = Engine.from_pretrained(directory, device="cuda", dtype="int8")
    for length in (12, 1, 30):
        (row,) = sequences(length)
        expected = engines["persistent"].generate(row, 60)
        engines["chain"].generate(row, 60)
        assert unforced.generate(row, 60) == expected
    assert "all layers" not in kernels_of_a_step(engines["chain"])
    assert kernels_of_a_step(engines["persistent"]).count("all layers") == 1
    assert "attention" not in kernels_of_a_step(engines["persistent"])
    assert kernels_of_a_step(unforced) == kernels_of_a_step(engines["persistent"])
    unforced.generate(sequences(5, 9), 4)
    assert "all layers" not in kernels_of_a_step(unforced)


@newest_gpus
def test_both_ways_of_a_step_continue_each_others_caches(model_directory, gpu, monkeypatch):
    """One row alone takes the one kernel, and other numbers of rows the chain."""
    engine = open_decoding_by("persistent", monkeypatch, model_directory("gpt2_wide_heads"))
    (row,) = sequences(70)  # more than a page
    cache = engine.core.make_cache(3, 96)
    parent = cache.allocate()
    engine.core.forward([row], [], cache, [parent])
    child = cache.fork(parent)
    for token in (5, 6, 7):
        engine.core.forward([[token]], [], cache, [child])
        engine.core.forward([[8], [9]], [], cache, [parent, child])
    logits = engine.core.forward([[11]], [], cache, [child])
    whole = engine.forward([[*row, 5, 9, 6, 9, 7, 9, 11]])[0][-1:]
    assert relative_error(logits, whole) < 1e-2


@newest_gpus
@pytest.mark.parametrize("path", DECODE_STEPS)
def test_a_step_that_meets_no_numbers_is_an_error_by_either_way(path, tmp_path, gpu, monkeypatch):
    model = models.build("gpt2_wide_heads")
    with torch.no_grad():
        model.transformer.wpe.weight[6] = torch.nan
    models.save("gpt2_wide_heads", model, tmp_path)
    engine = open_decoding_by(path, monkeypatch, tmp_path)
    tokens = engine.generate([3, 7, 4], 3).token_ids
    with pytest.raises(_C.Error, match="a NaN or an infinity for new token 4 of prompt 0"):
        engine.generate([3, 7, 4], 8)
    assert engine.generate([3, 7, 4], 3).token_ids == tokens


@newest_gpus
def test_memory_report_counts_what_a_step_in_one_kernel_needs(model_directory, gpu, monkeypatch):
    reported, allocated = [], []
    for path in DECODE_STEPS:
        gc.collect()
        before = torch.cuda.memory_allocated()
        engine = open_decoding_by(path, monkeypatch, model_directory("gpt2_wide_heads"))
        engine.generate(sequences(9), 4)
        reported.append(engine.memory_report()["total"])
        allocated.append(torch.cuda.memory_allocated() - before)
        del engine
    more = reported[1] - reported[0]
    assert more > 1e5
    assert abs(allocated[1] - allocated[0] - more) < 0.02 * more
