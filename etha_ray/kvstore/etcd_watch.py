"""What the waits of a store sleep on: watches of etcd, all on one stream.

A watch begins "now", with no revision, and says when it has begun. That counts as a change, so its wait looks again, and what came between
the look before and the beginning is not lost. The same holds when a stream broke: each watch begins again on the next, and each wait
looks. So nothing depends on revisions, which etcd may have compacted, or lost with its data.

A wait that is content with its first look costs no watch. A thread reads the stream; when that breaks, it opens the next if there are
watches, and ends if there are none.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from etha_ray.kvstore.base import Sleep
from etha_ray.kvstore.etcd_client import EtcdClient, etcdrpc

_PAUSE = 0.1
"""Seconds between two streams."""
_REFUSED_PAUSE = 0.5
"""Seconds between two looks of a wait whose watch etcd refuses."""


class _Watch:
    """One wait's watch: wanted once its wait sleeps, begun when etcd has given it an id."""

    def __init__(self, start: bytes, end: bytes) -> None:
        create = etcdrpc.WatchCreateRequest(key=start, range_end=end)
        self.message = etcdrpc.WatchRequest(create_request=create)
        self.woken = threading.Event()
        self.wanted = False
        self.refused = False
        self.id: int | None = None


class Watches:
    """The watches of one client."""

    def __init__(self, client: EtcdClient) -> None:
        self._client = client
        self._lock = threading.Lock()  # of all below, and of the state of the watches
        self._watches: set[_Watch] = set()
        self._asked: deque[_Watch] = deque()  # etcd answers in this order
        self._messages: queue.SimpleQueue[Any] | None = None  # of the stream, while there is one
        self._reader: threading.Thread | None = None

    @contextmanager
    def changes(self, start: bytes, end: bytes) -> Iterator[Sleep]:
        """`KVStore._changes`, for the keys from ``start`` up to ``end``."""
        watch = _Watch(start, end)
        with self._lock:
            self._watches.add(watch)
        try:
            yield lambda deadline: self._sleep(watch, deadline)
        finally:
            with self._lock:
                self._watches.discard(watch)
                if watch.id is not None:
                    self._cancel(watch.id)

    def wake(self) -> None:
        """`KVStore._wake`."""
        with self._lock:
            for watch in self._watches:
                watch.woken.set()

    def _sleep(self, watch: _Watch, deadline: float) -> None:
        left = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        if watch.refused:
            watch.woken.wait(min(left, _REFUSED_PAUSE))
            watch.refused = False
        else:
            with self._lock:
                if not watch.wanted:
                    watch.wanted = True
                    self._ask(watch)
            watch.woken.wait(left)
        watch.woken.clear()

    def _ask(self, watch: _Watch) -> None:
        if self._messages is not None:
            self._asked.append(watch)
            self._messages.put(watch.message)
        elif self._reader is None:
            self._reader = threading.Thread(target=self._read, name="etha-ray-etcd-watch", daemon=True)
            self._reader.start()

    def _cancel(self, number: int) -> None:
        if self._messages is not None:
            self._messages.put(etcdrpc.WatchRequest(cancel_request=etcdrpc.WatchCancelRequest(watch_id=number)))

    def _read(self) -> None:
        while self._begin():
            messages = self._messages
            assert messages is not None
            with closing(self._client.watch(iter(messages.get, None))) as answers:
                for answer in answers:
                    if not self._take(answer):
                        break
            self._end()
            messages.put(None)  # lets go of gRPC's thread that sends them
            self._client.closing.wait(_PAUSE)

    def _begin(self) -> bool:
        """Asks for all watches on a new stream; False if there are none, and then the thread is over."""
        with self._lock:
            wanted = [watch for watch in self._watches if watch.wanted]
            if not wanted or self._client.closing.is_set():
                self._reader = None
                return False
            self._messages = queue.SimpleQueue()
            self._asked.clear()
            for watch in wanted:
                self._ask(watch)
            return True

    def _end(self) -> None:
        with self._lock:
            self._messages = None
            for watch in self._watches:
                watch.id = None
                watch.woken.set()

    def _take(self, answer: Any) -> bool:
        """Acts on an answer; False if the stream is to be opened anew."""
        with self._lock:
            if answer.created:
                watch = self._asked.popleft()
                watch.woken.set()
                if answer.canceled:  # the token has run out, or the user may not read all of these keys
                    watch.wanted, watch.refused = False, True
                    return False
                if watch in self._watches:
                    watch.id = answer.watch_id
                else:
                    self._cancel(answer.watch_id)
                return True
            for watch in self._watches:
                if watch.id == answer.watch_id:
                    watch.woken.set()
                    # etcd ends a watch when it compacts what the watch has not been told yet.
                    return not answer.canceled
            return True
