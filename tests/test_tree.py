"""Names and inodes, as plain data."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from streamfs.entries import Entry
from streamfs.errors import NotFound
from streamfs.tree import ROOT, File, Folder, Tree
from tests.sourcefakes import spec_of


def entry(stream_id: int, name: str) -> Entry:
    return Entry(id=stream_id, spec=spec_of(name), added=0.0)


def shape(tree: Tree) -> dict[str, Any]:
    def of(folder: Folder) -> dict[str, Any]:
        return {
            name.decode(): of(node) if isinstance(node, Folder) else node.stream_id
            for name, node in folder.children.items()
        }

    return of(tree.root)


def test_folders_appear_with_the_first_stream_in_them_and_vanish_with_the_last() -> None:
    tree = Tree()
    tree.add(entry(2, "a/b/x"))
    tree.add(entry(3, "a/y"))
    folder = tree.child(tree.root, b"a")
    assert shape(tree) == {"a": {"b": {"x": 2}, "y": 3}}
    tree.remove(2)
    assert shape(tree) == {"a": {"y": 3}}
    assert tree.child(tree.root, b"a") is folder
    tree.remove(3)
    assert shape(tree) == {}
    with pytest.raises(NotFound):
        tree.node(folder.inode)


@pytest.mark.parametrize("new", ["d/y", "d/e/x", "y", "e/x"])
def test_the_only_stream_of_a_folder_can_be_renamed(new: str) -> None:
    tree = Tree()
    tree.add(entry(2, "d/x"))
    tree.add(entry(2, new))
    at: Any = shape(tree)
    for part in new.split("/"):
        assert list(at) == [part]
        at = at[part]
    assert at == 2


def test_a_rename_within_a_folder_keeps_the_folders_inode() -> None:
    tree = Tree()
    tree.add(entry(2, "d/x"))
    folder = tree.child(tree.root, b"d")
    tree.add(entry(2, "d/y"))
    assert tree.child(tree.root, b"d") is folder
    assert tree.node(folder.inode) is folder


def test_a_stream_added_under_the_same_name_again_stays() -> None:
    tree = Tree()
    tree.add(entry(2, "d/x"))
    tree.add(entry(2, "d/x"))
    assert shape(tree) == {"d": {"x": 2}}


def test_a_stream_that_takes_anothers_name_keeps_it_when_the_other_goes() -> None:
    tree = Tree()
    tree.add(entry(2, "d/x"))
    tree.add(entry(3, "y"))
    folder = tree.child(tree.root, b"d")
    tree.add(entry(3, "d/x"))
    tree.remove(2)
    assert shape(tree) == {"d": {"x": 3}}
    assert tree.child(tree.root, b"d") is folder


def test_a_successor_takes_the_name_and_the_old_inode_lives_while_the_kernel_holds_it() -> None:
    tree = Tree()
    tree.add(entry(2, "x"))
    old = tree.file_of(2)
    tree.looked_up(old)
    new = tree.succeed(old)
    assert new.inode != old.inode
    assert tree.child(tree.root, b"x") is new
    assert tree.node(old.inode) is old
    tree.forget(old.inode, 1)
    with pytest.raises(NotFound):
        tree.node(old.inode)
    assert tree.node(new.inode) is new


def test_an_inode_that_was_succeeded_leads_to_the_current_one() -> None:
    tree = Tree()
    tree.add(entry(2, "x"))
    old = tree.file_of(2)
    tree.looked_up(old)
    new = tree.succeed(old)
    assert tree.succeed(old) is new


def test_a_removed_stream_has_no_successor() -> None:
    tree = Tree()
    tree.add(entry(2, "x"))
    old = tree.file_of(2)
    tree.looked_up(old)
    tree.remove(2)
    with pytest.raises(NotFound):
        tree.succeed(old)


def test_forgetting_counts_references() -> None:
    tree = Tree()
    tree.add(entry(2, "x"))
    file = tree.file_of(2)
    for _ in range(3):
        tree.looked_up(file)
    tree.remove(2)
    tree.forget(file.inode, 2)
    assert tree.node(file.inode) is file
    tree.forget(file.inode, 1)
    with pytest.raises(NotFound):
        tree.node(file.inode)
    tree.forget(file.inode, 1)  # again: nothing


def test_forgetting_a_named_file_or_a_folder_keeps_it() -> None:
    tree = Tree()
    tree.add(entry(2, "d/x"))
    for node in (tree.file_of(2), tree.child(tree.root, b"d"), tree.root):
        tree.looked_up(node)
        tree.forget(node.inode, 1)
        assert tree.node(node.inode) is node


def test_paths_are_those_of_the_catalogue_bytes_and_all() -> None:
    tree = Tree()
    name = b"d/\xff\xc3\xa9".decode("utf-8", "surrogateescape")
    tree.add(Entry(id=2, spec=SimpleNamespace(name=name), added=0.0))  # type: ignore[arg-type]
    folder = tree.child(tree.root, b"d")
    assert isinstance(folder, Folder)
    assert isinstance(tree.child(folder, b"\xff\xc3\xa9"), File)
    assert tree.path_of(folder, b"\xff\xc3\xa9") == name
    assert tree.path_of(tree.root, b"x") == "x"
    assert tree.root.inode == ROOT


def test_a_whole_catalogue_is_shown_as_if_each_stream_had_been_added() -> None:
    names = sorted(["x", "a/y", "a/b/z", "a/b/w", "b/x", "é/a", "a.b/c"], key=os.fsencode)
    entries = [Entry(id=number, spec=spec_of(name), added=float(number)) for number, name in enumerate(names, 2)]
    one_by_one, at_once = Tree(), Tree()
    for each in entries:
        one_by_one.add(each, when=each.added)
    at_once.load((each.id, os.fsencode(each.name), each.added) for each in entries)
    assert shape(at_once) == shape(one_by_one)
    for name in (b"a", b"b", "é".encode()):
        folders = [tree.child(tree.root, name) for tree in (one_by_one, at_once)]
        seen = {(folder.modified, folder.folders) for folder in folders if isinstance(folder, Folder)}
        assert len(seen) == 1
    at_once.remove(2)
    at_once.add(Entry(id=3, spec=spec_of("moved/there"), added=0.0))
    assert shape(at_once)["moved"] == {"there": 3}
