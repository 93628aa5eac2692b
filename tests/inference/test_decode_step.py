"""Which models' steps of one token one kernel of a GPU computes, and that all are right."""

import models
import pytest
import rounded_models
import torch
from decoders import write_decoder
from models import open_decoding_by, relative_error, sequences

from moq import _C
from moq.inference import Engine
from moq.input_grid import KINDS, is_static

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs compute capability 9.0, which has the one kernel",
    ),
]

# Traits that differ from those of GPT-2, and how the error names them.
OTHERS = {
    "ALiBi": {"positions": "alibi", "embedding_norm": True},  # as BLOOM
    "rotary positions": {"positions": "rotary"},
    "a parallel residual": {"parallel_residual": True},
    "rotary positions, a parallel residual": {"positions": "rotary", "parallel_residual": True},
    "a gated feed-forward block": {"gated": True, "activation": "silu"},
    "norms behind the blocks": {"norm_place": "post"},
    "RMSNorm": {"norm": "rms_norm"},
    "heads that share keys": {"num_heads": 4, "num_kv_heads": 2, "hidden_size": 256}
    | {"intermediate_size": 1024},
    "norms of q and k": {"qk_norm": True},
    "2 heads of 32 columns": {"head_dim": 32},
    "4 heads of 32 columns": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32},
    "4 heads of 64 columns": {"num_heads": 4, "num_kv_heads": 4},
    "feed-forward 256": {"intermediate_size": 256},
    "27 heads of 64 columns": {"num_heads": 27, "num_kv_heads": 27, "hidden_size": 1728}
    | {"intermediate_size": 6912, "num_layers": 1},
}

# What GPT-2 has not, but the kernel computes.
SERVED = {
    "no positions": {"positions": "none"},
    "a norm of the embedding": {"embedding_norm": True},
    "no biases": dict.fromkeys(("norm_bias", "qkv_bias", "out_bias", "ffn_bias"), False),
    "relu": {"activation": "relu"},
    "exact gelu": {"activation": "gelu"},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "tanh"},
    "one head": {"num_heads": 1, "num_kv_heads": 1, "hidden_size": 64, "intermediate_size": 256},
    "one layer": {"num_layers": 1},
}

GRIDS = {
    "with zero points": {"num_bits": 8, "mode": "asymmetric"},
    "with a scale for 32 columns": {"num_bits": 8, "granularity": "per_group", "group_size": 32},
    "of 4 bits": {"num_bits": 4},
}


def kernels_of(engine: Engine) -> list[str]:
    """The kernels of the step of one token that was captured last."""
    return [what for what, *_ in engine.core.decode_kernels()]


def check_steps(engine: Engine, cpu: Engine) -> None:
    """Generates, and compares the logits of steps one by one with those of the CPU."""
    (row,) = sequences(9)
    tokens = engine.generate(row, 40, stop_token_ids=[]).token_ids
    whole = [*row, *tokens]
    cache = engine.core.make_cache(1, len(whole))
    slot = cache.allocate()
    pieces = [whole[:9], *([token] for token in whole[9:])]
    logits = torch.cat([engine.core.forward([piece], [], cache, [slot]) for piece in pieces])
    assert relative_error(logits, cpu.forward([whole])[0]) < 0.02


def expect_refused(obstacle: str, directory, monkeypatch, **options) -> None:
    """What is not possible is refused before anything is brought to the device."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    message = f"MOQ_DECODE_STEP=persistent must be asked of .*{obstacle}.*: unset it, or say chain"
    with pytest.raises(_C.Error, match=message):
        open_decoding_by("persistent", monkeypatch, directory, **options)
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("trait", OTHERS)
def test_decoders_that_differ_from_gpt2_take_the_chain(trait, tmp_path, gpu, monkeypatch):
    policy = write_decoder(tmp_path, **OTHERS[trait])
    engine = Engine.from_pretrained(tmp_path, device=gpu, dtype="int8", policy=policy)
    check_steps(engine, Engine.from_pretrained(tmp_path, dtype="int8", policy=policy))
    assert kernels_of(engine) and "all layers" not in kernels_of(engine)
    expect_refused(trait.split(", ")[-1], tmp_path, monkeypatch, policy=policy)


@pytest.mark.parametrize("trait", SERVED)
def test_what_the_one_kernel_serves_is_right(trait, tmp_path, gpu):
    policy = write_decoder(tmp_path, **SERVED[trait])
    engine = Engine.from_pretrained(tmp_path, device=gpu, dtype="int8", policy=policy)
    check_steps(engine, Engine.from_pretrained(tmp_path, dtype="int8", policy=policy))
    assert kernels_of(engine).count("all layers") == 1
    assert "attention" not in kernels_of(engine)


@pytest.mark.parametrize("grid", GRIDS)
def test_weights_of_other_grids_take_the_chain(grid, tmp_path, gpu, monkeypatch):
    monkeypatch.setitem(rounded_models.GRIDS, grid, lambda name: GRIDS[grid])
    rounded_models.export(models.build("gpt2_wide_heads"), tmp_path / "out", grid)
    engine = Engine.from_pretrained(tmp_path / "out", device=gpu)
    check_steps(engine, Engine.from_pretrained(tmp_path / "out"))
    assert kernels_of(engine) and "all layers" not in kernels_of(engine)
    expect_refused(grid, tmp_path / "out", monkeypatch)


def test_weights_of_one_scale_and_of_fewer_bits_take_the_one_kernel(tmp_path, gpu):
    for grid in ("8 bits per tensor", "6 bits in 8-bit codes", "8 bits per channel"):
        directory = tmp_path / grid.replace(" ", "_")
        rounded_models.export(models.build("gpt2_wide_heads"), directory, grid)
        engine = Engine.from_pretrained(directory, device=gpu)
        check_steps(engine, Engine.from_pretrained(directory))
        assert kernels_of(engine).count("all layers") == 1


@pytest.mark.parametrize(
    ("obstacle", "options"),
    [
        ("float weights", {"dtype": "fp16"}),
        ("in float32", {"dtype": None, "compute_dtype": "fp16"}),
        ("a KV cache in int8", {"kv_cache_dtype": "int8"}),
        ("activations in float32", {"compute_dtype": "fp32"}),
    ],
)
def test_other_options_take_the_chain(obstacle, options, model_directory, gpu, monkeypatch):
    directory = model_directory("gpt2_wide_heads")
    options = {"dtype": "int8"} | options
    engine = Engine.from_pretrained(directory, device=gpu, **options)
    on_cpu = {"dtype": options["dtype"]}
    check_steps(engine, Engine.from_pretrained(directory, **on_cpu))
    assert kernels_of(engine) and "all layers" not in kernels_of(engine)
    expect_refused(obstacle, directory, monkeypatch, **options)


@pytest.mark.parametrize("activations", KINDS)
def test_int8_activations_take_the_chain(activations, tmp_path, gpu, monkeypatch):
    model = models.build("gpt2_wide_heads")
    (row,) = sequences(40)
    grids = None
    if is_static(activations):
        grids = rounded_models.static_input_grids(model, row, activations)
    rounded_models.export(model, tmp_path / "out", "8 bits per channel", activations, grids)
    engine = Engine.from_pretrained(tmp_path / "out", device=gpu)
    engine.generate(row, 10)
    assert kernels_of(engine) and "all layers" not in kernels_of(engine)
    expect_refused("with INT8 activations", tmp_path / "out", monkeypatch)


def test_an_unknown_way_of_a_step_is_refused_first(model_directory, gpu, monkeypatch):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with pytest.raises(_C.Error, match="MOQ_DECODE_STEP must be chain or persistent, got other"):
        open_decoding_by("other", monkeypatch, model_directory("gpt2_wide_heads"))
    assert torch.cuda.max_memory_allocated() == before


def test_a_long_generation_goes_on_by_the_chain_where_that_is_faster(tmp_path, gpu, monkeypatch):
    longest = 4608  # cached tokens of 2 heads, behind which the chain is faster
    policy = write_decoder(tmp_path, max_positions=longest + 64)
    engine = Engine.from_pretrained(tmp_path, device=gpu, dtype="int8", policy=policy)
    forced = open_decoding_by("persistent", monkeypatch, tmp_path, policy=policy)
    (row,) = sequences(longest - 4)
    engine.generate(row, 3, stop_token_ids=[])
    assert "all layers" in kernels_of(engine)
    tokens = engine.generate(row, 30, stop_token_ids=[]).token_ids
    assert "attention" in kernels_of(engine)
    assert forced.generate(row, 30, stop_token_ids=[]).token_ids[:5] == tokens[:5]
    assert "attention" not in kernels_of(forced)
    cpu = Engine.from_pretrained(tmp_path, dtype="int8", policy=policy)
    logits = cpu.forward([[*row, *tokens[:-1]]])[0][len(row) - 1 :]
    lost = logits.amax(dim=-1) - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    assert lost.max() < 0.02 * logits.abs().max()
    engine.generate(row[:5], 3, stop_token_ids=[])  # by the graph that it has of the one kernel
