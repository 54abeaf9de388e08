"""What a stream's options say of who we are: the headers sent to its own origin, and only there."""

from __future__ import annotations

import base64
import functools
import http.cookiejar
import netrc
import os
import urllib.request
from importlib import metadata
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import trio

from streamfs.errors import SourceFailed
from streamfs.sources.addresses import Origin
from streamfs.sources.transport import Identity
from streamfs.spec import REFERENCE, StreamOptions

_MOST_SECRET = 16 << 10  # bytes; servers take no longer headers
# These carry the meaning of a request; an option that changed them would change what a reply proves.
_OURS = frozenset(
    {"range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since", "accept-encoding"}
    | {"connection", "content-length", "transfer-encoding", "upgrade", "te", "expect"}
)


def identity_of(options: StreamOptions) -> Identity:
    return Identity(
        proxy=options.proxy,
        cacert=options.cacert,
        cert=options.cert,
        key=options.key,
        insecure=options.insecure,
    )


def user_agent(options: StreamOptions) -> str:
    return options.user_agent if options.user_agent is not None else f"streamfs/{_version()}"


@functools.cache
def _version() -> str:
    try:
        return metadata.version("streamfs")
    except metadata.PackageNotFoundError:
        return "0"  # run from a source tree


async def secrets_for(url: str, options: StreamOptions, login: tuple[str, str] | None) -> list[tuple[str, str]]:
    """Headers for a request to `url`, whose origin is the stream's own: the stream's own headers, Authorization
    from `login` (user and password of the registered URL) or else the netrc file, cookies that match. Files are read
    each time, as they change under us. Raises SourceFailed where one cannot be read, without showing what is in it."""
    headers = [(name, value) for name, value in options.headers if name.lower() not in _OURS]
    if options.secret_headers:
        named = [(name, value) for name, value in options.secret_headers if name.lower() not in _OURS]
        secret = await trio.to_thread.run_sync(lambda: [(name, resolved(value)) for name, value in named])
        hidden = {name.lower() for name, _ in secret}
        headers = [header for header in headers if header[0].lower() not in hidden] + secret
    given = {name.lower() for name, _ in headers}
    if "authorization" not in given:
        login = login or await _login_from_netrc(url, options)
        if login is not None:
            headers.append(basic(login))
    if options.cookie_file is not None and "cookie" not in given:
        cookie = await trio.to_thread.run_sync(_cookies, without_userinfo(url), options.cookie_file)
        if cookie:
            headers.append(("Cookie", cookie))
    return headers


def resolved(value: str) -> str:
    """The value of a secret header with its references replaced by what they refer to. Reads files. Raises
    SourceFailed, which names the place and shows nothing of it."""
    return REFERENCE.sub(lambda match: _secret(match[1], match[2]), value)


def _secret(kind: str, place: str) -> str:
    if kind == "env":
        secret = os.environ.get(place)
        if secret is None:
            raise SourceFailed(f"the secret ${{env:{place}}} is not set in the daemon's environment")
    else:
        path = place
        if kind == "credential":
            folder = os.environ.get("CREDENTIALS_DIRECTORY")
            if folder is None or "/" in place:
                raise SourceFailed(f"the secret ${{credential:{place}}} is not there: no credential of a systemd unit")
            path = f"{folder}/{place}"
        try:
            with open(Path(path).expanduser(), "rb") as file:
                raw = file.read(_MOST_SECRET + 1)
        except (OSError, RuntimeError) as error:  # RuntimeError: whose home that is, nobody knows
            raise SourceFailed(
                f"the secret ${{{kind}:{place}}} cannot be read: {getattr(error, 'strerror', error)}"
            ) from error
        secret = raw.decode("utf-8", "surrogateescape").rstrip("\r\n")
    if len(secret) > _MOST_SECRET or any(ord(letter) < 32 or ord(letter) >= 127 for letter in secret):
        raise SourceFailed(f"the secret ${{{kind}:{place}}} is not one line of plain characters")
    return secret


def basic(login: tuple[str, str]) -> tuple[str, str]:
    """The header that carries a user and a password."""
    return "Authorization", "Basic " + base64.b64encode(":".join(login).encode()).decode("ascii")


async def url_with_login(url: str, options: StreamOptions) -> str:
    """`url` as ftp and sftp need it: with the netrc file's login where it has none of its own."""
    if userinfo(url) is not None:
        return url
    login = await _login_from_netrc(url, options)
    if login is None:
        return url
    parts = urlsplit(url)
    netloc = ":".join(quote(part, safe="") for part in login) + "@" + parts.netloc.rsplit("@", 1)[-1]
    return urlunsplit((parts.scheme, netloc, parts.path, parts.query, ""))


def userinfo(url: str) -> tuple[str, str] | None:
    parts = urlsplit(url)
    if parts.username is None and parts.password is None:
        return None
    return unquote(parts.username or ""), unquote(parts.password or "")


def without_userinfo(url: str) -> str:
    """`url` as it goes on the wire: no user, password or fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, parts.query, ""))


async def _login_from_netrc(url: str, options: StreamOptions) -> tuple[str, str] | None:
    if options.netrc is None:
        return None
    return await trio.to_thread.run_sync(_read_netrc, options.netrc, Origin.of(url).host)


def _read_netrc(path: str, host: str) -> tuple[str, str] | None:
    try:
        found = netrc.netrc(path).authenticators(host)
    except OSError as error:
        raise SourceFailed(f"the netrc file cannot be read: {error.strerror}") from error
    except (netrc.NetrcParseError, UnicodeDecodeError):
        raise SourceFailed("the netrc file is malformed") from None  # the cause quotes from the file
    return (found[0], found[2] or "") if found is not None else None


def _cookies(url: str, path: str) -> str | None:
    jar = http.cookiejar.MozillaCookieJar()
    try:
        jar.load(path, ignore_discard=True)
    except http.cookiejar.LoadError:
        raise SourceFailed("the cookie file is not in Netscape format") from None  # the cause quotes from the file
    except OSError as error:
        raise SourceFailed(f"the cookie file cannot be read: {error.strerror}") from error
    except ValueError:
        raise SourceFailed("the cookie file is malformed") from None
    request = urllib.request.Request(url)
    jar.add_cookie_header(request)
    return request.get_header("Cookie")
