"""CLIP models from a local folder or the Hugging Face hub, read by ``transformers``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

ARCHITECTURE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "projection_dim",
    "hidden_act",
)
"""Entries of a vision tower's configuration that have to be those of its base model."""


def require_transformers() -> Any:
    """Import the package ``transformers``.

    Raises:
        ImportError: If it is not installed; the message names the extra that installs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"This model is read by transformers, which cannot be imported ({error}). "
            "Install it with: pip install 'lightning-odem[clip]'"
        ) from error
    return transformers


def read_clip(source: str) -> tuple[Any, Any, Any]:
    """Read a CLIP model in fp32, its tokenizer and its image processor.

    Args:
        source: Folder that ``save_pretrained`` wrote, or a model id on the hub.

    Raises:
        ImportError: If ``transformers`` is not installed.
        FileNotFoundError: If there is no such folder and no such model on the hub, or the hub cannot be reached.
        ValueError: If the folder is incomplete or corrupt, or holds another kind of model.
    """
    transformers = require_transformers()
    _check_type(transformers, source, "clip")
    with _reading(source):
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source)
        processor = transformers.CLIPImageProcessor.from_pretrained(source)
    return _read_model(transformers.CLIPModel, source), tokenizer, processor


def read_clip_vision(source: str, base: Any = None) -> dict[str, Tensor]:
    """Read the vision tower of a CLIP model, under its names in :class:`~lightning_odem.classifiers.ClipClassifier`.

    Args:
        source: Folder or model id of a ``CLIPVisionModel``, such as ``tanganke/clip-vit-base-patch32_mnist``, or of a
            whole ``CLIPModel``. The text tower is not used.
        base: Configuration of the base model's vision tower, a ``CLIPVisionConfig``; None skips the check.

    Returns:
        Parameters by name, each starting with ``vision_model.``, fp32 on the CPU.

    Raises:
        ImportError: If ``transformers`` is not installed.
        FileNotFoundError: If there is no such folder and no such model on the hub, or the hub cannot be reached.
        ValueError: If the folder is incomplete or corrupt or holds another kind of model, or the tower is not of the
            base model's architecture (``ARCHITECTURE``); both values of every difference are listed.
    """
    transformers = require_transformers()
    _check_type(transformers, source, "clip", "clip_vision_model")
    with _reading(source):
        config = transformers.CLIPVisionConfig.from_pretrained(source)
    values = {name: (getattr(config, name), getattr(base, name)) for name in ARCHITECTURE if base is not None}
    if differing := [f"{name} {own!r}, not {other!r}" for name, (own, other) in values.items() if own != other]:
        raise ValueError(
            f"The vision tower in {source} was not fine-tuned from this base model: it has {'; '.join(differing)}. "
            "Give the base model it was fine-tuned from as `model`."
        )
    state = _read_model(transformers.CLIPVisionModel, source).state_dict()
    # Before version 5 the tower was in a module of its own, and its published weights still have those names.
    return {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in state.items()}


def _check_type(transformers: Any, source: str, *expected: str) -> None:
    # transformers would only warn and continue with a model of random weights.
    with _reading(source):
        found = transformers.PretrainedConfig.get_config_dict(source)[0].get("model_type")
    if found not in expected:
        raise ValueError(f"{source} is a model of type {found!r}; expected is {' or '.join(map(repr, expected))}.")


def _read_model(kind: Any, source: str) -> Any:
    with _reading(source):
        model, found = kind.from_pretrained(source, output_loading_info=True)
    # These would be left at random values too.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{source} is no complete {kind.__name__}: {len(missing)} tensors are missing in its weights "
            f"({', '.join(missing[:3])}, ...)."
        )
    return model.float()


@contextmanager
def _reading(source: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # the type depends on the version of transformers and on the file
        if not Path(source).is_dir():
            raise FileNotFoundError(
                f"{source} is no folder, and the Hugging Face hub gave no CLIP model of that name: {error}"
            ) from error
        raise ValueError(f"The folder {source} holds no CLIP model that can be read: {error}") from error
