"""The agent: one process (or thread) per device that serves the workers beside it.

Its loop takes commands from the queue and never waits. What the commands do is in `service`; here is what keeps the agent
alive: its files, its heartbeat, its loop, its end.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from functools import partial
from typing import Any

from etha_ray.config import (
    FAILURE_TIMEOUT,
    HEARTBEAT_INTERVAL,
    INTEGRITY,
    TRANSPORTS,
    AgentPaths,
    agent_paths,
    check_integrity,
    check_name,
    check_transport,
    store_url,
    worker_environment,
)
from etha_ray.cuda.gpus import see_only
from etha_ray.errors import ConfigError, QueueHeldError, StoreError
from etha_ray.kvstore import KVStore, create_store
from etha_ray.processes import permit_tracing, process_start_time
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.history import History, Observer
from etha_ray.tensor_bus.host import HostNonce, host_identity
from etha_ray.tensor_bus.jobs import Jobs
from etha_ray.tensor_bus.leftovers import claim, leave_folder, sweep
from etha_ray.tensor_bus.messages import Message
from etha_ray.tensor_bus.network import AgentNetwork, address_towards
from etha_ray.tensor_bus.pinned import Pinned
from etha_ray.tensor_bus.presence import Presence
from etha_ray.tensor_bus.records import AgentRecord
from etha_ray.tensor_bus.service import BusService
from etha_ray.tensor_bus.ways import Ways
from etha_ray.transport.base import OneSidedTransport
from etha_ray.transport.checked import CheckedTransport
from etha_ray.transport.network import DEFAULT_MEMORY_BUDGET

logger = logging.getLogger(__name__)

_SAY_AGAIN = 60.0
"""Seconds after which the log says once more that the queue is held up."""


class TensorBusAgent:
    """Serves the workers of one device.

    Args:
        rank: this agent's rank in its pool.
        store: where agents find one another. Stays the caller's to close.
        paths: command queue and state file; by default those of ``rank`` in the default namespace.
        device: what it is pinned to: "cpu", or "cuda:N", N being the node's own number of the GPU.
        ordinal: what this process calls that GPU; by default N. 0 where it sees no other.
        threads: threads that copy; by default all cores of this process.
        mapped: what moves bytes on this host, instead of what suits the device (`pinned`). Closed with the agent.
        transport: how it reads what others hold. "auto": mapped from memory where they share it, else over the network. "mapped", "nccl"
            or "tcp" are that way alone, also within one host; what cannot go so fails with `NoTransportError` when it is registered.
        host: the address of this host that agents of other hosts connect to; without one, only this host's agents are reached.
        memory_budget: bytes of staging memory that transfers between hosts may have, over all that are under way.
        integrity: "auto" compares the checksums of what comes from other hosts with those of what was sent, "on" also looks at what is
            copied within this host, "off" does neither. It is this agent's choice for what it receives.
        restarts: somebody starts this agent again if it dies: who waits for it then goes on waiting, for a while.
        observer: told twice a second what ended, on a thread of its own; what it takes delays no transfer.

    Raises:
        AgentBusyError: another live agent serves these paths.
        ConfigError: the budget is too small, or ``host`` is no address of this host.
        UnsafePathError: a path belongs to another user.
    """

    def __init__(
        self,
        rank: int,
        store: KVStore,
        *,
        paths: AgentPaths | None = None,
        device: str = "cpu",
        ordinal: int | None = None,
        threads: int | None = None,
        mapped: OneSidedTransport | None = None,
        transport: str = "auto",
        host: str | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        integrity: str = "auto",
        observer: Observer | None = None,
        restarts: bool = False,
    ) -> None:
        self.rank = rank
        check_integrity(integrity)
        check_transport(transport)
        pinned = Pinned.to(device, ordinal)
        if pinned.ordinal is not None:
            permit_tracing()  # other agents take from it what its workers gave it alone
        self.paths = paths or agent_paths(rank)
        self._store = store
        self._stopping = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._turned = time.monotonic()
        self._held_said = -math.inf
        self._observer = observer
        self._history = History(observed=observer is not None)
        incarnation = secrets.token_hex(16)
        with contextlib.ExitStack() as undo:
            self._nonce = HostNonce()
            undo.callback(self._nonce.close)
            self._network: AgentNetwork | None = None
            if host is not None:
                self._network = AgentNetwork(
                    store,
                    host,
                    incarnation,
                    memory_budget,
                    checksums=integrity != "off",
                    accelerator=pinned.accelerator,
                    communicators=pinned.communicators(),
                    path="nccl" if transport == "nccl" else "tcp" if transport == "tcp" else "auto",
                )
                undo.callback(self._network.close)
            address = "" if self._network is None else self._network.address
            self.record = _record(rank, incarnation, self._nonce, self.paths, device, pinned, address, restarts)
            self._state = claim(self.record)
            undo.callback(self._state.close, destroy=True)
            sweep()
            self._queue = CommandQueue(self.paths.command_queue)
            undo.callback(self._queue.close, destroy=True)
            self._jobs = Jobs(self._queue.wake)
            mapped = mapped or pinned.transport(threads or len(os.sched_getaffinity(0)))
            self._mapped = CheckedTransport(mapped) if integrity == "on" else mapped
            ways = Ways(incarnation, self._mapped, None if self._network is None else self._network.transport, transport, pinned.ordinal)
            self._service = BusService(self.record, store, self._state, self._jobs, ways, self._network, self._history)
            self._queue.on_corrupt = self._service.handle_corrupt
            if self._network is not None:
                self._network.serve(self._receive, self._left)
            self._presence = Presence(self.record, store, self._jobs)
            undo.callback(self._presence.close)
            self._state.put_first(self._queue.head())
            self._service.restore()
            while left := self._queue.dequeue_batch(64):
                for message in left:
                    self._service.handle_left_over(message)
            self._state.beat()
            undo.pop_all()

    def start(self, *, dies: bool = False) -> None:
        """`run` on a thread of its own; `stop` ends it."""
        self._thread = threading.Thread(target=self.run, args=(dies,), name=f"etha-ray agent {self.rank}", daemon=True)
        self._thread.start()

    def run(self, dies: bool = False) -> None:
        """Serve until `stop` is called, then clean up. Call it once, on one thread.

        dies: this process is the agent's alone, and is started again. Should the loop fail, it dies as if it were killed: the next one
        takes up what this one served, where an end in order would tell everybody that it is over.
        """
        heart = threading.Thread(target=self._beat, name=f"etha-ray heart {self.rank}", daemon=True)
        heart.start()
        try:
            next_check = 0.0
            while not self._stopping.is_set():
                self._turn()
                now = time.monotonic()
                self._service.expire(now)
                if now >= next_check:
                    next_check = now + HEARTBEAT_INTERVAL
                    self._presence.renew()
                    self._presence.check_store()
                    self._service.check_others(self._presence.silent_since)
                    self._service.tell_status()
        except Exception:
            if dies:
                logger.critical("agent %d: its loop failed, so its process ends, for the next one to go on", self.rank, exc_info=True)
                logging.shutdown()
                os._exit(os.EX_SOFTWARE)
            raise
        finally:
            self._stopping.set()
            heart.join()
            self._shut_down()

    def stop(self, timeout: float = 10.0) -> None:
        """End the loop: transfers under way are cancelled, files and semaphores removed. From any thread; may be repeated.

        Raises TimeoutError if a copy under way takes longer than ``timeout`` seconds.
        """
        self._stopping.set()
        self._jobs.wake()
        if self._thread is not None and self._thread is not threading.current_thread() and not self._stopped.wait(timeout):
            raise TimeoutError(f"agent {self.rank} did not shut down within {timeout:g} s: a copy is still under way")

    @property
    def running(self) -> bool:
        """Whether it has not been told to stop."""
        return not self._stopping.is_set()

    def describe(self) -> dict[str, Any]:
        """Rank, device, the UUID of its GPU, pid, host and paths, and counts of what it serves. From any thread."""
        return {
            "rank": self.rank,
            "device": self.record.device,
            "gpu": self.record.gpu,
            "pid": self.record.pid,
            "hostname": self.record.hostname,
            "state": "running" if self.running else "stopped",
            "incarnation": self.record.incarnation,
            "command_queue_path": self.paths.command_queue,
            "state_path": self.paths.state,
            **self._service.counts(),
        }

    def _turn(self) -> None:
        self._turned = time.monotonic()
        deadline = self._service.next_deadline()
        pause = HEARTBEAT_INTERVAL if deadline is None else min(HEARTBEAT_INTERVAL, max(0.001, deadline - time.monotonic()))
        try:
            for message in self._queue.dequeue_batch(64, block=True, timeout=pause):
                self._service.handle(message)
            results = self._jobs.count()
            if not results:
                return
            # First what came in before these results: a DataRevoked that was sent while a copy ran makes that copy worthless. No
            # more than that, or clients that never pause would keep all results waiting.
            left = self._queue.size()
            while left > 0 and (messages := self._queue.dequeue_batch(min(left, 64))):
                left -= len(messages)
                for message in messages:
                    self._service.handle(message)
        except QueueHeldError:
            self._held_up()
        else:
            self._jobs.run(self._jobs.take(results))

    def _held_up(self) -> None:
        # It beats on, and answers those of other hosts that only look; its workers see for themselves why nothing comes.
        try:
            self._queue.check_free()  # on a busy host somebody may just be slow
        except QueueHeldError as error:
            now = time.monotonic()
            if now - self._held_said > _SAY_AGAIN:
                self._held_said = now
                logger.error("agent %d can take no commands: %s", self.rank, error)

    def _receive(self, message: Message) -> None:
        # Through the queue, which the loop empties before it looks at what jobs came to: see `_turn`. It does not empty it while it
        # shuts down, and must not wait then for who waits here.
        self._queue.enqueue(message, timeout=FAILURE_TIMEOUT)

    def _left(self, incarnation: str, reason: str) -> None:
        self._jobs.post(partial(self._service.agent_left, incarnation, reason))

    def _beat(self) -> None:
        beats = 0
        while not self._stopping.wait(HEARTBEAT_INTERVAL):
            if time.monotonic() - self._turned > FAILURE_TIMEOUT:
                continue  # the loop is stuck, and who waits for it should know
            self._state.beat()
            self._show()
            beats += 1
            if beats % 10 == 0:
                self._state.check_readers()
        self._show()

    def _show(self) -> None:
        if self._observer is None:
            return
        try:
            self._observer(*self._history.take(), self._service.counts())
        except Exception:  # the heart must beat, whatever becomes of who looks on
            logger.exception("agent %d: what observes it failed, and is told no more", self.rank)
            self._observer = None

    def _shut_down(self) -> None:
        # The state file goes last: until then no other agent takes this one's place.
        with contextlib.ExitStack() as steps:
            steps.callback(self._stopped.set)
            steps.callback(leave_folder, self.paths)
            steps.callback(sweep)
            steps.callback(self._nonce.close)
            steps.callback(self._state.close, destroy=True)
            steps.callback(self._state.put_stopped)
            steps.callback(self._queue.close, destroy=True)
            steps.callback(self._service.close)
            steps.callback(self._mapped.close)
            if self._network is not None:
                steps.callback(self._network.close)
            self._presence.leave()
            self._service.leave_all(f"agent {self.rank} was shut down")


def _record(
    rank: int, incarnation: str, nonce: HostNonce, paths: AgentPaths, device: str, pinned: Pinned, address: str, restarts: bool
) -> AgentRecord:
    return AgentRecord(
        rank=rank,
        incarnation=incarnation,
        pid=os.getpid(),
        start_time=process_start_time(os.getpid()) or 0.0,
        hostname=socket.gethostname(),
        host=host_identity(),
        nonce_path=nonce.path,
        nonce=nonce.value,
        command_queue_path=paths.command_queue,
        state_path=paths.state,
        device=device,
        address=address,
        restarts=restarts,
        gpu=pinned.gpu,
        trouble=pinned.trouble,
    )


def main(arguments: list[str] | None = None) -> None:
    """Run one agent in this process, for torchrun or any other launcher: ``python -m etha_ray.tensor_bus.agent --store URL``."""
    parser = argparse.ArgumentParser(prog="python -m etha_ray.tensor_bus.agent", description=main.__doc__)
    parser.add_argument("--store", help="store URL, such as tcp://127.0.0.1:29600, which rank 0 serves; default: ETHA_RAY_STORE")
    parser.add_argument("--rank", type=int, help="this agent's rank; default: RANK, as torchrun sets it")
    parser.add_argument("--namespace", help="name of the pool; default: ETHA_RAY_NAMESPACE, or default")
    parser.add_argument("--device", default="cpu", help="what this agent is pinned to (default: %(default)s)")
    parser.add_argument("--host", help="address for agents of other hosts (default: that on the way to the store, unless loopback)")
    parser.add_argument(
        "--memory-budget", type=int, default=DEFAULT_MEMORY_BUDGET, help="bytes of staging between hosts (default: %(default)s)"
    )
    parser.add_argument(
        "--integrity", choices=INTEGRITY, default="auto", help="check what arrives: from other hosts, all, none (default: %(default)s)"
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="auto", help="how it reads what others hold (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads that copy (default: all cores)")
    parser.add_argument("--restarts", action="store_true", help="whatever started this agent starts it again if it dies")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    rank = options.rank if options.rank is not None else worker_environment().global_rank
    if rank is None:
        parser.error("which agent is this? give --rank, or RANK in the environment (torchrun sets it)")
    url = options.store or store_url()
    if url is None:
        parser.error("where do the agents meet? give --store, or ETHA_RAY_STORE in the environment, which hides a password in it")
    if url.startswith("tcp://") and rank == 0 and "master=" not in url:
        url += ("&" if "?" in url else "?") + "master=1&wait_for_workers=0"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # while it starts: what it has made by then is undone
    try:
        namespace = worker_environment().namespace if options.namespace is None else check_name("namespace", options.namespace)
        store = create_store(url, namespace=namespace)
        agent = TensorBusAgent(
            rank,
            store,
            paths=agent_paths(rank, namespace),
            device=options.device,
            ordinal=see_only(options.device) if options.device.startswith("cuda:") else None,
            threads=options.threads,
            host=options.host or address_towards(url),
            memory_budget=options.memory_budget,
            integrity=options.integrity,
            transport=options.transport,
            restarts=options.restarts,
        )
    except ConfigError as error:
        parser.error(str(error))
    except StoreError as error:
        sys.exit(f"agent {rank} cannot start: {error}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=agent.stop, daemon=True).start())
    logger.info("agent %d serves %s", rank, agent.paths.command_queue)
    agent.run(dies=options.restarts)
    store.close(cleanup=False)  # the other agents still meet here


if __name__ == "__main__":
    main()
