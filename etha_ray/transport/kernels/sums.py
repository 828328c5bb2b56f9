"""A 64-bit checksum of each of many messages in a device's memory, however each is cut into pieces.

A message is read as little-endian words of 8 bytes, the last one filled up with zeros. Its checksum is the sum, modulo 2**64, of
a hash of each word with its place, and of its length: a sum has no order, so all words are hashed at once, and a word counts the same
wherever a piece ends. It finds faults, not forgeries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from etha_ray.accelerator import Accelerator, Lane
from etha_ray.errors import TensorMismatchError, WrongDeviceError
from etha_ray.transport.kernels.source import SLOTS, SUM_EDGES, SUM_PIECES, SUM_TILE, THREADS

PIECE = np.dtype([(name, "<u8") for name in ("address", "index", "words", "message")])
"""As ``struct Piece`` of kernels.cu: whole words that lie together, from the message's word ``index`` on."""
EDGE = np.dtype([("message", "<u8"), ("index", "<u8"), ("bytes", "<u8", (8,))])
"""As ``struct Edge``: a word whose bytes lie at these addresses, 0 for one past the message's end."""

_WORD = 8
_MASK = (1 << 64) - 1


class MessageSums:
    """Checksums of ``messages``, each the bytes of its tensors one after the other. Made once, and taken any number of times."""

    def __init__(self, accelerator: Accelerator, messages: Sequence[Sequence[torch.Tensor]]) -> None:
        """Raises:
        TensorMismatchError: a tensor is not contiguous.
        WrongDeviceError: a tensor is where ``accelerator`` does not reach.
        TransferError: the device has no memory for the tables, or does not take the kernels.
        """
        self._accelerator = accelerator
        self._messages = [tuple(message) for message in messages]  # keeps the memory that the tables have addresses of
        pieces, edges = [], []
        for number, message in enumerate(self._messages):
            for place, tensor in enumerate(message):
                _check(accelerator, tensor, f"message {number}, piece {place}")
            whole, partial = words_of([(tensor.data_ptr(), tensor.nbytes) for tensor in message])
            pieces += [(address, index, words, number) for address, index, words in whole]
            edges += [(number, index, places) for index, places in partial]
        first = np.zeros(len(pieces) + 1, np.int64)
        np.cumsum([-(-words // SUM_TILE) for _, _, words, _ in pieces], out=first[1:])
        self._tiles, self._count, self._edge_count = int(first[-1]), len(pieces), len(edges)
        self._pieces, self._first, self._edges = map(accelerator.upload, (np.array(pieces, PIECE), first, np.array(edges, EDGE)))
        self._sums = accelerator.upload(np.zeros(len(self._messages) * SLOTS, np.uint64))
        for kernel in (SUM_PIECES, SUM_EDGES):
            accelerator.load(kernel)

    def enqueue(self, lane: Lane) -> None:
        """Have ``lane`` make them, after what it has been handed before; keep this until it is done.

        Raises:
            TransferError: the device does not take it.
        """
        with lane.current():
            self._sums.zero_()
        width = self._accelerator.width
        if self._tiles:
            arguments = (self._pieces, self._first, self._count, self._tiles, self._sums)
            self._accelerator.launch(SUM_PIECES, min(self._tiles, width), arguments, lane)
        if self._edge_count:
            blocks = min(-(-self._edge_count // THREADS), width)
            self._accelerator.launch(SUM_EDGES, blocks, (self._edges, self._edge_count, self._sums), lane)

    def values(self) -> list[int]:
        """The checksums, each from 0 to 2**64 - 1, in the messages' order. Only once the lane is done.

        Raises:
            TransferError: the device reports that something on it failed.
        """
        with self._accelerator.current().current():
            parts: np.ndarray[Any, Any] = self._sums.cpu().numpy().view(np.uint64).reshape(-1, SLOTS)
        sums = parts.sum(axis=1, dtype=np.uint64)
        lengths = (sum(tensor.nbytes for tensor in message) for message in self._messages)
        return [(int(value) + mixed(length, _MASK)) & _MASK for value, length in zip(sums, lengths, strict=True)]


def words_of(pieces: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int, int]], list[tuple[int, tuple[int, ...]]]]:
    """A message's words: those whole within a piece, as (address, index of the first, number), and the others, as (index, addresses
    of its 8 bytes). ``pieces``: address and bytes of each.
    """
    whole: list[tuple[int, int, int]] = []
    partial: dict[int, list[int]] = {}
    offset = 0
    for address, nbytes in pieces:
        head = min(-offset % _WORD, nbytes)
        words, tail = divmod(nbytes - head, _WORD)
        if words:
            whole.append((address + head, (offset + head) // _WORD, words))
        for place in (*range(head), *range(nbytes - tail, nbytes)):
            index, byte = divmod(offset + place, _WORD)
            partial.setdefault(index, [0] * _WORD)[byte] = address + place
        offset += nbytes
    return whole, [(index, tuple(places)) for index, places in partial.items()]


def mixed(word: int, index: int) -> int:
    """What a word adds to the checksum, as ``mixed`` of kernels.cu has it."""
    value = word ^ (index + 1) * 0x9E3779B97F4A7C15 & _MASK
    for _ in range(2):
        value = (value ^ value >> 32) * 0xD6E8FEB86659FD93 & _MASK
    return value ^ value >> 32


def _check(accelerator: Accelerator, tensor: torch.Tensor, name: str) -> None:
    if not accelerator.reaches(tensor.device):
        raise WrongDeviceError(f"{name}: a {tensor.device} tensor, which {accelerator.device} does not reach; sum it where it is")
    if not tensor.is_contiguous():
        raise TensorMismatchError(f"{name}: strides {tensor.stride()} are not contiguous; give its contiguous parts one by one")
