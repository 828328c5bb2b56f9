"""Messages that are nearly right: real ones with something changed in them."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from etha_ray.decoding import Decoder

_STRANGE: list[Any] = [
    None, True, 0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 0.0, -1.5, float("nan"), float("inf"), 1e308,
    "", "x", "..", "a/b", "a\0b", "\ud7ff", "x" * 70_000, b"", b"\0", b"\xff" * 9, b"x" * 70_000, [], {}, [[]], [None], {"a": 1},
    "send", "recv", "no", "soon", "/etc/passwd", "/dev/shm/x", "/proc/1/fd/0",
]  # fmt: skip


def mutated(data: bytes, random: random.Random) -> bytes:
    """Most often the same structure with other values in it, sometimes other bytes."""
    kind = random.random()
    if kind < 0.1 or not _is_msgpack(data):
        return other_bytes(data, random)
    tree = msgspec.msgpack.decode(data)
    for _ in range(1 if kind < 0.7 else random.randrange(2, 6)):
        tree = _changed(tree, random)
    try:
        return msgspec.msgpack.encode(tree)
    except RecursionError:  # it has been made deeper again and again
        return other_bytes(data, random)


def other_bytes(data: bytes, random: random.Random) -> bytes:
    """Cut short, spliced, or with bits turned."""
    choice = random.randrange(4)
    if choice == 0:
        return data[: random.randrange(len(data))]
    if choice == 1:
        return random.randbytes(random.randrange(64))
    if choice == 2:
        at = random.randrange(len(data))
        return data[:at] + data[random.randrange(len(data)) :] + data[at:]
    changed = bytearray(data)
    for _ in range(random.randrange(1, 4)):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _changed(tree: Any, random: random.Random) -> Any:
    if isinstance(tree, dict) and tree and random.random() < 0.9:
        key = random.choice(list(tree))
        choice = random.random()
        if choice < 0.1:
            return {name: value for name, value in tree.items() if name != key}
        if choice < 0.15:
            return {**tree, f"{key}2": tree[key]}
        return {**tree, key: _changed(tree[key], random)}
    if isinstance(tree, list) and tree and random.random() < 0.8:
        at = random.randrange(len(tree))
        choice = random.random()
        if choice < 0.15:
            return tree[:at] + tree[at + 1 :]
        if choice < 0.3:
            return tree[:at] + [tree[at]] * random.choice([2, 3, 300]) + tree[at:]
        return [*tree[:at], _changed(tree[at], random), *tree[at + 1 :]]
    if isinstance(tree, int) and not isinstance(tree, bool) and random.random() < 0.4:
        return max(-(2**63), min(2**64 - 1, tree + random.choice([-1, 1, 2**20, -(2**20), 2**40])))
    if isinstance(tree, bytes) and tree and random.random() < 0.6:
        return mutated(tree, random)
    if random.random() < 0.05:
        nested: Any = tree
        for _ in range(600):
            nested = [nested]
        return nested
    return random.choice(_STRANGE)


def _is_msgpack(data: bytes) -> bool:
    try:
        Decoder(Any).decode(data)
    except msgspec.DecodeError:
        return False
    return True
