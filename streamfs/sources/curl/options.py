"""What libcurl is told: a request, and whom to trust, as options of an easy handle.

ftps is TLS from the first byte (implicit). An ftp identity with a `cacert` or `cert` demands AUTH TLS (explicit), for
the login and for the data; a server that cannot is refused.
"""

from __future__ import annotations

import os
import pwd
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import pycurl

from streamfs.sources.transport import Identity, Request, TransportError
from streamfs.spec import PROXY_SCHEMES

KNOWN_HOSTS_VARIABLE = "STREAMFS_KNOWN_HOSTS"
HTTP = frozenset({"http", "https"})
KNOWN_HOST_OK, KNOWN_HOST_MISMATCH = pycurl.KHMATCH_OK, pycurl.KHMATCH_MISMATCH
_SCHEMES = {
    "http": pycurl.PROTO_HTTP,
    "https": pycurl.PROTO_HTTPS,
    "ftp": pycurl.PROTO_FTP,
    "ftps": pycurl.PROTO_FTPS,
    "sftp": pycurl.PROTO_SFTP,
}
_BUNDLES = (  # of distributions, for Python builds that know none
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_DEFAULT_SSH_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa")  # the order of OpenSSH, less what libssh2 cannot read
_SUPPRESS_CONNECT_HEADERS = 265  # CURLOPT_…, which pycurl does not name


@dataclass(frozen=True, slots=True)
class Target:
    """A request with its URL taken apart. `shown` names it in messages: scheme and host, no secret."""

    request: Request
    parts: SplitResult
    scheme: str
    shown: str

    @classmethod
    def of(cls, request: Request) -> Target:
        """Raises TransportError("refused") for a URL that cannot be asked for."""
        try:
            parts = urlsplit(request.url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise TransportError("refused", f"not a URL ({error})") from None
        scheme = parts.scheme.lower()
        if scheme not in _SCHEMES or not host:
            raise TransportError("refused", f"libcurl is not used for {scheme}: URLs without a host or of that kind")
        if scheme not in pycurl.version_info()[8]:
            raise TransportError("refused", f"this libcurl was built without {scheme} (see `curl-config --protocols`)")
        if re.search(r"[\x00-\x20\x7f]", request.url):
            raise TransportError("refused", "the URL holds a space or a control character")
        shown = f"{scheme}://{host}" + (f":{port}" if port else "")
        return cls(request, parts, scheme, shown)

    @property
    def identity(self) -> Identity:
        return self.request.identity

    def redact(self, text: str) -> str:
        """`text` of libcurl or a server, without the passwords and the query that might be repeated in it."""
        proxy = urlsplit(self.identity.proxy) if self.identity.proxy else None
        for secret in (self.parts.password, self.parts.query, proxy.password if proxy else None):
            if secret:
                text = text.replace(secret, "***").replace(unquote(secret), "***")
        return text


def apply(target: Target, easy: pycurl.Curl) -> None:
    """The options that every scheme shares."""
    request = target.request
    easy.setopt(pycurl.URL, request.url.encode())
    easy.setopt(pycurl.PROTOCOLS, _SCHEMES[target.scheme])
    easy.setopt(pycurl.FOLLOWLOCATION, 0)
    easy.setopt(pycurl.NETRC, 0)
    easy.setopt(pycurl.TCP_KEEPALIVE, 1)
    if request.address is not None:
        address = f"[{request.address}]" if ":" in request.address else request.address
        # Whatever host and port the URL has: that port at this address, with the URL's name for TLS and SSH.
        easy.setopt(pycurl.CONNECT_TO, [f"::{address}:"])
    _apply_proxy(target, easy)
    if target.scheme in ("https", "ftps") or (request.identity.proxy or "").lower().startswith("https:"):
        _apply_tls(target, easy)


def _apply_proxy(target: Target, easy: pycurl.Curl) -> None:
    proxy = target.identity.proxy
    easy.setopt(pycurl.PROXY, "" if proxy is None else proxy.encode())  # "": not the environment's either
    easy.setopt(pycurl.NOPROXY, "")
    if proxy is None:
        return
    if urlsplit(proxy).scheme.lower() not in PROXY_SCHEMES:
        known = ", ".join(sorted(PROXY_SCHEMES))
        raise TransportError("refused", f"the proxy is to be a URL of one of these kinds: {known}")
    easy.setopt(_SUPPRESS_CONNECT_HEADERS, 1)
    if target.scheme not in HTTP:
        easy.setopt(pycurl.HTTPPROXYTUNNEL, 1)


def _apply_tls(target: Target, easy: pycurl.Curl) -> None:
    identity = target.identity
    easy.setopt(pycurl.SSLVERSION, pycurl.SSLVERSION_TLSv1_2)
    if identity.insecure:
        for option in (pycurl.SSL_VERIFYPEER, pycurl.SSL_VERIFYHOST, pycurl.PROXY_SSL_VERIFYPEER):
            easy.setopt(option, 0)
        easy.setopt(pycurl.PROXY_SSL_VERIFYHOST, 0)
    else:
        bundle = identity.cacert or _system_bundle()
        easy.setopt(pycurl.CAINFO, bundle)
        easy.setopt(pycurl.PROXY_CAINFO, bundle)
    if identity.cert is not None:
        easy.setopt(pycurl.SSLCERT, identity.cert)
        easy.setopt(pycurl.SSLKEY, identity.key or identity.cert)


def _system_bundle() -> str:
    """The file of trusted authorities: SSL_CERT_FILE (which libcurl does not read), Python's, a distribution's."""
    paths = ssl.get_default_verify_paths()
    for candidate in (os.environ.get("SSL_CERT_FILE"), paths.cafile, *_BUNDLES):
        if candidate and Path(candidate).is_file():
            return candidate
    raise TransportError("tls", "no file of trusted authorities found: install ca-certificates, or give --cacert")


def apply_http(target: Target, easy: pycurl.Curl) -> None:
    request = target.request
    fields = [*request.headers, *request.varying]
    names = {name.lower() for name, _ in fields}
    if "accept-encoding" not in names:
        fields.append(("Accept-Encoding", "identity"))
    easy.setopt(pycurl.HTTPHEADER, [_header_line(name, value) for name, value in fields])
    easy.setopt(pycurl.HEADEROPT, pycurl.HEADER_SEPARATE)  # ours are for the origin, not for CONNECT
    easy.setopt(pycurl.HTTP_CONTENT_DECODING, 0)
    easy.setopt(pycurl.HTTP200ALIASES, ["ICY 200 OK"])
    easy.setopt(pycurl.HTTP09_ALLOWED, 0)
    if request.identity.http2:
        easy.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_2TLS)
        easy.setopt(pycurl.PIPEWAIT, 1)
    else:
        easy.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
    if request.method == "HEAD":
        easy.setopt(pycurl.NOBODY, 1)


def _header_line(name: str, value: str) -> bytes:
    if not re.fullmatch(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+", name) or re.search(r"[\x00\r\n]", value):
        raise TransportError("refused", f"the header {name!r} cannot be sent: line break or bad name")
    try:
        # An empty value is written with a semicolon: "Name:" would remove the header instead.
        return (f"{name}: {value}" if value.strip() else f"{name};").encode("latin-1")
    except UnicodeEncodeError as error:
        raise TransportError("refused", f"the header {name!r} holds characters beyond latin-1") from error


@dataclass
class HostKeyVerdict:
    """What the known-hosts file said of an ssh server: one of KHMATCH_*, None while not asked."""

    match: int | None = None
    file: str = ""


def prepare_file(target: Target, easy: pycurl.Curl) -> HostKeyVerdict:
    """The options of ftp, ftps and sftp. The verdict is filled in when the server has shown its key."""
    apply(target, easy)
    if target.scheme == "ftp" and (target.identity.cacert or target.identity.cert):
        easy.setopt(pycurl.USE_SSL, pycurl.USESSL_ALL)
        _apply_tls(target, easy)
    easy.setopt(pycurl.OPT_FILETIME, 1)
    easy.setopt(pycurl.HEADERFUNCTION, _ignore_line)
    return _apply_ssh(target, easy) if target.scheme == "sftp" else HostKeyVerdict()


def _ignore_line(line: bytes) -> None:
    """Replies of an FTP server reach us as libcurl's verdicts."""


def _apply_ssh(target: Target, easy: pycurl.Curl) -> HostKeyVerdict:
    identity = target.identity
    verdict = HostKeyVerdict(file=os.environ.get(KNOWN_HOSTS_VARIABLE) or str(Path.home() / ".ssh/known_hosts"))

    def judge_host_key(known: object, found: object, match: int) -> int:
        verdict.match = match
        accepted = match == KNOWN_HOST_OK or identity.insecure
        return pycurl.KHSTAT_FINE if accepted else pycurl.KHSTAT_REJECT  # type: ignore[no-any-return]

    easy.setopt(pycurl.SSH_KNOWNHOSTS, verdict.file)
    easy.setopt(pycurl.SSH_KEYFUNCTION, judge_host_key)
    if identity.insecure:
        # libcurl would lend this unchecked connection to requests that insist on the check.
        easy.setopt(pycurl.FRESH_CONNECT, 1)
        easy.setopt(pycurl.FORBID_REUSE, 1)
    if target.parts.username is None:
        easy.setopt(pycurl.USERNAME, pwd.getpwuid(os.geteuid()).pw_name)
    key = identity.key or identity.cert or _default_ssh_key()
    if key is not None:
        easy.setopt(pycurl.SSH_PRIVATE_KEYFILE, key)
    return verdict


def _default_ssh_key() -> str | None:
    folder = Path.home() / ".ssh"
    return next((str(folder / name) for name in _DEFAULT_SSH_KEYS if (folder / name).is_file()), None)
