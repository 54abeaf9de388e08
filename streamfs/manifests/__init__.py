"""Lists of streams: reading every format that people have, and writing what was registered.

reading     which format a list has, and what is in it: the way in
model       Item, Feed, Problem: what a list holds; how a reference becomes a URL
playlists   M3U and PLS
feeds       XSPF, OPML, RSS, Atom     xmltree: their XML, of strangers
records     JSON and TOML
names       titles to names
export      registered streams to JSON, TOML, M3U

Pure functions over bytes: no file is opened, no server asked. Whatever the bytes are, they raise InvalidRequest or
nothing; a bad entry is a Problem with its line, and takes no other with it. Nothing is imported here: the command line
needs the names of formats for its help, and the rest seldom.
"""

FORMATS = ("m3u", "pls", "xspf", "opml", "feed", "json", "toml")
"""What can be read."""
WRITTEN = ("json", "jsonl", "toml", "m3u")
"""What can be written."""
