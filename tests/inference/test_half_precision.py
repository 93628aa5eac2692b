"""FP16 and BF16 on a GPU: the errors of logits against those of transformers in the same dtype."""

import copy
from pathlib import Path

import models
import pytest
import rounded_models
import torch
from decoders import WIDE_HEADS
from models import (
    DECODE_STEPS,
    DECODERS,
    WIDE_DECODERS,
    WIDE_ENCODERS,
    cached_logits,
    in_pieces,
    open_decoding_by,
    open_fp32,
    reference_logits,
    relative_error,
    sequences,
)

from moq.inference import Engine

pytestmark = pytest.mark.gpu

LICENSE = Path(__file__).parents[2] / "LICENSE"  # a long English text
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


# Positions that must be decided beyond all doubt, so that comparing decisions says something. The
# share is one of the model and of PyTorch's own errors, not of the engine: of SmolLM2's positions
# here PyTorch on a CPU decides 0.86 in fp16, 0.89 with INT8 weights and 0.35 in bf16.
FEWEST_DECIDED = {"fp16": 0.7, "int8": 0.6, "bf16": 0.3}
# A 16-bit error moves static activations across the edges of their codes.
FEWEST_DECIDED_STATIC = {"fp16": 0.2, "bf16": 0.08}

ROWS = sequences(1, 8, 9, 40, 95)


@pytest.fixture
def enough_decided(record_property):
    """Refuses a smaller share of decided positions; all shares are summed up behind the tests."""

    def check(share, fewest):
        record_property("decided positions", share)
        assert share >= fewest

    return check


def with_parameters_in(dtype, model):
    """The model with its parameters in a dtype; frequencies of rotations stay as they are."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def logits_of(model, rows, device):
    """transformers' logits of all rows, one below the other, float64."""
    model = copy.deepcopy(model).to(device)
    logits = [model(torch.tensor([row], device=device)).logits.flatten(0, -2) for row in rows]
    return torch.cat(logits).double().cpu()


def naive_logits(model, rows):
    """The same in the model's own dtype on the GPU, with either way that transformers attends."""
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        yield logits_of(model, rows, "cuda")


def check_against_naive(actual, naive, exact):
    """Each error at most twice those of naive computations, and equal decisions beyond them.

    Returns:
        The share of positions at which the margin between the two largest logits exceeds what both
        sides may err.
    """
    error = (actual.double().cpu() - exact).abs()
    naive_error = torch.stack([(values - exact).abs() for values in naive]).amax(dim=0)
    assert error.max() <= 2 * naive_error.max()
    assert error.square().mean() <= 1.5 * naive_error.square().mean()
    top = exact.topk(2, dim=-1).values
    decided = (top[..., 0] - top[..., 1]) > 4 * naive_error.amax(dim=-1)
    assert torch.equal(actual.cpu().argmax(-1)[decided], exact.argmax(-1)[decided])
    return decided.double().mean().item()


def whole_and_in_steps(engine):
    """Logits of ROWS at once, and of the last row token by token; each with its rows of naive."""
    whole, steps = (
        torch.cat(engine.forward(ROWS)),
        cached_logits(engine.core, in_pieces(ROWS[-1], 1)),
    )
    return [(whole, slice(None)), (steps, slice(-len(steps), None))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*DECODERS, *WIDE_DECODERS])
def test_decoder_errors_are_those_of_its_dtype(name, dtype, model_directory, gpu, enough_decided):
    directory = model_directory(name)
    engine = Engine.from_pretrained(
        directory, device=gpu, dtype=dtype, policy=models.policy_in(directory)
    )
    assert engine.core.compute_dtype == str(DTYPES[dtype]).removeprefix("torch.")
    half = with_parameters_in(DTYPES[dtype], models.build(name))
    naive = list(naive_logits(half, ROWS))
    exact = logits_of(with_parameters_in(torch.float64, half), ROWS, "cpu")
    decided = check_against_naive(torch.cat(engine.forward(ROWS)), naive, exact)
    enough_decided(decided, FEWEST_DECIDED[dtype])


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", [*DECODERS, *WIDE_DECODERS])
def test_decode_steps_err_as_their_dtype(name, weights, model_directory, gpu, enough_decided):
    directory = model_directory(name)
    engine = Engine.from_pretrained(
        directory, device=gpu, dtype=weights, policy=models.policy_in(directory)
    )
    model = models.build(name)
    half = with_parameters_in(
        DTYPES.get(weights, torch.float32),
        models.simulate_int8(model) if weights == "int8" else model,
    )
    naive = list(
        naive_logits(with_parameters_in(DTYPES.get(weights, torch.float16), half), [ROWS[-1]])
    )
    exact = logits_of(with_parameters_in(torch.float64, half), [ROWS[-1]], "cpu")
    for sizes in ([1], [7, 1, 8, 2, 17]):
        decided = check_against_naive(
            cached_logits(engine.core, in_pieces(ROWS[-1], *sizes)), naive, exact
        )
        enough_decided(decided, FEWEST_DECIDED[weights])


@pytest.mark.parametrize("path", DECODE_STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_either_way_of_a_decode_step_errs_and_decides_as_its_dtype(
    dtype, path, model_directory, gpu, monkeypatch
):
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0, which has both ways")
    directory = model_directory("gpt2_wide_heads")
    engine = open_decoding_by(path, monkeypatch, directory, compute_dtype=dtype)
    model = models.simulate_int8(models.build("gpt2_wide_heads"))
    (prompt,) = sequences(9)
    tokens = engine.generate(prompt, 80).token_ids
    row = [*prompt, *tokens[:-1]]
    naive = list(naive_logits(with_parameters_in(DTYPES[dtype], model), [row]))
    exact = logits_of(with_parameters_in(torch.float64, model), [row], "cpu")
    for sizes in ([1], [40, 1, 1, 1]):
        check_against_naive(cached_logits(engine.core, in_pieces(row, *sizes)), naive, exact)
    naive_error = max((values - exact).abs().max().item() for values in naive)
    exact = exact[len(prompt) - 1 :]
    lost = exact.amax(dim=-1) - exact.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert lost.max() <= 4 * naive_error


@torch.no_grad()
def logits_with_int8_cache(model, rows):
    """transformers' logits in float32, with keys and values rounded as in the engine's cache."""
    model = with_parameters_in(torch.float32, model)
    logits = [model(torch.tensor([row]), past_key_values=models.Int8Cache()).logits for row in rows]
    return torch.cat([values[0] for values in logits]).double()


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 33])
@pytest.mark.parametrize(
    ("weights", "kv_cache_dtype"),
    [("fp16", None), ("bf16", None), ("int8", None), ("fp16", "int8"), ("int8", "int8")],
)
@pytest.mark.parametrize("name", ["gpt2_wide_heads", "llama_wide"])
def test_batches_draw_what_their_errors_allow(
    name, weights, kv_cache_dtype, rows, model_directory, gpu
):
    """By captured steps of rows that fill them, and of rows that do not."""
    directory = model_directory(name)
    engine = Engine.from_pretrained(
        directory,
        device=gpu,
        dtype=weights,
        kv_cache_dtype=kv_cache_dtype,
        policy=models.policy_in(directory),
    )
    prompts = sequences(*[1 + 5 * i % 40 for i in range(rows)])

    def draw():
        generations = engine.generate(prompts, 24, max_batch=rows, stop_token_ids=[])
        return [generation.token_ids for generation in generations]

    drawn = draw()
    assert draw() == drawn
    model = models.build(name)
    if weights == "int8":
        model = models.simulate_int8(model)
    half = with_parameters_in(DTYPES.get(weights, torch.float16), model)
    model = model if weights == "int8" else half
    whole = [[*prompt, *tokens[:-1]] for prompt, tokens in zip(prompts, drawn, strict=True)]
    exact = logits_of(with_parameters_in(torch.float64, model), whole, "cpu")
    error = max((naive - exact).abs().max().item() for naive in naive_logits(half, whole))
    if kv_cache_dtype is not None:
        error += (logits_with_int8_cache(model, whole) - exact).abs().max().item()
    of_rows = exact.split([len(row) for row in whole])
    steps = torch.cat([logits[-24:] for logits in of_rows])
    best = steps.amax(dim=-1)
    lost = best - steps.gather(-1, torch.tensor(drawn).flatten()[:, None])[:, 0]
    assert lost.max() <= 4 * error
    assert 4 * error < (best - steps.mean(dim=-1)).median() / 2  # tokens drawn at random lose more


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "bert_masked_lm", *WIDE_ENCODERS]
)
def test_encoder_errors_are_those_of_its_dtype(name, dtype, model_directory, gpu):
    engine = Engine.from_pretrained(model_directory(name), device=gpu, dtype=dtype)
    half = with_parameters_in(DTYPES[dtype], models.build(name))
    rows = sequences(*range(1, 95, 3))
    if name in ("bert_masked_lm", "roberta_wide"):
        actual = torch.cat(engine.forward(rows))
    else:
        actual = engine.encode(rows).logits
    naive = list(naive_logits(half, rows))
    check_against_naive(
        actual, naive, logits_of(with_parameters_in(torch.float64, half), rows, "cpu")
    )


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("bert_wide_heads", [128]),
        ("bert_wide_heads", [9]),
        ("bert_wide_heads", [65, 64]),
        ("bert_wide_heads", [128, 2, 1, 20]),
        ("bert_wide_heads", [129, 100]),
        ("gpt2_wide_heads", [96]),
        ("gpt2_wide_heads", [70, 1, 9]),
    ],
    ids=str,
)
def test_heads_of_64_dimensions_err_as_their_dtype(
    name, lengths, dtype, weights, model_directory, gpu
):
    # Projection and attention are one kernel where there are so few tokens.
    engine = Engine.from_pretrained(
        model_directory(name),
        device=gpu,
        dtype=weights or dtype,
        compute_dtype=dtype,
        quantize_head=False,
    )
    model = models.build(name)
    if weights == "int8":
        model = models.simulate_int8(model, head=False)
    half = with_parameters_in(DTYPES[dtype], model)
    rows = sequences(*lengths)
    exact = logits_of(with_parameters_in(torch.float64, half), rows, "cpu")
    for _ in range(3):  # the third time by a captured step
        actual = torch.cat(engine.forward(rows))
        check_against_naive(actual, list(naive_logits(half, rows)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["static", "static_asymmetric"])
def test_static_activations_err_as_their_dtype(kind, name, dtype, tmp_path, gpu, enough_decided):
    model = models.build(name)
    grids = rounded_models.static_input_grids(model, ROWS[-1], kind)
    rounded_models.export(model, tmp_path / "out", "8 bits per channel", kind, grids)
    rounded_models.round_inputs(model, grids)
    engine = Engine.from_pretrained(tmp_path / "out", device=gpu, compute_dtype=dtype)
    naive = list(naive_logits(with_parameters_in(DTYPES[dtype], model), ROWS))
    exact = torch.cat([reference_logits(model, row) for row in ROWS])
    for logits, rows in whole_and_in_steps(engine):
        decided = check_against_naive(logits, [n[rows] for n in naive], exact[rows].double())
        enough_decided(decided, FEWEST_DECIDED_STATIC[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["gpt2_wide_heads", "llama_wide", "llama"])
@pytest.mark.parametrize("kind", ["dynamic", "dynamic_asymmetric"])
def test_dynamic_activations_add_no_more_error_than_in_float32(
    kind, name, dtype, model_directory, gpu
):
    """Errors of the dtype and of the activations' codes add up at most, twice over."""
    directory = model_directory(name)

    def logits_with(compute_dtype, activations):
        engine = Engine.from_pretrained(
            directory,
            device=gpu,
            dtype="int8",
            compute_dtype=compute_dtype,
            activations=activations,
            policy=models.policy_in(directory),
        )
        return [logits for logits, _ in whole_and_in_steps(engine)]

    exact, codes_in_fp32, without, found = (
        logits_with(compute_dtype, activations)
        for compute_dtype in ("fp32", dtype)
        for activations in (None, kind)
    )
    for i in range(2):
        error, of_dtype, of_codes = (
            relative_error(logits[i], exact[i]) for logits in (found, without, codes_in_fp32)
        )
        print(f"{name} {dtype} {kind}: {error:.2e}, dtype {of_dtype:.2e}, codes {of_codes:.2e}")
        assert relative_error(found[i], without[i]) > 1e-4
        assert error <= 2 * (of_dtype + of_codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama_even", "gpt2"])
@pytest.mark.parametrize("grid", rounded_models.GRIDS)
def test_exported_grids_err_as_their_dtype(grid, name, dtype, tmp_path, gpu, enough_decided):
    model = rounded_models.export(models.build(name), tmp_path / "out", grid)
    engine = Engine.from_pretrained(tmp_path / "out", device=gpu, compute_dtype=dtype)
    naive = list(naive_logits(with_parameters_in(DTYPES[dtype], model), ROWS))
    exact = logits_of(with_parameters_in(torch.float64, model), ROWS, "cpu")
    for logits, rows in whole_and_in_steps(engine):
        decided = check_against_naive(logits, [n[rows] for n in naive], exact[rows])
        enough_decided(decided, FEWEST_DECIDED[dtype])


@pytest.mark.parametrize(
    ("stored", "computed"), [("fp32", "fp16"), ("fp16", "fp16"), ("bf16", "bf16")]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_int8_weights_are_computed_in_the_dtype_of_the_directory(
    name, stored, computed, tmp_path, gpu, enough_decided
):
    half = with_parameters_in(DTYPES.get(stored, torch.float32), models.build(name))
    models.save(name, half, tmp_path)
    engine = Engine.from_pretrained(tmp_path, device=gpu, dtype="int8")
    assert engine.core.compute_dtype == str(DTYPES[computed]).removeprefix("torch.")
    model = models.simulate_int8(with_parameters_in(torch.float32, half))
    naive = list(naive_logits(with_parameters_in(DTYPES[computed], model), ROWS))
    exact = logits_of(with_parameters_in(torch.float64, model), ROWS, "cpu")
    for logits, rows in whole_and_in_steps(engine):
        decided = check_against_naive(logits, [n[rows] for n in naive], exact[rows])
        enough_decided(decided, FEWEST_DECIDED[computed])


@pytest.mark.parametrize("sizes", [[1], [7, 1, 8, 2, 17]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "bloom", *WIDE_HEADS])
def test_an_int8_cache_adds_no_more_error_than_in_float32(name, dtype, sizes, model_directory, gpu):
    """Errors of the dtype and of the cache add up at most; another draw of either is up to twice.

    A 16-bit error also moves keys and values across the edges of codes, but these then err by less
    than a step of the grid, as the others do.
    """
    directory = model_directory(name)
    pieces = in_pieces(ROWS[-1], *sizes)

    def logits_with(**options):
        return cached_logits(open_fp32(directory, gpu, **options).core, pieces)

    exact, cache_in_fp32 = (logits_with(kv_cache_dtype=kind) for kind in (None, "int8"))
    plain, rounded = (
        Engine.from_pretrained(
            directory,
            device=gpu,
            dtype=dtype,
            kv_cache_dtype=kind,
            policy=models.policy_in(directory),
        )
        for kind in (None, "int8")
    )
    assert plain.core.kv_cache_dtype == str(DTYPES[dtype]).removeprefix("torch.")
    assert rounded.core.kv_cache_dtype == "int8"
    without, found = (cached_logits(engine.core, pieces) for engine in (plain, rounded))
    error, of_dtype, of_cache = (
        relative_error(logits, exact) for logits in (found, without, cache_in_fp32)
    )
    print(f"{name} {dtype} {sizes}: {error:.2e}, dtype {of_dtype:.2e}, cache {of_cache:.2e}")
    assert relative_error(found, without) > 1e-5
    assert error <= 2 * (of_dtype + of_cache)


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int8"])
def test_decisions_of_a_real_model_are_those_of_float64(weights, gpu, smollm2, enough_decided):
    directory, model, tokenizer = smollm2
    row = tokenizer(LICENSE.read_text())["input_ids"][:256]
    engine = Engine.from_pretrained(directory, device=gpu, dtype=weights)
    half = with_parameters_in(DTYPES.get(weights, torch.float32), model)
    if weights == "int8":
        half = models.simulate_int8(half)
    naive = list(
        naive_logits(with_parameters_in(torch.float16, half) if weights == "int8" else half, [row])
    )
    exact = logits_of(with_parameters_in(torch.float64, half), [row], "cpu")
    pieces = [row[:190], *in_pieces(row[190:], 1, 1, 1, 5)]
    for logits in (engine.forward([row])[0], cached_logits(engine.core, pieces)):
        decided = check_against_naive(logits, naive, exact)
        enough_decided(decided, FEWEST_DECIDED[weights])
