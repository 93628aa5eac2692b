"""Which parameters the rules quantize, and what they refuse."""

import re
import warnings

import pytest
import torch
from tiny_decoder import wrap
from torch import nn

from moq import MoQConfig, MoQOptimizer, Rule, Timing
from moq.rules import match_parameters, warn_of_overruled


def matched(model, *rules, held=None, **config):
    found, _ = match_parameters(
        model, MoQConfig(rules=rules, **config), model.parameters() if held is None else held
    )
    return {m.name: m for m in found}


def test_by_default_every_linear_but_the_head_is_quantized_and_no_embedding(decoder):
    found = matched(decoder())
    assert len(found) == 12
    assert all(name.startswith("layers.") and name.endswith("_proj.weight") for name in found)
    assert {m.rule for m in found.values()} == {"default"}


def test_layers_are_the_blocks(decoder):
    assert {m.block for m in matched(decoder()).values()} == {"layers.0", "layers.1"}


def test_block_pattern_names_other_blocks(decoder):
    found = matched(decoder(), block_pattern=r"^layers\.\d+(\.down)?")
    assert found["layers.0.down_proj.weight"].block == "layers.0.down"


def test_a_module_outside_all_layers_is_a_block_of_its_own():
    model = nn.ModuleDict({"pooler": nn.Linear(4, 4)})
    assert matched(model)["pooler.weight"].block == "pooler"


def test_the_last_rule_that_matches_decides(decoder):
    found = matched(
        decoder(),
        Rule("*", target_bits=6),
        Rule("layers.1.*", target_bits=5),
        Rule("layers.1.down_proj", exclude=True),
    )
    assert found["layers.0.down_proj.weight"].spec.target_bits == 6
    assert found["layers.1.gate_proj.weight"].spec.target_bits == 5
    assert found["layers.1.gate_proj.weight"].rule == "layers.1.*"
    assert "layers.1.down_proj.weight" not in found


@pytest.mark.parametrize(
    "pattern",
    [
        "layers.0.down_proj",
        "layers.0.down_proj.weight",
        "layers.0.down*",
        "re:layers\\.0\\.down.*",
    ],
)
def test_exact_names_globs_and_regular_expressions_match_whole_names(decoder, pattern):
    found = matched(decoder(), Rule("*", exclude=True), Rule(pattern, target_bits=4))
    assert list(found) == ["layers.0.down_proj.weight"]


def test_a_regular_expression_must_match_the_whole_name(decoder):
    with pytest.raises(ValueError, match="matches nothing"):
        matched(decoder(), Rule("re:down_proj", target_bits=4))


def overruled(model, *rules):
    """The warnings of rules that decide nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_overruled(model, MoQConfig(rules=rules))
    return [str(warning.message) for warning in caught]


def test_a_rule_before_a_more_general_one_is_warned_of(decoder):
    narrow, wide = Rule("*.down_proj", target_bits=4), Rule("*", activations="static")
    (message,) = overruled(decoder(), narrow, Rule("lm_head"), wide)
    assert message.startswith("rules[0] ('*.down_proj') decides nothing: rules[2] ('*') matches")
    (message,) = overruled(decoder(), narrow, Rule("re:.*down_proj"), Rule("*.q_proj"))
    assert "behind rules[1]" in message


DEFAULTS = {
    "a wide rule before a narrow one": [Rule("*.[qkv]_proj"), Rule("*.q_proj")],
    "everything excluded, all of it taken": [Rule("*", exclude=True), Rule("*")],
    "parts excluded, and taken again": [Rule("*_proj", exclude=True), Rule("*")],
    "a default that narrow rules share out": [Rule("*"), Rule("*.[!d]*_proj"), Rule("*.d*_proj")],
    "a part that two others share out": [Rule("*.[qk]_proj"), Rule("*.q_proj"), Rule("*.k_proj")],
}


@pytest.mark.parametrize("rules", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_rules_that_replace_a_default_are_not_warned_of(decoder, rules):
    assert overruled(decoder(), *rules) == []


def test_names_of_one_weight_overrule_each_other_without_a_warning(decoder):
    model = decoder()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    assert overruled(model, Rule("layers.0.q_proj"), Rule("layers.1.q_proj")) == []


def test_rules_are_warned_of_once_in_a_training(decoder, recwarn):
    model = decoder()
    first, second = (list(layer.parameters()) for layer in model.layers)
    config = {"rules": [{"match": "*.down_proj", "target_bits": 4}, {"match": "*_proj"}]}
    optimizer = MoQOptimizer(torch.optim.SGD(first), model, config, total_steps=12, verbose=False)
    optimizer.add_param_group({"params": second})
    told = [w for w in recwarn.list if "decides nothing" in str(w.message)]
    assert len(told) == 1


def test_head_and_embedding_are_quantized_when_a_rule_says_so(decoder):
    by_kind = matched(decoder(), Rule("*", modules=("linear", "head", "embedding")))
    by_name = matched(decoder(), Rule("lm_head", target_bits=8), Rule("embedding"))
    for found in (by_kind, by_name):
        assert {"lm_head.weight", "embedding.weight"} <= found.keys()
        assert len(found) == 14


def test_output_embeddings_of_a_transformers_model_are_its_head():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=8)
    found = matched(GPT2LMHeadModel(config))
    assert sorted(found) == [
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]
    assert all(m.transposed for m in found.values())
    assert found["transformer.h.0.mlp.c_fc.weight"].in_features == 16
    assert {m.block for m in found.values()} == {"transformer.h.0"}


def test_classifier_heads_stay_in_full_precision_and_poolers_do_not():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=8,
        vocab_size=32, max_position_embeddings=8,
    )  # fmt: skip
    found = matched(BertForSequenceClassification(config))
    assert "bert.pooler.dense.weight" in found
    assert "classifier.weight" not in found
    assert {m.block for m in found.values()} == {"bert.encoder.layer.0", "bert.pooler.dense"}


def test_a_tied_weight_is_quantized_once_under_its_first_name(decoder):
    model = decoder()
    model.layers[1].down_proj.weight = model.layers[0].down_proj.weight
    found = matched(model)
    assert "layers.0.down_proj.weight" in found
    assert "layers.1.down_proj.weight" not in found


def test_a_rule_for_any_name_of_a_tied_weight_counts(decoder):
    model = decoder()
    model.lm_head.weight = model.embedding.weight
    assert "embedding.weight" not in matched(model)
    assert "embedding.weight" in matched(model, Rule("lm_head"))


def test_a_linear_that_shares_an_embeddings_weight_is_the_head_whatever_its_name(decoder):
    model = nn.ModuleDict(
        {"words": nn.Embedding(6, 4), "inner": nn.Linear(4, 4), "to_words": nn.Linear(4, 6)}
    )
    model["to_words"].weight = model["words"].weight
    held = list(model.parameters())

    def matched(**rule):
        config = MoQConfig.from_dict({"rules": [rule]} if rule else {})
        return {m.name for m in match_parameters(model, config, held)[0]}

    assert matched() == {"inner.weight"}
    assert matched(match="*", modules=["head"]) == {"inner.weight", "words.weight"}
    assert matched(match="to_words") == {"inner.weight", "words.weight"}
    with pytest.raises(ValueError, match="matches nothing of kind linear, conv1d; .*of kind head:"):
        matched(match="to_*")


def test_two_parameters_over_one_memory_are_refused(decoder):
    model = decoder()
    model.layers[1].down_proj.weight.data = model.layers[0].down_proj.weight.data
    with pytest.raises(ValueError, match=r"layers\.0\.down_proj\.weight and layers\.1\.down_proj"):
        matched(model)


def test_names_are_those_of_the_module_inside_compile_and_checkpoint_wrappers(decoder):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = decoder()
    names = set(matched(model))
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    assert set(matched(torch.compile(model))) == names


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("layers.0.down_prj"), r"matches nothing \(did you mean 'layers\.0\.down_proj'"),
        (Rule("*.dwn_proj"), r"nothing \(did you mean '\*\.down_proj'\?\)$"),
        (Rule("down_proj"), r"nothing \(did you mean '\*\.down_proj'\?\)$"),
        (Rule("*.dwn_proj.weight"), r"nothing \(did you mean '\*\.down_proj'\?\)$"),
        (Rule("re:.*[/.]dwn_proj"), r"nothing \(did you mean 're:\.\*\[/\.\]down_proj'\?\)$"),
        (Rule("re:dwn_proj"), r"nothing \(did you mean '\*\.down_proj'\?\)$"),
        (Rule("embed*"), r"of kind linear, conv1d; what it matches is of kind embedding: add"),
        (Rule("layers.0.norm"), r"layers\.0\.norm is a LayerNorm"),
        (
            Rule("nothing.like.it"),
            r"matches nothing; the 14 modules with a weight matrix are embedding, "
            r"layers\.0\.q_proj, layers\.0\.k_proj, …$",
        ),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_that_says_what_is_near(decoder, rule, message):
    with pytest.raises(ValueError, match=message):
        matched(decoder(), rule)


@pytest.mark.parametrize(
    ("rule", "parts", "got"),
    [
        (
            Rule("*.q_proj", target_bits=6),
            "q_proj, k_proj, v_proj",
            "q_proj: rule '*.q_proj', target_bits 6; k_proj: rule 'default', target_bits 8; "
            "v_proj: rule 'default', target_bits 8;",
        ),
        (
            Rule("*.v_proj", exclude=True),
            "q_proj, k_proj, v_proj",
            "q_proj: rule 'default'; k_proj: rule 'default'; v_proj: not quantized;",
        ),
        (
            Rule("*.up_proj", granularity="per_tensor", blend_steps=1),
            "gate_proj, up_proj",
            "gate_proj: rule 'default', granularity 'per_channel', blend_steps 0; "
            "up_proj: rule '*.up_proj', granularity 'per_tensor', blend_steps 1;",
        ),
        (
            Rule("layers.1.gate_proj", rounding="stochastic"),
            "gate_proj, up_proj",
            "gate_proj: rule 'layers.1.gate_proj', rounding 'stochastic'; "
            "up_proj: rule 'default', rounding 'nearest';",
        ),
        (
            Rule("layers.1.up_proj", schedule=Timing(period=1)),
            "gate_proj, up_proj",
            "gate_proj: rule 'default', schedule None; "
            "up_proj: rule 'layers.1.up_proj', schedule {'period': 1};",
        ),
    ],
)
def test_siblings_that_inference_fuses_must_share_one_spec(decoder, rule, parts, got):
    words = rf"layers\.\d: {parts} are one matrix at inference and must share one spec, got "
    with pytest.raises(ValueError, match=f"{words}{re.escape(got)} write one rule"):
        matched(decoder(), rule)


def test_siblings_must_fall_together(decoder):
    with pytest.raises(ValueError, match="are one matrix at inference"):
        matched(decoder(), block_pattern=r"^.*_proj")


def test_a_sibling_that_the_optimizer_does_not_hold_is_refused(decoder):
    model = decoder()
    held = [p for name, p in model.named_parameters() if "k_proj" not in name]
    with pytest.raises(ValueError, match="k_proj: not quantized"):
        matched(model, held=held)


def test_parameters_that_the_optimizer_does_not_hold_stay_and_are_named(decoder):
    model = decoder()
    held = [p for name, p in model.named_parameters() if "down_proj" not in name]
    adamw = torch.optim.AdamW(held)
    from moq import MoQOptimizer

    with pytest.warns(UserWarning, match=r"2 weights match .* layers\.0\.down_proj\.weight"):
        optimizer = MoQOptimizer(adamw, model, total_steps=5, verbose=False)
    assert len(optimizer.num_bits) == 10


def test_groups_must_divide_the_input_features(decoder):
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj.*group_size must divide its 12"):
        matched(decoder(), granularity="per_group", group_size=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.double(), "must be float32, bfloat16 or float16"),
        (lambda m: m.to("meta"), "must be on the CPU or a CUDA device"),
    ],
)
def test_weights_without_a_grid_are_refused_by_name(decoder, change, message):
    with pytest.raises(
        ValueError, match=rf"layers\.0\.q_proj\.weight \(rule 'default'\): {message}"
    ):
        matched(change(decoder()))


def test_an_embedding_with_sparse_gradients_is_refused():
    model = nn.ModuleDict({"table": nn.Embedding(8, 4, sparse=True)})
    with pytest.raises(ValueError, match=r"table\.weight .*sparse must be False"):
        matched(model, Rule("table"))


def test_layers_with_several_widths_become_several_blocks(decoder):
    config = {"rules": [{"match": "layers.0.down_proj", "target_bits": 4}]}
    names = wrap(decoder(), config).schedule().block_names
    assert names == ["layers.0 (16 to 8 bits)", "layers.0 (16 to 4 bits)", "layers.1"]


def test_layers_with_several_schedules_become_several_blocks(decoder):
    config = {
        "start_bits": 9,
        "sensitivity": {"rule": "none"},
        "rules": [
            {"match": "*.down_proj", "schedule": {"period": 3}},
            {"match": "layers.1.down_proj", "schedule": {"table": {0: 9, 4: 8}}},
        ],
    }
    optimizer = wrap(decoder(), config, total_steps=10)
    plan = dict(zip(optimizer.schedule().block_names, optimizer.schedule().plan(), strict=True))
    assert plan == {
        "layers.0 (9 to 8 bits, rule 'default')": [(0, 9), (6, 8)],
        "layers.0 (9 to 8 bits, rule '*.down_proj')": [(0, 9), (3, 8)],
        "layers.1 (9 to 8 bits, rule 'default')": [(0, 9), (6, 8)],
        "layers.1 (9 to 8 bits, rule 'layers.1.down_proj')": [(0, 9), (4, 8)],
    }


def test_two_rules_of_one_pattern_are_told_apart():
    model = nn.ModuleDict({"0": nn.ModuleDict({"head": nn.Linear(4, 4), "score": nn.Linear(4, 4)})})
    rules = [
        {"match": "0.*", "modules": ["head"], "schedule": {"period": 2}},
        {"match": "0.*", "modules": ["linear"], "schedule": {"period": 1}},
    ]
    config = {"start_bits": 9, "sensitivity": {"rule": "none"}, "rules": rules}
    names = wrap(model, config).schedule().block_names
    assert len(set(names)) == len(names)
