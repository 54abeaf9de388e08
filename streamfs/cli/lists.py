"""Many streams at once: import and export."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
import msgspec

from streamfs.cli import types
from streamfs.cli.progress import Count, count_progress
from streamfs.cli.registry import open_registry
from streamfs.cli.tables import visible
from streamfs.errors import InvalidRequest, NotFound, StreamfsError
from streamfs.home import Home
from streamfs.manifests import FORMATS, WRITTEN
from streamfs.spec import (
    URL_SCHEMES,
    IfTaken,
    Registration,
    StreamOptions,
    StreamSpec,
    UrlSource,
    check_url,
    redact_url,
)

if TYPE_CHECKING:
    from streamfs.importing import Found, Rules
    from streamfs.sources.base import Source

MOST_SHOWN = 20  # problems that are named one by one


@click.command(
    short_help="Register the streams of a playlist, feed or list.",
    name="import",
    epilog="""Examples:

\b
  A playlist of radio stations, a podcast with its episodes, all podcasts of a player:
    streamfs import stations.m3u --into radio
    streamfs import https://example.org/podcast.xml --into podcasts
    streamfs import subscriptions.opml --into podcasts --skip
\b
  What another machine has; its commands are run only where that is said:
    ssh box streamfs export | streamfs import - --format json --allow-commands
\b
  Look first, change nothing:
    streamfs import list.xspf --dry-run
\b
  A list of your own, list.toml:
    [[stream]]
    name = "music/song.flac"
    url = "https://example.org/song.flac"
    options = { user-agent = "me/1.0", stall-timeout = "10s" }
""",
)
@click.argument("source", metavar="(FILE | URL | -)")
@click.option("--format", "kind", type=click.Choice(FORMATS), help="What the list is. [default: as it looks]")
@click.option("--into", type=types.NAME, default=None, help="A folder that all names go below.")
@click.option("--skip", is_flag=True, help="Leave streams whose name is taken as they are.")
@click.option("--replace", is_flag=True, help="Take the place of streams of the same name.")
@click.option("--rename", is_flag=True, help="Call streams whose name is taken 'name (2)' and so on.")
@click.option("--skip-bad", is_flag=True, help="Import the rest where some entries cannot be used.")
@click.option("--probe", is_flag=True, help="Ask every server for length and type, in the background.")
@click.option("--allow-commands", is_flag=True, help="Register commands of the list, which run as you.")
@click.option("--allow-private", is_flag=True, help="Let a list from a public host name private addresses.")
@click.option("--dry-run", is_flag=True, help="Show what would be done.")
def import_(
    source: str,
    kind: str | None,
    into: str | None,
    skip: bool,
    replace: bool,
    rename: bool,
    skip_bad: bool,
    probe: bool,
    allow_commands: bool,
    allow_private: bool,
    dry_run: bool,
) -> None:
    """Register all streams of a list: M3U, PLS, XSPF, OPML, a podcast's feed (RSS, Atom), JSON, TOML.

    All of them or none. Names are made of titles; those of JSON and TOML lists are taken as they are. Lists in OPML
    bring the episodes of every feed, each feed in a folder. Servers of the streams are not asked.
    """
    from streamfs.importing import Rules

    policies = [name for name, given in (("skip", skip), ("replace", replace), ("rename", rename)) if given]
    if len(policies) > 1:
        raise click.UsageError(f"--{policies[0]} and --{policies[1]} cannot go together")
    taken = cast(IfTaken, policies[0] if policies else "refuse")
    found = _gathered(source, Rules(kind, into or "", allow_commands, allow_private))
    for where, text in found.problems[:MOST_SHOWN]:
        click.echo(visible(f"{where}: {text}"), err=True)
    if found.problems:
        count = f"{len(found.problems)} of {len(found.problems) + len(found.streams)} entries cannot be used"
        if not skip_bad:
            raise StreamfsError(f"{count}: nothing was imported (--skip-bad imports the others)")
        click.echo(f"streamfs: {count}", err=True)
    if not found.streams:
        raise InvalidRequest(f"{_shown(source)} names no stream")
    items = [msgspec.structs.replace(item, facts=None) for item in found.streams] if probe else found.streams
    with open_registry(Home.locate()) as registry:
        try:
            done = registry.register(items, taken, probe=probe, dry_run=dry_run)
        except StreamfsError as error:
            if taken != "refuse" or "exist already" not in str(error):
                raise
            raise type(error)(f"{error}: nothing was imported (--skip, --replace or --rename)") from error
    if dry_run:
        for item, (outcome, _, name) in zip(items, done, strict=True):
            click.echo(visible(f"{outcome:<9}  {name}  <-  {item.spec.described()}"))
    counts = Counter(outcome for outcome, _, _ in done)
    click.echo(("would be: " if dry_run else "") + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


def _gathered(source: str, rules: Rules) -> Found:
    """The streams of the list that `source` names."""
    import trio

    from streamfs import importing
    from streamfs.config import FILE_NAME, load
    from streamfs.sources import Transports, make_source

    config = load(Home.open().config / FILE_NAME)

    async def gather(told: Count) -> Found:
        async with Transports() as transports:

            def opener(url: str) -> Source:
                options = StreamOptions(allow_private=rules.allow_private)
                spec = StreamSpec(name="list", source=UrlSource(check_url(url)), options=options)
                return make_source(config.effective(spec), transports)

            if _is_url(source):
                data, base = await importing.download(opener, source)
            else:
                data, base = _read_local(source)
            return await importing.gather(data, base, _shown(source), rules, opener, told)

    with count_progress("feeds") as told:
        try:
            return trio.run(gather, told)
        except BaseExceptionGroup as group:  # Ctrl-C while feeds are fetched
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None


def _is_url(source: str) -> bool:
    scheme, separator, _ = source.partition("://")
    return bool(separator) and scheme.lower() in URL_SCHEMES


def _read_local(source: str) -> tuple[bytes, str]:
    """The bytes of a file, or of standard input; and the URL that stands for where they are."""
    from streamfs.importing import MOST_BYTES

    if source == "-":
        data = sys.stdin.buffer.read(MOST_BYTES + 1)
    else:
        with open(source, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise InvalidRequest(f"{source} is longer than the {MOST_BYTES >> 20} MiB of a list")
    return data, Path(source).absolute().as_uri()


def _shown(source: str) -> str:
    return redact_url(source) if "://" in source else source


@click.command(
    short_help="Write streams as a list that import reads.",
    epilog="""Examples:

\b
  Everything, to take to another machine:
    streamfs export > streams.json
    streamfs import streams.json --allow-commands
\b
  One folder, to be edited by hand; without logins, to be shown to others:
    streamfs export --format toml podcasts > podcasts.toml
    streamfs export --no-secrets --format m3u radio > radio.m3u
""",
)
@click.argument("names", metavar="[NAME]...", nargs=-1, type=types.NAME)
@click.option("--format", "kind", type=click.Choice(WRITTEN), default="json", show_default=True, help="Of the list.")
@click.option(
    "--no-secrets", is_flag=True, help="Without headers, variables, and logins, queries and fragments of URLs."
)
def export(names: tuple[str, ...], kind: str, no_secrets: bool) -> None:
    """Write the streams NAME, or those in the folders NAME, as a list that 'streamfs import' reads.

    All of them without a NAME. The list holds the URLs with logins and tokens, headers, and the commands with their
    variables, as they were registered: keep it as you would keep those. Files of cookies, logins and keys are named in
    it, and not part of it. M3U has only the URLs and names.
    """
    from streamfs.manifests.export import holds_secrets, without_secrets, write

    with open_registry(Home.locate()) as registry:
        items = _chosen(registry.registered(), names)
    secret = sum(holds_secrets(item.spec) for item in items)
    if secret and no_secrets:
        items = [msgspec.structs.replace(item, spec=without_secrets(item.spec)) for item in items]
        _warn(f"left out what may be secret of {secret} streams, which may not work without")
    elif secret:
        _warn(f"the list holds what may be secret (headers, logins, queries of URLs) of {secret} streams: --no-secrets")
    urls = [item for item in items if isinstance(item.spec.source, UrlSource)]
    if kind == "m3u" and len(urls) < len(items):
        _warn(f"left out {len(items) - len(urls)} commands, which a playlist cannot hold")
    click.echo(write(items, kind), nl=False)


def _chosen(items: list[Registration], names: tuple[str, ...]) -> list[Registration]:
    """The streams of these names, and those in the folders of these names."""
    if not names:
        return items
    chosen: set[str] = set()
    for name in names:
        found = [item for item in items if item.spec.name == name or item.spec.name.startswith(name + "/")]
        if not found:
            raise NotFound(f"no stream or folder {name!r}")
        chosen |= {item.spec.name for item in found}
    return [item for item in items if item.spec.name in chosen]


def _warn(text: str) -> None:
    click.echo(f"streamfs: {text}", err=True)
