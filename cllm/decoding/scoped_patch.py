"""Patches of a model that are active only while some thread needs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock, get_ident
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import PreTrainedModel

Forward = Callable[..., Any]


class ScopedPatch(ABC):
    """A patch of a model, active while any thread is inside this context manager.

    All decoders of a model share one instance per subclass, see :meth:`for_model`. It is not reentrant. If an interrupt keeps
    a thread from leaving, the thread's next use repairs that.
    """

    _instances: ClassVar[WeakKeyDictionary[PreTrainedModel, Any]]

    def __init_subclass__(cls) -> None:
        cls._instances = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)
        self._lock = Lock()
        self._inside: set[int] = set()  # ids of threads

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> Self:
        """The instance that all decoders of ``model`` share."""
        return cls._instances.setdefault(model, cls(model))

    def __enter__(self) -> None:
        try:
            with self._lock:
                self._inside.add(get_ident())
                self._apply()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._leave()

    def __reduce__(self) -> tuple[Callable[[PreTrainedModel], Self], tuple[PreTrainedModel | None]]:
        return type(self).for_model, (self._model(),)  # a decoder can be copied

    def _leave(self) -> None:
        self._inside.discard(get_ident())
        if not self._inside:
            self._remove()

    @abstractmethod
    def _apply(self) -> None:
        """Patch the model, which may be patched already. The lock is held."""

    @abstractmethod
    def _remove(self) -> None:
        """Restore the model, which may be unpatched already. The lock is held."""


class PatchedForward:
    """A callable that can replace the ``forward`` of a layer; subclasses may call the original one as ``plain``."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.override = layer, overridden_forward(layer)
        self.plain = self.override or layer.forward
        self._attributes = layer.__dict__

    def apply(self) -> None:
        if self._attributes.get("forward") is self.override:
            self._attributes["forward"] = self

    def remove(self) -> None:
        if self._attributes.get("forward") is not self:
            return
        if self.override is None:
            del self._attributes["forward"]
        else:
            self._attributes["forward"] = self.override


def overridden_forward(layer: nn.Module) -> Forward | None:
    """The ``forward`` that other code has set on the layer itself, None if it has its type's."""
    forward = layer.__dict__.get("forward")
    return forward.override if isinstance(forward, PatchedForward) else forward
