"""A stream's state on disk: written completely or not at all, checked when read, used by one process at a time."""

from lightning_odem.stream.store.encoding import decode, encode
from lightning_odem.stream.store.error import StreamInUseError, StreamStateError
from lightning_odem.stream.store.fingerprint import differences, fingerprint
from lightning_odem.stream.store.lock import StreamLock
from lightning_odem.stream.store.store import StreamStore

__all__ = [
    "StreamInUseError",
    "StreamLock",
    "StreamStateError",
    "StreamStore",
    "decode",
    "differences",
    "encode",
    "fingerprint",
]
