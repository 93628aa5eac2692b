"""What accuracy.py trains: three tasks, and the state of each that several cells start from."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import accuracy_inputs as inputs
import torch
from accuracy_inputs import WINDOW, Batch
from torch import Tensor, nn

RESERVED = 512  # labelled texts that only sensitivities are measured on
EVALUATED = 64  # labelled texts of a batch without gradients
WEIGHT_DECAY = 0.01
LARGEST_NORM = 1.0  # of a step's gradient
WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of a task: the same for every method.

    Attributes:
        model: ``minilm`` or ``smollm2``.
        data: ``wordnet``, ``rotten`` or ``sotu``.
        batch_size: Texts or windows of a step.
        learning_rate: Highest; it rises over WARM_UP of the steps and falls to 0.
        first_steps: In full precision, before anything is quantized; all methods share them.
        steps: After these, in full precision or of a method.
        held_out: Texts or windows that a score is measured on; the same for every seed.
        probe: (batches, texts or windows in each) that sensitivities are measured on.
        products: Hessian-vector products, (in all for traces, a block and batch for eigenvalues).
        block_examples: Held-out texts or windows that a block's loss increase is measured on.
        granularity, group_size: Of the scales.
        fused: Regular expression; what it finds in a module's name is the group of weights that
            inference fuses, the block of budgeted bits.
    """

    model: str
    data: str
    batch_size: int
    learning_rate: float
    first_steps: int
    steps: int
    held_out: int
    probe: tuple[int, int]
    products: tuple[int, int]
    block_examples: int
    granularity: str
    group_size: int
    fused: str

    def digest(self, folder: Path) -> str:
        """What tells results of these settings and inputs from results of others."""
        own = json.dumps(asdict(self), sort_keys=True)
        content = own + inputs.digest(folder, (self.model, self.data))
        return hashlib.sha256(content.encode()).hexdigest()[:12]


FUSED_BERT = r"^.*layer\.\d+\.(?:attention\.)?[a-z]+"
FUSED_LLAMA = (
    r"^.*layers\.\d+\.(?:self_attn(?=\.[qkv]_proj)|self_attn\.o_proj|mlp(?=\.gate|\.up)|mlp\.down)"
)

GLOSSES = Settings(
    model="minilm",
    data="wordnet",
    batch_size=64,
    learning_rate=2e-4,
    first_steps=300,
    steps=400,
    held_out=4000,
    probe=(2, 64),
    products=(64, 12),
    block_examples=1024,
    granularity="per_channel",
    group_size=0,
    fused=FUSED_BERT,
)

FULL = {
    "wordnet": GLOSSES,
    "rotten": replace(
        GLOSSES,
        data="rotten",
        batch_size=32,
        learning_rate=1e-4,
        first_steps=200,
        steps=300,
        held_out=2000,
    ),
    "sotu": replace(
        GLOSSES,
        model="smollm2",
        data="sotu",
        batch_size=8,
        learning_rate=5e-5,
        first_steps=200,
        steps=200,
        held_out=64,
        probe=(2, 1),
        products=(32, 6),
        block_examples=16,
        fused=FUSED_LLAMA,
    ),
}

SMALL = {
    "wordnet": replace(
        GLOSSES,
        batch_size=16,
        learning_rate=5e-4,
        first_steps=10,
        steps=6,
        held_out=96,
        probe=(1, 4),
        products=(4, 3),
        block_examples=16,
    )
}


class Task:
    """One task and seed: its model at two points, and its batches.

    Args:
        settings: Of the task.
        seed: Of the head, the order of the data, dropout and what is probed.
        folder: Where accuracy_inputs keeps models and texts.
        work: Where states are kept that several cells start from.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(
        self, settings: Settings, seed: int, folder: Path, work: Path, device: str
    ) -> None:
        self.settings, self.seed, self.folder, self.device = settings, seed, folder, device
        self.stem = work / f"{settings.data}-{settings.digest(folder)}-{device}-seed{seed}"
        self._make = self._running_text() if settings.model == "smollm2" else self._labelled_texts()

    def _labelled_texts(self) -> Callable[[Sequence[int]], Batch]:
        data = inputs.labelled(self.folder, self.settings.data)
        # One split for all seeds; their spread is that of training.
        shuffled = torch.randperm(
            len(data.rows), generator=torch.Generator().manual_seed(0)
        ).tolist()
        held_out = self.settings.held_out
        self.held_out = sorted(shuffled[:held_out], key=lambda row: len(data.rows[row]))
        self.some_held_out = shuffled[: self.settings.block_examples]
        reserved = shuffled[held_out : held_out + RESERVED]
        train = shuffled[held_out + RESERVED :]
        self.evaluated = EVALUATED
        generator = torch.Generator().manual_seed(1 + self.seed)

        def draw(source: list[int], count: int) -> list[int]:
            epochs = math.ceil(count / len(source))
            orders = [torch.randperm(len(source), generator=generator) for _ in range(epochs)]
            return [source[place] for place in torch.cat(orders).tolist()[:count]]

        self.probed = draw(reserved, math.prod(self.settings.probe))
        self.trained = draw(train, self._examples())
        self.num_classes = data.num_classes
        return data.batch

    def _running_text(self) -> Callable[[Sequence[int]], Batch]:
        text = inputs.running_text(self.folder)
        train, held_out = text["train"], text["held_out"]
        count = self.settings.held_out
        # Held-out windows are numbered behind the training text's.
        ids = torch.cat([train, held_out])
        spread = torch.linspace(len(train), len(ids) - WINDOW, count).long().tolist()
        self.held_out = spread
        self.some_held_out = spread[:: max(1, count // self.settings.block_examples)]
        self.evaluated = self.settings.batch_size
        generator = torch.Generator().manual_seed(1 + self.seed)

        def draw(count: int) -> list[int]:
            return torch.randint(len(train) - WINDOW, (count,), generator=generator).tolist()

        self.probed = draw(math.prod(self.settings.probe))
        self.trained = draw(self._examples())
        return lambda starts: inputs.windows(ids, starts)

    def _examples(self) -> int:
        return (self.settings.first_steps + self.settings.steps) * self.settings.batch_size

    def _batches(self, chosen: Sequence[int], size: int) -> Iterator[Batch]:
        for start in range(0, len(chosen), size):
            batch = self._make(chosen[start : start + size])
            yield {name: value.to(self.device) for name, value in batch.items()}

    def probe_batches(self) -> list[Batch]:
        """What sensitivities are measured on."""
        return list(self._batches(self.probed, self.settings.probe[1]))

    def _new_model(self) -> nn.Module:
        if self.settings.model == "smollm2":
            return inputs.decoder(self.folder)
        return inputs.encoder(self.folder, self.num_classes, self.seed)

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """The optimizer of every training."""
        return torch.optim.AdamW(
            model.parameters(),
            lr=self.settings.learning_rate,
            weight_decay=WEIGHT_DECAY,
            fused=self.device == "cuda",
        )

    def train(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, first: bool) -> None:
        """Trains through the first steps, or through those after them."""
        steps = self.settings.first_steps if first else self.settings.steps
        size = self.settings.batch_size
        split = self.settings.first_steps * size
        chosen = self.trained[:split] if first else self.trained[split:]
        warm_up = max(1, round(WARM_UP * steps))

        def rate(step: int) -> float:
            return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        torch.manual_seed(self.seed)  # of dropout
        torch.backends.cuda.matmul.allow_tf32 = True  # measurements are in float32
        model.train()
        for batch in self._batches(chosen, size):
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        model.eval()
        torch.backends.cuda.matmul.allow_tf32 = False

    def fine_tuned(self, *, first: bool) -> nn.Module:
        """The model in full precision after the first steps, or after all."""

        def write(path: Path) -> None:
            model = self._new_model().to(self.device) if first else self.fine_tuned(first=True)
            self.train(model, self.optimizer(model), first=first)
            torch.save(model.state_dict(), path)

        name = f"{self.stem.name}-{'first' if first else 'last'}.pt"
        path = inputs.once(self.stem.with_name(name), write)
        model = self._new_model()
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        return model.to(self.device).eval()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, some: bool = False) -> tuple[float, float]:
        """Returns (score, loss a prediction) on held-out text, or on some of it.

        The score is the accuracy in % or the perplexity.
        """
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in self._batches(self.some_held_out if some else self.held_out, self.evaluated):
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if labels.dim() == 2:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            right = logits.argmax(-1) == labels
            totals += torch.stack([losses.double().sum(), right.sum().double(), _count(labels)])
        loss_sum, right_sum, count = totals.tolist()
        loss = loss_sum / count
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss on held-out text is {loss}")
        return math.exp(loss) if self.higher_is_worse else 100 * right_sum / count, loss

    @property
    def higher_is_worse(self) -> bool:
        """True of perplexities."""
        return self.settings.model == "smollm2"


def _count(labels: Tensor) -> Tensor:
    return torch.tensor(len(labels), dtype=torch.float64, device=labels.device)
