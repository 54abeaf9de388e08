"""Replies that are waited for on the spot.

A server on this machine or beside it answers a small request sooner than a round of trio, a task and its waking take
together. Where a program reads here and there from such a server, its request is sent as soon as the program asks, and
for a moment nothing else is done but to wait for the reply. What does not come within that moment is waited for as
ever, so nothing is lost but the moment; and where several were lost in a row, no more are spent for a while.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

import trio

from streamfs.errors import SourceChanged
from streamfs.sources.base import Body, Facts
from streamfs.sources.httpbody import HttpBody
from streamfs.sources.plain import Exchange, PlainResponse
from streamfs.sources.replies import Asked
from streamfs.sources.transport import TransportError

MOMENT = 250e-6
"""Seconds that are waited on the spot for a reply, and as many for the rest of its bytes: nginx on the same machine
takes 60 microseconds, one time in ten 150, one in a hundred 300, and a task that waits costs 700 more."""
NEAR = 5e-3
"""Seconds within which a server has answered of which replies may come on the spot. Far more than MOMENT, as it
includes what the event loop did meanwhile."""
MISSES = 3  # in a row, after which a server seems to be too slow
LOOK_AGAIN = 16  # requests after which it is tried once more
SEVERAL = len(os.sched_getaffinity(0)) > 1  # processors: with one alone, a server here could not answer meanwhile


class Patience:
    """Whether the next reply of a server is worth waiting for on the spot."""

    def __init__(self) -> None:
        self._near = False
        self._misses = 0

    def answered(self, seconds: float) -> None:
        """A reply that was not waited for on the spot took so long."""
        self._near = seconds <= NEAR

    def tried(self, *, came: bool) -> None:
        """Whether a reply that was waited for on the spot came within MOMENT."""
        self._misses = 0 if came else self._misses + 1

    def worth(self) -> bool:
        """Ask once for each request."""
        if not SEVERAL:
            return False
        if self._misses >= MISSES:
            self._misses = (self._misses + 1) % LOOK_AGAIN
            return False
        return self._near


class Answers(Protocol):
    """Who knows what a reply is good for."""

    def usable(self, asked: Asked, response: PlainResponse) -> HttpBody | None:
        """The body of a reply that is just what was asked for. None: it is not, and was closed; `go_on` finds out."""

    async def go_on(self, asked: Asked, exchange: Exchange | None) -> Body:
        """As Source.open, where there is an `exchange` over its reply first. It is in other hands from now on."""


class PromptBody:
    """A body of which the request was sent, and whose bytes may come on the spot: see base.Prompt."""

    end_proven = True  # its end is that of its range

    def __init__(self, asked: Asked, expect: Facts, exchange: Exchange, answers: Answers, patience: Patience) -> None:
        self.facts = expect
        self.start = asked.start
        self._asked = asked
        self._answers = answers
        self._patience = patience
        self._until = time.perf_counter() + MOMENT
        self._exchange: Exchange | None = exchange  # None: its response was had, or it is of no more use
        self._prompt: HttpBody | None = None  # over the response that came on the spot
        self._body: Body | None = None  # what `receive_into` goes on with

    def receive_now(self, view: memoryview) -> int:
        if self._exchange is not None:
            try:
                response = self._exchange.response_by(self._until)
            except TransportError:
                response = self._exchange = None
            self._patience.tried(came=response is not None)
            if response is None:
                return 0
            self._exchange = None
            self._prompt = self._answers.usable(self._asked, response)
            self._until += MOMENT
        return 0 if self._prompt is None else self._prompt.receive_ready(view, self._until)

    def close_now(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
        if self._prompt is not None:
            self._prompt.close_now()

    async def receive_into(self, view: memoryview) -> int:
        if self._body is None:
            self._body = self._prompt or await self._late()
        return await self._body.receive_into(view)

    async def _late(self) -> Body:
        exchange, self._exchange = self._exchange, None
        body = await self._answers.go_on(self._asked, exchange)
        if body.start == self.start:
            return body
        with trio.CancelScope(shield=True):
            await body.aclose()
        raise SourceChanged("the source no longer serves ranges")

    async def aclose(self) -> None:
        if self._body is not None:
            await self._body.aclose()
        else:
            self.close_now()
