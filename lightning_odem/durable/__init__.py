"""A stream's state on disk: written whole or not at all, checked when read, used by one process at a time."""

from lightning_odem.durable.encoding import decode, encode
from lightning_odem.durable.error import StreamInUseError, StreamStateError
from lightning_odem.durable.fingerprint import differences, fingerprint
from lightning_odem.durable.lock import StreamLock
from lightning_odem.durable.store import StreamStore

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
