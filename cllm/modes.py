"""Evaluation mode for models that several callers run at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_lock = Lock()
_entered: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # number of callers, and the original mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep all modules of ``model`` in evaluation mode; when the last caller leaves, each returns to its original mode.

    Callers may overlap in any order, in one thread or several, and one caller's model may be part of another's.
    """
    modules = list(model.modules())
    with _lock:
        for module in modules:
            count, training = _entered.get(module, (0, module.training))
            _entered[module] = count + 1, training
        _set(dict.fromkeys(modules, False))
    try:
        yield
    finally:
        with _lock:
            _set({module: _leave(module) for module in modules})


def _leave(module: nn.Module) -> bool:
    """Remove one caller of the module; returns the mode it should have now."""
    count, training = _entered.pop(module)
    if count == 1:
        return training
    _entered[module] = count - 1, training
    return False


def _set(modes: dict[nn.Module, bool]) -> None:
    """Set each module's mode. Parents must come first, because ``train`` also changes their children."""
    for module, training in modes.items():
        if module.training != training:
            module.train(training)
