"""`python -m moq.inference`."""

import json
import subprocess
import sys

import pytest
from launch import one_thread_environment, torchrun_command

from moq.inference import Engine

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


def test_only_the_first_of_two_ranks_prints_and_its_tokens_are_those_of_one(smollm2, expected):
    arguments = ["generate", smollm2[0], "--prompt", PROMPT, "--max-new-tokens", "12", "--json"]
    result = subprocess.run(
        torchrun_command(2, "-m", "moq.inference", *arguments),
        capture_output=True,
        text=True,
        env=one_thread_environment(),
        check=True,
    )
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["token_ids"] == expected.token_ids
    assert json.loads(line)["transport"] == "shared_memory"


def test_stream_prints_the_text_and_the_speed_apart(smollm2, expected):
    arguments = ["--max-new-tokens", 12, "--stream"]
    result = run("generate", smollm2[0], *arguments, input=PROMPT)
    assert result.stdout == expected.text + "\n"
    assert "tokens/s" in result.stderr


def test_chat_puts_the_prompt_into_the_template(smollm2):
    arguments = ["--chat", "--prompt", "What is 2 + 2?", "--max-new-tokens", 4, "--json"]
    result = run("generate", smollm2[0], *arguments)
    assert json.loads(result.stdout)["prompt_tokens"] > 20  # the template's own tokens


def test_encode_prints_a_vector_per_text(smollm2):
    result = run("encode", smollm2[0], "--text", "a", "--text", "b")
    assert [len(json.loads(line)["vector"]) for line in result.stdout.splitlines()] == [576, 576]


def test_bench_measures_both_phases(model_directory):
    result = run("bench", model_directory("llama"), "--context", 9, "--new-tokens", 4, "--json")
    record = json.loads(result.stdout)
    assert record["prefill_tokens_per_second"] > 0 < record["decode_tokens_per_second"]


def test_an_error_is_one_line_and_status_one(tmp_path):
    result = run("generate", tmp_path / "nothing", "--prompt", "x")
    assert result.returncode == 1
    assert result.stderr.strip().startswith("moq generate: engine: the model must be a directory")
    assert len(result.stderr.strip().splitlines()) == 1


def test_help_teaches_by_example():
    result = run("generate", "--help")
    assert "torchrun --standalone --nproc-per-node 2" in result.stdout
