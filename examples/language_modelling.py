"""What the decoder examples share: windows of tokens, a training loop, perplexity."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

WINDOW = 256  # tokens


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over independent windows.

    Attributes:
        value: exp of the mean negative log-likelihood per token.
        standard_error: Of `value`, from the spread of the windows' means (delta method).
    """

    value: float
    standard_error: float

    def __str__(self) -> str:
        """Value and error as they stand in a table."""
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, seed: int | None = None
) -> Tensor:
    """Cuts a text into windows of consecutive tokens.

    Args:
        tokenizer: The model's.
        text: At least `count` windows long.
        count: Number of windows.
        seed: Draws the windows' places at random; None spreads them evenly over the text.

    Returns:
        [count, WINDOW] int64 token ids.
    """
    # Tokenizing only what is used keeps a 12 MB text from costing a minute.
    characters = WINDOW * 8
    last = len(text) - characters
    if last < count:
        raise ValueError(f"the text has {len(text)} characters, {count} windows need more")
    if seed is None:
        starts = [round(i * last / max(count - 1, 1)) for i in range(count)]
    else:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(last, (count,), generator=generator).tolist()
    rows = []
    for start in starts:
        start = text.find(" ", start) + 1  # at a word
        ids = tokenizer(text[start : start + characters], add_special_tokens=False)["input_ids"]
        rows.append(ids[:WINDOW])
    return torch.tensor(rows)


def progress_bar() -> Progress:
    """The progress bar of the examples: what, how far, how long still, and the latest figures."""
    return Progress(
        TextColumn("{task.description:>22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )


def perplexity(logits_of: Callable[[Tensor], Tensor], windows: Tensor, title: str) -> Perplexity:
    """Measures a model on held-out windows.

    Args:
        logits_of: Maps [1, WINDOW] token ids to [1, WINDOW, vocab_size] logits.
        windows: [n, WINDOW] token ids.
        title: Names the model beside the progress bar.
    """
    means = []
    with torch.no_grad(), progress_bar() as bar:
        task = bar.add_task(title, total=len(windows), figures="")
        for window in windows:
            logits = logits_of(window[None])[0, :-1].double()
            means.append(nn.functional.cross_entropy(logits, window[1:]).item())
            running = math.exp(sum(means) / len(means))
            bar.update(task, advance=1, figures=f"perplexity {running:.2f}")
    losses = torch.tensor(means, dtype=torch.float64)
    value = losses.mean().exp().item()
    return Perplexity(value, value * losses.std().item() / math.sqrt(len(means)))


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    title: str,
    *,
    warmup_steps: int,
) -> Iterator[float]:
    """Trains on one window a step; yields each step's loss.

    The learning rate rises over `warmup_steps` and falls to a tenth along a cosine.
    """
    steps = len(windows)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        along = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * along))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    with progress_bar() as bar:
        task = bar.add_task(title, total=steps, figures="")
        for window in windows:
            loss = model(input_ids=window[None], labels=window[None]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            bar.update(task, advance=1, figures=f"loss {loss.item():.3f}")
            yield loss.item()
    model.eval()
