"""The libcurl transport: HTTP/2, proxies, ftp, ftps and sftp, and http(s) like the plain one.

transport   one request, one reply; http and https
files       ftp, ftps and sftp, dressed as HTTP
response    a reply's body
failures    what libcurl's failures mean
options     what libcurl is told
multi       libcurl under trio
"""

from streamfs.sources.curl.options import KNOWN_HOSTS_VARIABLE
from streamfs.sources.curl.response import CurlResponse
from streamfs.sources.curl.transport import HOST_CONNECTIONS, CurlTransport

__all__ = ["HOST_CONNECTIONS", "KNOWN_HOSTS_VARIABLE", "CurlResponse", "CurlTransport"]
