"""The choices of one request while they are being written, as the event loop sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from cllm.decoding import Request
from cllm.serving.server.protocol import Usage
from cllm.serving.server.worker import Progress, ReportingJob, Worker
from cllm.serving.text import TextStream


@dataclass(eq=False)
class Choice:
    """One response: its text so far, why it ended, and what it cost.

    A stop string ends it at the token that completes the string, and at the forward that produced this token, however much more
    has been decoded by then. Text and cost therefore depend on the request alone.
    """

    index: int
    text: TextStream
    written: list[str] = field(default_factory=list)
    reason: str | None = None  # "stop" or "length", once it has ended
    forwards: int = 0
    reused: int = 0  # tokens of the prompt whose keys and values were cached

    def take(self, progress: Progress) -> str:
        """The new text in a report of the worker, possibly empty. Raises Failed or Closed where it reports that."""
        if progress.error:
            raise progress.error
        self.reused, piece = progress.reused, ""
        for step in progress.steps:
            piece += self.text.put(step)
            self.forwards += 1
            if self.text.stopped:
                break
        if progress.stop:
            piece += self.text.end()
            self.reason = "stop" if progress.stop == "eos" else "length"
        if self.text.stopped:
            self.reason = "stop"
        self.written.append(piece)
        return piece


class Answer:
    """Requests to the worker, and what it reports about them. :meth:`submit` submits them; afterwards :meth:`cancel` must be
    called in every case. The requests hold ``copies`` of each prompt, one after the other.
    """

    def __init__(self, worker: Worker, requests: Sequence[Request], texts: Sequence[TextStream], copies: int) -> None:
        loop = asyncio.get_running_loop()
        self._worker = worker
        self._reports: asyncio.Queue[tuple[Choice, Progress]] = asyncio.Queue()
        self.choices = [Choice(index, text) for index, text in enumerate(texts)]
        self._copies = copies

        def report(choice: Choice, progress: Progress) -> None:
            loop.call_soon_threadsafe(self._reports.put_nowait, (choice, progress))

        self._jobs = [ReportingJob(request, partial(report, choice)) for request, choice in zip(requests, self.choices, strict=True)]

    def submit(self) -> None:
        """Submit the requests. Raises Busy or Closed where the worker does not accept them."""
        self._worker.submit(self._jobs)

    def cancel(self) -> None:
        """Cancel what is still running."""
        self._worker.cancel(self._jobs)

    async def pieces(self, deadline: float) -> AsyncIterator[tuple[Choice, str]]:
        """Each choice with its next piece of text, as they come. Pieces may be empty; with its last one, a choice has a reason.

        Raises what :meth:`Choice.take` raises, and TimeoutError at ``deadline`` (seconds of the event loop's clock).
        """
        left = len(self.choices)
        while left:
            async with asyncio.timeout_at(deadline):
                choice, progress = await self._reports.get()
            if choice.reason:  # its row ran on for a moment after a stop string
                continue
            piece = choice.take(progress)
            if choice.reason:
                left -= 1
                self._worker.cancel([self._jobs[choice.index]])
            yield choice, piece

    @property
    def usage(self) -> Usage:
        """Each prompt counts once, however many choices it has. Its tokens count as cached if no choice had to compute them."""
        first = range(0, len(self.choices), self._copies)
        return Usage(
            sum(len(self._jobs[at].request.prompt) for at in first),
            sum(min(choice.reused for choice in self.choices[at : at + self._copies]) for at in first),
            sum(choice.text.tokens for choice in self.choices),
            sum(choice.forwards for choice in self.choices),
        )
