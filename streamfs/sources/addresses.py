"""Where a request may go: which addresses are private, what a redirect may do, and names to addresses.

The address that was judged is the one that is dialled, so a name that resolves anew between the two changes
nothing. Every spelling of an address (decimal, octal, hexadecimal, mapped into IPv6) is judged after resolution.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit, urlunsplit

import trio

from streamfs.errors import InvalidRequest, NotPermitted, SourceFailed
from streamfs.sources.transport import TransportError
from streamfs.spec import check_url, redact_url

MAX_REDIRECTS = 5
RESOLVED_SECONDS = 30.0  # a guess: long enough for the seeks of one reader, short for a moving host
REMEMBERED = 1024  # answers kept of each pure function that every request asks
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Origin:
    scheme: str
    host: str
    port: int | None

    @classmethod
    @functools.lru_cache(REMEMBERED)  # each request asks several times
    def of(cls, url: str) -> Origin:
        """The origin of a checked URL. Raises SourceFailed where its port is malformed."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError as error:
            raise SourceFailed(f"the port of {redact_url(url)} is malformed") from error
        scheme = parts.scheme.lower()
        return cls(scheme, (parts.hostname or "").lower().rstrip("."), port or _PORTS.get(scheme))


@functools.lru_cache(REMEMBERED)
def is_private(address: str) -> bool:
    """True for every address that is not plainly public: loopback, link-local, private, shared, reserved,
    multicast, and those that carry such an IPv4 address inside (mapped, 6to4, Teredo, NAT64)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None and int(ip) >> 32 == 0 and int(ip) > 1:
            inner = ipaddress.IPv4Address(int(ip))  # the old "IPv4-compatible" spelling
        if inner is not None:
            return is_private(str(inner))
        if ip.is_site_local:
            return True
    return not ip.is_global or ip.is_multicast or ip.is_reserved or ip.is_unspecified


def is_private_name(host: str) -> bool:
    """Whether `host` says by itself that it is private: localhost, or an address in any spelling. For where a proxy
    does the resolving; any other name may be anything."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    literal = _literal(host)
    if literal is None:
        try:
            literal = socket.inet_ntoa(socket.inet_aton(host))
        except (OSError, UnicodeError):
            return False
    return is_private(literal)


def redirect_target(url: str, location: str, *, downgrade_allowed: bool) -> str:
    """Where `location` in a reply of `url` leads; user and password in it are dropped, they are not ours.
    Raises NotPermitted for a scheme a redirect must not reach, SourceFailed for what is no URL."""
    try:
        target = urljoin(url, location.strip())
        parts = urlsplit(target)
        scheme = parts.scheme.lower()
    except ValueError as error:
        raise SourceFailed(f"{redact_url(url)} redirects to something that is no URL") from error
    if scheme not in ("http", "https"):
        raise NotPermitted(f"{redact_url(url)} redirects to a {scheme or 'nameless'}: URL, which is not allowed")
    if scheme == "http" and urlsplit(url).scheme.lower() == "https" and not downgrade_allowed:
        raise NotPermitted(f"{redact_url(url)} redirects from https to http; --allow-private permits it")
    netloc = parts.netloc.rsplit("@", 1)[-1]
    target = urlunsplit((scheme, netloc, parts.path, parts.query, "")).replace(" ", "%20")
    try:
        return check_url(target)
    except InvalidRequest as error:
        raise SourceFailed(f"{redact_url(url)} redirects to something that is no URL") from error


def permitted(addresses: list[str], *, private_allowed: bool, url: str) -> list[str]:
    """Those of `addresses` that may be dialled for `url`. Raises NotPermitted where none may."""
    allowed = [address for address in addresses if private_allowed or not is_private(address)]
    if not allowed:
        raise not_permitted(url)
    return allowed


def not_permitted(url: str) -> NotPermitted:
    return NotPermitted(f"redirected to {redact_url(url)}, a private or local address; --allow-private permits it")


class Resolver:
    """Names to addresses, remembered for RESOLVED_SECONDS."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[float, list[str]]] = {}

    async def resolve(self, url: str) -> list[str]:
        """Every address of the URL's host in the system's order, as numbers. Raises TransportError("connect")."""
        origin = Origin.of(url)
        port = origin.port or 0
        literal = _literal(origin.host)
        if literal is not None:
            return [literal]
        now = trio.current_time()
        until, addresses = self._known.get((origin.host, port), (0.0, []))
        if now < until:
            return addresses
        try:
            found = await trio.socket.getaddrinfo(origin.host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "not a host name"
            raise TransportError("connect", f"the name {origin.host} cannot be resolved: {reason}") from error
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        if not addresses:
            raise TransportError("connect", f"the name {origin.host} has no address")
        self._known = {host: entry for host, entry in self._known.items() if entry[0] > now}
        self._known[origin.host, port] = (now + RESOLVED_SECONDS, addresses)
        return addresses

    def forget(self, url: str) -> None:
        """Ask anew next time: none of the addresses answered."""
        origin = Origin.of(url)
        self._known.pop((origin.host, origin.port or 0), None)


@functools.lru_cache(REMEMBERED)
def _literal(host: str) -> str | None:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return None  # also 0x7f000001 and 017700000001: getaddrinfo reads those as connect would
