"""Where bytes come from: one protocol, and what follows it.

base          the protocol: Source, Body, Facts
transformed   any of them, its bytes passed through transforms
command       standard output of a command
file          file:/// URLs
http          http, https, ftp, ftps, sftp: what is asked, what is done with a reply
  httpbody      the bytes, over as many replies as it takes     decoding, overlap: gzip; a second reading compared
  prompt        replies of a server so near that they are waited for on the spot
  replies       what a reply means     attempts: how often one is tried     addresses, credentials: where, and as whom
  transports    which transport carries a URL     transport: what each of them does
    plain         HTTP/1.1: a pool of connections     http1: heads and bodies     connection: sockets and TLS
    ftp           ftp in clear: sessions, their data     idle: connections at rest
    curl          libcurl, for all else     apart: in a thread of its own
      filereplies   files of ftp, ftps and sftp servers, dressed as HTTP
"""

from __future__ import annotations

from urllib.parse import urlsplit

import msgspec

from streamfs.sources.base import Source
from streamfs.sources.command import ProcessSource
from streamfs.sources.file import FileSource
from streamfs.sources.http import HttpSource
from streamfs.sources.transformed import TransformedSource
from streamfs.sources.transports import Transports
from streamfs.spec import StreamSpec, UrlSource

__all__ = ["Transports", "make_source"]


def make_source(spec: StreamSpec, transports: Transports) -> Source:
    """The source that `spec` describes; nothing is contacted or started yet."""
    if spec.options.transforms:
        # A declared size is that of the file which is shown, not of what the source sends.
        bare = msgspec.structs.replace(spec, options=msgspec.structs.replace(spec.options, size=None))
        return TransformedSource(_make_bare_source(bare, transports), spec.options.transforms)
    return _make_bare_source(spec, transports)


def _make_bare_source(spec: StreamSpec, transports: Transports) -> Source:
    if not isinstance(spec.source, UrlSource):
        return ProcessSource(spec)
    if urlsplit(spec.source.url).scheme.lower() == "file":
        return FileSource(spec)
    return HttpSource(spec, transports)
