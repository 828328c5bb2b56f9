"""One entry of the command queue: how a command and its sender stand in LMDB, and what is left of a damaged one.

An entry is its header, the sender's semaphore name, and the encoded command. What is needed to answer the sender has a checksum of
its own, and so outlives a damaged command.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import msgspec

from etha_ray.tensor_bus.messages import Message, decode_command, encode_command

_HEADER = struct.Struct("<IIQH")  # checksum of what follows up to the command, checksum of the command, command id, name length
_CHECKSUM = struct.Struct("<I")
_AFTER_CHECKSUM = struct.Struct("<IQH")


@dataclass(frozen=True)
class CorruptEntry:
    """An entry that had to be dropped. The sender's fields are None if they could not be read either."""

    position: int
    semaphore_name: str | None
    command_id: int | None
    reason: str


def cost_of(entry: bytes) -> int:
    """Bytes of the map that an entry takes at most: small ones share pages that may be half full, large ones have their own."""
    size = len(entry)
    return 2 * (size + 32) if size < 2000 else size + 4096


def pack_entry(msg: Message) -> bytes:
    """The command as an entry."""
    body = encode_command(msg)
    name = (msg.semaphore_name or "").encode()
    prefix = _AFTER_CHECKSUM.pack(zlib.crc32(body), msg.command_id & 0xFFFFFFFFFFFFFFFF, len(name)) + name
    return _CHECKSUM.pack(zlib.crc32(prefix)) + prefix + body


def unpack_entry(position: int, entry: bytes | None) -> Message | CorruptEntry:
    """The command in what is stored at ``position`` (None: nothing is), or what could be read of a damaged one."""
    if entry is None:
        return CorruptEntry(position, None, None, "the entry is missing")
    if len(entry) < _HEADER.size:
        return CorruptEntry(position, None, None, f"{len(entry)} bytes are too few")
    header_checksum, body_checksum, command_id, name_length = _HEADER.unpack_from(entry)
    start = _HEADER.size + name_length
    if zlib.crc32(entry[_CHECKSUM.size : start]) != header_checksum:
        return CorruptEntry(position, None, None, "its header does not match its checksum")
    try:
        name = str(entry[_HEADER.size : start], "utf-8") or None
    except UnicodeDecodeError as error:
        return CorruptEntry(position, None, command_id, f"its semaphore's name is none: {error}")
    body = entry[start:]
    if zlib.crc32(body) != body_checksum:
        return CorruptEntry(position, name, command_id, "its body does not match its checksum")
    try:
        return decode_command(body)
    except msgspec.DecodeError as error:
        return CorruptEntry(position, name, command_id, f"it is no valid command: {error}")
