"""Who may read the node's port: by name, by origin, by token, by cookie."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.port_access import Access, is_loopback_name, is_same_origin

TOKEN = "sesame-0123456789abcdef"


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "node.localhost:80",
        "127.0.0.1",
        "127.0.0.1:8080",
        "127.8.9.1:1",
        "[::1]",
        "[::1]:80",
    ],
)
def test_names_of_this_machine(host: str) -> None:
    assert is_loopback_name(host)
    assert Access(None).knows_host(host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil-localhost",
        "127.0.0.1@evil.example",
        "evil.example/127.0.0.1",
        "192.168.0.4:8080",
        "[fe80::1]",
        "[::1",
        "0x7f.1",
        "::1",
    ],
)
def test_names_that_somebody_else_may_have_made_up(host: str) -> None:
    assert not is_loopback_name(host)
    assert not Access(None).knows_host(host)


def test_without_a_name_there_is_no_answer() -> None:
    assert not Access(None).knows_host(None)


def test_with_a_token_every_name_will_do() -> None:
    assert Access(TOKEN).knows_host("gpu-17.cluster:8080")
    assert Access(TOKEN).knows_host(None)


@given(st.text(max_size=40))
def test_no_header_brings_it_out_of_step(text: str) -> None:
    access = Access(TOKEN)

    assert not access.allows(authorization=text, cookie=text)
    assert not access.is_token(text)
    assert isinstance(is_loopback_name(text), bool)
    assert isinstance(is_same_origin(text, text), bool)


def test_the_cookie_proves_the_token_and_does_not_hold_it() -> None:
    access = Access(TOKEN)

    assert TOKEN not in access.cookie
    assert access.allows(authorization=None, cookie=access.cookie)
    assert access.allows(authorization=f"Bearer {TOKEN}", cookie=None)
    assert not access.allows(authorization=None, cookie=TOKEN)
    assert not access.allows(authorization=f"Bearer {access.cookie}", cookie=None)
    assert not access.is_token(access.cookie)


def test_the_cookie_outlives_a_restart_and_not_another_token() -> None:
    assert Access(TOKEN).cookie == Access(TOKEN).cookie
    assert not Access(TOKEN + "x").allows(authorization=None, cookie=Access(TOKEN).cookie)


def test_a_port_without_a_token_gives_no_cookie_and_takes_no_token() -> None:
    assert not Access(None).is_token("")
    with pytest.raises(RuntimeError, match="gives no cookie"):
        _ = Access(None).cookie


@pytest.mark.parametrize(
    ("origin", "host", "is_same"),
    [
        (None, "localhost:80", True),
        (None, None, True),
        ("http://localhost:80", "localhost:80", True),
        ("http://LocalHost:80", "localhost:80", True),
        ("https://evil.example", "localhost:80", False),
        ("http://localhost:81", "localhost:80", False),
        ("null", "localhost:80", False),
        ("", "localhost:80", False),
        ("http://[", "localhost:80", False),
        ("http://localhost", None, False),
    ],
)
def test_a_page_of_another_origin_is_told_apart(origin: str | None, host: str | None, is_same: bool) -> None:
    assert is_same_origin(origin, host) is is_same
