"""URLs as sources: what requests are made, what is done with each reply, and how a body goes on after a break.

Each module beside this one holds one part of it: `replies` judges a reply (pure), `addresses` says where a request
may go, `credentials` what is told to whom, `overlap` compares a second reading with the first; `plain` and `curl`
carry one request and one reply. A body's bytes are of one version: that of the reply it began with.
"""

from __future__ import annotations

import os
import random
import re
import time
import zlib
from dataclasses import dataclass, replace
from types import TracebackType
from urllib.parse import urlsplit

import trio

from streamfs.errors import InvalidRequest, NotPermitted, SourceChanged, SourceFailed, SourceStalled, StreamfsError
from streamfs.sources import addresses, credentials
from streamfs.sources.addresses import Origin
from streamfs.sources.apart import ApartTransport
from streamfs.sources.base import Facts
from streamfs.sources.command import ProcessSource
from streamfs.sources.overlap import Marks
from streamfs.sources.plain import PlainResponse, PlainTransport
from streamfs.sources.replies import (
    REFRESHABLE,
    Again,
    Asked,
    AskWhole,
    Changed,
    Ended,
    Headers,
    Part,
    Refused,
    Verdict,
    Whole,
    judge,
    precondition,
)
from streamfs.sources.transport import Request, Response, Transport, TransportError
from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource, check_url, redact_url

ATTEMPTS = 10  # requests that bring no new byte before a body gives up
FIRST_ATTEMPTS = 4  # connections tried before a source that never answered is called unreachable (about 1 s)
PROBE_ATTEMPTS = 3
BACKOFF_FIRST = 0.1  # seconds; doubles with each failure
BACKOFF_CAP = 5.0  # seconds; ten attempts then take some 20 s, within the default stall timeout
RETRY_AFTER_CAP = 30.0  # seconds that a server may make us wait
REFRESH_SECONDS = 30.0
REFRESH_OUTPUT = 64 * 1024  # bytes of a refresh command's output that are looked at
LANDING_SECONDS = 60.0  # how long the end of a redirect chain is asked directly
DRAIN_LIMIT = 16 * 1024  # bytes of a redirect's page read to keep the connection
TEMPLATES = 16  # requests one source keeps ready: its own, and those of its redirects
SCRATCH = 256 * 1024  # bytes re-read at once while coming back to a position
FILE_THREADS = 16  # for the ftp and sftp servers that are in use: one each while there are no more
_FILE_SCHEMES = ("ftp", "ftps", "sftp")
_RETRIED = frozenset({"connect", "reset", "truncated"})


class Transports:
    """The transports of one daemon, shared by its sources. Close it after them."""

    def __init__(self) -> None:
        self.resolver = addresses.Resolver()
        self._plain: Transport | None = None
        self._curl: Transport | None = None
        self._files: dict[int, Transport] = {}
        self._forced = os.environ.get("STREAMFS_TRANSPORT") or None
        if self._forced not in (None, "plain", "curl"):
            raise InvalidRequest(f"STREAMFS_TRANSPORT is plain or curl, not {self._forced!r}")

    def pick(self, url: str, options: StreamOptions) -> Transport:
        """The transport that carries `url`: plain for HTTP without a proxy, libcurl for all else."""
        simple = urlsplit(url).scheme.lower() in ("http", "https") and options.proxy is None
        if self._forced == "plain" or (simple and self._forced is None):
            if self._plain is None:
                self._plain = PlainTransport()
            return self._plain
        from streamfs.sources.curl import CurlTransport  # here: most daemons never need libcurl

        parts = urlsplit(url)
        if parts.scheme.lower() in _FILE_SCHEMES:
            # libcurl may stand still with a silent server of these: not here, and not with another server's streams.
            place = hash(parts.netloc.rpartition("@")[2].lower()) % FILE_THREADS
            if place not in self._files:
                self._files[place] = ApartTransport(CurlTransport)
            return self._files[place]
        if self._curl is None:
            self._curl = CurlTransport()
        return self._curl

    async def aclose(self) -> None:
        async with trio.open_nursery() as nursery:
            for transport in (self._plain, self._curl, *self._files.values()):
                if transport is not None:
                    nursery.start_soon(self._close, transport)

    @staticmethod
    async def _close(transport: Transport) -> None:
        with trio.move_on_after(5, shield=True):  # also while being cancelled
            await transport.aclose()

    async def __aenter__(self) -> Transports:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class HttpSource:
    """A URL of scheme http, https, ftp, ftps or sftp: see base.Source."""

    def __init__(self, spec: StreamSpec, transports: Transports) -> None:
        if not isinstance(spec.source, UrlSource):
            raise TypeError(f"not a URL: {type(spec.source).__name__}")
        self._registered = spec.source.url
        self._url = spec.source.url  # later perhaps a fresh one, from the refresh command
        self._options = spec.options
        self._stall_timeout = spec.stall_timeout
        self._transports = transports
        self._landing: _Landing | None = None
        self._templates: dict[str, Request] = {}  # by URL

    async def open(self, start: int, stop: int | None, expect: Facts | None) -> HttpBody:
        attempts = Attempts(self._url, ATTEMPTS, FIRST_ATTEMPTS if expect is None else ATTEMPTS)
        with trio.move_on_after(_seconds(self._stall_timeout)):
            answer = await self.settle(Asked(start, stop, expect=expect), attempts)
            if isinstance(answer.verdict, Part) and not answer.verdict.facts.ranged and stop is not None:
                await answer.aclose()  # one-way after all: one reply must do for the whole
                answer = await self.settle(Asked(0, None, expect=expect), attempts)
            try:
                return self._body(answer, start, stop)
            except BaseException:
                await answer.aclose()
                raise
        raise self._stalled(attempts)

    async def probe(self) -> Facts:
        attempts = Attempts(self._url, PROBE_ATTEMPTS, PROBE_ATTEMPTS)
        with trio.move_on_after(_seconds(self._stall_timeout)):
            # HEAD is refused or answered wrongly by many servers; one byte of content shows what ranges are worth.
            answer = await self.settle(Asked(0, 1), attempts)
            try:
                facts = self._believed(answer.verdict.facts)
                await _drain(answer.response)
                return facts
            finally:
                await answer.aclose()
        raise self._stalled(attempts)

    @property
    def landed(self) -> str:
        """The URL that answered last, past all redirects: where references in its bytes start."""
        return self._landing.url if self._landing is not None else self._url

    async def aclose(self) -> None:
        """Nothing is held besides bodies: connections belong to the transports."""
        await trio.lowlevel.checkpoint()

    def _stalled(self, attempts: Attempts) -> SourceStalled:
        return SourceStalled(f"{redact_url(self._url)} sent nothing for {self._stall_timeout:g} s{attempts.last}")

    def _believed(self, facts: Facts) -> Facts:
        """`facts` with the declared length where the server tells none. Raises SourceFailed where they differ."""
        declared = self._options.size
        if declared is not None and facts.size not in (None, declared):
            raise SourceFailed(f"{redact_url(self._url)} has {facts.size} bytes, but its declared size is {declared}")
        return replace(facts, size=declared if declared is not None else facts.size)

    def _body(self, answer: Answer, start: int, stop: int | None) -> HttpBody:
        verdict = answer.verdict
        facts = self._believed(verdict.facts)
        if answer.icy_metaint:
            facts = replace(facts, ranged=False, validator=None)  # its offsets count the metadata, which differs
        if isinstance(verdict, Ended) and start > 0:
            raise SourceFailed(f"{redact_url(self._url)} ends at or before byte {start}")
        if isinstance(verdict, Part) and facts.size is not None and verdict.end > facts.size:
            raise SourceFailed(f"{redact_url(self._url)} goes on after its declared size of {facts.size} bytes")
        first = verdict.start if isinstance(verdict, Part) else 0
        # A one-way body goes on to the end: what lies beyond `stop` could only be had by reading all of it again.
        return HttpBody(self, self._url, answer, facts, first, stop if facts.ranged else None, self._stall_timeout)

    # -- one settled answer: retries, redirects, a fresh URL

    async def settle(self, asked: Asked, attempts: Attempts) -> Answer:
        """Ask until there is an answer that can be used. The caller closes it.
        Raises SourceFailed once attempts are spent or none helps, SourceChanged, NotPermitted."""
        refreshed = False
        while True:
            try:
                response, headers, verdict = await self._ask(asked)
            except TransportError as error:
                if error.kind not in _RETRIED:
                    raise SourceFailed(f"{redact_url(self._url)}: {error}") from error
                await attempts.failed(str(error), connecting=error.kind == "connect")
                continue
            if isinstance(verdict, Part | Whole | Ended):
                return Answer(asked, verdict, response, _icy_metaint(headers))
            await _close(response)
            match verdict:
                case Again(why=why, after=after):
                    await attempts.failed(why, after)
                case AskWhole(why=why, ranged=ranged):
                    if asked.start == 0 and not asked.ranged:
                        raise SourceFailed(f"{redact_url(self._url)}: {why}")
                    asked = replace(asked, start=0, stop=None, ranged=ranged and asked.start > 0)
                case Changed(why=why):
                    raise SourceChanged(f"{redact_url(self._url)}: {why}")
                case Refused(why=why, status=status):
                    if status not in REFRESHABLE or refreshed or self._options.refresh_command is None:
                        raise SourceFailed(f"{redact_url(self._url)}: {why}")
                    refreshed = True
                    self._url = await _fresh_url(self._options)
                    self._landing = None

    async def _ask(self, asked: Asked) -> tuple[Response, Headers, Verdict]:
        """One answer, past all redirects. Raises TransportError."""
        landing, self._landing = self._landing, None
        if landing is not None and trio.current_time() < landing.until:
            response = await self._send(landing.url, asked, landing.private_allowed)
            headers = Headers(response.headers)
            verdict = _judged(landing.url, asked, response, headers)
            if isinstance(verdict, Part | Whole | Ended):
                self._landing = landing
                return response, headers, verdict
            await _close(response)  # perhaps a signed URL that has run out: begin where the user began
        return await self._follow(asked)

    async def _follow(self, asked: Asked) -> tuple[Response, Headers, Verdict]:
        url = self._url
        seen = {credentials.without_userinfo(url)}
        hops = 0
        registered = Origin.of(url)
        private_allowed = self._options.allow_private or await self._is_private(url)
        while True:
            response = await self._send(url, asked, private_allowed or Origin.of(url) == registered)
            try:
                headers = Headers(response.headers)
                location = headers.get("location")
                if response.status not in addresses.REDIRECT_STATUSES or location is None:
                    if hops:
                        allowed = private_allowed or Origin.of(url) == registered
                        self._landing = _Landing(url, allowed, trio.current_time() + LANDING_SECONDS)
                    return response, headers, _judged(url, asked, response, headers)
                url = addresses.redirect_target(url, location, downgrade_allowed=self._options.allow_private)
                if url in seen:
                    raise SourceFailed(f"{redact_url(self._url)} redirects in a loop")
                hops += 1
                if hops > addresses.MAX_REDIRECTS:
                    raise SourceFailed(f"{redact_url(self._url)}: more than {addresses.MAX_REDIRECTS} redirects")
                seen.add(url)
                await _drain(response)
            except BaseException:
                await _close(response)
                raise
            await _close(response, reuse=True)

    async def _is_private(self, url: str) -> bool:
        """Whether the registered URL itself is a private address: then its redirects may stay among those. All of its
        addresses must be: else who answers for a public name could open the way to every private one."""
        if not self._resolves(url):
            return addresses.is_private_name(Origin.of(url).host)
        return all(map(addresses.is_private, await self._transports.resolver.resolve(url)))

    def _resolves(self, url: str) -> bool:
        """Whether names are resolved here: a proxy resolves them itself, and ftp and sftp never redirect."""
        return self._options.proxy is None and _speaks_http(url)

    async def _send(self, url: str, asked: Asked, private_allowed: bool) -> Response:
        """One request to one origin, over the first of its permitted addresses that answers."""
        transport = self._transports.pick(url, self._options)
        request = await self._request(url, asked, http2=not isinstance(transport, PlainTransport))
        if not self._resolves(url):
            if not private_allowed and addresses.is_private_name(Origin.of(url).host):
                raise addresses.not_permitted(url)
            return await transport.request(request)
        found = await self._transports.resolver.resolve(url)
        failure: TransportError | None = None
        for address in addresses.permitted(found, private_allowed=private_allowed, url=url):
            try:
                return await transport.request(_addressed(request, address))
            except TransportError as error:
                if error.kind != "connect":
                    raise
                failure = error
        self._transports.resolver.forget(url)
        assert failure is not None  # `permitted` gives at least one address
        raise failure

    async def _request(self, url: str, asked: Asked, *, http2: bool) -> Request:
        template = self._templates.get(url)
        if template is None:
            template = await self._template(url, http2=http2)
            if self._options.netrc is None and self._options.cookie_file is None:  # those may say something else soon
                if len(self._templates) >= TEMPLATES:
                    self._templates.clear()
                self._templates[url] = template
        if not asked.ranged:
            return template
        last = "" if asked.stop is None else str(asked.stop - 1)
        varying: tuple[tuple[str, str], ...] = (("Range", f"bytes={asked.start}-{last}"),)
        pinned = precondition(asked.expect.validator if asked.expect is not None else None)
        if pinned is not None:
            varying = (*varying, ("If-Range", pinned))
        return Request(template.url, headers=template.headers, varying=varying, identity=template.identity)

    async def _template(self, url: str, *, http2: bool) -> Request:
        """A request for `url`, without what tells one from another."""
        identity = replace(credentials.identity_of(self._options), http2=http2)
        headers = [
            ("User-Agent", credentials.user_agent(self._options)),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
        ]
        if "icy" in self._options.transforms:
            headers.append(("Icy-MetaData", "1"))
        if not _speaks_http(url):
            url = await credentials.url_with_login(url, self._options)
            return Request(url, headers=tuple(headers), identity=identity)
        login = credentials.userinfo(url)  # redirects have none, so this is the user's or the refresh command's
        if Origin.of(url) == Origin.of(self._registered):
            secrets = await credentials.secrets_for(url, self._options, login or credentials.userinfo(self._registered))
            given = {name.lower() for name, _ in secrets}
            headers = [header for header in headers if header[0].lower() not in given] + secrets
        elif login is not None:
            headers.append(credentials.basic(login))
        return Request(credentials.without_userinfo(url), headers=tuple(headers), identity=identity)


@dataclass(frozen=True, slots=True)
class _Landing:
    """Where a redirect chain ended, and until when (trio time) to ask there first."""

    url: str
    private_allowed: bool
    until: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply that can be used, and what it was asked."""

    asked: Asked
    verdict: Part | Whole | Ended
    response: Response
    icy_metaint: int  # bytes between two blocks of radio metadata; 0: there are none

    async def aclose(self, *, reuse: bool = True) -> None:
        await _close(self.response, reuse=reuse)


class Attempts:
    """Counts requests that brought nothing, and waits between them."""

    def __init__(self, url: str, limit: int, connecting_limit: int) -> None:
        self._url = url
        self._limit = limit
        self._connecting_limit = connecting_limit
        self._failures = 0
        self._why = ""

    @property
    def last(self) -> str:
        """Ready to end a sentence: why the last attempt failed, empty if none did."""
        return f" (before that: {self._why})" if self._why else ""

    def progress(self) -> None:
        self._failures = 0
        self._why = ""

    async def failed(self, why: str, after: float | None = None, *, connecting: bool = False) -> None:
        """Wait before the next attempt: jittered exponential backoff, and as long as the server asks for, within
        RETRY_AFTER_CAP. Raises SourceFailed where there is none left."""
        self._failures += 1
        self._why = why
        if self._failures >= (self._connecting_limit if connecting else self._limit):
            raise SourceFailed(f"{redact_url(self._url)}: {why} (gave up after {self._failures} attempts)")
        await trio.sleep(backoff(self._failures, after, random.random()))


def backoff(failures: int, after: float | None, chance: float) -> float:
    """Seconds to wait after so many failures in a row; `chance` in [0, 1) spreads clients apart."""
    own = min(BACKOFF_CAP, BACKOFF_FIRST * 2.0 ** (failures - 1)) * (0.5 + chance / 2)
    return own if after is None else max(own, min(after, RETRY_AFTER_CAP))


class HttpBody:
    """Bytes of one version, over as many replies as it takes: see base.Body.

    INVARIANT: `_position` is the offset of the next byte to give; `_skip` bytes of the current reply come before it.
    """

    def __init__(
        self,
        source: HttpSource,
        url: str,
        answer: Answer,
        facts: Facts,
        start: int,
        stop: int | None,
        stall_timeout: float | None,
    ) -> None:
        self.facts = facts
        self.start = start
        self.end_proven = False
        self._source = source
        self._name = redact_url(url)
        self._stop = stop
        self._stall_timeout = stall_timeout
        self._waited = 0.0  # seconds spent in receive_into since the last byte came
        self._attempts = Attempts(url, ATTEMPTS, ATTEMPTS)
        self._position = start
        self._skip = 0
        self._flow: _Flow | None = None
        # Only where no validator names the version must a second reading be compared with the first.
        self._given = Marks() if facts.validator is None else None
        self._again: Marks | None = None  # the second reading, up to `_position`
        self._ended = False
        self._scratch: memoryview | None = None
        self.icy_metaint = answer.icy_metaint
        """Bytes between two blocks of radio metadata; 0: there are none."""
        self._take(answer)

    async def receive_into(self, view: memoryview) -> int:
        if self._ended:
            return 0
        if count := self._receive_ready(view):
            self._waited = 0.0
            return count
        began = trio.current_time()
        try:
            count = await self._receive_patiently(view, began)
        except trio.Cancelled:
            self._waited += trio.current_time() - began
            raise
        self._waited = 0.0
        return count

    async def aclose(self) -> None:
        await self._drop()

    # -- patience

    async def _receive_patiently(self, view: memoryview, began: float) -> int:
        if self._stall_timeout is None:
            return await self._receive(view)
        self._deadline = began + self._stall_timeout - self._waited
        # A connection can die without a word. Where going on elsewhere is cheap, that is tried half way.
        tries = (self._stall_timeout / 2, 0.0) if self.facts.ranged else (0.0,)
        for reserve in tries:
            with trio.CancelScope(deadline=self._deadline - reserve) as self._scope:
                self._reserve = reserve
                return await self._receive(view)
            await self._drop(reuse=False)
        raise SourceStalled(f"{self._name} sent nothing for {self._stall_timeout:g} s{self._attempts.last}")

    def _heard(self) -> None:
        """Bytes came that are not to be given (again): not what was waited for, but no stall either."""
        if self._stall_timeout is not None:
            self._deadline = trio.current_time() + self._stall_timeout
            self._scope.deadline = self._deadline - self._reserve

    # -- the loop

    async def _receive(self, view: memoryview) -> int:
        while not self._ended:
            try:
                if self._flow is None:
                    await self._resume()
                elif self._skip:
                    await self._reread(self._flow)
                else:
                    count = await self._receive_from(self._flow, view)
                    if count:
                        return count
            except TransportError as error:
                await self._drop(reuse=False)
                if error.kind not in _RETRIED:
                    raise SourceFailed(f"{self._name}: {error}") from error
                await self._attempts.failed(str(error), connecting=error.kind == "connect")
        await self._drop()
        return 0

    def _limit(self) -> int | None:
        """The first offset not to give, None while unknown."""
        known = [end for end in (self._stop, self.facts.size) if end is not None]
        return min(known) if known else None

    async def _receive_from(self, flow: _Flow, view: memoryview) -> int:
        """Bytes from the current reply. 0 where it has none left: then either `_ended` is set or `_flow` is None."""
        limit = self._limit()
        reach = self._reach(flow, limit)
        if reach is not None and self._position >= reach:
            if reach == limit:
                await self._end_at(flow, reach)
            else:
                await self._drop()  # the server gave less than was asked: ask for the rest
                if not flow.fruitful:
                    await self._attempts.failed(f"the server gives no byte from {reach} on")
            return 0
        if reach is not None and len(view) > reach - self._position:
            view = view[: reach - self._position]
        count = await flow.receive_into(view)
        if count == 0:
            if reach is not None:
                raise TransportError("truncated", f"the body ended at byte {self._position} of {reach}")
            self._end(proven=flow.response.ending != "close")
            return 0
        self._gave(flow, view[:count])
        return count

    def _receive_ready(self, view: memoryview) -> int:
        """Bytes that the current reply has ready to be given; 0 where there is more to do than to give them. Most reads
        of a fast source end here, without what waiting takes."""
        flow = self._flow
        if flow is None or self._skip:
            return 0
        reach = self._reach(flow, self._limit())
        room = len(view) if reach is None else min(len(view), reach - self._position)
        if room <= 0:
            return 0
        try:
            count = flow.receive_ready(view[:room])
        except TransportError:
            return 0  # the connection says so again to who waits for it
        if count:
            self._gave(flow, view[:count])
        return count

    @staticmethod
    def _reach(flow: _Flow, limit: int | None) -> int | None:
        """The offset that the current reply's bytes are given up to; None: until it ends."""
        return limit if flow.end is None else flow.end if limit is None else min(limit, flow.end)

    def _gave(self, flow: _Flow, piece: memoryview) -> None:
        if self._given is not None:
            self._given.add(piece)
        self._position += len(piece)
        flow.fruitful = True
        self._attempts.progress()

    async def _end_at(self, flow: _Flow, limit: int) -> None:
        """End where it was known to be. Where only the user said so, one more byte contradicts it."""
        only_declared = limit == self.facts.size != self._stop and flow.end is None and not flow.told_size
        if only_declared and await flow.receive_into(self._scratch_view()[:1]):
            raise SourceFailed(f"{self._name} goes on after its declared size of {limit} bytes")
        self._end(proven=True)

    def _end(self, *, proven: bool) -> None:
        self._ended = True
        self.end_proven = proven
        if proven and self.facts.size is None and (self._stop is None or self._position < self._stop):
            self.facts = replace(self.facts, size=self._position)

    # -- going on after a break, or after a reply that gave only part

    async def _resume(self) -> None:
        comparable = self.facts.validator is not None
        start = self._position if comparable and not self._decoded else 0
        stop = None if self._decoded else self._stop
        expect = self.facts if comparable else replace(self.facts, size=self._served_size)
        self._take(await self._source.settle(Asked(start, stop, not self._decoded, expect), self._attempts))

    def _take(self, answer: Answer) -> None:
        """Go on with this reply."""
        verdict = answer.verdict
        self._flow = _Flow(answer.response, verdict)
        if answer.icy_metaint != self.icy_metaint:
            raise SourceChanged(f"{self._name} now sends its metadata at other places")
        self._served_size = verdict.facts.size
        self._decoded = isinstance(verdict, Whole) and verdict.decode is not None
        if isinstance(verdict, Ended):
            if answer.asked.start != self._position:
                raise SourceChanged(f"{self._name} had {self._position} bytes and now has none")
            self._skip = 0
            self._end(proven=verdict.proven)
            return
        self._skip = self._position - (verdict.start if isinstance(verdict, Part) else 0)
        self._again = Marks() if self._given is not None and self._skip else None

    async def _reread(self, flow: _Flow) -> None:
        """Read up to `_position` what was given before, comparing where no validator vouches for it."""
        piece = self._scratch_view()[: self._skip]
        count = await flow.receive_into(piece)
        if count == 0:
            raise TransportError("truncated", f"the body ended before byte {self._position}, where it was before")
        self._heard()
        self._skip -= count
        if self._again is not None and self._given is not None:
            self._again.add(piece[:count])
            if not self._given.agrees(self._again):
                raise SourceChanged(f"{self._name} was read again after a break and its bytes have changed")

    def _scratch_view(self) -> memoryview:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(SCRATCH))
        return self._scratch

    async def _drop(self, *, reuse: bool = True) -> None:
        flow, self._flow = self._flow, None
        if flow is not None:
            await _close(flow.response, reuse=reuse)


class _Flow:
    """The bytes of one reply, decoded where need be. `end`: the offset its bytes reach, None: until it ends."""

    def __init__(self, response: Response, verdict: Part | Whole | Ended) -> None:
        self.response = response
        self.end = verdict.end if isinstance(verdict, Part) else None
        self.told_size = verdict.facts.size is not None
        self.fruitful = False  # it has brought a byte that was not there before
        self._decoder = _Decoder(verdict.decode) if isinstance(verdict, Whole) and verdict.decode else None

    def receive_ready(self, view: memoryview) -> int:
        """What can be given without waiting; 0 where that takes `receive_into`. Raises TransportError."""
        if self._decoder is None and isinstance(self.response, PlainResponse):
            return self.response.receive_ready(view)
        return 0

    async def receive_into(self, view: memoryview) -> int:
        if self._decoder is None:
            return await self.response.receive_into(view)
        return await self._decoder.receive_into(self.response, view)


class _Decoder:
    """Undoes gzip or deflate."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._engine = zlib.decompressobj(47 if coding == "gzip" else 15)  # 47: gzip or zlib, told by the header
        self._encoded = b""
        self._fresh = True  # nothing decoded yet
        self._begun = False  # nothing received yet: a body of no bytes is an empty one
        self._piece = memoryview(bytearray(64 * 1024))

    async def receive_into(self, response: Response, view: memoryview) -> int:
        while True:
            data = self._decode(len(view))
            if data:
                view[: len(data)] = data
                return len(data)
            got = await response.receive_into(self._piece)
            if got == 0:
                if self._begun and not self._engine.eof:
                    raise TransportError("truncated", f"the {self._coding} body ended before its end mark")
                return 0
            self._begun = True
            self._encoded += self._piece[:got]

    def _decode(self, room: int) -> bytes:
        """Some decoded bytes, at most `room`; empty where more input is needed."""
        while True:
            if self._engine.eof:
                rest = self._encoded.lstrip(b"\0")  # padding after a member is allowed by gzip(1)
                self._encoded = rest
                if not rest:
                    return b""
                self._engine = zlib.decompressobj(47 if self._coding == "gzip" else 15)
            try:
                data = self._engine.decompress(self._encoded, room)
            except zlib.error as error:
                if not (self._fresh and self._coding == "deflate"):
                    raise TransportError("protocol", f"the {self._coding} body cannot be decoded") from error
                self._engine = zlib.decompressobj(-15)  # many servers send raw deflate under that name
                self._fresh = False
                continue
            self._encoded = self._engine.unused_data if self._engine.eof else self._engine.unconsumed_tail
            if data:
                self._fresh = False
                return data
            if not self._engine.eof:
                return b""


# -- small parts


def _judged(url: str, asked: Asked, response: Response, headers: Headers) -> Verdict:
    verdict = judge(asked, response.status, headers, time.time())
    if isinstance(verdict, Refused | Again) and not _speaks_http(url) and response.reason:
        return replace(verdict, why=response.reason)  # the status was the transport's word, not the server's
    return verdict


def _addressed(request: Request, address: str) -> Request:
    return Request(request.url, request.method, request.headers, request.varying, address, request.identity)


def _speaks_http(url: str) -> bool:
    return urlsplit(url).scheme.lower() in ("http", "https")


def _icy_metaint(headers: Headers) -> int:
    told = headers.get("icy-metaint")
    return int(told) if told is not None and re.fullmatch(r"\d{1,9}", told, re.ASCII) else 0


def _seconds(timeout: float | None) -> float:
    return float("inf") if timeout is None else timeout


async def _close(response: Response, *, reuse: bool = False) -> None:
    """Close also while being cancelled; two seconds are plenty for giving back a connection."""
    if isinstance(response, PlainResponse):
        await response.aclose(reuse=reuse)  # which never waits
        return
    with trio.move_on_after(2, shield=True):
        await response.aclose(reuse=reuse)


async def _drain(response: Response) -> None:
    """Read a short body that nobody needs, so that its connection can serve again."""
    length = Headers(response.headers).get("content-length")
    if response.ending == "close" or length is None or not length.isdigit() or int(length) > DRAIN_LIMIT:
        return
    piece = memoryview(bytearray(DRAIN_LIMIT))
    with trio.move_on_after(1):
        try:
            while await response.receive_into(piece):
                pass
        except TransportError:
            return  # the connection is not worth keeping, which `aclose` sees by itself


async def _fresh_url(options: StreamOptions) -> str:
    """What the refresh command prints. Raises SourceFailed; its output, which may hold secrets, is not shown."""
    assert options.refresh_command is not None
    own = StreamOptions(cwd=options.cwd, env=options.env, stall_timeout=REFRESH_SECONDS)
    source = ProcessSource(StreamSpec(name="refresh", source=CommandSource(options.refresh_command), options=own))
    output = memoryview(bytearray(REFRESH_OUTPUT))
    length = 0
    try:
        body = await source.open(0, None, None)
        try:
            while length < len(output) and (count := await body.receive_into(output[length:])):
                length += count
        finally:
            await body.aclose()
    except StreamfsError as error:
        raise SourceFailed(f"the refresh command failed ({type(error).__name__})") from None
    lines = bytes(output[:length]).decode("utf-8", "replace").split()
    try:
        url = check_url(lines[0] if lines else "")
    except InvalidRequest:
        raise SourceFailed("the refresh command printed no URL") from None
    if urlsplit(url).scheme.lower() == "file":
        raise NotPermitted("the refresh command printed a file: URL, which is not allowed")
    return url
