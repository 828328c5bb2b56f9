"""The errors of the torch stores: each is etha_ray's and torch's at once, so that code written for either catches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import DistNetworkError, DistStoreError, QueueEmptyError

from etha_ray.errors import StoreError, StoreTimeoutError, StoreUnavailableError


class C10dTimeoutError(StoreTimeoutError, DistStoreError):
    """What was waited for did not appear in time; torch's own stores raise `torch.distributed.DistStoreError`."""


class C10dLookupError(C10dTimeoutError, LookupError):
    """The same where torch elastic promises a `LookupError`."""


class C10dUnavailableError(StoreUnavailableError, DistNetworkError):
    """The backend cannot be reached; torch's TCPStore raises `torch.distributed.DistNetworkError`."""


class C10dQueueEmptyError(StoreError, QueueEmptyError):
    """A queue had no element for a pop that does not wait; torch's own stores raise `torch.distributed.QueueEmptyError`."""


@contextmanager
def torch_errors() -> Iterator[None]:
    """A lost connection becomes an error that is torch's as well."""
    try:
        yield
    except StoreUnavailableError as error:
        raise C10dUnavailableError(str(error)) from error
