"""Names and inodes: the folders that stream names make, and which inode stands for what. Pure data.

A file's inode number belongs to one version of its bytes, because the kernel caches pages and sizes per inode: a new
version gets a new number, as if another file had been renamed over the old one. Numbers are never used again within
a mount.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from typing import TypeAlias

from streamfs.entries import Entry
from streamfs.errors import NotEmpty, NotFound
from streamfs.generation import Generation

ROOT = 1
_FIRST_SUCCESSOR = 1 << 40  # above every catalogue id
_FIRST_FOLDER = 1 << 56  # above every successor


class Folder:
    """A folder, which goes with the last stream in it; but one that was emptied within the mount stays until it is
    removed there, or a stream takes its name (otherwise `rm -r` would fail at a folder that is gone by itself).

    `modified`: when a name in it last came or went, in seconds since the epoch. `folders`: how many of `children` are.
    `lasting`: it was made for itself, and goes only when it is removed.
    """

    __slots__ = ("children", "folders", "inode", "lasting", "modified", "name", "parent")

    def __init__(self, inode: int, parent: Folder | None, name: bytes) -> None:
        self.inode = inode
        self.parent = parent
        self.name = name
        self.children: dict[bytes, Node] = {}
        self.folders = 0
        self.modified = 0.0
        self.lasting = False


class File:
    """One inode of a stream.

    `generation`: the version this inode stands for, None before the first open. `told`: the size the kernel was told
    for it; it may go from 0 (unknown) to the size, and never changes again. `doubted`: the kernel may still have a 0 in
    hand that it was told while the size was unknown. `folder`: where its name is, None where it has none any more.
    `lookups`: the references the kernel holds.
    """

    __slots__ = ("doubted", "folder", "generation", "inode", "lookups", "name", "stream_id", "told")

    def __init__(self, inode: int, stream_id: int) -> None:
        self.inode = inode
        self.stream_id = stream_id
        self.generation: Generation | None = None
        self.told = 0
        self.doubted = False
        self.lookups = 0
        self.folder: Folder | None = None
        self.name = b""


Node: TypeAlias = Folder | File


class Tree:
    """All names of one mount."""

    def __init__(self) -> None:
        self.root = Folder(ROOT, None, b"")
        self._nodes: dict[int, Node] = {ROOT: self.root}
        self._files: dict[int, File] = {}  # the current one of each stream, by stream id
        self._successors = itertools.count(_FIRST_SUCCESSOR)
        self._folders = itertools.count(_FIRST_FOLDER)

    def node(self, inode: int) -> Node:
        """Raises NotFound."""
        try:
            return self._nodes[inode]
        except KeyError:
            raise NotFound("no such file") from None

    def file_of(self, stream_id: int) -> File:
        return self._files[stream_id]

    def child(self, folder: Folder, name: bytes) -> Node:
        """Raises NotFound."""
        try:
            return folder.children[name]
        except KeyError:
            raise NotFound(f"no such file: {os.fsdecode(name)!r}") from None

    def path_of(self, folder: Folder, name: bytes) -> str:
        """The stream name that `name` in `folder` has or would have."""
        parts = [name]
        at: Folder | None = folder
        while at is not None and at.parent is not None:
            parts.append(at.name)
            at = at.parent
        return os.fsdecode(b"/".join(reversed(parts)))

    def add(self, entry: Entry, *, when: float | None = None, keep_folders: bool = False) -> None:
        """Show a stream under its name, since `when` (None: now). `keep_folders`: the folder that it leaves stays."""
        when = time.time() if when is None else when
        at, last = self._place(entry.name, when)
        file = self._files.get(entry.id)
        if file is None:
            file = self._files[entry.id] = File(entry.id, entry.id)
            self._nodes[file.inode] = file
        was, name = file.folder, file.name
        self._put(at, last, file, when)
        file.folder, file.name = at, last
        if was is not None and (was, name) != (at, last):
            self._clear(was, name, keep_folders)  # after the new name is there, so that a folder they share stays

    def load(self, names: Iterable[tuple[int, bytes, float]]) -> None:
        """`add` for the streams of a catalogue, (id, name, since when) in the order of names, none of which is there
        yet: several times as fast."""
        known, at = b"", self.root
        for stream_id, name, when in names:
            folder, _, last = name.rpartition(b"/")
            if folder != known:
                known, (at, _) = folder, self._place(os.fsdecode(name), when)
            file = self._nodes[stream_id] = self._files[stream_id] = at.children[last] = File(stream_id, stream_id)
            file.folder, file.name = at, last
            at.modified = max(at.modified, when)

    def add_folder(self, path: str, *, when: float | None = None) -> Folder:
        """Show a folder that stays without streams. No stream may have its name, or a part of it."""
        when = time.time() if when is None else when
        at, last = self._place(path, when)
        folder = at.children.get(last)
        if not isinstance(folder, Folder):
            folder = self._new_folder(at, last, when)
        folder.lasting = True
        return folder

    def move(self, folder: Folder, path: str, *, keep_folders: bool = False) -> None:
        """Give a folder, with all that is in it, the name `path`, where no stream is."""
        now = time.time()
        at, last = self._place(path, now)
        was, name = folder.parent, folder.name
        assert was is not None, "the root has no name"
        if (was, name) != (at, last):
            self._put(at, last, folder, now)
            folder.parent, folder.name = at, last
            self._clear(was, name, keep_folders)

    def remove(self, stream_id: int, *, keep_folders: bool = False) -> None:
        """Take a stream's name away; folders that this leaves empty go too, unless `keep_folders`."""
        file = self._files.pop(stream_id, None)
        if file is None:
            return
        at, file.folder = file.folder, None
        assert at is not None
        if at.children.get(file.name) is file:  # another may have taken its name
            self._clear(at, file.name, keep_folders)
        self._drop_if_forgotten(file)

    def remove_folder(self, folder: Folder) -> None:
        """Raises NotEmpty."""
        if folder.children or folder.parent is None:
            raise NotEmpty("the folder is not empty")
        self._clear(folder.parent, folder.name, keep_folders=True)
        del self._nodes[folder.inode]

    def _place(self, path: str, when: float) -> tuple[Folder, bytes]:
        """The folder of a name, made where it is missing, and the last part."""
        *folders, last = os.fsencode(path).split(b"/")
        at = self.root
        for part in folders:
            child = at.children.get(part)
            at = child if isinstance(child, Folder) else self._new_folder(at, part, when)
        return at, last

    def _new_folder(self, at: Folder, name: bytes, when: float) -> Folder:
        folder = Folder(next(self._folders), at, name)
        self._put(at, name, folder, when)
        self._nodes[folder.inode] = folder
        return folder

    def _put(self, at: Folder, name: bytes, node: Node, when: float) -> None:
        old = at.children.get(name)
        if isinstance(old, Folder) and old is not node:
            self._forget_folder(old)  # without streams, or the name could not be given
        at.folders += isinstance(node, Folder) - isinstance(old, Folder)
        at.children[name] = node
        at.modified = max(at.modified, when)

    def _clear(self, at: Folder, name: bytes, keep_folders: bool) -> None:
        """Take a name out of a folder and, without `keep_folders`, folders that have nothing left out of theirs."""
        at.folders -= isinstance(at.children.pop(name), Folder)
        at.modified = time.time()
        while not keep_folders and at.parent is not None and is_bare(at) and not is_lasting(at):
            self._forget_folder(at)
            del at.parent.children[at.name]
            at = at.parent
            at.folders -= 1
            at.modified = time.time()

    def _forget_folder(self, folder: Folder) -> None:
        """Give up the inodes of a folder without streams, and of those in it."""
        self._nodes.pop(folder.inode, None)
        for child in folder.children.values():
            if isinstance(child, Folder):
                self._forget_folder(child)

    def succeed(self, old: File) -> File:
        """The inode that follows `old`, whose stream has another version now: the one that did already, or a new one,
        which takes the old one's name. Raises NotFound where the stream was removed."""
        current = self._files.get(old.stream_id)
        if current is None:
            raise NotFound("the stream was removed")
        if current is old:
            assert old.folder is not None
            current = self._files[old.stream_id] = File(next(self._successors), old.stream_id)
            self._nodes[current.inode] = current
            current.folder, current.name = old.folder, old.name
            current.folder.children[current.name] = current
            old.folder = None
            self._drop_if_forgotten(old)
        return current

    def looked_up(self, node: Node) -> None:
        """The kernel was told of the inode once more."""
        if isinstance(node, File):
            node.lookups += 1

    def forget(self, inode: int, count: int) -> None:
        """The kernel gave back `count` of its references."""
        node = self._nodes.get(inode)
        if isinstance(node, File):
            node.lookups -= count
            self._drop_if_forgotten(node)

    def _drop_if_forgotten(self, file: File) -> None:
        if file.folder is None and file.lookups <= 0:
            self._nodes.pop(file.inode, None)


def is_bare(folder: Folder) -> bool:
    """Whether no stream is in the folder, nor in those within it. Ends at the first one it meets."""
    return all(isinstance(child, Folder) and is_bare(child) for child in folder.children.values())


def is_lasting(folder: Folder) -> bool:
    """Whether the folder, or one within it, was made for itself."""
    return folder.lasting or any(isinstance(child, Folder) and is_lasting(child) for child in folder.children.values())
