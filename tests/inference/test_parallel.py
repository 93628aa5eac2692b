"""Tensor parallelism: two and three ranks against one, on small models that divide by neither."""

import models as small_models
import pytest
import torch
from launch import WORKERS, run_ranks
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from workers.tensor_parallel import DTYPES

DECODERS = {
    # Three KV groups of three heads; on two ranks unequal shares of heads, columns and vocabulary,
    # on three no FFN column is left for the last.
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=131,
            hidden_size=72,
            intermediate_size=100,
            num_hidden_layers=2,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=64,
        )
    ),
    # Fewer KV heads than three ranks: two ranks share one, and its query heads are split.
    "llama_shared_kv": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    ),
    # Fused q|k|v stored [in, out], biases, five heads as GPT-2 XL's 25.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=199, n_embd=40, n_layer=2, n_head=5, n_positions=64)
    ),
    # A shard's ALiBi slopes, norms of its heads, a parallel residual, both other orders of q|k|v.
    **{
        name: small_models.DECODERS[name]
        for name in ("bloom", "qwen3", "gpt_neox", "gpt_neox_elementwise")
    },
}
TWO_HEADS = {
    "two_heads": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ),
}
# About 100 MB, nearly all of it in layers.
LARGE = {
    "large": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=4,
            num_attention_heads=12,
            num_key_value_heads=4,
        )
    ),
}
ENCODERS = {
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=101,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=160,
            max_position_embeddings=64,
        )
    ),
}
PROMPT_LENGTHS = (7, 1, 13)


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocab_size, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of saved models, and the models themselves."""
    folder = tmp_path_factory.mktemp("models")
    built = {}
    for seed, (name, build) in enumerate((DECODERS | ENCODERS | TWO_HEADS | LARGE).items()):
        torch.manual_seed(seed)
        model = build().eval()
        for parameter in model.parameters():
            # Larger than the usual initialization, so that tokens depend on attention and FFN;
            # biases and norms too, so that one that is added twice or dropped is seen.
            torch.nn.init.normal_(parameter, std=0.2)
        small_models.save(name, model, folder / name)
        torch.save(prompts(model.config.vocab_size), folder / name / "prompts.pt")
        built[name] = model
    return folder, built


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """{number of ranks: [results of each rank]}."""
    folder, _ = models
    results = {}
    for num_ranks in (1, 2, 3):
        output = tmp_path_factory.mktemp(f"tp{num_ranks}")
        run_ranks(num_ranks, [WORKERS / "tensor_parallel.py", folder, output])
        files = [output / f"rank{rank}.pt" for rank in range(num_ranks)]
        results[num_ranks] = [torch.load(file) for file in files]
    return results


def outputs_of(model, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits (hidden states of an encoder) of every prompt by transformers, each alone."""
    model = model.to(dtype)
    field = "last_hidden_state" if name in ENCODERS else "logits"
    with torch.no_grad():
        rows = [
            getattr(model(torch.tensor([row])), field)[0]
            for row in prompts(model.config.vocab_size)
        ]
    model.to(torch.float32)
    return torch.cat(rows)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_rank_has_the_same_bits(runs, name, dtype, num_ranks):
    first, *others = (rank[name, dtype] for rank in runs[num_ranks])
    assert first["tp_size"] == num_ranks
    for other in others:
        assert torch.equal(first["outputs"], other["outputs"])


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_those_of_one_rank(runs, name, dtype, num_ranks):
    expected = runs[1][0][name, dtype]["tokens"]
    assert all(rank[name, dtype]["tokens"] == expected for rank in runs[num_ranks])


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_ranks_draw_the_same_tokens_without_a_seed(runs, name, num_ranks):
    first, *others = (rank[name, "fp32"]["sampled"] for rank in runs[num_ranks])
    assert all(other == first for other in others)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_error_is_within_twice_that_of_float32_pytorch(models, runs, name, num_ranks):
    model = models[1][name]
    exact = outputs_of(model, name, torch.float64)
    naive_error = (outputs_of(model, name, torch.float32) - exact).abs().max()
    error = (runs[num_ranks][0][name, "fp32"]["outputs"] - exact).abs().max()
    assert error <= 2 * naive_error


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_weights_are_quantized_as_by_one_rank(runs, name, num_ranks):
    expected = runs[1][0][name, "int8"]["outputs"]
    outputs = runs[num_ranks][0][name, "int8"]["outputs"]
    quantization = (runs[1][0][name, "fp32"]["outputs"] - expected).abs().max()
    assert (outputs - expected).abs().max() < 1e-3 * quantization


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_encoders_pooled_vectors_are_those_of_one_rank(runs, num_ranks):
    expected = runs[1][0]["bert", "fp32"]["pooled"]
    for rank in runs[num_ranks]:
        torch.testing.assert_close(rank["bert", "fp32"]["pooled"], expected, rtol=1e-5, atol=1e-6)


def test_more_ranks_than_heads_are_refused_naming_the_largest_degree(runs):
    assert [rank["two_heads", "fp32"]["tp_size"] for rank in runs[2]] == [2, 2]
    for rank in runs[3]:
        assert rank["two_heads", "fp32"]["error"] == (
            "shard_heads: the tensor-parallel degree must be at most the number of attention "
            "heads, got 3 ranks for 2 heads; the largest degree that works is 2"
        )


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    "what", ["prompts", "temperature", "top_k", "stop tokens", "batch", "tokens", "slots"]
)
def test_ranks_with_different_requests_are_told_so(runs, what, num_ranks):
    for rank in runs[num_ranks]:
        message = rank["disagreement"][what]
        assert f"must be the same on all {num_ranks} ranks, got different ones" in message
    assert runs[1][0]["disagreement"] == {}


def test_a_ranks_peak_memory_is_about_its_share(runs):
    # A rank's pages of the file and its packed weights. Row-parallel shards are columns: with rows
    # of this width, three quarters of a page, they touch every page of a third of the file.
    whole = runs[1][0]["large"]["peak_growth"]
    assert whole > 100
    for rank in runs[2]:
        assert rank["large"]["peak_growth"] < 0.75 * whole
    for rank in runs[3]:
        assert rank["large"]["peak_growth"] < 0.65 * whole
