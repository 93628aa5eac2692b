"""User-supplied policies: errors of the table itself."""

import json
import shutil

import models
import pytest

from moq import _C
from moq.inference import Engine


@pytest.fixture
def neox(model_directory, tmp_path):
    """Opens the small GPT-NeoX with its policy changed by a function."""
    directory = model_directory("gpt_neox")

    def open_with(change):
        policy = json.loads(models.policy_in(directory).read_text())
        change(policy)
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(policy))
        return Engine.from_pretrained(directory, policy=path)

    return open_with


def test_a_users_policy_wins_over_a_builtin_one(model_directory, tmp_path):
    path = shutil.copy(models.policy_in(model_directory("gpt_neox")), tmp_path / "mine.json")
    assert (
        Engine.from_pretrained(model_directory("gpt_neox"), policy=path).core.policy == "gpt_neox"
    )
    with pytest.raises(_C.Error, match="must hold one of gpt_neox.embed_in.weight"):
        Engine.from_pretrained(model_directory("llama"), policy=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(colour="red"), "colour: must be one of name, architectures, spec"),
        (lambda p: p["spec"].update(norms="x"), 'spec.*must be one of vocab_size.*got "norms"'),
        (
            lambda p: p["spec"].update(norm="batch_norm"),
            'spec.norm: must be one of layer_norm, rms_norm, got "batch_norm"',
        ),
        (lambda p: p["modules"].update(gates="x"), 'must be one of token_embedding.*"gates"'),
        (
            lambda p: p["modules"]["qkv"].update(order="mixed"),
            "order must be concatenated, elementwise or",
        ),
        (lambda p: p["modules"]["qkv"].update(layout="kn"), "layout must be out_in"),
        (lambda p: p["modules"].pop("down"), "must have a rule for down"),
        (lambda p: p["modules"].pop("token_embedding"), "must have a rule for token_embedding"),
        (
            lambda p: p["modules"].update(attention_norm="layers.{layer}.post_attention_layernorm"),
            "must use every tensor once, got .*post_attention_layernorm",
        ),
        (
            lambda p: p["modules"].update(down="layers.{layer}.attention.dense"),
            "must use every tensor once, got .*attention.dense.weight",
        ),
        (
            lambda p: p["spec"].update(has_pooler=True, has_classifier=True),
            "must have a rule for classifier, which the model spec needs, got none",
        ),
        (lambda p: p["config"].pop("num_heads"), "num_heads must be >= 1, got 0"),
        (lambda p: p["spec"].update(hidden_size=True), "hidden_size"),
    ],
)
def test_an_unsuitable_policy_is_refused(change, message, neox):
    with pytest.raises(_C.Error, match=message):
        neox(change)
