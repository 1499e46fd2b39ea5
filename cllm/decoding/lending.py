"""What a model is lent while threads run it, and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock, get_ident
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import PreTrainedModel

Forward = Callable[..., Any]


class Lending(ABC):
    """Something that is put into a model while some thread has entered this, and taken out when the last one leaves.

    All decoders of a model share one of each kind. It cannot be entered twice by one thread. A thread that an interrupt kept
    from leaving leaves the next time.
    """

    _known: ClassVar[WeakKeyDictionary[PreTrainedModel, Any]]

    def __init_subclass__(cls) -> None:
        cls._known = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)
        self._lock = Lock()
        self._inside: set[int] = set()  # threads

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """The one that all decoders of a model share."""
        return cls._known.setdefault(model, cls(model))

    def __enter__(self) -> None:
        try:
            with self._lock:
                self._inside.add(get_ident())
                self._put_in()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._leave()

    def __reduce__(self) -> tuple[Callable[[PreTrainedModel], Self], tuple[PreTrainedModel | None]]:
        return type(self).of, (self._model(),)  # a decoder can be copied

    def _leave(self) -> None:
        self._inside.discard(get_ident())
        if not self._inside:
            self._take_out()

    @abstractmethod
    def _put_in(self) -> None:
        """The lock is held."""

    @abstractmethod
    def _take_out(self) -> None:
        """The lock is held; nothing may be in."""


class LentForward:
    """Replaces the ``forward`` of a layer for a while. Subclasses are called instead of ``plain``."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.own = layer, own_forward(layer)
        self.plain = self.own or layer.forward
        self._attributes = layer.__dict__

    def put_in(self) -> None:
        if self._attributes.get("forward") is self.own:
            self._attributes["forward"] = self

    def take_out(self) -> None:
        if self._attributes.get("forward") is not self:
            return
        if self.own is None:
            del self._attributes["forward"]
        else:
            self._attributes["forward"] = self.own


def own_forward(layer: nn.Module) -> Forward | None:
    """The forward that others gave the layer instead of its type's."""
    forward = layer.__dict__.get("forward")
    return forward.own if isinstance(forward, LentForward) else forward
