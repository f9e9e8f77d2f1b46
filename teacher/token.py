"""Where a bearer token is read from and how two of them are compared."""

from __future__ import annotations

import hmac
from pathlib import Path

from engine.errors import Absent, UserError


def read_token(path: str) -> str:
    """The first line of the file, without surrounding white space.

    Raises:
        Absent: there is no such file.
        UserError: it cannot be read, or its first line is empty or not printable ASCII.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise Absent(f"token file {path!r} is not there", remedy="write a token into its first line") from None
    except OSError as error:
        raise UserError(
            f"token file {path!r} cannot be read: {error.strerror}; write a token into its first line"
        ) from None
    line = text.split(b"\n", 1)[0].strip()
    # A header can carry nothing else, and a space would end the token early.
    if not line or not all(0x21 <= byte <= 0x7E for byte in line):
        raise UserError(
            f"token file {path!r}: the first line must be a token of printable ASCII characters without spaces"
        )
    return line.decode("ascii")


def is_authorized(header: str | None, token: str | None) -> bool:
    """Whether an ``Authorization`` header carries ``token``; everyone is when there is none. Takes constant time."""
    if token is None:
        return True
    return header is not None and hmac.compare_digest(header.encode("utf-8", "replace"), f"Bearer {token}".encode())
