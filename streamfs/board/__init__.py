"""The board: one memory-mapped file in which a daemon shows what its streams do, and which any program may read.

heap     the file as a heap: blocks of any length, taken, given back, joined; knows nothing of boards
layout   what stands in it: words, records with checksums
reader   Board: reading without locks and without asking anybody
writer   BoardWriter: for the one daemon

The format is docs/board.md. Usable alone: neither FUSE nor trio is needed, nor the rest of streamfs.
"""

from streamfs.board.reader import NAME, Board

__all__ = ["NAME", "Board"]
