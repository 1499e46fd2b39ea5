"""What a model is lent while threads run it, and gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import Lock, get_ident
from typing import Any, ClassVar, Self
from weakref import WeakKeyDictionary, ref

from transformers import PreTrainedModel


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
