"""Lists in XML: XSPF playlists, OPML lists of podcasts, and the feeds (RSS, Atom) with their episodes."""

from __future__ import annotations

import html

from streamfs.errors import InvalidRequest
from streamfs.manifests.model import Feed, Manifest, resolve
from streamfs.manifests.xmltree import Element, parse_xml
from streamfs.spec import Facts


def read_xspf(data: bytes, base: str) -> Manifest:
    root = _root(data, "playlist")
    found = Manifest(title=_child(root, "title"))
    tracks = (track for lists in root.children if lists.local == "trackList" for track in lists.children)
    for track in tracks:
        places = [child for child in track.children if child.local == "location" and child.text]
        if not places:
            found.refuse(track.line, "a track without its location")
            continue
        creator, title = _child(track, "creator"), _child(track, "title")
        named = f"{creator} - {title}" if creator and title else title
        found.add_url(places[0].text, track.get("xml:base") or base, places[0].line, title=named)
    return found


def _child(element: Element, name: str) -> str:
    """XSPF and Atom may be written with a prefix."""
    return next((child.text for child in element.children if child.local == name and child.text), "")


def read_opml(data: bytes, base: str) -> Manifest:
    """Its feeds, in the folders of the outlines they stand in; and the files that outlines name themselves."""
    root = _root(data, "opml")
    head, body = root.first("head"), root.first("body")
    found = Manifest(title=head.text_of("title") if head is not None else "")
    if body is not None:
        _read_outlines(body, (), base, found)
    return found


def _read_outlines(element: Element, folder: tuple[str, ...], base: str, found: Manifest) -> None:
    for outline in element.all("outline"):
        title = outline.get("title") or outline.get("text")
        url = outline.get("xmlUrl")
        if url:
            try:
                found.feeds.append(Feed(resolve(url, base), outline.line, title, folder))
            except InvalidRequest as error:
                found.refuse(outline.line, str(error))
        elif outline.get("url") and outline.get("type") in ("audio", "video", "song", "link"):
            found.add_url(outline.get("url"), base, outline.line, title=title, folder=folder)
        _read_outlines(outline, (*folder, title) if title and not url else folder, base, found)


def read_feed(data: bytes, base: str) -> Manifest:
    """The episodes of a podcast: what each item of RSS, or entry of Atom, encloses. Items without are passed over."""
    root = parse_xml(data)
    match root.local:
        case "rss" | "RDF":
            return _read_rss(root, base)
        case "feed":
            return _read_atom(root, base)
    raise InvalidRequest(f"this XML is no feed: it is a {root.local!r}")


def _read_rss(root: Element, base: str) -> Manifest:
    channel = root.first("channel") or root
    found = Manifest(title=html.unescape(channel.text_of("title")))
    for item in [*channel.all("item"), *(root.all("item") if channel is not root else ())]:
        title = html.unescape(item.text_of("title", "itunes:title"))
        for enclosure in [*item.all("enclosure"), *item.all("media:content")][:1]:
            length = enclosure.get("length") or enclosure.get("fileSize")
            _add_episode(found, enclosure.get("url"), base, enclosure, title, length)
    return found


def _read_atom(root: Element, base: str) -> Manifest:
    base = root.get("xml:base") or base
    found = Manifest(title=_child(root, "title"))
    for entry in root.children:
        if entry.local == "entry":
            for link in entry.children:
                if link.local == "link" and link.get("rel") == "enclosure":
                    _add_episode(found, link.get("href"), base, link, _child(entry, "title"), link.get("length"))
    return found


def _add_episode(found: Manifest, url: str, base: str, element: Element, title: str, length: str) -> None:
    mime = element.get("type").partition(";")[0].strip().lower()
    # 0 and 1 are what feeds say that do not know.
    size = int(length) if length.isascii() and length.isdigit() and len(length) < 16 and int(length) > 1 else None
    facts = Facts(size=size, mime=mime if "/" in mime and mime.isascii() and mime.isprintable() else None)
    found.add_url(url, base, element.line, title=title, facts=facts)


def _root(data: bytes, name: str) -> Element:
    root = parse_xml(data)
    if root.local != name:
        raise InvalidRequest(f"this XML is a {root.local!r}, not a {name!r}")
    return root
