"""What `streamfs web` serves: metrics for Prometheus and a page to look at, both read from the board.

From top to bottom: `server` (waitress, signals), `application` (what is answered, and to whom), `metrics` (the board as
Prometheus counts it), `watch` (the board, of whichever daemon runs), `page.html`. A process of its own: the daemon is
never asked, and does not know of it.
"""
