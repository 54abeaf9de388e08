"""URLs as sources: what requests are made, and what is done with each reply.

Each module beside this one holds one part of it: `replies` judges a reply (pure), `addresses` says where a request
may go, `credentials` what is told to whom, `attempts` how often one is made; `httpbody` gives the bytes and goes on
after a break; `transports` picks who carries one request and one reply: `plain` or `curl`.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import trio

from streamfs.errors import InvalidRequest, NotPermitted, SourceChanged, SourceFailed, SourceStalled, StreamfsError
from streamfs.sources import addresses, credentials
from streamfs.sources.addresses import Origin
from streamfs.sources.attempts import ATTEMPTS, FIRST_ATTEMPTS, PROBE_ATTEMPTS, Attempts
from streamfs.sources.base import Facts
from streamfs.sources.command import ProcessSource
from streamfs.sources.httpbody import Answer, HttpBody
from streamfs.sources.plain import Exchange, PlainResponse, PlainTransport, Prepared
from streamfs.sources.prompt import Patience, PromptBody
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
from streamfs.sources.transport import Request, Response, TransportError
from streamfs.sources.transports import FILE_SCHEMES, Transports, close
from streamfs.spec import CommandSource, StreamOptions, StreamSpec, UrlSource, check_url, redact_url

REFRESH_SECONDS = 30.0
REFRESH_OUTPUT = 64 * 1024  # bytes of a refresh command's output that are looked at
LANDING_SECONDS = 60.0  # how long the end of a redirect chain is asked directly
DRAIN_LIMIT = 16 * 1024  # bytes of a redirect's page read to keep the connection
TEMPLATES = 16  # requests one source keeps ready: its own, and those of its redirects


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
        options = spec.options
        self._lasting = not (options.netrc or options.cookie_file or options.secret_headers)
        """Whether what we say of ourselves stays as it is: those may say something else soon."""
        self._place: _Place | None = None
        self._patience = Patience()

    async def open(
        self, start: int, stop: int | None, expect: Facts | None, *, begun: Exchange | None = None
    ) -> HttpBody:
        """As Source.open. `begun`: an exchange that asked for just this; its reply is looked at first."""
        if urlsplit(self._url).scheme.lower() in FILE_SCHEMES:
            # An exchange of these that ends before its file costs a login, while one that waits costs nothing.
            stop = None
        attempts = Attempts(self._url, ATTEMPTS, FIRST_ATTEMPTS if expect is None else ATTEMPTS)
        with trio.move_on_after(_seconds(self._stall_timeout)):
            answer = await self.settle(Asked(start, stop, expect=expect), attempts, begun)
            if isinstance(answer.verdict, Part) and not answer.verdict.facts.ranged and stop is not None:
                await answer.aclose()  # one-way after all: one reply must do for the whole
                answer = await self.settle(Asked(0, None, expect=expect), attempts)
            try:
                return self._body(answer, start, stop)
            except BaseException:
                await answer.aclose()
                raise
        raise self._stalled(attempts)

    def begin(self, start: int, stop: int, expect: Facts) -> PromptBody | None:
        place = self._place
        if place is None or not self._patience.worth() or trio.current_time() >= place.until:
            return None
        asked = Asked(start, stop, expect=expect)
        exchange = place.transport.begin(place.request, _varying(asked))
        return None if exchange is None else PromptBody(asked, expect, exchange, self, self._patience)

    def usable(self, asked: Asked, response: PlainResponse) -> HttpBody | None:
        """See prompt.Answers. Whatever is not quite as it was before is left to those who ask with patience."""
        headers = Headers(response.headers)
        verdict = judge(asked, response.status, headers, 0.0)
        if isinstance(verdict, Part) and verdict.facts.ranged and not _icy_metaint(headers):
            with suppress(SourceFailed):
                return self._body(Answer(asked, verdict, response, 0), asked.start, asked.stop)
        response.close(reuse=False)
        self._place = None
        return None

    async def go_on(self, asked: Asked, exchange: Exchange | None) -> HttpBody:
        """See prompt.Answers."""
        return await self.open(asked.start, asked.stop, asked.expect, begun=exchange)

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
        return facts if declared is None else replace(facts, size=declared)

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

    async def settle(self, asked: Asked, attempts: Attempts, begun: Exchange | None = None) -> Answer:
        """Ask until there is an answer that can be used, of which `begun` may bring the first. The caller closes it.
        Raises SourceFailed once attempts are spent or none helps, SourceChanged, NotPermitted."""
        refreshed = False
        if begun is not None:
            answer = await self._answer_of(begun, asked)
            if answer is not None:
                return answer
        while True:
            began = trio.current_time()
            try:
                response, headers, verdict = await self._ask(asked)
            except TransportError as error:
                if not error.passing:
                    raise SourceFailed(f"{redact_url(self._url)}: {error}") from error
                await attempts.failed(str(error), connecting=error.kind == "connect")
                continue
            if isinstance(verdict, Part | Whole | Ended):
                self._remember(response, verdict, trio.current_time() - began)
                return Answer(asked, verdict, response, _icy_metaint(headers))
            await close(response)
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
                    self._landing = self._place = None

    async def _answer_of(self, begun: Exchange, asked: Asked) -> Answer | None:
        """None where it is of no use: then all is asked anew, as nothing is known yet of why."""
        try:
            response = await begun.response()
        except TransportError:
            return None  # the server may have closed the connection while it was idle
        headers = Headers(response.headers)
        verdict = judge(asked, response.status, headers, time.time())
        if isinstance(verdict, Part | Whole | Ended):
            return Answer(asked, verdict, response, _icy_metaint(headers))
        response.close(reuse=False)
        self._place = None
        return None

    def _remember(self, response: Response, verdict: Verdict, seconds: float) -> None:
        """Where the next range may be asked for at once."""
        self._place = None
        if self._lasting and isinstance(response, PlainResponse) and isinstance(verdict, Part) and verdict.facts.ranged:
            until = trio.current_time() + addresses.RESOLVED_SECONDS
            if self._landing is not None:
                until = min(until, self._landing.until)
            self._place = _Place(response.transport, response.prepared, until)
            self._patience.answered(seconds)

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
            await close(response)  # perhaps a signed URL that has run out: begin where the user began
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
                await close(response)
                raise
            await close(response, reuse=True)

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
            if self._lasting:
                if len(self._templates) >= TEMPLATES:
                    self._templates.clear()
                self._templates[url] = template
        if not asked.ranged:
            return template
        return Request(template.url, headers=template.headers, varying=_varying(asked), identity=template.identity)

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
class _Place:
    """Where the latest range came from, and until when (trio time) the next may be asked for there without asking first
    whether that is still right."""

    transport: PlainTransport
    request: Prepared
    until: float


def _varying(asked: Asked) -> tuple[tuple[str, str], ...]:
    """The headers of a request for a range that are not in its template."""
    last = "" if asked.stop is None else str(asked.stop - 1)
    wanted = ("Range", f"bytes={asked.start}-{last}")
    pinned = precondition(asked.expect.validator if asked.expect is not None else None)
    return (wanted,) if pinned is None else (wanted, ("If-Range", pinned))


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
