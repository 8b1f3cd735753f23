"""The global random state of Python, NumPy and torch, and its continuation in another process."""

import hashlib
import os
import random
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor


def take_random_state() -> dict[str, Any]:
    """The random state, that of the GPUs included, as values that load with ``weights_only=True``.

    Example:
        >>> state = take_random_state()
        >>> first = torch.rand(2), np.random.rand(), random.random()
        >>> load_random_state(state)
        >>> bool((torch.rand(2) == first[0]).all()), np.random.rand() == first[1], random.random() == first[2]
        (True, True, True)
    """
    version, words, gauss = random.getstate()
    algorithm, keys, *rest = cast(tuple, np.random.get_state())  # noqa: NPY002 (that of users' transforms)
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [algorithm, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_random_state(state: dict[str, Any]) -> None:
    """Restore a state of :func:`take_random_state`; if the number of GPUs differs, GPUs keep their own."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    algorithm, keys, *rest = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def random_digest(state: dict[str, Any]) -> str:
    """SHA-256 of a random state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        for part in state[name] if isinstance(state[name], list) else [state[name]]:
            digest.update(part.numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()


class RandomContinuation:
    """Lets a new process draw the random numbers that the process before it would have drawn.

    There are two conditions. When this object is made, the process has the random state in which the stream's first
    process began. And no seed was set and no number drawn between two tasks. Otherwise the process keeps its own
    random state. A dict that is saved with the stream, :attr:`StreamState.random
    <lightning_odem.stream.state.StreamState>`, carries what has to be known: ``began``, ``reseeded`` and ``state``.

    Under strategies for several processes, Lightning sets the seed of ``seed_everything`` again when a fit starts.
    Every task begins with that seed then.
    """

    def __init__(self) -> None:
        self._began = random_digest(take_random_state())
        self._last: dict[str, Any] | None = None
        self._set_anew: dict[str, Any] | None = None

    def before_fit(self, strategy: Strategy) -> None:
        """Note the random state at the start of a fit if Lightning has just set the seed."""
        # All of these strategies set it when they set up the environment, if there is a seed.
        is_set_anew = isinstance(strategy, ParallelStrategy) and "PL_GLOBAL_SEED" in os.environ
        self._set_anew = take_random_state() if is_set_anew else None

    def before_task(self, known: dict[str, Any], is_new_process: bool) -> dict[str, Any]:
        """Restore the random state after the last merge, if the conditions hold.

        Args:
            known: The dict saved with the stream; empty before the first merge.
            is_new_process: Whether another process made the last merge.

        Returns:
            The dict to keep from here on.
        """
        if not known:
            return known
        if self._set_anew is not None:
            if is_new_process:  # it may have drawn numbers since, to build its module
                load_random_state(self._set_anew)
            return known
        if known is self._last:  # and no training has failed in between
            changed = random_digest(take_random_state()) != random_digest(known["state"])
            return {**known, "reseeded": known["reseeded"] or changed}
        if is_new_process and known["began"] == self._began and not known["reseeded"]:
            load_random_state(known["state"])
        return known

    def after_merge(self, known: dict[str, Any]) -> dict[str, Any]:
        """The dict to save after a merge."""
        self._last = {"began": self._began, "reseeded": False, **known, "state": take_random_state()}
        return self._last
