"""What loggers are told: the right numbers, at the right steps, whoever listens."""

import copy
import csv

import pytest
import torch
from tiny_decoder import FALLING, Recorder, batch, loss_of, masters, train_step, weights, wrap
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moq import MoQOptimizer
from moq.loggers import CsvLogger, Logger, TensorBoardLogger
from moq.scalars import _Measurement


def codes(model: nn.Module, optimizer: MoQOptimizer, bits: dict[str, int]) -> dict:
    return {
        name: torch.ops.moq.quantize(model.get_parameter(name).detach(), bits[name])[0]
        for name in optimizer.num_bits
    }


def test_the_scalars_of_every_step_are_those_of_the_weights(decoder):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, loggers=recorder, log_every=1)
    for step in range(10):
        before = weights(model)
        train_step(model, optimizer, step)
        bits = optimizer.num_bits
        now = codes(model, optimizer, bits)
        sums = {"layers.0": [0.0] * 4, "layers.1": [0.0] * 4}
        for name, master in masters(optimizer).items():
            error = (model.get_parameter(name) - master).double()
            old = torch.ops.moq.quantize(before[name], bits[name])[0]
            row = [
                error.square().sum().item(),
                master.double().square().sum().item(),
                (old != now[name]).sum().item(),
                master.numel(),
            ]
            block = sums[name[:8]]
            sums[name[:8]] = [a + b for a, b in zip(block, row, strict=True)]
        told = recorder.steps[step + 1]
        for block, (error, master, *_) in sums.items():
            assert told[f"moq/bits/{block}"] == bits[f"{block}.q_proj.weight"]
            expected = pytest.approx((error / master) ** 0.5, rel=1e-6)
            assert told[f"moq/quantization_error/{block}"] == expected
        total = [sum(values) for values in zip(*sums.values(), strict=True)]
        assert told["moq/quantization_error"] == pytest.approx((total[0] / total[1]) ** 0.5)
        if bits == {name: optimizer.schedule().bits_at(0, step) for name in bits}:  # no drop
            assert told["moq/flips"] == pytest.approx(total[2] / total[3])
            assert told["moq/flips/layers.0"] == sums["layers.0"][2] / sums["layers.0"][3]
        assert told["moq/bits"] == pytest.approx(sum(bits.values()) / len(bits))
        assert "moq/blend_ratio" not in told
    assert sorted(recorder.steps) == list(range(1, 11))


@pytest.mark.parametrize(
    "grid",
    [
        {"mode": "ternary", "target_bits": 2},
        {"mode": "binary", "target_bits": 1},
        {"mode": "asymmetric", "granularity": "per_group", "groups": 4},
        {"scale": "mse"},
    ],
    ids=lambda grid: " ".join(map(str, grid.values())),
)
def test_every_grid_is_measured_with_the_integers_that_the_masters_have(decoder, grid):
    model, recorder = decoder(hidden=12, intermediate=20), Recorder()
    optimizer = wrap(model, FALLING | grid, loggers=recorder, log_every=1)
    for step in range(12):
        bits = optimizer.num_bits
        before = integers(optimizer, bits)
        train_step(model, optimizer, step)
        if optimizer.num_bits == bits:
            after = integers(optimizer, bits)
            flips = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
            count = sum(a.numel() for a in after)
            assert recorder.steps[step + 1]["moq/flips"] == flips / count
    assert optimizer.num_bits == dict.fromkeys(bits, optimizer.config.target_bits)


def integers(optimizer: MoQOptimizer, bits: dict[str, int]) -> list[torch.Tensor]:
    """The codes of the masters, which are those of the simulated weights."""
    values = masters(optimizer)
    return [
        torch.ops.moq.quantize(
            values[m.name].detach(),
            bits[m.name],
            granularity=m.granularity,
            group_size=m.group_size,
            mode=m.spec.mode,
            scale_rule=m.spec.scale,
        )[0]
        for m in optimizer._masters.matched
    ]


def test_flips_are_none_when_nothing_moves_and_many_when_everything_does(decoder):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, {"start_bits": 8, "target_bits": 8}, loggers=recorder, log_every=1)
    for step, rate in enumerate([0.0, 1.0]):
        loss_of(model, batch(step)).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    # A learning rate of 0 is a step as well; only zero gradients beside it make it none.
    assert recorder.steps[1]["moq/flips"] == 0.0
    assert recorder.steps[2]["moq/flips"] > 0.9


@pytest.mark.parametrize("every", [1, 3, 100])
def test_only_every_so_many_steps_are_measured(decoder, every):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, loggers=[recorder], log_every=every)
    for step in range(7):
        train_step(model, optimizer, step)
    assert sorted(recorder.steps) == list(range(1, 8, every))


def test_measuring_changes_nothing(decoder):
    logged, silent = decoder(), decoder()
    config = FALLING | {"rounding": "stochastic"}
    first = wrap(logged, config, loggers=Recorder(), log_every=1)
    second = wrap(silent, config)
    for step in range(6):
        assert train_step(logged, first, step) == train_step(silent, second, step)


def test_without_loggers_nothing_is_measured(decoder, monkeypatch):
    monkeypatch.setattr("moq.scalars._codes", lambda *_: pytest.fail("measured"))
    model = decoder()
    optimizer = wrap(model, FALLING, log_every=1)
    train_step(model, optimizer, 0)


GRIDS = {
    "channels": {},
    "groups": {"granularity": "per_group", "group_size": 4, "mode": "asymmetric"},
    "tensors": {"granularity": "per_tensor"},
    "ternary": {"mode": "ternary", "start_bits": 4, "target_bits": 2},
    "learned": {"scale": "learned", "simulate": "autograd"},
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_weights_are_measured_together_as_one_by_one(monkeypatch, grid, conv1d):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    recorders = []
    for elements in (1, 1 << 18):
        monkeypatch.setattr("moq.scalars.CHUNK_ELEMENTS", elements)
        torch.manual_seed(0)
        layers = [nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(12, 8), nn.Linear(8, 8)]
        if conv1d:
            layers = [pytorch_utils.Conv1D(m.out_features, m.in_features) for m in layers]
        recorders.append(recorder := Recorder())
        model = nn.Module()
        model.layers = nn.ModuleList([nn.ModuleList(layers[:3]), nn.ModuleList(layers[3:])])
        optimizer = wrap(model, FALLING | GRIDS[grid], loggers=recorder, log_every=1)
        for _ in range(10):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    one_by_one, together = recorders
    assert together.steps.keys() == one_by_one.steps.keys()
    for step, scalars in together.steps.items():
        assert scalars == pytest.approx(one_by_one.steps[step], rel=1e-12)
    assert any(scalars["moq/flips"] for scalars in together.steps.values())


class Operations(TorchDispatchMode):
    """Counts operators, but those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is not torch.ops.aten.detach.default
        return function(*args, **(kwargs or {}))


def test_a_measured_step_calls_as_many_operators_whatever_the_number_of_weights():
    counts = {}
    for weights_of_a_layer in (4, 40):
        model = nn.Module()
        parts = [nn.Linear(4, 4, bias=False) for _ in range(weights_of_a_layer)]
        model.layers = nn.ModuleList([nn.ModuleList(parts)])
        optimizer = wrap(model, FALLING, loggers=Recorder(), log_every=1)
        masters, scalars = optimizer._masters, optimizer._scalars
        with Operations() as operations:
            scalars.before_step(masters)
            scalars.after_step(masters)
        counts[weights_of_a_layer] = operations.count
    assert counts[4] == counts[40]


def test_blend_ratios_are_told(decoder):
    layer, recorder = nn.Linear(16, 4, bias=False), Recorder()
    optimizer = MoQOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.0),
        nn.ModuleDict({"0": layer}),
        {"start_bits": 6, "target_bits": 3, "blend_steps": 4, "schedule": {"table": {0: 6, 2: 3}}},
        total_steps=8,
        verbose=False,
        loggers=recorder,
        log_every=1,
    )
    for _ in range(8):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    ratios = [recorder.steps[step]["moq/blend_ratio/0"] for step in range(1, 9)]
    assert ratios == [0, 1, 0.75, 0.5, 0.25, 0, 0, 0]


def test_sensitivities_are_told_when_they_are_measured(decoder):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, loggers=recorder)
    found = optimizer.probe(
        lambda tokens: loss_of(model, tokens), [batch(50)], max_products=4, max_cost=None
    )
    assert recorder.steps[0] == {
        "moq/sensitivity/layers.0": found.normalised[0],
        "moq/sensitivity/layers.1": found.normalised[1],
    }


def test_an_overflow_step_tells_the_step_that_it_did_not_make(decoder):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, loggers=recorder, log_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, overflow in enumerate([False, True, False]):
        scaler.scale(loss_of(model, batch(step))).backward()
        if overflow:
            model.layers[0].q_proj.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert sorted(recorder.steps) == [1, 2]


def test_a_step_that_failed_is_not_told(decoder, monkeypatch):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, loggers=recorder, log_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.inner, "step", lambda: pytest.fail("inner"))
        with pytest.raises(BaseException, match="inner"):
            train_step(model, optimizer, 0)
    train_step(model, optimizer, 0)
    assert recorder.steps == {}


def test_a_logger_added_later_is_told_from_then_on(decoder):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, log_every=1)
    train_step(model, optimizer, 0)
    optimizer.add_logger(recorder)
    train_step(model, optimizer, 1)
    assert list(recorder.steps) == [2]


class Late:
    """Stands for an event of a device that is behind."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


def test_what_is_on_its_way_is_told_before_a_param_group_brings_blocks(decoder, monkeypatch):
    monkeypatch.setattr("moq.scalars._to_host", lambda values: _Measurement(values, Late()))
    model, recorder = decoder(), Recorder()
    adamw = torch.optim.AdamW(model.layers[1].parameters())
    with pytest.warns(UserWarning, match="in no param group"):
        optimizer = MoQOptimizer(
            adamw, model, FALLING, total_steps=12, verbose=False, loggers=recorder, log_every=1
        )
    train_step(model, optimizer, 0)
    assert recorder.steps == {}
    optimizer.add_param_group({"params": list(model.layers[0].parameters())})
    train_step(model, optimizer, 1)
    optimizer.flush_logs()
    blocks = [[name for name in told if "/bits/" in name] for told in recorder.steps.values()]
    assert blocks == [["moq/bits/layers.1"], ["moq/bits/layers.0", "moq/bits/layers.1"]]


def test_a_csv_file_has_a_row_for_each_scalar_and_is_continued(decoder, tmp_path):
    path = tmp_path / "logs" / "run.csv"
    state = None
    for first, last in ((0, 3), (2, 4)):  # killed after step 3, resumed from step 2
        model = decoder()
        logger = CsvLogger(path)
        optimizer = wrap(model, FALLING, loggers=logger, log_every=1)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in range(first, last):
            train_step(model, optimizer, step)
            if optimizer.steps == 2:
                state = copy.deepcopy(optimizer.state_dict())
        logger.close()
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "name", "value"]
    assert [row[0] for row in rows if row[1] == "moq/bits"] == ["1", "2", "3", "4"]
    plan = optimizer.schedule().plan()[0]
    bits = [bits for step, bits in plan if step <= 1][-1]
    assert float(next(row[2] for row in rows if row[1] == "moq/bits/layers.0")) == bits
    assert not any(row == rows[0] for row in rows[1:])


def test_a_csv_file_forgets_the_steps_that_are_made_again(tmp_path):
    path = tmp_path / "run.csv"
    logger = CsvLogger(path)
    for step in (10, 20, 30):
        logger.log({"loss": step / 10, 'a "name", quoted': 1.0}, step=step)
    logger.close()
    path.write_text(path.read_text() + "40,lo")  # killed while it wrote
    unused, logger = CsvLogger(path), CsvLogger(path)
    assert path.read_text().endswith("40,lo")  # until something is logged
    for step in (20, 20, 25):
        logger.log({"loss": 5.0 + step}, step=step)
    unused.close()
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[1] == "loss"]
    assert [(row[0], float(row[2])) for row in rows] == [
        ("10", 1.0), ("20", 25.0), ("20", 25.0), ("25", 30.0),
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["run.csv"]


def test_a_csv_file_that_two_ranks_open_has_one_header(tmp_path):
    path = tmp_path / "run.csv"
    loggers = [CsvLogger(path), CsvLogger(path)]
    assert path.read_text() == ""  # whoever opens it next finds no other columns
    for step, logger in enumerate((loggers[1], loggers[0], loggers[1])):
        logger.log({"moq/bits": 8.0}, step=step)
    rows = [f"{step},moq/bits,8.0" for step in range(3)]
    assert path.read_text().split() == ["step,name,value", *rows]


def test_another_csv_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns \['step', 'name', 'value'\], got"):
        CsvLogger(path)
    assert path.read_text() == "epoch,loss\n1,2\n"


@pytest.mark.parametrize("own_writer", [False, True])
def test_tensorboard_has_a_curve_for_each_scalar(decoder, tmp_path, own_writer):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    target = SummaryWriter(str(tmp_path)) if own_writer else tmp_path
    model, recorder = decoder(), Recorder()
    loggers = [TensorBoardLogger(target), recorder]
    optimizer = wrap(model, FALLING, loggers=loggers, log_every=2)
    for step in range(5):
        train_step(model, optimizer, step)
    optimizer.flush_logs()  # the writer itself flushes every two minutes
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("moq/bits", "moq/flips/layers.1", "moq/quantization_error"):
        curve = {event.step: event.value for event in events.Scalars(name)}
        assert curve == {step: pytest.approx(told[name]) for step, told in recorder.steps.items()}


def test_an_accelerator_is_a_logger_as_it_is(decoder, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from accelerate.state import AcceleratorState

    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("run")
    assert isinstance(accelerator, Logger)
    model = decoder()
    optimizer = wrap(model, FALLING, loggers=accelerator, log_every=1)
    train_step(model, optimizer, 0)
    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert list(tmp_path.rglob("events.*"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loggers": [print]}, TypeError, r"loggers must have a method log\(scalars, step=…\)"),
        ({"loggers": 3}, TypeError, "got int"),
        ({"loggers": "run.csv"}, TypeError, "got str"),
        ({"log_every": 0}, ValueError, "log_every must be at least 1, got 0"),
        ({"log_every": 2.0}, TypeError, "log_every must be an integer, got 2.0"),
        ({"log_every": True}, TypeError, "log_every must be an integer"),
    ],
)
def test_bad_loggers_are_refused(decoder, options, error, message):
    with pytest.raises(error, match=message):
        wrap(decoder(), FALLING, **options)


def test_a_bad_logger_is_refused_later_too(decoder):
    with pytest.raises(TypeError, match="got NoneType"):
        wrap(decoder(), FALLING).add_logger(None)


# ------------------------------------------------------------------------- figures of one's own


def test_figures_of_ones_own_are_told_at_the_present_step(decoder):
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, loggers=recorder, log_every=100)
    optimizer.log({"accuracy": 0})
    for step in range(2):
        loss = torch.tensor(train_step(model, optimizer, step), requires_grad=True)
        optimizer.log({"loss": loss, "learning rate": 1e-2})
    assert recorder.steps[0] == {"accuracy": 0.0}
    assert recorder.steps[2] == {"loss": loss.item(), "learning rate": 1e-2}


def test_figures_keep_their_place_behind_the_scalars_that_are_on_their_way(decoder, monkeypatch):
    monkeypatch.setattr("moq.scalars._to_host", lambda values: _Measurement(values, Late()))
    model, recorder = decoder(), Recorder()
    optimizer = wrap(model, FALLING, loggers=recorder, log_every=1)
    for step in range(2):
        train_step(model, optimizer, step)
        optimizer.log({"loss": float(step)})
    assert recorder.steps == {}
    optimizer.flush_logs()
    assert [told["loss"] for told in recorder.steps.values()] == [0.0, 1.0]
    assert all("moq/bits" in told for told in recorder.steps.values())


@pytest.mark.parametrize(
    ("figures", "error", "message"),
    [
        ({"loss": torch.zeros(3)}, ValueError, r"'loss' must be one number, got .* \[3\]"),
        ({"loss": "low"}, TypeError, "'loss' must be a number or a tensor of one, got 'low'"),
        ({"moq/bits": 3.0}, ValueError, "must not be empty or begin with 'moq/', got 'moq/bits'"),
        ({1: 3.0}, TypeError, "names must be strings, got 1"),
    ],
)
def test_what_is_no_figure_is_refused(decoder, figures, error, message):
    optimizer = wrap(decoder(), FALLING)
    with pytest.raises(error, match=message):
        optimizer.log(figures)
