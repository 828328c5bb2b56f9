"""One hash for what plans are made from: sides that agree on it agree on every route."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

_FORMAT = "etha_ray plan 3"
"""Part of every hash, so that two versions which route differently never take each other's plan for their own."""


def digest_inputs(parts: Iterable[bytes | str]) -> str:
    """A hash over ``parts`` in their order, 64 hex digits. How the parts are cut counts: ("ab", "c") is not ("a", "bc")."""
    found = hashlib.sha256(_FORMAT.encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        found.update(b"%s%d:" % (b"s" if isinstance(part, str) else b"b", len(data)))
        found.update(data)
    return found.hexdigest()
