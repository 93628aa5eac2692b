"""What training prints, and what that costs."""

import warnings

import pytest
from tiny_decoder import Decoder, train_step, wrap

from moq.reporting import Reporter, drop_lines

FALLING = {"start_bits": 9, "target_bits": 6, "schedule": {"table": {0: 9, 2: 8, 4: 7, 5: 6}}}


class LateTrainer:
    """A trainer whose device is ahead of what the host has heard, and whose schedule is costly."""

    def __init__(self, trainer, seen: int) -> None:
        self.step_seen = seen
        self.step = trainer.step
        self.next_drop = trainer.next_drop
        self.asked = 0
        self._schedule = trainer.schedule

    @property
    def schedule(self):
        self.asked += 1
        return self._schedule


@pytest.fixture
def trained(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING)
    for step in range(6):
        train_step(model, optimizer, step)
    return optimizer


def test_drops_that_the_host_has_not_heard_of_are_printed_by_who_waits(trained, capsys):
    late, reporter = LateTrainer(trained._masters.trainer, seen=3), Reporter(True)
    reporter.drops(late)
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [" step 2"]
    reporter.drops(late, wait=True)
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == [
        " step 4", " step 5",
    ]  # fmt: skip
    reporter.drops(late)  # still hears of step 3
    reporter.drops(late, wait=True)
    assert capsys.readouterr().out == ""


def test_a_training_that_goes_on_behind_its_schedule_warns_once(decoder):
    model = decoder()
    optimizer = wrap(model, FALLING, total_steps=6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            train_step(model, optimizer, step)
        assert not [w for w in caught if "total_steps" in str(w.message)]
        for step in range(6, 9):
            train_step(model, optimizer, step)
    (warning,) = [str(w.message) for w in caught if "total_steps" in str(w.message)]
    assert "must be the steps of the whole training, got 6, and step 7 has been made" in warning


def test_a_drop_names_the_first_layers_of_the_model():
    schedule = wrap(Decoder(layers=11), FALLING)._masters.trainer.schedule
    first = drop_lines(schedule, 0, 12)[0]
    assert first.endswith("layers.0, layers.1, layers.2 and 8 more")


def test_flushing_the_logs_prints_drops_too(trained, capsys):
    trained._reporter = Reporter(True)
    trained.flush_logs()
    assert capsys.readouterr().out.count("moq: step") == 3


def test_a_step_without_a_drop_does_not_look_through_the_schedule(trained):
    late, reporter = LateTrainer(trained._masters.trainer, seen=0), Reporter(True)
    asked = []
    for late.step_seen in range(1, 9):
        reporter.drops(late)
        asked.append(late.asked)
    assert asked == [0, 1, 1, 2, 3, 3, 3, 3]


def test_the_next_drop_is_the_first_of_any_block(decoder):
    rule = {"match": "*.down_proj", "schedule": {"table": {0: 9, 3: 6}}}
    trainer = wrap(decoder(), FALLING | {"rules": [rule]})._masters.trainer
    assert [trainer.next_drop(step) for step in (0, 1, 2, 3, 4, 5)] == [2, 2, 3, 4, 5, None]
