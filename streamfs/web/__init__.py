"""What `streamfs web` serves: metrics for Prometheus and a page to look at, both read from the board.

server       waitress, and signals
application  what is answered, and to whom; the page is page.html
metrics      the board as Prometheus counts it
watch        the board, of whichever daemon runs

A process of its own: the daemon is never asked, and does not know of it.
"""
