"""What a c10d key is called in a `KVStore`: as it is, but for what a `KVStore` cannot hold and what is needed for queues.

A ``%`` is written ``%25``, and a byte that is no part of a UTF-8 text as ``%`` and its two digits. No name made so has a ``%`` before
anything but two digits, so names with ``%queue`` in them are free for the queues. Those of the queue ``k`` begin with ``k``: who
watches a key sees its queue as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

from etha_ray.kvstore.keys import check_encodable

Key: TypeAlias = "str | bytes"

_QUEUE = "%queue"
_ESCAPED = re.compile("[%\udc80-\udcff]")


def stored_name(key: Key) -> str:
    """Raises `TypeError` unless the key is str or bytes, `ConfigError` for a text that has no UTF-8 form."""
    if isinstance(key, str):
        check_encodable("key", key)
        text = key
    elif isinstance(key, bytes):
        text = key.decode(errors="surrogateescape")  # a byte that does not belong becomes U+DC00 and the byte
    else:
        raise TypeError(f"a key must be str or bytes, not {type(key).__name__}: {key!r}")
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", text)


def queue_name(key: Key) -> str:
    """What everything of the queue ``key`` begins with."""
    return stored_name(key) + _QUEUE


def keys_of(names: Iterable[str]) -> list[bytes]:
    """The keys that have these names; names of queues are left out."""
    return [unquote_to_bytes(name) for name in names if _QUEUE not in name]
