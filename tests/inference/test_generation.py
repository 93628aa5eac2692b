"""Generation: sampling, stopping, streaming."""

import threading

import pytest
import torch
from models import open_fp32, sequences

from moq import _C
from moq.inference import Engine

PROMPTS = sequences(5, 9)


@pytest.fixture(scope="module")
def engine(model_directory, device) -> Engine:
    return open_fp32(model_directory("llama"), device)


@pytest.fixture(scope="module")
def text_engine(smollm2, device) -> Engine:
    return open_fp32(smollm2[0], device, dtype="int8")


def test_same_seed_draws_the_same_tokens(engine):
    first, second = (engine.generate(PROMPTS, 30, temperature=1.0, seed=7) for _ in range(2))
    assert first == second


def test_another_seed_draws_other_tokens(engine):
    first, second = (engine.generate(PROMPTS, 30, temperature=1.0, seed=s) for s in (7, 8))
    assert first[0].token_ids != second[0].token_ids


def test_rows_of_one_seed_draw_apart(engine):
    rows = engine.generate([PROMPTS[0]] * 2, 30, temperature=1.0, seed=7)
    assert rows[0].token_ids != rows[1].token_ids


def test_no_seed_means_a_new_one_each_time(engine):
    first, second = (engine.generate(PROMPTS[0], 40, temperature=1.0) for _ in range(2))
    assert first.token_ids != second.token_ids


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_filters_that_leave_one_token_are_greedy(option, engine):
    sampled = engine.generate(PROMPTS, 20, temperature=1.0, seed=3, **option)
    assert sampled == engine.generate(PROMPTS, 20)


def test_first_tokens_are_drawn_in_proportion_to_their_probability(engine):
    probabilities = engine.forward(PROMPTS[:1])[0][-1].softmax(dim=-1).cpu()
    drawn = engine.generate([PROMPTS[0]] * 2000, 1, temperature=1.0, seed=0, max_batch=500)
    counts = torch.bincount(torch.tensor([g.token_ids[0] for g in drawn]), minlength=97)
    expected = probabilities * 2000
    # Chi-squared over the frequent tokens: mean = degrees of freedom, deviation = sqrt(2 of it).
    often = expected >= 5
    statistic = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
    freedom = int(often.sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_repetition_penalty_keeps_tokens_from_coming_back(engine):
    tokens = engine.generate(PROMPTS[0], 40, repetition_penalty=1e6).token_ids
    assert len(set(tokens)) == len(tokens)


def test_stop_token_ends_its_row_only(engine):
    free = engine.generate(PROMPTS, 20)
    stop = next(token for token in free[0].token_ids if token not in free[1].token_ids)
    rows = engine.generate(PROMPTS, 20, stop_token_ids=[stop])
    assert rows[0].finish_reason == "stop_token"
    assert rows[0].token_ids == free[0].token_ids[: free[0].token_ids.index(stop) + 1]
    assert rows[1] == free[1]


def test_one_new_token_is_a_generation(engine):
    generation = engine.generate(PROMPTS[0], 1)
    assert (len(generation.token_ids), generation.finish_reason) == (1, "length")


def test_no_prompts_give_no_generations(engine):
    assert engine.core.generate([], max_new_tokens=3).rows == []


def test_timing_counts_every_token(engine):
    engine.generate(PROMPTS, 10)
    assert engine.timing.prompt_tokens == 14
    assert engine.timing.decode_tokens == 18  # the first of each row belongs to prefill


def test_prompts_longer_than_a_chunk_are_read_in_pieces(text_engine):
    prompt = (torch.arange(700) % 1000 + 300).tolist()
    tokens = text_engine.generate(prompt, 2).token_ids
    assert tokens[0] == text_engine.forward([prompt])[0][-1].argmax().item()


def test_text_is_decoded(text_engine):
    generation = text_engine.generate("The capital of France is", 8, stop_token_ids=[])
    assert "Paris" in str(generation)


def test_stop_string_ends_the_text_before_it(text_engine):
    free = text_engine.generate("One, two, three,", 16)
    stop = free.text[6:10]
    generation = text_engine.generate("One, two, three,", 16, stop=stop)
    assert generation.text == free.text[: free.text.index(stop)]
    assert generation.finish_reason == "stop_string"


def test_streamed_pieces_join_to_the_text(text_engine):
    pieces = list(text_engine.stream("Once upon a time", max_new_tokens=24))
    assert len(pieces) > 10
    assert "".join(pieces) == text_engine.generate("Once upon a time", 24).text


def test_text_follows_the_prompt_without_a_gap(text_engine):
    prompt = "The capital of France is"
    generation = text_engine.generate(prompt, 8, stop_token_ids=[])
    assert prompt + str(generation) == text_engine.tokenizer.decode(
        text_engine.tokenizer(prompt)["input_ids"] + generation.token_ids
    )


def test_error_in_a_callback_reaches_the_caller_and_leaves_the_engine_usable(text_engine):
    def fail(row, piece):
        raise KeyError("from the callback")

    expected = text_engine.generate("Once upon", 8)
    with pytest.raises(KeyError, match="from the callback"):
        text_engine.generate("Once upon", 8, on_text=fail)
    assert text_engine.generate("Once upon", 8) == expected


def test_leaving_a_stream_ends_its_generation(text_engine):
    expected = text_engine.generate("Once upon", 8)
    threads = threading.active_count()
    for _ in text_engine.stream("Once upon a time", max_new_tokens=4000, stop_token_ids=[]):
        break
    assert threading.active_count() == threads
    assert text_engine.generate("Once upon", 8) == expected


def test_error_in_a_stream_reaches_the_caller(text_engine):
    with pytest.raises(_C.Error, match="max_new_tokens must be >= 1, got 0"):
        list(text_engine.stream("Once upon", max_new_tokens=0))
    with pytest.raises(ValueError, match="stream takes one prompt, got 2: generate"):
        list(text_engine.stream(["Once upon", "a time"]))
