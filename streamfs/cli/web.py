"""web: a page to look at and metrics for Prometheus, on this machine only."""

from __future__ import annotations

import contextlib

import click

from streamfs.errors import InvalidRequest
from streamfs.home import Home

PORT = 9717
_NEEDED = ("prometheus_client", "waitress")


@click.command(short_help="Serve a page, and metrics, on this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free one.")
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="A loopback address.")
def web(port: int, host: str) -> None:
    """Serve a page that shows the streams, and metrics for Prometheus, until Ctrl-C.

    \b
      /              the page: buffer maps, rates, readers, errors
      /metrics       for Prometheus
      /streams.json  as 'streamfs status --json'

    It looks at the daemon's board and never asks the daemon. It can be reached from this machine only, but by all of
    its users; secrets are not in it. Needs the extra 'web': pip install 'streamfs[web]'.
    """
    try:
        from streamfs.web.application import Application
        from streamfs.web.server import listen, loopback, serve
        from streamfs.web.watch import Watch
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _NEEDED:
            raise
        raise click.ClickException(
            f"this needs {error.name}: pip install 'streamfs[web]', or pipx inject streamfs {' '.join(_NEEDED)}"
        ) from error
    from streamfs.cli.looking import board_path
    from streamfs.cli.tables import document

    try:
        address = loopback(host)
    except InvalidRequest as error:
        raise click.BadParameter(str(error), param_hint="--host") from error
    home = Home.locate()
    with contextlib.closing(Watch(lambda: board_path(home))) as watch:
        serve(listen(address, port), Application(watch.look, document), lambda url: click.echo(url))
