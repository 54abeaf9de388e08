"""doctor: what could keep streamfs from working here, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from streamfs.cli.tables import visible


@click.command(short_help="Check this system, and say what to do.")
@click.option("--json", "as_json", is_flag=True, envvar="STREAMFS_DOCTOR_JSON", help="One JSON document.")
def doctor(as_json: bool) -> None:
    """Check this system: FUSE, rights, libraries, limits, disk, dead mounts.

    Says for each what to do. Exits with 1 if something keeps streamfs from working.
    """
    from streamfs.cli.checks import findings  # loads much of the package

    found = findings()
    if as_json:
        click.echo(json.dumps({"version": 1, "findings": [asdict(finding) for finding in found]}))
    else:
        marks = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}
        for finding in found:
            click.echo(visible(f"{marks[finding.state]}  {finding.check}: {finding.detail}"))
            if finding.advice:
                click.echo(visible(f"         -> {finding.advice}"))
    if any(finding.state == "problem" for finding in found):
        raise click.exceptions.Exit(1)
