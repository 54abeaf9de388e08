"""Where requests may go: addresses, redirects, names."""

from __future__ import annotations

import pytest

from streamfs.errors import NotPermitted, SourceFailed
from streamfs.sources.addresses import Origin, Resolver, is_private, is_private_name, permitted, redirect_target
from streamfs.sources.transport import TransportError


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
        "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "fec0::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1",
    ],
)  # fmt: skip
def test_private_addresses_are_known_in_every_dress(address: str) -> None:
    assert is_private(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are_public(address: str) -> None:
    assert not is_private(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "017700000001", "0x7f.1", "[::ffff:7f00:1]"]
)
async def test_a_loopback_address_is_found_out_however_it_is_written(host: str) -> None:
    assert all(map(is_private, await Resolver().resolve(f"http://{host}/x")))


async def test_a_name_without_address_is_a_failure_to_connect() -> None:
    with pytest.raises(TransportError) as raised:
        await Resolver().resolve("http://nothing.invalid/x")
    assert raised.value.kind == "connect"


@pytest.mark.parametrize(
    ("host", "private"),
    [
        *(("localhost", True), ("a.localhost", True), ("2130706433", True), ("0x7f.1", True), ("10.0.0.1", True)),
        *(("8.8.8.8", False), ("134744072", False), ("example.org", False), ("::1", True)),
    ],
)
def test_a_name_that_says_it_is_private_is_believed(host: str, private: bool) -> None:
    assert is_private_name(host) is private


def test_only_permitted_addresses_are_left() -> None:
    assert permitted(["10.0.0.1", "8.8.8.8"], private_allowed=False, url="http://x/") == ["8.8.8.8"]
    assert permitted(["10.0.0.1"], private_allowed=True, url="http://x/") == ["10.0.0.1"]
    with pytest.raises(NotPermitted):
        permitted(["10.0.0.1"], private_allowed=False, url="http://x/")


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b?c=d", "https://h.example/b?c=d"),
        ("b", "https://h.example/dir/b"),
        ("//other.example/b", "https://other.example/b"),
        ("https://u:p@other.example:8443/b#f", "https://other.example:8443/b"),
        ("/with space", "https://h.example/with%20space"),
        ("?q", "https://h.example/dir/a?q"),
    ],
)
def test_a_redirect_leads_where_the_rules_of_urls_say(location: str, target: str) -> None:
    assert redirect_target("https://h.example/dir/a", location, downgrade_allowed=False) == target


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://h.example/a", "data:,x", "javascript:1", "sftp://h/x"]
)
def test_a_redirect_reaches_nothing_but_http(location: str) -> None:
    with pytest.raises(NotPermitted):
        redirect_target("http://h.example/a", location, downgrade_allowed=True)


def test_a_redirect_gives_up_tls_only_where_allowed() -> None:
    with pytest.raises(NotPermitted):
        redirect_target("https://h.example/a", "http://h.example/a", downgrade_allowed=False)
    assert redirect_target("https://h.example/a", "http://h.example/a", downgrade_allowed=True)
    assert redirect_target("http://h.example/a", "https://h.example/a", downgrade_allowed=False)


@pytest.mark.parametrize("location", ["http://[broken", "https://", "http://h:port/", "http://h\x01/"])
def test_a_redirect_to_no_url_is_a_failed_source(location: str) -> None:
    with pytest.raises(SourceFailed):
        redirect_target("http://h.example/a", location, downgrade_allowed=False)


def test_origins_are_scheme_host_and_port() -> None:
    assert Origin.of("https://H.Example./a") == Origin.of("https://u:p@h.example:443/b")
    assert Origin.of("http://h.example") != Origin.of("https://h.example")
    assert Origin.of("http://h.example:8080") != Origin.of("http://h.example")
