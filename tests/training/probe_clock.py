"""Measurements in time that a test makes."""

from tiny_decoder import FALLING, batch, loss_of

BATCHES = [batch(50), batch(51)]


class Clock:
    """Time that passes only where the test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def timed(model, clock, seconds=1.0):
    """A loss that takes `seconds`, so that a difference of gradients takes twice as long."""

    def loss_fn(tokens):
        clock.now += seconds
        return loss_of(model, tokens)

    return loss_fn


def differenced(**section):
    return FALLING | {"sensitivity": {"form": "finite_difference", **section}}
