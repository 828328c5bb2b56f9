"""A first-in-first-out queue on any `KVStore`, for any number of producers and consumers.

Two kinds of keys make it, with no lock that could die with its owner:

- **index** ``{name}``: the ids of the elements in order, 16 bytes each, in one key;
- **element** ``{name}/{id}``: the value, under a random id.

A push stores the element, then appends its id to the index: at that moment the element is in the queue. A pop reads the first id, reads
its element and deletes it. Of many that delete one key exactly one is told that it did, and the element is that one's. Only then
does the id leave the index, and whoever finds an id without an element removes it as well, so a consumer killed in between stops nobody.

So each element is handed out once, in the order of the pushes. A killed consumer loses at most the element it had just deleted; a killed
producer leaves at most an element that nobody will see. An id is never pushed twice, so several that remove the same one do not
remove another.
"""

from __future__ import annotations

import uuid

from etha_ray.errors import ValueTooLargeError
from etha_ray.kvstore.base import KVStore

_ID = 16


class Queue:
    """The queue whose index is the key ``name`` of ``store``. A push is two requests to the store, a pop four."""

    def __init__(self, store: KVStore, name: str) -> None:
        self._store = store
        self._name = name

    def push(self, value: bytes) -> None:
        """Puts ``value`` at the end. Raises `ValueTooLargeError` above the backend's limit for the value, or for the index."""
        new = uuid.uuid4().bytes
        self._store.set_bytes(self._element(new), value)
        try:
            self._store.append(self._name, new)
        except ValueTooLargeError:
            self._store.delete(self._element(new))
            raise

    def pop(self) -> bytes | None:
        """Takes the first element, which nobody else gets then; None if the queue is empty. Never waits for an element."""
        while index := self._store.get(self._name):
            first = index[:_ID]
            value = self._store.get(self._element(first))
            mine = value is not None and self._store.delete(self._element(first))
            self._remove(first, index)
            if mine:
                return value
        return None

    def __len__(self) -> int:
        """How many elements there are; one more for each consumer that was killed in a pop, until the next pop."""
        return len(self._store.get(self._name) or b"") // _ID

    def _element(self, which: bytes) -> str:
        return f"{self._name}/{which.hex()}"

    def _remove(self, first: bytes, index: bytes | None) -> None:
        while index is not None and index.startswith(first):
            rest = index[_ID:]
            index = self._store.compare_and_set(self._name, index, rest)
            if index == rest:
                return
