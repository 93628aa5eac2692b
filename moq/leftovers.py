"""Modules that a training put into a model and that outlived it."""

from __future__ import annotations

import gc
import weakref
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.utils import parametrize

_PLACED_BY: WeakKeyDictionary[nn.Module, weakref.ref[object]] = WeakKeyDictionary()
"""Module -> weak reference to what placed it, which lives as long as its training."""


def remember(module: nn.Module, owner: object) -> None:
    """Notes who placed a module."""
    _PLACED_BY[module] = weakref.ref(owner)


def is_left_over(module: nn.Module) -> bool:
    """Says whether no training is left that placed the module; none placed a copy of it."""
    for collect in (gc.collect, None):
        owner = _PLACED_BY.get(module)
        if owner is None or owner() is None:
            return True
        if collect is not None:
            collect()  # the training may be over
    return False


def remove_parametrization(module: nn.Module, name: str) -> None:
    """Removes all parametrizations of a parameter; it becomes what they were computed from.

    torch changes the module's class for it, which a copy of the module shares.
    """
    own = type(module)
    module.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
