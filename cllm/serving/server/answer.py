"""The choices of one request while they are written, on the event loop's side of the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from cllm.decoding import Request
from cllm.serving.server.protocol import Usage
from cllm.serving.server.worker import Job, Progress, Worker
from cllm.serving.text import TextStream


@dataclass(eq=False)
class Choice:
    """One response: its text so far, why it ended, what it cost.

    A stop string ends it with the token that completes the string and with the forward that brought this token, whatever
    else has been decoded meanwhile. So text and cost are functions of the request alone.
    """

    index: int
    text: TextStream
    written: list[str] = field(default_factory=list)
    reason: str | None = None  # "stop" or "length", once it has ended
    forwards: int = 0
    reused: int = 0  # tokens of the prompt

    def take(self, progress: Progress) -> str:
        """The text that a report of the worker brings, maybe none. Raises Failed or Closed where it brings that."""
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
    """Requests for the worker, and what it reports of them. Nothing is submitted before :meth:`submit`, and after it
    :meth:`cancel` must be called in the end, come what may. ``copies`` of each prompt follow one another.
    """

    def __init__(self, worker: Worker, requests: Sequence[Request], texts: Sequence[TextStream], copies: int) -> None:
        loop = asyncio.get_running_loop()
        self._worker = worker
        self._reports: asyncio.Queue[tuple[Choice, Progress]] = asyncio.Queue()
        self.choices = [Choice(index, text) for index, text in enumerate(texts)]
        self._copies = copies

        def report(choice: Choice, progress: Progress) -> None:
            loop.call_soon_threadsafe(self._reports.put_nowait, (choice, progress))

        self._jobs = [Job(request, partial(report, choice)) for request, choice in zip(requests, self.choices, strict=True)]

    def submit(self) -> None:
        """Put the requests in line. Raises Busy or Closed where the worker does not take them."""
        self._worker.submit(self._jobs)

    def cancel(self) -> None:
        """Let go of the rows that are still running."""
        self._worker.cancel(self._jobs)

    async def pieces(self, deadline: float) -> AsyncIterator[tuple[Choice, str]]:
        """Each choice with its next piece of text, as they come; with the last piece it has a reason. Maybe empty texts.

        Raises what :meth:`Choice.take` does, and TimeoutError at ``deadline`` (seconds of the event loop's clock).
        """
        left = len(self.choices)
        while left:
            async with asyncio.timeout_at(deadline):
                choice, progress = await self._reports.get()
            if choice.reason:  # the row ran on for a moment behind a stop string
                continue
            piece = choice.take(progress)
            if choice.reason:
                left -= 1
                self._worker.cancel([self._jobs[choice.index]])
            yield choice, piece

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has; as cached counts what none of them had to compute."""
        first = range(0, len(self.choices), self._copies)
        return Usage(
            sum(len(self._jobs[at].request.prompt) for at in first),
            sum(min(choice.reused for choice in self.choices[at : at + self._copies]) for at in first),
            sum(choice.text.tokens for choice in self.choices),
            sum(choice.forwards for choice in self.choices),
        )
