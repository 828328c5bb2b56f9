"""A process that pops elements of a queue and prints each on a line of its own, until it is killed."""

from __future__ import annotations

import sys

from etha_ray.kvstore import create_store
from etha_ray.kvstore.c10d import C10dStore

if __name__ == "__main__":
    url, namespace = sys.argv[1:]
    store = C10dStore(create_store(url, namespace=namespace))
    while True:
        print(store.queue_pop("q").decode(), flush=True)  # waits once the pipe is full
