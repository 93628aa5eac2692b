"""`python -m moq.inference`."""

import argparse
import contextlib
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from launch import one_thread_environment

from moq.cli import COMMANDS, build_parser
from moq.inference import Encoding, Engine, encode

PROMPT = "The capital of France is"


def run(*arguments, **options):
    command = [sys.executable, "-m", "moq.inference", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=one_thread_environment(), **options
    )


@pytest.fixture(scope="module")
def expected(smollm2):
    return Engine.from_pretrained(smollm2[0]).generate(PROMPT, 12)


def test_json_gives_tokens_speed_and_settings(smollm2, expected):
    result = run("generate", smollm2[0], "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    record = json.loads(result.stdout)
    assert record["token_ids"] == expected.token_ids
    assert record["text"] == expected.text
    assert record["decode_tokens_per_second"] > 0
    assert (record["weights"], record["tp_size"], record["threads"]) == ("float32", 1, 1)


def test_stream_prints_the_text_and_the_speed_apart(smollm2, expected):
    arguments = ["--max-new-tokens", 12, "--stream"]
    result = run("generate", smollm2[0], *arguments, input=PROMPT)
    assert result.stdout == expected.text + "\n"
    assert "tokens/s" in result.stderr


def test_chat_puts_the_prompt_into_the_template(smollm2):
    arguments = ["--chat", "--prompt", "What is 2 + 2?", "--max-new-tokens", 4, "--json"]
    result = run("generate", smollm2[0], *arguments)
    record = json.loads(result.stdout)
    assert record["prompt_tokens"] > 20  # the template's own tokens
    assert (
        run("generate", smollm2[0], *arguments[:-1]).stdout == record["text"] + "\n"
    )  # the answer


def test_encode_prints_a_vector_per_text(smollm2):
    result = run("encode", smollm2[0], "--text", "a", "--text", "b")
    assert [len(json.loads(line)["vector"]) for line in result.stdout.splitlines()] == [576, 576]


def test_encode_prints_every_line_of_standard_input_beside_a_progress_bar(smollm2):
    texts = [f"text {i}" for i in range(70)]
    terminal, of_process = pty.openpty()
    seen: list[bytes] = []

    def read_terminal() -> None:  # a full one would stop the process
        with contextlib.suppress(OSError):  # nobody writes to it any more
            while piece := os.read(terminal, 4096):
                seen.append(piece)

    reader = threading.Thread(target=read_terminal)
    reader.start()
    result = subprocess.run(
        [sys.executable, "-m", "moq.inference", "encode", smollm2[0]],
        input="\n".join(texts),
        stdout=subprocess.PIPE,
        stderr=of_process,
        env=one_thread_environment(TERM="xterm"),
        text=True,
        timeout=300,
    )
    os.close(of_process)
    reader.join()
    os.close(terminal)
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == texts
    assert b"encode" in b"".join(seen)


def test_encode_prints_while_it_computes(monkeypatch, capsys):
    """An engine that notes how many lines were printed before it got each batch."""
    printed, sizes, cut = [], [], []

    def compute(texts, truncation):
        cut.append(truncation)
        printed.append(capsys.readouterr().out.count("\n"))
        sizes.append(len(texts))
        vectors = torch.zeros(len(texts), 2)
        return Encoding([], vectors, None, None)

    engine = SimpleNamespace(encode=compute, labels={})
    monkeypatch.setattr(encode, "open_engine", lambda args: engine)
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    assert encode.run(parser.parse_args(["none", *["--text", "a"] * 70])) == 0
    assert sizes == [32, 32, 6]
    assert printed == [0, 32, 32]
    assert encode.run(parser.parse_args(["none", "--text", "a", "--truncation"])) == 0
    assert cut == [False, False, False, True]


@pytest.mark.parametrize("option", ["context", "new-tokens", "batch", "repeats"])
def test_bench_refuses_to_measure_nothing(option, model_directory):
    result = run("bench", model_directory("llama"), f"--{option}", 0)
    assert result.returncode == 1
    least = 2 if option == "new-tokens" else 1
    assert result.stderr == f"moq bench: --{option} must be >= {least}, got 0\n"


def test_bench_measures_both_phases(model_directory):
    result = run("bench", model_directory("llama"), "--context", 9, "--new-tokens", 4, "--json")
    record = json.loads(result.stdout)
    assert record["prefill_tokens_per_second"] > 0 < record["decode_tokens_per_second"]


def test_bench_keeps_within_the_positions_of_a_small_model(model_directory):
    result = run("bench", model_directory("llama"), "--new-tokens", 4, "--json")
    assert json.loads(result.stdout)["context"] == 92
    result = run("bench", model_directory("llama"), "--context", 93, "--new-tokens", 4)
    assert result.stderr.startswith("moq bench: --context and --new-tokens together must be at")


def test_an_error_is_one_line_and_status_one(tmp_path):
    result = run("generate", tmp_path / "nothing", "--prompt", "x")
    assert result.returncode == 1
    assert result.stderr.strip().startswith("moq generate: engine: the model must be a directory")
    assert len(result.stderr.strip().splitlines()) == 1


def test_every_serving_command_is_one_of_moq_too():
    from moq.inference.__main__ import _COMMANDS

    for name, (module, _) in _COMMANDS.items():
        assert COMMANDS[name][0] == module.__name__


def test_help_teaches_by_example():
    result = run("generate", "--help")
    assert "torchrun --standalone --nproc-per-node 2" in result.stdout


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor"}))
def test_examples_of_help_are_commands(command):
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        build_parser(command).parse_args([command, "--help"])
    lines = re.findall(
        rf"^  (?:moq|python -m moq.inference) ({command} [^<>\n]*)", shown.getvalue(), re.MULTILINE
    )
    assert lines
    for line in lines:
        assert build_parser(command).parse_args(shlex.split(line)).command == command
