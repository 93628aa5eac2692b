"""Text that grows by tokens: with the real byte-level BPE of SmolLM2, and with a small tokenizer
of SentencePiece's kind, which drops the first word's space and spells rare characters in bytes."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moq.inference.text_stream import TextStream

TEXT = " The straße – naïve, 北京 and 👩‍🚀!  Two  spaces.\n\nEnd"


def sentence_piece() -> PreTrainedTokenizerFast:
    words = ["The", "straße", "naïve", "and", "Two", "spaces", "End", "Hello", "world"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", *"▁ßïabcdefghijklmnoprstuvwyzTEHx,.!", *words, *("▁" + word for word in words)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["<unk>", "</s>", *pieces]))}
    # A merge for every way to put two pieces together that gives a third.
    merges = [
        (piece[:at], piece[at:])
        for piece in vocabulary
        for at in range(1, len(piece))
        if piece[0] != "<" and {piece[:at], piece[at:]} <= vocabulary.keys()
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module", params=["byte_level", "sentence_piece"])
def tokenizer(request):
    if request.param == "sentence_piece":
        return sentence_piece()
    return request.getfixturevalue("smollm2")[2]


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def streamed(tokenizer, prompt: list[int], tokens: list[int], stop=()) -> tuple[list[str], str]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces = [stream.append(token) for token in tokens] + [stream.finish()]
    assert "".join(pieces) == stream.text
    return pieces, stream.text


@pytest.mark.parametrize("split", range(0, 41, 4))
def test_prompt_and_streamed_text_are_the_whole_text(tokenizer, split):
    ids = ids_of(tokenizer, TEXT)
    whole = tokenizer.decode(ids)
    prompt = tokenizer.decode(ids[:split]).rstrip("\ufffd")
    _, text = streamed(tokenizer, ids[:split], ids[split:])
    assert prompt + text == whole


def test_no_piece_holds_a_part_of_a_character(tokenizer):
    pieces, _ = streamed(tokenizer, [], ids_of(tokenizer, TEXT))
    assert not any("\ufffd" in piece for piece in pieces)
    assert "北" in "".join(pieces)


def test_a_character_cut_off_at_the_end_is_shown_as_such(tokenizer):
    ids = ids_of(tokenizer, "Hello 👩")[:-1]
    assert streamed(tokenizer, [], ids)[1] == tokenizer.decode(ids)


def test_a_word_behind_a_special_token_keeps_its_space(tokenizer):
    end = tokenizer.eos_token_id
    hello, world = ids_of(tokenizer, "Hello"), ids_of(tokenizer, "Hello world")
    tokens = [end, end, *world[len(hello) :]]
    assert streamed(tokenizer, hello, tokens)[1] == " world"


def test_a_prompt_of_rare_characters_is_taken_from_where_one_begins(tokenizer):
    prompt, whole = ids_of(tokenizer, "京" * 20), ids_of(tokenizer, "京" * 20 + "北!")
    assert whole[: len(prompt)] == prompt
    assert streamed(tokenizer, prompt, whole[len(prompt) :])[1] == "北!"


def test_text_ends_before_the_first_of_several_stop_strings(tokenizer):
    ids = ids_of(tokenizer, TEXT)
    expected = tokenizer.decode(ids)
    stream = TextStream(tokenizer, [], ["spaces", "! ", "never"])
    for token in ids:
        stream.append(token)
        if stream.stopped:
            break
    assert stream.finish() == ""
    assert stream.text == expected[: expected.index("! ")]


def test_the_beginning_of_a_stop_string_waits_and_is_text_in_the_end(tokenizer):
    pieces, text = streamed(tokenizer, [], ids_of(tokenizer, "Hello world, and"), ["world, or"])
    assert pieces[-1] == "" or not "world, or".startswith(pieces[-1])
    assert text == tokenizer.decode(ids_of(tokenizer, "Hello world, and"))
    pieces, text = streamed(tokenizer, [], ids_of(tokenizer, "Hello world"), ["world, or"])
    assert pieces[-1] == "world"
    assert text == tokenizer.decode(ids_of(tokenizer, "Hello world"))


class CountingTokenizer:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, token_ids, **options) -> str:
        self.decoded += len(token_ids)
        return self._tokenizer.decode(token_ids, **options)


def test_the_work_for_a_token_does_not_grow_with_the_text(tokenizer):
    ids = ids_of(tokenizer, TEXT * 20)
    counting = CountingTokenizer(tokenizer)
    streamed(counting, ids, ids)
    assert counting.decoded < 16 * len(ids)
