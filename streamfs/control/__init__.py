"""Asking a running daemon: one request, one reply, over a unix stream socket.

wire     messages and their framing, errors on the wire; no I/O
client   Client: synchronous, for the command line; needs no trio
server   listen and serve: for the daemon, under trio; import it by its own name

Everyone who may use the socket can run code as the daemon's user: registering a command is one of the requests.
So the socket is 0600 in a 0700 directory, and both ends check the other's uid.
"""

from streamfs.control.client import Client

__all__ = ["Client"]
