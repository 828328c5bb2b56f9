"""Requests to etcd: to which endpoint, with which token, how often, and what its errors mean.

Of etcd-sdk-python (or etcd3, which it continues) only the generated stubs are used. Its client class gives an endpoint up for 300 s after
one failure, keeps the token it got first, and ends every watch with its connection. What shapes this file instead:

- An attempt has a deadline of seconds, whatever the caller's patience, and the next one goes to the next endpoint.
- A token runs out, and a simple one is in the server's memory and gone after its restart. etcd refuses a request that has an old one
  before doing anything, so it is sent again with a new one.
- gRPC's threads do not survive a fork. A forked process is told to make a store of its own.
"""

from __future__ import annotations

import itertools
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from etha_ray.errors import ConfigError, OptionalDependencyError, StoreClosedError, StoreError, StoreUnavailableError
from etha_ray.kvstore.patience import ATTEMPT, LEAVE, OwnDeadline

try:
    import grpc

    try:
        from pyetcd import etcdrpc as _etcdrpc
    except ImportError:
        from etcd3 import etcdrpc as _etcdrpc
except (ImportError, TypeError) as error:  # etcd3's stubs end in a TypeError under a protobuf that is too new for them
    raise OptionalDependencyError(f'EtcdStore needs gRPC and the stubs of etcd ({error}): pip install "etha-ray[etcd]"') from error

etcdrpc: Any = _etcdrpc
"""The protocol's messages and stubs."""

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE = 0.1
"""Seconds between two rounds through the endpoints."""
_PAGE = 64
"""Keys read in one request, so that their values come within `ATTEMPT` on a slow network, too."""
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 3000),  # how long connecting may take
    # A watch may be silent for hours: asks whether the other host is still there. etcd takes no more than one such ping in 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
# A connection that breaks shows as any of these; etcd itself says UNAVAILABLE where it has no leader or is shutting down.
_NO_ANSWER = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "INTERNAL", "CANCELLED", "UNKNOWN")
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old")

Method = Callable[["_Endpoint"], Callable[..., Any]]
RANGE: Method = attrgetter("kv.Range")
DELETE_RANGE: Method = attrgetter("kv.DeleteRange")
LEASE_GRANT: Method = attrgetter("lease.LeaseGrant")
LEASE_REVOKE: Method = attrgetter("lease.LeaseRevoke")
KEEP_ALIVE: Method = attrgetter("keep_alive")
TXN: Method = attrgetter("kv.Txn")


@dataclass(frozen=True)
class Security:
    """Who the client is and whom it trusts. Certificates and key are paths of PEM files; without ``tls`` all three are None."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = field(default=None, repr=False)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For gRPC's channels; None without TLS. Raises `ConfigError` naming the file that cannot be used."""
        if not self.tls:
            return None
        # gRPC tells of a bad file only when it connects, and not which it is.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            named, what = self.ca, "ca"
            if self.ca is not None:
                context.load_verify_locations(self.ca)
            if self.cert is not None:
                named, what = f"{self.cert}, {self.key}", "cert and key"
                context.load_cert_chain(self.cert, self.key, password=lambda: "")
            return grpc.ssl_channel_credentials(_content(self.ca), _content(self.key), _content(self.cert))
        except (OSError, ValueError) as error:
            remedy = "give PEM files that this process can read, a key without a passphrase, and the certificate that belongs to it"
            raise ConfigError(f"{what} of an EtcdStore ({named}) cannot be used: {error}; {remedy}") from error


class NoAnswerError(Exception):
    """An attempt after which nobody knows more than before; the message has the reason."""


class _Endpoint:
    """The stubs of one address."""

    def __init__(self, address: str, credentials: Any) -> None:
        self.address = address
        secure = credentials is not None
        self.channel = grpc.secure_channel(address, credentials, _OPTIONS) if secure else grpc.insecure_channel(address, _OPTIONS)
        self.kv, self.lease = etcdrpc.KVStub(self.channel), etcdrpc.LeaseStub(self.channel)
        self.watch, self.auth = etcdrpc.WatchStub(self.channel), etcdrpc.AuthStub(self.channel)

    def keep_alive(self, message: Any, **how: Any) -> Any:
        """One question and its answer of what is a stream in etcd."""
        return next(self.lease.LeaseKeepAlive(iter([message]), **how))


class EtcdClient:
    """One client of an etcd cluster, for any number of threads.

    ``closing`` is set by the owner before it calls `close`: requests under way then end at their next failure, by `StoreClosedError`.
    """

    def __init__(self, addresses: Sequence[str], security: Security, home: str, patience: float, closing: threading.Event) -> None:
        """Connects to nothing yet. ``home`` is what the keys that it writes begin with.

        ``patience`` is for how many seconds a request that gets no answer is sent again.
        """
        self.where = f"etcd://{','.join(addresses)}"
        self.closing = closing
        self._security = security
        self._patience = patience
        self._token: str | None = None
        credentials = security.credentials()
        self._endpoints = [_Endpoint(address, credentials) for address in addresses]
        self._current = 0
        self._home = home
        self._pid = os.getpid()
        self.deadline = OwnDeadline()
        """When this thread's patience ends at the latest."""

    def connect(self, key: bytes, patience: float) -> None:
        """Reads ``key``, to find out within ``patience`` seconds whether anybody answers, and lets this client in."""
        message = etcdrpc.RangeRequest(key=key, count_only=True)
        self.until_answered(lambda: self.attempt(RANGE, message), patience)

    def call(self, method: Method, message: Any, tolerated: str = "") -> Any:
        """The answer to a message that may be carried out more than once; None if it is refused with the status ``tolerated``.

        Raises `StoreUnavailableError` when nobody answers, `ConfigError` when etcd does not let this client in, `StoreError` when it
        refuses what was asked.
        """
        return self.until_answered(lambda: self.attempt(method, message, tolerated))

    def read(self, start: bytes, end: bytes, revision: int = 0) -> tuple[list[Any], int] | None:
        """The entries from ``start`` up to ``end``, all as of one revision, and that revision; of now, if it is 0.

        None if etcd has compacted that revision.
        """
        entries: list[Any] = []
        while True:
            message = etcdrpc.RangeRequest(key=start, range_end=end, revision=revision, limit=_PAGE)
            answer = self.call(RANGE, message, "OUT_OF_RANGE")
            if answer is None:
                return None
            entries += answer.kvs
            revision = revision or answer.header.revision
            if not answer.more:
                return entries, revision
            start = answer.kvs[-1].key + b"\0"

    def watch(self, messages: Iterator[Any]) -> Generator[Any, None, None]:
        """What etcd answers on a stream of watch requests, until the connection breaks; the next call goes to the next endpoint.

        Closing the iterator ends the stream.
        """
        at, call = self._current, None
        try:
            # Without this a server that has lost its cluster keeps the stream, and is silent.
            metadata = (*self._how(at)["metadata"], ("hasleader", "true"))
            call = self._endpoints[at].watch.Watch(messages, metadata=metadata)
            yield from call
        except grpc.RpcError as error:
            logger.debug("a stream of watches ended: %s", self._meaning(at, error))
        except ValueError:  # gRPC says so of a closed channel
            if not self.closing.is_set():
                raise
        finally:
            if call is not None:
                call.cancel()

    def close(self) -> None:
        """Ends all connections, and with them what is under way in other threads. Closing twice is fine."""
        if os.getpid() == self._pid:
            self.closing.set()
            for endpoint in self._endpoints:
                endpoint.channel.close()

    def until_answered(self, attempt: Callable[[], T], patience: float | None = None) -> T:
        """What ``attempt`` returns once it does not raise `NoAnswerError`. Raises `StoreUnavailableError` when patience is over."""
        start = time.monotonic()
        deadline = min(start + (self._patience if patience is None else patience), self.deadline.moment)
        for tried in itertools.count(1):
            try:
                return attempt()
            except NoAnswerError as error:
                if tried % len(self._endpoints) == 0:
                    self._check_open()
                    now = time.monotonic()
                    if now + _PAUSE > deadline:
                        raise StoreUnavailableError(f"no etcd answers at {self.where}, tried for {now - start:.1f} s: {error}") from error
                    self.closing.wait(_PAUSE)
        raise AssertionError("unreachable")

    def attempt(self, method: Method, message: Any, tolerated: str = "") -> Any:
        """`call`, once. Raises `NoAnswerError` when it is not known what became of it; the next attempt goes elsewhere, if it can."""
        if os.getpid() != self._pid:
            raise StoreUnavailableError(
                f"an EtcdStore at {self.where} was made by process {self._pid}, and its connections do not survive the fork: "
                f"make a new store in process {os.getpid()}"
            )
        at = self._current
        try:
            return method(self._endpoints[at])(message, **self._how(at))
        except grpc.RpcError as error:
            if error.code().name == tolerated:
                return None
            raise self._meaning(at, error) from error
        except ValueError:
            self._check_open()  # gRPC says so of a closed channel
            raise

    def _how(self, at: int) -> dict[str, Any]:
        """Metadata and deadline of a request, with a token if this client needs one."""
        timeout = min(LEAVE if self.closing.is_set() else ATTEMPT, self._patience)  # who is silent for so long is left for the next
        token = self._token
        if token is None and self._security.user is not None:
            asked = etcdrpc.AuthenticateRequest(name=self._security.user, password=self._security.password)
            try:
                token = self._endpoints[at].auth.Authenticate(asked, timeout=timeout).token
            except grpc.RpcError as error:
                if "authentication is not enabled" not in (error.details() or ""):
                    raise
                token = ""  # as etcd's own clients do
            self._token = token
        return {"metadata": (("token", token),) if token else (), "timeout": timeout}

    def _meaning(self, at: int, error: Any) -> Exception:
        """What to raise for gRPC's error; lets go of the endpoint or of the token where they are the cause."""
        code, details, user = error.code().name, error.details() or "", self._security.user
        if any(words in details for words in _STALE_TOKEN) and user is not None:
            self._token = None
            return NoAnswerError(details)
        if code in _NO_ANSWER or "too many requests" in details:
            if self._current == at:
                self._current = (at + 1) % len(self._endpoints)
            return NoAnswerError(f"{self._endpoints[at].address}: {details.rstrip('. ')}. {self._remedy(details)}")
        if "user name is empty" in details or code == "UNAUTHENTICATED":
            return ConfigError(f"etcd at {self.where} lets only its users in ({details}): give user= and password=")
        if "authentication failed" in details:
            return ConfigError(f"etcd at {self.where} does not let user {user!r} in: wrong user or password ({details})")
        if code == "PERMISSION_DENIED":
            return StoreError(
                f"etcd at {self.where} does not allow user {user!r} what was asked ({details}): grant it a role with readwrite permission "
                f"on the prefix {self._home!r}"
            )
        if "database space exceeded" in details:
            return StoreError(f"etcd at {self.where} is full ({details}): compact and defragment it, or raise its --quota-backend-bytes")
        if "too large" in details or "larger than max" in details:
            return StoreError(f"etcd at {self.where} takes smaller requests than usual ({details}): raise its --max-request-bytes")
        return StoreError(f"etcd at {self.where} refused a request: {details} ({code})")

    def _remedy(self, details: str) -> str:
        """What may help where there is no connection."""
        security = self._security
        if "verif" in details.lower():
            trusted = "any authority that gRPC knows (ca= names others)" if security.ca is None else f"ca={security.ca!r}"
            return f"The server's certificate is not signed by {trusted}, or not for this host"
        if security.tls and security.cert is None:
            return "Is it running, does it speak TLS, and does it want a client's certificate (cert=, key=)?"
        if security.tls:
            return f"Is it running, does it speak TLS, and does it accept the certificate {security.cert!r}?"
        return "Is it running, is the address right, and does it want TLS (tls=, ca=)?"

    def _check_open(self) -> None:
        if self.closing.is_set():
            raise StoreClosedError(f"the EtcdStore at {self.where} was closed while a request was under way")


def end_of(prefix: bytes) -> bytes:
    """The first key after all that begin with ``prefix``, which must not be made of 0xff alone."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1])


def _content(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
