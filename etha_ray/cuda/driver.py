"""libcuda.so.1 by ctypes: devices by UUID, and memory that two processes share.

torch works in each device's primary context, so all that is done here is done there, whichever thread calls. Nothing is initialised
before the first call; in a child of a process that had initialised CUDA the driver refuses all of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import uuid
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any, ClassVar

LIBRARY = "libcuda.so.1"

HANDLE_BYTES = 64
"""Of what `Driver.ipc_handle` and `Driver.export_fabric` give."""

_POSIX_FD, _FABRIC = 1, 8  # CU_MEM_HANDLE_TYPE_...
_BUFFER_ID, _IPC_CAPABLE = 7, 10  # CU_POINTER_ATTRIBUTE_...
_LAZY_PEER_ACCESS = 1
_ON_DEVICE, _READ_AND_WRITE = 1, 3


class DriverError(Exception):
    """The driver refused ``call``; ``name`` is what it calls that, such as ``CUDA_ERROR_INVALID_VALUE``."""

    def __init__(self, call: str, name: str) -> None:
        super().__init__(f"{call}: {name}")
        self.call, self.name = call, name


class _Bytes16(ctypes.Structure):
    _fields_: ClassVar[Any] = [("data", ctypes.c_ubyte * 16)]


class _Bytes64(ctypes.Structure):
    _fields_: ClassVar[Any] = [("data", ctypes.c_ubyte * HANDLE_BYTES)]


class _Access(ctypes.Structure):
    _fields_: ClassVar[Any] = [("kind", c_int), ("id", c_int), ("flags", c_int)]


_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetUuid_v2": [POINTER(_Bytes16), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuMemGetAddressRange_v2": [POINTER(c_uint64), POINTER(c_size_t), c_uint64],
    "cuPointerGetAttribute": [c_void_p, c_int, c_uint64],
    "cuIpcGetMemHandle": [POINTER(_Bytes64), c_uint64],
    "cuIpcOpenMemHandle_v2": [POINTER(c_uint64), _Bytes64, c_uint],
    "cuIpcCloseMemHandle": [c_uint64],
    "cuMemRetainAllocationHandle": [POINTER(c_uint64), c_void_p],
    "cuMemExportToShareableHandle": [c_void_p, c_uint64, c_int, c_uint64],
    "cuMemImportFromShareableHandle": [POINTER(c_uint64), c_void_p, c_int],
    "cuMemRelease": [c_uint64],
    "cuMemAddressReserve": [POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemAddressFree": [c_uint64, c_size_t],
    "cuMemMap": [c_uint64, c_size_t, c_size_t, c_uint64, c_uint64],
    "cuMemSetAccess": [c_uint64, c_size_t, POINTER(_Access), c_size_t],
    "cuMemUnmap": [c_uint64, c_size_t],
}


class Driver:
    """CUDA's driver. All methods may be called from any thread; those that take an address want `current` around them.

    Raises:
        DriverError: (by all methods) it refused.
        OSError: there is no such library.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(library)
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name, None)  # an old driver may lack some
            if function is not None:
                function.argtypes, function.restype = arguments, c_int
        self._lock = threading.RLock()  # a mapping that is collected in here is undone in here
        self._contexts: dict[int, c_void_p] = {}
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise DriverError(name, "not in this driver, which is too old")
        code = function(*arguments)
        if code:
            text = c_char_p()
            known = self._library.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
            raise DriverError(name, text.value.decode() if known and text.value else f"CUDA error {code}")

    # --------------------------------------------------------------------------------------------------- devices

    def count(self) -> int:
        """How many GPUs this process sees."""
        found = c_int()
        self._call("cuDeviceGetCount", ctypes.byref(found))
        return found.value

    def uuid(self, ordinal: int) -> str:
        """What names the GPU, or MIG instance, on this host, whatever a process calls it: ``GPU-`` and 36 characters."""
        found = _Bytes16()
        self._call("cuDeviceGetUuid_v2", ctypes.byref(found), self._device(ordinal))
        return f"GPU-{uuid.UUID(bytes=bytes(found.data))}"

    @contextlib.contextmanager
    def current(self, ordinal: int) -> Iterator[None]:
        """Within, this thread works in the GPU's primary context; afterwards it is where it was."""
        with self._lock:
            if ordinal not in self._contexts:
                context = c_void_p()
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(ordinal))
                self._contexts[ordinal] = context  # kept for good, as torch does
        self._call("cuCtxPushCurrent_v2", self._contexts[ordinal])
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))

    def _device(self, ordinal: int) -> c_int:
        found = c_int()
        self._call("cuDeviceGet", ctypes.byref(found), ordinal)
        return found

    # ------------------------------------------------------------------------------------------ what is at an address

    def range_of(self, address: int) -> tuple[int, int]:
        """Where the allocation that ``address`` is in begins, and its bytes; of memory that is mapped in chunks, the chunk's."""
        base, size = c_uint64(), c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        return base.value, size.value

    def buffer_id(self, address: int) -> int:
        """What tells the allocation from all others of this process, earlier ones too."""
        return self._attribute(address, _BUFFER_ID)

    def is_ipc_capable(self, address: int) -> bool:
        """Whether `ipc_handle` can be made of it: it came from cudaMalloc."""
        return bool(self._attribute(address, _IPC_CAPABLE))

    def _attribute(self, address: int, which: int) -> int:
        found = c_uint64(0)  # some are 4 bytes, which are the lower ones
        self._call("cuPointerGetAttribute", ctypes.addressof(found), which, address)
        return found.value

    # ---------------------------------------------------------------------------------------------- whole allocations

    def ipc_handle(self, base: int) -> bytes:
        """What another process opens the allocation with."""
        found = _Bytes64()
        self._call("cuIpcGetMemHandle", ctypes.byref(found), base)
        return bytes(found.data)

    def ipc_open(self, handle: bytes) -> int:
        """Map another process's allocation, also one of a GPU that this process does not see; its address."""
        found = c_uint64()
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(found), _Bytes64.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        return found.value

    def ipc_close(self, address: int) -> None:
        """Undo one `ipc_open`."""
        self._call("cuIpcCloseMemHandle", address)

    # --------------------------------------------------------------------------------------------------------- chunks

    def chunk_at(self, address: int) -> int:
        """The chunk that is mapped at ``address``; `release` it."""
        found = c_uint64()
        self._call("cuMemRetainAllocationHandle", ctypes.byref(found), address)
        return found.value

    def export_fd(self, chunk: int) -> int:
        """A descriptor of a chunk, to be closed by the caller."""
        found = c_int(-1)
        self._call("cuMemExportToShareableHandle", ctypes.addressof(found), chunk, _POSIX_FD, 0)
        return found.value

    def export_fabric(self, chunk: int) -> bytes:
        """What opens a chunk anywhere in the fabric."""
        found = _Bytes64()
        self._call("cuMemExportToShareableHandle", ctypes.addressof(found), chunk, _FABRIC, 0)
        return bytes(found.data)

    def import_fd(self, fd: int) -> int:
        """The chunk of a descriptor, which may be closed then; `release` it."""
        found = c_uint64()
        self._call("cuMemImportFromShareableHandle", ctypes.byref(found), fd, _POSIX_FD)
        return found.value

    def import_fabric(self, handle: bytes) -> int:
        """The chunk that `export_fabric` described; `release` it."""
        found, given = c_uint64(), _Bytes64.from_buffer_copy(handle)
        self._call("cuMemImportFromShareableHandle", ctypes.byref(found), ctypes.addressof(given), _FABRIC)
        return found.value

    def release(self, chunk: int) -> None:
        """Let go of a chunk; where it is mapped it stays."""
        self._call("cuMemRelease", chunk)

    def reserve(self, size: int) -> int:
        """Addresses for ``size`` bytes."""
        found = c_uint64()
        self._call("cuMemAddressReserve", ctypes.byref(found), size, 0, 0, 0)
        return found.value

    def unreserve(self, address: int, size: int) -> None:
        """Give addresses back, of which nothing is mapped any more."""
        self._call("cuMemAddressFree", address, size)

    def map(self, address: int, size: int, chunk: int) -> None:
        """Map a chunk of ``size`` bytes there; `allow` the use of it then."""
        self._call("cuMemMap", address, size, 0, chunk, 0)

    def allow(self, address: int, size: int, ordinal: int) -> None:
        """Let a GPU of this process read and write what is mapped there."""
        access = _Access(_ON_DEVICE, self._device(ordinal).value, _READ_AND_WRITE)
        self._call("cuMemSetAccess", address, size, ctypes.byref(access), 1)

    def unmap(self, address: int, size: int) -> None:
        """Undo a `map`, or several side by side."""
        self._call("cuMemUnmap", address, size)


_driver: Driver | None = None
_lock = threading.Lock()


def driver() -> Driver:
    """The driver of this process, loaded at the first call. Raises `DriverError` if there is none, or it finds no GPU."""
    global _driver
    with _lock:
        if _driver is None:
            try:
                _driver = Driver()
            except OSError as error:
                raise DriverError("loading it", str(error)) from error
        return _driver


def use(library: str) -> Driver:
    """Have this process use another library instead, such as one that only acts as if there were GPUs."""
    global _driver
    with _lock:
        _driver = Driver(library)
        return _driver
