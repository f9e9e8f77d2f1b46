"""Who may read the node's port: decided from the headers of a request alone. Pure; what is answered is ``http_port``'s.

Two rules, and one of them always holds:

* there is a token: whoever sends it (``Authorization: Bearer``) or the cookie that a browser got for it. The cookie
  belongs to the name under which the browser knows the node, so a page of another name has none.
* there is none: the port is bound to a loopback address, and ``Host`` must be a name of this machine. Otherwise any
  page on the web could have its own name resolve to 127.0.0.1 and read the port through a visitor's browser (DNS
  rebinding).

A browser says in ``Origin`` which page makes it ask. A page of another origin is refused in both cases.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from teacher.token import is_authorized

_PURPOSE = b"status page of a node"


class Access:
    """Decides for one port.

    Args:
        token: None: none is needed.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._cookie = None if token is None else hmac.new(token.encode(), _PURPOSE, hashlib.sha256).hexdigest()

    @property
    def needs_token(self) -> bool:
        return self._token is not None

    @property
    def cookie(self) -> str:
        """What a browser is given for the token: proves it, does not contain it, and is the same after a restart.

        Raises:
            RuntimeError: there is no token.
        """
        if self._cookie is None:
            raise RuntimeError("a port without a token gives no cookie")
        return self._cookie

    def is_token(self, given: str) -> bool:
        """Whether it is the token itself. Takes constant time."""
        return self._token is not None and is_authorized(f"Bearer {given}", self._token)

    def allows(self, *, authorization: str | None, cookie: str | None) -> bool:
        """By the token, or by the cookie; everyone when there is no token. Takes constant time."""
        if self._cookie is None:
            return True
        by_cookie = cookie is not None and hmac.compare_digest(cookie.encode("utf-8", "replace"), self._cookie.encode())
        return is_authorized(authorization, self._token) or by_cookie

    def knows_host(self, host: str | None) -> bool:
        """Whether ``Host`` is a name under which this port may be asked."""
        return self._token is not None or (host is not None and is_loopback_name(host))


def is_loopback_name(host: str) -> bool:
    """Whether a ``Host`` header, port included or not, names this machine to itself.

    Example::

        assert is_loopback_name("127.0.0.1:8080") and is_loopback_name("[::1]") and is_loopback_name("localhost:80")
        assert not is_loopback_name("127.0.0.1.evil.example")
    """
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    # hostname leaves out what is before an @: such a header was not made by a browser.
    if name is None or "@" in host or "/" in host:
        return False
    name = name.removesuffix(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_same_origin(origin: str | None, host: str | None) -> bool:
    """Whether a request comes from a page of this port, or from no page at all."""
    if origin is None:
        return True
    return _netloc(origin) == (host or "").lower()


def _netloc(origin: str) -> str | None:
    """Host and port of an ``Origin`` header; None: there are none ("null", which a sandboxed page sends)."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
