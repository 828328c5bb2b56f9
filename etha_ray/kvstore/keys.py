"""What may be a key, a value, a pattern or a number in a store, and how keys are written down; no backend in sight.

A key lives under ``{namespace}/{component}/{key}``. Namespace and component have ``%`` and ``/`` percent-escaped, so that the first
two slashes always end them: namespace ``a`` with component ``b/c`` and namespace ``a/b`` with component ``c`` are different places, and a
namespace that is a prefix of another sees nothing of it. The key itself is kept as it is; any text is a key. No escaped name has a ``%``
that ``25`` or ``2F`` does not follow, so components such as ``%lease`` are the stores' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from etha_ray.errors import ConfigError, StoreError

_INTEGER = re.compile(rb"-?[0-9]{1,19}")
_INT64 = range(-(2**63), 2**63)


def escape(what: str, name: str) -> str:
    """``name`` as a part of a whole key. Raises `ConfigError`, saying ``what`` it is, unless it is a text that is not empty."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{what} must be a text that is not empty, not {name!r}")
    check_encodable(what, name)
    return name.replace("%", "%25").replace("/", "%2F")


def check_encodable(what: str, text: str) -> None:
    """Raises `ConfigError` for a text that has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} {text!r} has no UTF-8 form: {error.reason}") from None


def as_bytes(key: str, value: str | bytes) -> bytes:
    """A value as it is stored: text as UTF-8, buffers copied. Raises `TypeError` for anything else."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"value of key {key!r} must be bytes, not {type(value).__name__}")


def text_as_bytes(key: str, value: str) -> bytes:
    """A text as it is stored. Raises `TypeError` for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"value of key {key!r} must be str, not {type(value).__name__}; set_bytes takes bytes")
    return value.encode()


def matcher(key_pattern: str) -> Callable[[str], bool]:
    """Whether a key matches the pattern, in which ``*`` stands for any text and every other character for itself."""
    full_match = re.compile(".*".join(re.escape(part) for part in key_pattern.split("*")), re.DOTALL).fullmatch
    return lambda key: full_match(key) is not None


def added(key: str, stored: bytes | None, n: int) -> int:
    """``n`` plus the decimal number that ``stored`` is (None counts as 0).

    Raises `StoreError` if it is not a number, or if it or the sum does not fit into a signed 64-bit integer.
    """
    if stored is None:
        stored = b"0"
    if not _INTEGER.fullmatch(stored) or int(stored) not in _INT64:
        raise StoreError(f"cannot add to key {key!r}: it holds {short(stored)}, not a 64-bit decimal number; delete or set it first")
    total = int(stored) + n
    if total not in _INT64:
        raise StoreError(f"cannot add {n} to key {key!r}: {stored.decode()} + {n} does not fit into 64 bits")
    return total


def short(value: bytes | None) -> str:
    """A value for a message."""
    if value is None:
        return "missing"
    return repr(value) if len(value) <= 60 else f"{value[:60]!r}... ({len(value)} bytes)"
