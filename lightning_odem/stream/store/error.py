"""What can be wrong with the state of a stream on disk."""


class StreamStateError(ValueError):
    """The state of a stream on disk cannot be taken up; the message names the file and what was found in it."""


class DamagedFileError(StreamStateError):
    """A file is missing or is not what was written; an older generation may be whole."""


class StreamInUseError(RuntimeError):
    """Another process, or another object of this one, has the stream; the message names it."""
