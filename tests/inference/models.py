"""Small random models of every architecture, and directories of them."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

from moq.inference import Engine

POLICIES = Path(__file__).parent / "policies"
VOCAB_SIZE = 97  # odd sizes everywhere, so that no vector width divides them

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 83,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 36,
    "n_layer": 2,
    "n_head": 6,
    "n_positions": 96,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_NEOX_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.67}


def _gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**_SMALL, rope_parameters=_NEOX_ROPE))


DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "llama_even": lambda: LlamaForCausalLM(  # sizes that groups of 12 divide
        LlamaConfig(**_GROUPED | {"intermediate_size": 84})
    ),
    "llama_biases_tied": lambda: LlamaForCausalLM(
        LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    "llama3_rope": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, rope_parameters=_LLAMA3_ROPE)),
    "nine_heads": lambda: LlamaForCausalLM(  # SmolLM2's heads, which two ranks share unevenly
        LlamaConfig(
            **_SMALL
            | {
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "intermediate_size": 200,
            }
        )
    ),
    "one_head": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2 | {"n_head": 1})),
    "linear_rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_GROUPED,
            rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        )
    ),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**_GROUPED, head_dim=10, sliding_window=None)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    "gpt2_wide_heads": lambda: GPT2LMHeadModel(  # the heads of GPT-2 itself
        GPT2Config(**_GPT2 | {"n_embd": 128, "n_head": 2, "initializer_range": 0.1})
    ),
    "gpt2_relu": lambda: GPT2LMHeadModel(
        GPT2Config(**_GPT2, n_inner=50, activation_function="relu")
    ),
    "gpt_neox": _gpt_neox,
    "gpt_neox_elementwise": _gpt_neox,  # the same, saved in Megatron-LM's order of version 1.0
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=36,
            n_layer=2,
            n_head=6,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.3,
        )
    ),
}

_ENCODER = {k: v for k, v in _SMALL.items() if k not in ("bos_token_id", "eos_token_id")}
_DISTIL = {
    "vocab_size": VOCAB_SIZE,
    "dim": 36,
    "n_layers": 2,
    "n_heads": 6,
    "hidden_dim": 83,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
}

ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**_ENCODER, num_labels=5)),
    "bert_base": lambda: BertModel(BertConfig(**_ENCODER)),
    "bert_masked_lm": lambda: BertForMaskedLM(BertConfig(**_ENCODER)),
    "bert_wide_heads": lambda: BertForMaskedLM(  # the heads of BERT itself
        BertConfig(
            **_ENCODER
            | {
                "hidden_size": 128,
                "num_attention_heads": 2,
                "max_position_embeddings": 160,
                "initializer_range": 0.1,
            }
        )
    ),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER, num_labels=5)),
    "roberta_base": lambda: RobertaModel(RobertaConfig(**_ENCODER)),
    "roberta_masked_lm": lambda: RobertaForMaskedLM(RobertaConfig(**_ENCODER)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**_DISTIL, num_labels=5)
    ),
}

# Sizes that the fast kernels of a GPU compute: those above are odd on purpose.
_WIDE = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 352,
    "initializer_range": 0.1,
}
_WIDE_GROUPED = _GROUPED | _WIDE | {"num_attention_heads": 4, "head_dim": 64}

WIDE_DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama_wide": lambda: LlamaForCausalLM(LlamaConfig(**_WIDE_GROUPED)),
    "mistral_wide": lambda: MistralForCausalLM(
        MistralConfig(**_WIDE_GROUPED | {"head_dim": 128}, sliding_window=None)
    ),
    "qwen2_wide": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_WIDE_GROUPED | {"hidden_size": 256}, tie_word_embeddings=True)
    ),
    "qwen3_wide": lambda: Qwen3ForCausalLM(Qwen3Config(**_WIDE_GROUPED | {"head_dim": 128})),
    "gpt_neox_wide": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**_SMALL | _WIDE, rope_parameters=_NEOX_ROPE | {"partial_rotary_factor": 0.5})
    ),
}

WIDE_ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "roberta_wide": lambda: RobertaForMaskedLM(RobertaConfig(**_ENCODER | _WIDE)),
    "distilbert_wide": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(
            **_DISTIL | {"dim": 128, "n_heads": 2, "hidden_dim": 352, "initializer_range": 0.1},
            num_labels=5,
        )
    ),
}


def build(name: str) -> PreTrainedModel:
    """The random model of that name, the same each time, its norms and biases not trivial."""
    torch.manual_seed(sum(map(ord, name)))
    model = (DECODERS | ENCODERS | WIDE_DECODERS | WIDE_ENCODERS)[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(name: str, model: PreTrainedModel, directory: Path) -> None:
    """Writes a Hugging Face directory, and policy.json where moq has no policy of its own."""
    model.save_pretrained(directory)
    policy_file = POLICIES / f"{re.sub('_(elementwise|wide)$', '', name)}.json"
    if not policy_file.exists():
        return
    policy = json.loads(policy_file.read_text())
    if name.endswith("_elementwise"):
        policy["modules"]["qkv"]["order"] = "elementwise"
        _reorder_qkv(directory / "model.safetensors", model.config.num_attention_heads)
    (directory / "policy.json").write_text(json.dumps(policy))


def _reorder_qkv(file: Path, num_heads: int) -> None:
    """Turns rows [num_heads, 3, head_dim] into [num_heads, head_dim, 3]."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if ".query_key_value." in name:
            per_head = tensor.unflatten(0, (num_heads, 3, -1))
            tensors[name] = per_head.transpose(1, 2).flatten(0, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _quantized_rows(weight: Tensor) -> Tensor:
    """The definition: 8 bits, symmetric, narrow range, one scale per row, half to even."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight * (1 / scale)).round().clamp(-127, 127) * scale


@torch.no_grad()
def simulate_int8(model: PreTrainedModel, head: bool = True) -> PreTrainedModel:
    """Rounds the layers' projections, and the head, to their INT8 grids."""
    if head and model.get_output_embeddings() is not None:
        embeddings = model.get_output_embeddings()
        embeddings.weight = nn.Parameter(_quantized_rows(embeddings.weight))
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ == "Conv1D":
            weight.copy_(_quantized_rows(weight.T).T)
        elif isinstance(module, nn.Linear) and re.search(r"\.(h|layer|layers)\.\d", name):
            weight.copy_(_quantized_rows(weight))
    return model


def open_fp32(directory: Path, device: str, **options: Any) -> Engine:
    """The engine of a directory that save wrote, with float32 activations on either device."""
    return Engine.from_pretrained(
        directory, device=device, compute_dtype="fp32", policy=policy_in(directory), **options
    )


DECODE_STEPS = ("chain", "persistent")  # ways to compute a GPU's steps of one token


def open_decoding_by(path: str, monkeypatch: Any, directory: Path, **options: Any) -> Engine:
    """A GPU engine whose steps of one token are computed by one of these ways.

    Its weights are INT8 ones unless the options have another dtype.
    """
    options = {"dtype": "int8"} | options
    with monkeypatch.context() as context:
        context.setenv("MOQ_DECODE_STEP", path)
        return Engine.from_pretrained(directory, device="cuda", **options)


# What the order of sums may change logits by, by kv_cache_dtype: it may move a key or a value that
# lies between two codes of an INT8 cache to the other one.
CACHE_TOLERANCES = {None: 5e-6, "int8": 1e-2}


def same_bits(device: str, actual: Tensor, expected: Tensor, tolerance: float = 5e-6) -> bool:
    """Equal bits on the CPU. A GPU sums in an order that depends on the number of tokens."""
    if device == "cpu":
        return torch.equal(actual, expected)
    return relative_error(actual, expected) < tolerance


def policy_in(directory: Path) -> Path | None:
    """The policy that save wrote, if it did."""
    path = directory / "policy.json"
    return path if path.exists() else None


def sequences(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids; 0 and 1 are left out, which encoders use for padding."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths
    ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    assert actual.shape == expected.shape
    actual, expected = actual.cpu(), expected.cpu()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def cached_logits(core: Any, pieces: list[list[int]]) -> Tensor:
    """Logits of one sequence that comes piece by piece."""
    cache = core.make_cache(1, sum(map(len, pieces)))
    slot = cache.allocate()
    return torch.cat([core.forward([piece], [], cache, [slot]) for piece in pieces])


def in_pieces(row: list[int], *sizes: int) -> list[list[int]]:
    """The row in pieces of these sizes, over and over."""
    pieces, of_size = [], itertools.cycle(sizes)
    while row:
        size = next(of_size)
        pieces.append(row[:size])
        row = row[size:]
    return pieces


@torch.no_grad()
def reference_logits(model: nn.Module, row: list[int]) -> Tensor:
    """transformers' logits of one sequence: [length, vocab_size] or [num_labels]."""
    return model(torch.tensor([row])).logits[0]


class Int8Cache(DynamicCache):
    """A cache of transformers that keeps what an INT8 cache does: one grid a token and head."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        rounded = (_quantized_rows(x.flatten(0, -2)).view_as(x) for x in (keys, values))
        return super().update(*rounded, *args, **kwargs)


def greedy(model: PreTrainedModel, row: list[int], tokens: list[int]) -> list[int]:
    """transformers' greedy choice after each prefix of row + tokens, from row on.

    Equal to `tokens` exactly if transformers' greedy continuation of `row` is.
    """
    logits = reference_logits(model, row + tokens[:-1])
    return logits[len(row) - 1 :].argmax(dim=-1).tolist()
