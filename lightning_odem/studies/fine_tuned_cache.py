"""Fine-tuned models and the files they are kept in."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_odem.methods.needs import Need
from lightning_odem.parameters.files import replacing
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.stream.store import decode, encode
from lightning_odem.studies.training_fingerprint import fingerprint


@dataclass
class FineTuned:
    """A model fine-tuned on one task, and what was collected and measured during its training.

    Args:
        weights: Parameters and buffers that are merged, by name.
        own: The task's own parameters and buffers, such as its head.
        collected: What needs collected during the training, by their class. It is None if there was no training.
        pretrained: Score of the base model on the task, by split.
        fine_tuned: Score of this model on the task, by split.
    """

    weights: Snapshot
    own: Snapshot
    collected: Mapping[type[Need[Any]], Any] = field(default_factory=dict)
    pretrained: dict[str, float] = field(default_factory=dict)
    fine_tuned: dict[str, float] = field(default_factory=dict)


class FineTunedCache:
    """A directory of fine-tuned models, each a ``.safetensors`` file and a ``.json`` file that describes its training.

    Args:
        directory: The directory. It is created when the first model is written.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)

    def path(self, task: str, description: Any) -> Path:
        """Path of the model's ``.safetensors`` file, which need not exist."""
        return self.directory / f"{task}-{fingerprint(description)}.safetensors"

    def load(self, task: str, description: Any, needs: Iterable[Need[Any]] = ()) -> FineTuned | None:
        """Read the model that was trained as described.

        Returns:
            The model; None if there is none, or if one of the needs did not collect during its training.
        """
        path = self.path(task, description)
        if not path.with_suffix(".json").exists():
            return None
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        parts = _split(load_file(path))
        collected = _collected(facts, parts)
        wanted = {type(need) for need in needs if need.collects}
        if any(kind.__name__ not in collected for kind in wanted):
            return None
        return FineTuned(
            weights=parts["weights"],
            own=parts.get("own", {}),
            collected={kind: collected[kind.__name__] for kind in wanted},
            pretrained=facts["pretrained"],
            fine_tuned=facts["fine_tuned"],
        )

    def save(self, task: str, description: Any, model: FineTuned) -> None:
        """Write a model. Its JSON file is written last, so that an interrupted write leaves nothing to load."""
        structure, collected = encode({kind.__name__: found for kind, found in model.collected.items()}, "collected")
        parts = {"weights": model.weights, "own": model.own, "collected": collected}
        tensors = {
            f"{part}/{name}": tensor.contiguous() for part, held in parts.items() for name, tensor in held.items()
        }
        facts = {
            "task": task,
            "collected": structure,
            "pretrained": model.pretrained,
            "fine_tuned": model.fine_tuned,
            "made_by": description,
        }
        path = self.path(task, description)
        with replacing(path) as draft:
            save_file(tensors, draft)
        with replacing(path.with_suffix(".json")) as draft:
            draft.write_text(json.dumps(facts, indent=1, default=repr), encoding="utf-8")


def _collected(facts: Mapping[str, Any], parts: Mapping[str, Snapshot]) -> dict[str, Any]:
    """What needs collected, by the names of their classes."""
    if "collected" in facts:
        return decode(facts["collected"], parts.get("collected", {}))
    # A file of version 0.5 has second moments, and snapshots if a method needed them.
    snapshots = tuple(parts[f"snapshot{number}"] for number in range(facts["snapshots"]))
    return {"SecondMoments": parts.get("second_moments", {}), **({"Snapshots": snapshots} if snapshots else {})}


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Snapshot]:
    parts: dict[str, Snapshot] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts
