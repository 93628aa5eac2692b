"""Tables on a terminal: names and patterns as they are, in the width that there is."""

import json
from collections import OrderedDict

import pytest
from tiny_decoder import wrap
from torch import nn

from moq.cli import main
from moq.target_bits import Budget, Candidates, choose

PATTERNS = ["re:.*[/.]down_proj", "*.[d]own_proj", "re:.*(:x:|down_proj)", "re:.*[b]?down_proj"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_printed_as_they_are(decoder, capsys, pattern):
    later = {"match": "*.[qkv]_proj", "schedule": {"finish_at": 0.5}}
    optimizer = wrap(decoder(), {"rules": [{"match": pattern}, later]}, 40, verbose=True)
    printed = capsys.readouterr().out
    assert pattern in printed and "*.[qkv]_proj" in printed
    assert "rule '*.[qkv]_proj'" in str(optimizer.schedule())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_schedule_command_prints_patterns_as_they_are(tmp_path, capsys, pattern):
    (tmp_path / "moq.json").write_text(json.dumps({"rules": [{"match": pattern}]}))
    assert main(["schedule", str(tmp_path / "moq.json"), "--steps", "100"]) == 0
    assert pattern in capsys.readouterr().out


def front_of(num_blocks):
    """A choice among blocks whose names have brackets."""
    widths, errors, sizes = (4, 8), (1.0, 0.1), (5, 10)
    blocks = [
        Candidates(f"h.{i} (rule '*.[a]')", 1.0 + i, 10, widths, errors, sizes)
        for i in range(num_blocks)
    ]
    return choose(blocks, Budget.parse("mean_bits=6"))


@pytest.mark.parametrize("num_blocks", [3, 40])
def test_a_front_says_how_many_of_its_choices_it_shows(num_blocks):
    choice = front_of(num_blocks)
    text = str(choice)
    assert "h.2 (rule '*.[a]')" in text
    below = text.partition("Front: ")[2].splitlines()
    rows = [line for line in below[1:] if " at " in line and "blocks at" not in line]
    if num_blocks == 3:
        assert below[0].endswith("loss")
        assert len(rows) == len(choice.front)
    else:
        assert below[0].endswith(f"loss; {len(rows)} of them:")
        assert len(rows) < len(choice.front)


@pytest.mark.parametrize("columns", [70, 120, 200])
def test_the_start_table_keeps_to_the_width_of_the_terminal(decoder, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    rule = {"match": "*.down_proj", "granularity": "per_group", "group_size": 4}
    wrap(decoder(), {"rules": [rule | {"activations": "static"}]}, 400, verbose=True)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= columns
    assert "layers.{0-1}.down_proj" in printed or columns == 70  # there it is folded


def test_the_start_table_is_as_wide_as_its_names_where_there_is_no_terminal(
    decoder, capsys, monkeypatch
):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.__stdout__", None)  # as where it is a file
    model = nn.Sequential(OrderedDict({"a_name_of_some_length" * 9: decoder()}))
    wrap(model, {}, 400, verbose=True)
    assert "a_name_of_some_length" * 9 + ".layers.{0-1}.down_proj" in capsys.readouterr().out
