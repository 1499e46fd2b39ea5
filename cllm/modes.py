"""Training and evaluation mode of a model that several callers run at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_lock = Lock()
_entered: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # how often, and the mode before the first


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model is in training mode; after the last caller has left, each is in its own mode again.

    Callers may overlap in any order, within one thread or over several, also where one's model is a part of another's.
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
    """The mode that the module should be in when one caller less is inside."""
    count, training = _entered.pop(module)
    if count == 1:
        return training
    _entered[module] = count - 1, training
    return False


def _set(modes: dict[nn.Module, bool]) -> None:
    """``train`` also changes what is below a module, so parents come first."""
    for module, training in modes.items():
        if module.training != training:
            module.train(training)
