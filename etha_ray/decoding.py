"""Bytes that another process wrote, taken apart: whatever is wrong with them is one error, and they can make nothing but plain data."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

import msgspec

T = TypeVar("T")


class Decoder(Generic[T]):
    """Of msgpack. Made at import: threads that first decode a type at the same time crash in msgspec."""

    @overload
    def __init__(self: Decoder[T], kind: type[T]) -> None: ...

    @overload
    def __init__(self, kind: Any) -> None: ...

    def __init__(self, kind: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind)

    def decode(self, data: bytes | bytearray | memoryview) -> T:
        """What ``data`` stands for; raises `msgspec.DecodeError`, also where text is no UTF-8, or lists lie in lists without end."""
        try:
            return self._decoder.decode(data)  # type: ignore[no-any-return]
        except (UnicodeDecodeError, RecursionError) as error:
            raise msgspec.DecodeError(f"{type(error).__name__}: {error}") from error
