"""The buffer engine: usable alone, without FUSE, command line or network.

ranges        interval arithmetic
pool          reused memory pieces within a budget
replies       memory for replies that are put together, used again once nobody sees it
state         what is present, where the end is, who waits; all transitions
recording     the on-disk form, each block with a checksum
diskreads     reads that must wait for the disk: how many at a time, over all streams
store         bytes at rest: memory pieces, then a recording
fetches       which fetches a ranged source needs for what its readers want; a decision, no I/O
lanes         how many of them read side by side; a decision, too
transforms    stateful byte-to-byte filters: gunzip, zstd, digest and a protocol for one's own
buffer        Buffer: one generation, many readers and writers, threads and trio
streambuffer  StreamBuffer: random access to any iterable
"""
