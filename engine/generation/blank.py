"""Tokens that nobody made and nobody looks at: as many as an answer has, in no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast, overload

V = TypeVar("V")


class Repeated(Sequence[V]):
    """``length`` times one value, in no memory: the tokens of an answer that nobody made."""

    __slots__ = ("length", "value")

    def __init__(self, value: V, length: int) -> None:
        self.value = value
        self.length = length

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> V: ...
    @overload
    def __getitem__(self, index: slice) -> Repeated[V]: ...
    def __getitem__(self, index: int | slice) -> V | Repeated[V]:
        if isinstance(index, slice):
            return Repeated(self.value, len(range(*index.indices(self.length))))
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return self.value

    def __iter__(self) -> Iterator[V]:
        return iter((self.value,) * self.length)

    def __add__(self, other: Sequence[V]) -> Repeated[V]:
        return Repeated(self.value, self.length + len(other))

    __radd__ = __add__

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy as np

        return np.full(self.length, self.value, dtype)

    def __repr__(self) -> str:
        return f"Repeated({self.value!r}, {self.length})"


def blank_tokens(num_tokens: int) -> tuple[int, ...]:
    """So many tokens that nobody looks at."""
    return cast(tuple[int, ...], Repeated(0, num_tokens))


def blank_logprobs(num_tokens: int) -> tuple[float, ...]:
    """As many log-probabilities of nothing."""
    return cast(tuple[float, ...], Repeated(0.0, num_tokens))
