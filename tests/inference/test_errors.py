"""Unsuitable input is refused before any work, with a message that names what was expected."""

import json
import shutil
import warnings

import models
import numpy as np
import pytest
import torch
from models import sequences
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moq
from moq import _C
from moq.inference import Engine


@pytest.fixture(scope="module")
def engine(model_directory, device) -> Engine:
    return Engine.from_pretrained(model_directory("llama"), device=device)


@pytest.fixture
def copy(model_directory, tmp_path):
    """A copy of the small Llama's directory to spoil."""
    return shutil.copytree(model_directory("llama"), tmp_path / "copy")


def change_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "meta"}, "device must be None, 'cpu', 'cuda' or 'cuda:N', got 'meta'"),
        ({"device": "gpu"}, "device must be None, 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        ({"compute_dtype": "int8"}, "compute_dtype must be None or 'fp32' on the CPU"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype must be None, or 'int8' on a GPU"),
        ({"device": "cuda", "kv_cache_dtype": "fp8"}, "or 'int8' on a GPU, got 'fp8' on cuda"),
        ({"device": "cuda", "compute_dtype": "int8"}, "must be None or one of fp32, fp16, bf16"),
        ({"dtype": "int4"}, "dtype must be None or one of int8, fp32, fp16, bf16, got 'int4'"),
        ({"compute_dtype": "bf16"}, "compute_dtype must be None or 'fp32' on the CPU"),
        (
            {"activations": "static"},
            "activations must be None, 'dynamic' or 'dynamic_asymmetric', got 'static'",
        ),
        ({"activations": "dynamic_asymetric"}, "did you mean 'dynamic_asymmetric'"),
        ({"quantize_head": True}, "quantize_head=True needs dtype='int8'"),
        ({"tp_size": 2}, "tp_size must be 1 or the number of ranks, got 2 with 1 ranks"),
    ],
)
def test_unsuitable_option(options, message, model_directory):
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(model_directory("llama"), **options)


def test_a_rank_without_a_gpu_is_told_before_the_ranks_meet(model_directory, monkeypatch):
    launcher = {"RANK": "0", "LOCAL_RANK": "99", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (launcher | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(_C.Error, match="device cuda:99 must be one of the GPUs here"):
        Engine.from_pretrained(model_directory("llama"), device="cuda")


def test_missing_directory(tmp_path):
    with pytest.raises(_C.Error, match="the model must be a directory, got .*nothing"):
        Engine.from_pretrained(tmp_path / "nothing")


def test_a_name_on_a_hub_is_said_not_to_be_looked_up():
    with pytest.raises(
        _C.Error, match="a directory, got gpt2, which is not there: names of models"
    ):
        Engine.from_pretrained("gpt2")


@pytest.mark.parametrize(
    ("name", "ours"), [("float16", "fp16"), (torch.bfloat16, "bf16"), ("INT8", "int8")]
)
def test_a_dtype_in_another_spelling_is_told_ours(name, ours, model_directory):
    with pytest.raises(ValueError, match=rf"did you mean '{ours}'\?"):
        Engine.from_pretrained(model_directory("llama"), dtype=name)


def test_directory_without_config(tmp_path):
    with pytest.raises(_C.Error, match="must hold a model's config.json, got none: name"):
        Engine.from_pretrained(tmp_path)


def test_unknown_architecture_lists_the_known(copy):
    change_config(copy, architectures=["MambaForCausalLM"])
    with pytest.raises(_C.Error, match="GPT2LMHeadModel.*got .*MambaForCausalLM"):
        Engine.from_pretrained(copy)


def test_unsupported_rope_scaling_lists_the_supported(copy):
    change_config(copy, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(_C.Error, match='rope_type: must be one of default, linear, llama3.*"yarn"'):
        Engine.from_pretrained(copy)


def test_value_that_the_engine_does_not_compute(model_directory, tmp_path):
    directory = shutil.copytree(model_directory("gpt2"), tmp_path / "copy")
    change_config(directory, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(_C.Error, match="scale_attn_by_inverse_layer_idx must be false.*got true"):
        Engine.from_pretrained(directory)


def test_wrong_type_in_config(copy):
    change_config(copy, hidden_size="36")
    with pytest.raises(_C.Error, match="hidden_size"):
        Engine.from_pretrained(copy)


def test_heads_that_kv_heads_do_not_divide(copy):
    change_config(copy, num_key_value_heads=4)
    with pytest.raises(_C.Error, match="num_kv_heads must divide num_heads, got 4 and 6"):
        Engine.from_pretrained(copy)


def test_missing_tensor_is_named(copy):
    change_tensors(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(_C.Error, match=r"must hold model.layers.1.mlp.up_proj.weight \(up\)"):
        Engine.from_pretrained(copy)


def test_tensor_that_no_rule_names(copy):
    change_tensors(copy, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    with pytest.raises(_C.Error, match="every tensor must belong to a module.*model.extra.weight"):
        Engine.from_pretrained(copy)


def test_wrong_shape_names_expected_and_found(copy):
    name = "model.layers.0.self_attn.k_proj.weight"
    change_tensors(copy, lambda tensors: tensors.update({name: torch.ones(6, 36)}))
    with pytest.raises(_C.Error, match=r"k_proj \(key\) must be \[12, 36\].*got \[6, 36\]"):
        Engine.from_pretrained(copy)


def test_wrong_dtype_is_named(copy):
    name = "model.norm.weight"
    change_tensors(copy, lambda t: t.update({name: torch.ones(36, dtype=torch.int32)}))
    with pytest.raises(_C.Error, match="model.norm.weight must be F32, F16 or BF16.*got I32"):
        Engine.from_pretrained(copy)


def test_codes_without_scales_are_named(copy):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(copy, lambda t: t.update({name: torch.ones(83, 36, dtype=torch.int8)}))
    with pytest.raises(_C.Error, match="up_proj.weight_scale"):
        Engine.from_pretrained(copy)


def test_other_quantization_methods_are_refused(copy):
    change_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(_C.Error, match='quant_method must be compressed-tensors.*got "gptq"'):
        Engine.from_pretrained(copy)


def test_not_finite_weight_is_refused_at_load_time_quantization(copy, device):
    def spoil(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")

    change_tensors(copy, spoil)
    with pytest.raises(_C.Error, match="model.layers.0.mlp.up_proj"):
        Engine.from_pretrained(copy, device=device, dtype="int8")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "a prompt must have at least one token, got none in prompt 0"),
        (
            [5] * 90,
            {"max_new_tokens": 7},
            "must fit .* 96 positions .*, got 7: at most 6 would fit",
        ),
        (
            [5] * 96,
            {"max_new_tokens": 1},
            "96 positions .*, got 1: shorten the prompt to at most 95",
        ),
        ([5] * 96, {"max_new_tokens": 96}, "got 96: shorten the prompt$"),
        ([5] * 90, {"max_new_tokens": 2**63 - 1}, "must fit into the model's 96 positions"),
        ([5, 97], {}, r"a token must lie in \[0, 97\), got 97 in prompt 0"),
        ([5, -1], {}, r"a token must lie in \[0, 97\), got -1"),
        ([5, 2**70], {}, f"a token must lie in the vocabulary, got {2**70}"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ([5], {"max_new_tokens": 4, "max_batch": 0}, "max_batch and chunk_tokens must be >= 1"),
        ([5], {"max_new_tokens": 4, "temperature": -1.0}, "temperature"),
        ([5], {"max_new_tokens": 4, "temperature": 1.0, "top_p": 0.0}, "top_p"),
        ([5], {"max_new_tokens": 4, "repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_unsuitable_prompt_or_option(prompt, options, message, engine):
    with pytest.raises(_C.Error, match=message):
        engine.generate(prompt, **{"max_new_tokens": 4} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"min_p": -0.5}, r"min_p must be in \[0, 1\], got -0.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and > 0"),
    ],
)
def test_sampling_options_are_checked_before_anything_is_computed(options, message, engine):
    # Without a prompt there is nothing to compute.
    with pytest.raises(_C.Error, match=message):
        engine.core.generate([], max_new_tokens=4, **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "got NoneType"),
        ([3.5], "got float"),
        ({"input_ids": [[3]]}, "got dict: give its 'input_ids'"),
        ([{"role": "user", "content": "x"}], "got dict: make a text of .*apply_chat_template"),
    ],
)
def test_what_is_neither_text_nor_token_ids(prompt, message, engine):
    with pytest.raises(TypeError, match=f"generate: a prompt must be .*, {message}"):
        engine.generate(prompt)


def test_a_mapping_is_not_encoded_as_the_texts_of_its_keys(engine):
    with pytest.raises(TypeError, match="encode: a prompt must be .*, got dict"):
        engine.encode({"input_ids": [[3]]})


def test_text_without_a_tokenizer(engine):
    with pytest.raises(ValueError, match="must have a tokenizer to take text, got none"):
        engine.generate("hello")


def test_stop_string_without_a_tokenizer(engine):
    with pytest.raises(ValueError, match="must have a tokenizer for stop strings"):
        engine.generate([3, 4], stop="x")


def test_generate_needs_a_decoder(model_directory, device):
    with pytest.raises(_C.Error, match="must be causal.*got BertForSequenceClassification"):
        Engine.from_pretrained(model_directory("bert"), device=device).generate([3, 4])


def test_forward_needs_a_head(model_directory, device):
    with pytest.raises(_C.Error, match="forward needs a model with a language-model head"):
        Engine.from_pretrained(model_directory("bert"), device=device).forward([[3, 4]])


def test_sequence_longer_than_the_model(model_directory, device):
    engine = Engine.from_pretrained(model_directory("bert"), device=device)
    with pytest.raises(_C.Error, match="a sequence must have at most 96 tokens, got 97"):
        engine.encode(sequences(97))


def test_token_type_outside_its_table(model_directory, device):
    engine = Engine.from_pretrained(model_directory("bert_masked_lm"), device=device)
    with pytest.raises(_C.Error, match=r"a token type must lie in \[0, 2\), got 2"):
        engine.forward(torch.tensor([[3, 4]]), token_type_ids=torch.tensor([[0, 2]]))


def test_mask_of_another_shape(engine):
    with pytest.raises(ValueError, match=r"attention_mask must have the shape \[1, 2\]"):
        engine.forward(torch.tensor([[3, 4]]), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1, 1]], "got padding between those of row 0"),
        ([[1, 1, 0, 0], [0, 1, 0, 1]], "got padding between those of row 1: leave these tokens"),
        (torch.tensor([[1.0, 0.5, 0.0, 0.0]]), "1 at tokens and 0 at padding, got other numbers"),
        ([[1, 1, 2, 0]], "1 at tokens and 0 at padding, got other numbers"),
    ],
)
def test_masks_that_hide_more_than_padding(mask, message, engine):
    ids = torch.full((len(mask), 4), 5)
    for call in (engine.forward, engine.encode):
        with pytest.raises(ValueError, match=f"attention_mask must be .*{message}"):
            call(ids, mask)


@pytest.mark.parametrize(
    ("ids", "mask", "types", "message"),
    [
        ([3, 4], [1, 1], None, r"token ids must be \[batch, length\], got shape \[2\]"),
        ([[[3]]], [[[1]]], None, r"token ids must be \[batch, length\], got shape \[1, 1, 1\]"),
        ([[3, 4]], [[1, 0]], [[0, 0, 0]], r"types must have the shape \[1, 2\] .*got \[1, 3\]"),
        ([[3, 4]], [[1, 0]], [[0, 0], [0, 0]], r"types must have the shape .*, got \[2, 2\]"),
        ([[3, 4]], None, [0, 0], r"token types must be \[batch, length\], got shape \[2\]"),
    ],
)
def test_masks_and_types_of_other_shapes(ids, mask, types, message, model_directory, device):
    engine = Engine.from_pretrained(model_directory("bert_masked_lm"), device=device)
    types = None if types is None else torch.tensor(types)
    with pytest.raises(ValueError, match=message):
        engine.forward(torch.tensor(ids), mask, types)


def test_a_mask_needs_tensors(model_directory, device):
    engine = Engine.from_pretrained(model_directory("bert_masked_lm"), device=device)
    ids, mask = torch.tensor([[3, 4]]), torch.tensor([[1, 0]])
    for call in (engine.forward, engine.encode):
        with pytest.raises(ValueError, match="must come with a tensor of token ids, got a list"):
            call([[3, 4]], mask)
    with pytest.raises(ValueError, match="must come with a tensor of token ids, got a str"):
        engine.encode("a text", mask)
    with pytest.raises(ValueError, match="token types must be a tensor where .*, got a list"):
        engine.forward(ids, mask, [[0, 1]])


def test_a_mask_cuts_token_types_too(model_directory, device):
    engine = Engine.from_pretrained(model_directory("bert_masked_lm"), device=device)
    ids, types = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 0, 1]])
    cut = engine.forward(ids, torch.tensor([[0, 1, 1]], device=device), types)
    assert torch.equal(cut[:, 1:], engine.forward(ids[:, 1:], None, types[:, 1:]))


def test_a_mask_may_be_a_list(engine):
    ids = torch.tensor([[3, 4, 5, 1]])
    logits = engine.forward(ids, [[0, 1, 1, 0]])
    assert torch.equal(logits, engine.forward(ids, torch.tensor([[0, 1, 1, 0]])))
    assert not logits[0, 0].any() and logits[0, 1].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": "0.7"}, TypeError, "temperature must be a number, got '0.7'"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"top_k": 5.5}, TypeError, "top_k must be an integer, got 5.5"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be an integer, got 2.5"),
        ({"max_batch": "4"}, TypeError, "max_batch must be an integer, got '4'"),
        ({"seed": "x"}, TypeError, "seed must be an integer, got 'x'"),
        ({"seed": -1}, ValueError, "seed must be >= 0 and <= 18446744073709551615, got -1"),
        ({"stop": [5]}, TypeError, "stop must be a text or texts, got 5 among them"),
        ({"stop": ""}, TypeError, "stop must be a text or texts, got '' among them"),
        ({"stop": 5}, TypeError, "stop must be a text or texts, got 5"),
        (
            {"stop_token_ids": ["a"]},
            TypeError,
            "each of stop_token_ids must be an integer, got 'a'",
        ),
        ({"stop_token_ids": "ab"}, TypeError, "stop_token_ids must be an integer or integers, got"),
        ({"stop_token_ids": 5.0}, TypeError, "stop_token_ids must be an integer or .*, got 5.0"),
        ({"stop_token_ids": [2**63]}, ValueError, r"each of stop_token_ids must be >= .*, got 9"),
        ({"top_k": 2**63}, ValueError, "top_k must be >= -9223372036854775808 and <= 922.*, got"),
        ({"temperature": 10**400}, TypeError, "temperature must be a number, got 1000"),
    ],
)
def test_options_of_another_type_are_named(options, error, message, engine):
    with pytest.raises(error, match=f"generate: {message}"):
        engine.generate([3, 4], **{"max_new_tokens": 3} | options)


def test_numbers_of_numpy_are_numbers(engine):
    expected = engine.generate([3, 4], 3, stop_token_ids=96)
    prompt = np.array([3, 4])
    options = {"temperature": np.float32(0), "top_k": np.int64(0), "seed": np.uint8(3)}
    assert (
        engine.generate(prompt, np.int32(3), stop_token_ids=[np.int64(96)], **options) == expected
    )
    assert engine.generate([prompt], 3, stop_token_ids=np.int64(96)) == [expected]


def test_options_that_change_nothing_are_told(engine):
    with pytest.warns(UserWarning, match="top_k and top_p must be left out at temperature 0"):
        engine.generate([3, 4], 3, top_k=5, top_p=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.generate([3, 4], 3, top_k=5, temperature=0.5, seed=1)
        engine.generate([3, 4], 3, seed=1)


@pytest.mark.parametrize(
    ("call", "ids", "message"),
    [
        ("forward", [1, 2, 3], "a list of token lists, got a list of int"),
        ("forward", ["hello"], "a list of token lists, got a list of str"),
        ("forward", [[1, 2], [3, "x"]], "token ids must be integers, got str"),
        ("forward", 5, "forward: a prompt must be a text or token ids, .*, got int"),
        ("forward", {"input_ids": [[3]]}, "forward: .*, got dict: give its 'input_ids'"),
        ("generate", torch.ones(1, 3).bool(), r"integers, .*, got torch.bool of shape \[1, 3\]"),
        ("generate", [[1, 2], [3, 4.5]], "token ids must be integers, got float"),
        ("generate", [True], "token ids must be integers, got bool"),
        ("generate", b"hi", r"a text or token ids.*, got bytes: make a text of it with decode\(\)"),
        ("generate", [[1], b"hi"], "a text or token ids.*, got bytes"),
        ("forward", [b"hi"], "a list of token lists, got a list of bytes"),
        ("encode", b"hi", "a text or token ids.*, got bytes"),
        ("generate", torch.rand(1, 3), r"integers, .*, got torch.float32 of shape \[1, 3\]"),
        ("generate", torch.ones(1, 2, 3).int(), r"got torch.int32 of shape \[1, 2, 3\]"),
    ],
)
def test_what_are_no_token_ids(call, ids, message, engine):
    with pytest.raises(TypeError, match=message):
        getattr(engine, call)(ids)


def test_a_text_that_is_too_long_is_shown_or_cut(copy, device):
    tokenizer = Tokenizer(WordLevel({"a": 5, "b": 6, "[UNK]": 7}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(copy)
    engine = Engine.from_pretrained(copy, device=device)
    texts = ["a b", "b " * 97]
    with pytest.raises(_C.Error, match="at most 96 tokens, got 97 for 'b b .*truncation=True"):
        engine.encode(texts)
    states = engine.encode(texts, truncation=True).last_hidden_state
    assert [len(tokens) for tokens in states] == [2, 96]
    with pytest.raises(ValueError, match="truncation must be False for token ids, got True"):
        engine.encode([[5] * 97], truncation=True)


def test_a_run_is_not_served(tmp_path):
    model = models.build("llama").train()
    optimizer = moq.MoQOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, total_steps=9, verbose=False
    )
    optimizer.save(tmp_path / "run")
    with pytest.raises(ValueError, match="got a run: moq export .* makes a checkpoint of it"):
        Engine.from_pretrained(tmp_path / "run")


def test_a_model_beside_a_file_that_is_called_as_a_run_is_served(copy):
    (copy / "run.json").write_text("[]")
    assert Engine.from_pretrained(copy).core.vocab_size == 97


def test_full_cache_refuses_a_sequence(engine):
    cache = engine.core.make_cache(1, 8)
    cache.allocate()
    with pytest.raises(_C.Error, match="needs a free slot, got 1 slots in use"):
        cache.allocate()


def test_cache_refuses_tokens_beyond_its_capacity(engine):
    cache = engine.core.make_cache(1, 8)
    slot = cache.allocate()
    with pytest.raises(_C.Error, match="8"):
        engine.core.forward(sequences(9), [], cache, [slot])
    assert cache.length(slot) == 0


@pytest.mark.parametrize("other", ["gpt2", "llama_biases_tied", "qwen3", "mistral"])
def test_a_cache_of_another_model_is_refused(other, engine, model_directory, device):
    core = Engine.from_pretrained(model_directory(other), device=device).core
    cache = core.make_cache(1, 8)
    slot = cache.allocate()
    if other == "llama_biases_tied":  # the same sizes
        engine.core.forward([[3, 4]], [], cache, [slot])
        return
    with pytest.raises(_C.Error, match="must be one of this engine's make_cache, for 2 layers"):
        engine.core.forward([[3, 4]], [], cache, [slot])
    assert cache.length(slot) == 0


def test_a_cache_of_fewer_layers_is_refused(engine, tmp_path, device):
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=36,
            num_hidden_layers=1,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path)
    cache = Engine.from_pretrained(tmp_path, device=device).core.make_cache(1, 8)
    with pytest.raises(_C.Error, match="for 2 layers, 2 KV heads and head_dim 6, got one for 1, 2"):
        engine.core.forward([[3, 4]], [], cache, [cache.allocate()])


def test_two_sequences_in_one_slot_are_refused(engine):
    cache = engine.core.make_cache(2, 8)
    slot = cache.allocate()
    with pytest.raises(_C.Error, match="must have a slot each, got slot 0 twice"):
        engine.core.forward([[3, 4], [5, 6]], [], cache, [slot, slot])
    assert cache.length(slot) == 0


@pytest.mark.parametrize("ids", [[], torch.zeros(0, 5, dtype=torch.long)], ids=["list", "tensor"])
@pytest.mark.parametrize("name", ["llama", "bert_masked_lm"])
@pytest.mark.parametrize("call", ["forward", "encode"])
def test_an_empty_batch(call, name, ids, model_directory, device):
    engine = Engine.from_pretrained(model_directory(name), device=device)
    with pytest.raises(ValueError, match="must be those of at least one sequence, got none"):
        getattr(engine, call)(ids)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(1, 2), TypeError, "engine: token ids must be integers, got float32"),
        (torch.ones(1, 2).bool(), TypeError, "engine: token ids must be integers, got bool"),
        (torch.tensor([3, 4]), ValueError, r"must be \[batch, length\], got shape \[2\]"),
        ([[3, 4.0]], TypeError, "integer"),
        (["ab"], TypeError, "integer"),
        ([3], TypeError, "not iterable"),
        ([[2**63]], _C.Error, f"a token must lie in the vocabulary, got {2**63}"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "encode", "generate"])
def test_ids_of_another_type_or_shape(call, ids, error, message, engine):
    options = {"max_new_tokens": 1} if call == "generate" else {}
    with pytest.raises(error, match=message):
        getattr(engine.core, call)(ids, **options)


@pytest.mark.parametrize("types", [[[0, 0]], [[0, 0], [0], [0]]])
@pytest.mark.parametrize("call", ["forward", "encode"])
def test_token_types_of_another_number_of_sequences(types, call, model_directory, device):
    core = Engine.from_pretrained(model_directory("bert_masked_lm"), device=device).core
    message = f"must be empty or one list per sequence, got {len(types)} for 2"
    with pytest.raises(_C.Error, match=message):
        getattr(core, call)([[3, 4], [5]], types)


def test_sliding_window_limits_the_length(tmp_path, device):
    model = models.build("mistral")
    model.config.sliding_window = 40
    model.save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, device=device)
    with pytest.raises(_C.Error, match="must fit into the model's 40 positions"):
        engine.generate([3] * 38, 8)
