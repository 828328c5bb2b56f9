"""Other processes for tests: forked from a clean one that has imported what takes seconds, however many there are."""

from __future__ import annotations

import multiprocessing

fresh = multiprocessing.get_context("forkserver")
"""Starts them. There is one clean process for each that runs tests, so what it imports is said here, for all."""

# Its children are there in milliseconds, and inherit no threads.
fresh.set_forkserver_preload(
    [
        "etha_ray.kvstore.etcd",
        "etha_ray.kvstore.tcp",
        "etha_ray.tensor_bus.agent",
        "etha_ray.tensor_bus.client",
        "tests.chaos.process",
        "tests.tensor_bus.cluster",
        "torch.distributed.tensor",
    ]
)
