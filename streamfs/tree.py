"""Names and inodes: the folders that stream names make, and which inode stands for what. Pure data.

A file's inode number belongs to one version of its bytes, because the kernel caches pages and sizes per inode: a new
version gets a new number, as if another file had been renamed over the old one. Numbers are never used again within
a mount.
"""

from __future__ import annotations

import itertools
import os
from typing import TypeAlias

from streamfs.catalog import Entry
from streamfs.errors import NotFound
from streamfs.generation import Generation

ROOT = 1
_FIRST_SUCCESSOR = 1 << 40  # above every catalogue id
_FIRST_FOLDER = 1 << 56  # above every successor


class Folder:
    __slots__ = ("children", "inode", "name", "parent")

    def __init__(self, inode: int, parent: Folder | None, name: bytes) -> None:
        self.inode = inode
        self.parent = parent
        self.name = name
        self.children: dict[bytes, Node] = {}  # INVARIANT: not empty, but for the root


class File:
    """One inode of a stream.

    `generation`: the version this inode stands for, None before the first open. `told`: the size the kernel was told
    for it; it may go from 0 (unknown) to the size, and never changes again. `folder`: where its name is, None where
    it has none any more. `lookups`: the references the kernel holds.
    """

    __slots__ = ("folder", "generation", "inode", "lookups", "name", "stream_id", "told")

    def __init__(self, inode: int, stream_id: int) -> None:
        self.inode = inode
        self.stream_id = stream_id
        self.generation: Generation | None = None
        self.told = 0
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

    def add(self, entry: Entry) -> None:
        """Show a stream under its name."""
        *folders, last = os.fsencode(entry.name).split(b"/")
        at = self.root
        for part in folders:
            child = at.children.get(part)
            if not isinstance(child, Folder):
                child = Folder(next(self._folders), at, part)
                at.children[part] = child
                self._nodes[child.inode] = child
            at = child
        file = self._files.get(entry.id)
        if file is None:
            file = self._files[entry.id] = File(entry.id, entry.id)
            self._nodes[file.inode] = file
        was, name = file.folder, file.name
        self._link(file, at, last)
        if was is not None and (was, name) != (at, last):
            self._clear(was, name)  # after the new name is there, so that a folder they share stays

    def remove(self, stream_id: int) -> None:
        """Take a stream's name away; folders that this leaves empty go too."""
        file = self._files.pop(stream_id, None)
        if file is not None:
            self._unlink(file)
            self._drop_if_forgotten(file)

    def _link(self, file: File, folder: Folder, name: bytes) -> None:
        folder.children[name] = file
        file.folder, file.name = folder, name

    def _unlink(self, file: File) -> None:
        at, file.folder = file.folder, None
        assert at is not None
        if at.children.get(file.name) is file:  # another may have taken its name
            self._clear(at, file.name)

    def _clear(self, at: Folder, name: bytes) -> None:
        """Take a name out of a folder, and folders that this leaves empty out of theirs."""
        del at.children[name]
        while not at.children and at.parent is not None:
            del at.parent.children[at.name]
            self._nodes.pop(at.inode, None)
            at = at.parent

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
            self._link(current, old.folder, old.name)
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
