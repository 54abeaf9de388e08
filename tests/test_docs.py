"""The documentation says what the code is: tests that exist, attributes, options and numbers that agree."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib
import random
import re
from pathlib import Path

import click
import pytest

import streamfs
from streamfs import cache, filesystem, fuse, generation, spec, stream, xattrs
from streamfs.cli.app import cli
from streamfs.engine import fetches
from streamfs.sources import addresses, attempts, curl, http, plain, replies
from streamfs.spec import MountOptions

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
SEMANTICS = (ROOT / "docs" / "semantics.md").read_text()
PAGE, PROOFS = SEMANTICS.split("\n## The tests\n")
LABEL = re.compile(r"\[\^([a-z-]+)\]")
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def paragraphs() -> list[str]:
    """The paragraphs that say what a file does; a table belongs to the sentence below it."""
    _, *sections = re.split(r"^## .*\n", PAGE, flags=re.MULTILINE)
    found = [part.strip() for section in sections for part in section.split("\n\n")]
    return [part for part in found if part and not part.startswith("|")]


def proofs() -> dict[str, list[str]]:
    """The tests of each label, as path::name."""
    _, *definitions = re.split(r"^\[\^", PROOFS, flags=re.MULTILINE)
    return {text.split("]:")[0]: re.findall(r"`([^`]+)`", text) for text in definitions}


def names_of_tests(path: Path) -> set[str]:
    """Names of the test functions of a file, those of classes as Class::name."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}::{method.name}" for method in methods}
    return {name for name in found if name.rpartition(":")[2].startswith("test_")}


def prose(text: str) -> str:
    """One line, without the small numbers."""
    return " ".join(LABEL.sub("", text).split())


def test_every_paragraph_of_the_semantics_names_its_tests() -> None:
    assert len(paragraphs()) > 30
    known = proofs()
    for paragraph in paragraphs():
        labels = LABEL.findall(paragraph)
        assert labels, f"no test is named at the end of: {paragraph}"
        assert paragraph.endswith("]"), f"its tests are not named at the end of: {paragraph}"
        assert all(known.get(label) for label in labels), f"no test behind {labels}"


def test_every_proof_belongs_to_a_paragraph() -> None:
    labels = LABEL.findall(PAGE)
    assert sorted(labels) == sorted(proofs())
    assert len(set(labels)) == len(labels)


def test_every_test_that_the_semantics_name_exists() -> None:
    for label, names in proofs().items():
        for name in names:
            file, _, test = name.partition("::")
            assert (TESTS / file).is_file(), f"{label}: there is no {file}"
            assert test in names_of_tests(TESTS / file), f"{label}: there is no {test} in {file}"


def test_the_table_of_attributes_has_them_all_and_no_others() -> None:
    section = PAGE.split("## Extended attributes")[1]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    full = ["user.streamfs" + name if name.startswith(".") else name for name in named]
    assert sorted(full) == sorted(xattrs._READERS)


def test_every_attribute_that_the_pages_name_exists() -> None:
    pages = [README, *(path.read_text() for path in (ROOT / "docs").rglob("*.md"))]
    for name in {name for page in pages for name in re.findall(r"user\.[a-z0-9_.]*[a-z0-9]", page)}:
        assert name in xattrs._READERS, name


@pytest.mark.parametrize("command", ["add", "mount", "umount"])
def test_every_option_is_documented(command: str) -> None:
    for parameter in cli.commands[command].params:
        if isinstance(parameter, click.Option):
            named = [
                option for option in parameter.opts if re.search(rf"`[^`]*{option}\b[^`]*`", README + REFERENCE + PAGE)
            ]
            assert named, f"neither page names {parameter.opts}"


def test_every_option_that_the_pages_name_exists() -> None:
    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README + REFERENCE + PAGE))
    assert named <= known | {"--help"}, named - known


def test_every_command_is_documented() -> None:
    for name in cli.commands:
        assert re.search(rf"`(streamfs )?{name}\b|\n\| .*`{name}\b", README), name


def of_bytes(count: int | None) -> str:
    assert count is not None
    for unit, step in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count % step == 0:
            return f"{count // step} {unit}"
    return f"{count} bytes"


OPTIONS = MountOptions()
LEAST, MOST = of_bytes(fetches.LEAST_GAP), of_bytes(fetches.MOST_GAP)
TOO_SOON = " and ".join(", ".join(str(code) for code in sorted(replies.RETRYABLE)).rsplit(", ", 1))
EXPIRED = " or ".join(", ".join(str(code) for code in sorted(replies.REFRESHABLE)).rsplit(", ", 1))
NUMBERS = [
    f"if there are at most {filesystem.PROBES_AT_START} of them",
    f"a part is there is turned away if the rest does not follow within {2 * fuse.AHEAD_PATIENCE:g} s",
    f"no byte arrives for the stall timeout, or for {stream.WAIT_FOR_END:g} s where there is none",
    f"by {of_bytes(fetches.FIRST_AHEAD)} at first",
    f"at most `--read-ahead` ({of_bytes(OPTIONS.read_ahead)})",
    f"At most {fetches.MOST_FETCHES} fetches of one file",
    f"between {LEAST} and {MOST}",
    f"a resting one of a file that is open does so after {generation.IDLE:g} s",
    f"No byte for the stall timeout ({spec.DEFAULT_STALL_TIMEOUT:g} s for URLs",
    f"the answer is younger than {stream.FRESH:g} s",
    f"if the source cannot be reached within {stream.REVALIDATE:g} s",
    f"up to {attempts.ATTEMPTS} attempts in a row without a new byte",
    f"({attempts.FIRST_ATTEMPTS} where the first open cannot even connect, {attempts.PROBE_ATTEMPTS} for a probe)",
    f"{attempts.BACKOFF_FIRST:g} s to {attempts.BACKOFF_CAP:g} s apart",
    f"honoured up to {attempts.RETRY_AFTER_CAP:g} s",
    f"4xx answers other than {TOO_SOON} are not tried again",
    f"At most {addresses.MAX_REDIRECTS} redirects",
    f"kept for {addresses.RESOLVED_SECONDS:g} s",
    f"the end of a redirect chain for {http.LANDING_SECONDS:g} s",
    f"when the URL answers {EXPIRED} and",
    f"for {plain.IDLE_SECONDS:g} s after their last reply",
    f"one host has at most {plain.CONNECTIONS_PER_HOST} at a time",
    f"`{curl.KNOWN_HOSTS_VARIABLE}`",
    f"Up to `--spill-threshold` ({of_bytes(OPTIONS.spill_threshold)})",
    f"at most `--memory` ({of_bytes(OPTIONS.memory)})",
    f"at most `--cache-size` ({of_bytes(OPTIONS.cache_size)})",
    f"leaves {of_bytes(cache.FREE_FLOOR)} of its file system free",
    f"tried again every {cache.DISK_RETRY:g} s",
    f"nobody used for `--ttl` ({OPTIONS.ttl / 3600:g} h)",
]


@pytest.mark.parametrize("phrase", NUMBERS)
def test_the_numbers_of_the_semantics_are_those_of_the_code(phrase: str) -> None:
    assert phrase in prose(PAGE)


def test_half_a_second_is_how_long_an_unneeded_fetch_lingers() -> None:
    assert generation.LINGER == 0.5
    assert "gives its connection back after half a second" in prose(PAGE)


def test_both_transports_take_the_same_number_of_connections() -> None:
    assert curl.HOST_CONNECTIONS == plain.CONNECTIONS_PER_HOST


@pytest.mark.parametrize(
    ("option", "default"),
    [
        ("--memory", of_bytes(OPTIONS.memory)),
        ("--spill-threshold", of_bytes(OPTIONS.spill_threshold)),
        ("--read-ahead", of_bytes(OPTIONS.read_ahead)),
        ("--cache-size", f"{of_bytes(OPTIONS.cache_size)}, {OPTIONS.ttl / 3600:g}h"),
    ],
)
def test_the_defaults_of_the_reference_are_those_of_the_code(option: str, default: str) -> None:
    mount = REFERENCE.partition("## Options of the mount")[2]
    row = next(line for line in mount.splitlines() if line.startswith("| `--") and option in line)
    assert row.split("|")[-2].strip() == re.sub(r"(\d) ([KMG]iB)", r"\1\2", default)


def test_the_transforms_are_all_named() -> None:
    section = PAGE.split("## Transforms")[1].split("## ")[0]
    assert all(f"`{name}`" in section for name in spec.TRANSFORMS)


PACKAGE = Path(streamfs.__file__).parent
NAMES = re.compile(r"[a-z_0-9]+(?:, [a-z_0-9]+)*")


def modules_of(package: Path) -> set[str]:
    """The modules and packages in a package, by name."""
    inner = {path.parent.name for path in package.glob("*/__init__.py")}
    return inner | {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}


def mapped_in(text: str) -> list[str]:
    """What a map names: paragraphs of lines `names  what they do`, or several such in columns, later ones perhaps as
    `names: what they do`."""
    found = []
    for paragraph in text.split("\n\n"):
        lines = [re.split(r" {2,}", line.strip()) for line in paragraph.strip("\n").splitlines()]
        if not all(len(line) > 1 and NAMES.fullmatch(line[0]) for line in lines):
            continue
        for line in lines:
            described = True  # what comes next is a name
            for column in line:
                names, told, _ = column.partition(": ")
                if described and NAMES.fullmatch(names):
                    found += names.split(", ")
                    described = bool(told)
                else:
                    described = True
    return found


@pytest.mark.parametrize(
    "package", [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))], ids=lambda p: p.name
)
def test_the_map_of_a_package_names_its_modules_and_no_others(package: Path) -> None:
    named = mapped_in(ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or "")
    assert sorted(named) == sorted(modules_of(package))


def test_the_page_on_architecture_names_every_module_at_the_top_and_no_others() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    diagram = set(re.findall(r"[a-z_]+", page.split("```")[1]))
    paths = set(re.findall(r"`streamfs/(\w+)(?:/|\.py)[^`]*`", page))
    table = page.split("| module | what it does |")[1].split("\n\n")[0]
    rows = {name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    modules = modules_of(PACKAGE)
    assert modules <= diagram | rows | paths
    assert rows | paths <= modules | {"__init__"}


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_the_names_of_code_in_the_pages_exist(page: str) -> None:
    """`module.name` and `Class.name` in backticks, and paths of modules."""
    text = (ROOT / "docs" / page).read_text()
    for path in re.findall(r"`((?:streamfs|tests|scripts)/[^`*…]+)`", text):
        assert (ROOT / path).exists(), path
    places = _classes()
    for owner, name in re.findall(r"`([A-Z]\w+)\.(\w+)`", text):
        if owner in places:
            assert re.search(rf"\b{name}\b", places[owner]), f"{owner} has no {name}"


def _classes() -> dict[str, str]:
    """The source of each class of the package."""
    found = {}
    for path in Path(streamfs.__file__).parent.rglob("*.py"):
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                found[node.name] = ast.get_source_segment(source, node) or ""
    return found


def test_links_between_the_pages_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_library_example_of_the_readme_works() -> None:
    example = README.split("```python\n")[1].split("```")[0]
    content = bytes(range(256)) * 8000
    names: dict[str, object] = {"chunks_of_bytes": [content[at : at + 9999] for at in range(0, len(content), 9999)]}
    lines = re.sub(r"^    (buffer\S*.*?)  #", r"    results.append(\1)  #", example, flags=re.MULTILINE)
    names["results"] = results = []
    exec(compile(lines, "README.md", "exec"), names)
    assert results == [content[1_000_000:1_004_096], content[-10:]]
    assert names["StreamBuffer"] is importlib.import_module("streamfs").StreamBuffer


def test_the_examples_of_the_library_page_work(tmp_path: Path) -> None:
    unpack, own = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    content = random.Random(1).randbytes(300_000)
    (tmp_path / "packed").write_bytes(gzip.compress(content))
    names: dict[str, object] = {"path": tmp_path / "packed"}
    exec(compile(unpack, "library.md", "exec"), names)
    assert (names["size"], names["checksum"]) == (len(content), hashlib.sha256(content).hexdigest())
    names = {"__name__": "example"}
    exec(compile(own, "library.md", "exec"), names)
    assert names["sums"] == bytes([3, 7, 11])
