"""An HTTP server that redirects as its path says, and remembers what it was asked."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

BODY = b"the body of a resource\n" * 100


class Redirector:
    """/body serves BODY; /hops/N redirects N times before it; /loop never ends; /to/URL redirects to URL (quoted)."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        """Of all requests."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.paths.append(self.path)
                location = _location(self.path)
                self.send_response(302 if location is not None else 200)
                if location is not None:
                    self.send_header("Location", location)
                body = b"" if location is not None else BODY
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"one"')
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _location(path: str) -> str | None:
    kind, _, rest = path.removeprefix("/").partition("/")
    match kind:
        case "hops":
            return f"/hops/{int(rest) - 1}" if int(rest) > 1 else "/body"
        case "loop":
            return "/pool"
        case "pool":
            return "/loop"
        case "to":
            return unquote(rest)
    return None
