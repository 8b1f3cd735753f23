"""Loading of model folders with the libraries that they are for."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_odem.parameters.model_folder import ADAPTER_CONFIG, ModelFolder

SENTENCES = ["The committee approved the plan.", "How do I reset my password?", "It was a cold night in the mountains."]
_LIBRARIES = ("transformers", "sentence_transformers", "timm", "peft")


class NotLoadableError(Exception):
    """No library at hand loads a folder; the message says why."""


@dataclass
class Loaded:
    """A model in memory, as a library has loaded it.

    Args:
        library: The library and its version.
        kind: The model's class.
        model: The whole model.
        parts: The modules that the weights of each sub-folder are for.
        problems: What the library says about tensors that are missing, unexpected or of other shapes.
    """

    library: str
    kind: str
    model: nn.Module
    parts: Mapping[str, nn.Module]
    problems: set[str] = field(default_factory=set)


def load_folder(path: Path) -> Loaded:
    """Load a folder with its library, on the CPU, without network and without code from the folder.

    Raises:
        NotLoadableError: If no library is known for it, or that is not installed.
    """
    folder = ModelFolder(path)
    if (path / "modules.json").is_file():
        return _sentence_model(folder)
    if folder.is_adapter:
        return _adapter(folder)
    config = folder.config()
    if "architecture" in config:
        return _timm(path)
    if "model_type" in config:
        return load_transformers(path, config)
    raise NotLoadableError("no library is known for its configuration")


def outputs(loaded: Loaded, inputs: Mapping[str, Any]) -> list[Tensor]:
    """What a model makes of inputs."""
    loaded.model.eval()
    with torch.inference_mode():
        if "sentences" in inputs:
            return [loaded.model.encode(inputs["sentences"], convert_to_tensor=True, show_progress_bar=False)]  # type: ignore[operator]
        if "images" in inputs:
            return [loaded.model(inputs["images"])]
        found = loaded.model(**inputs)
    values = found.values() if isinstance(found, Mapping) else found
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def inputs_for(loaded: Loaded, path: Path) -> dict[str, Any]:
    """Sentences and a photograph as a model takes them; empty if it takes something else."""
    if loaded.library.startswith("sentence"):
        return {"sentences": SENTENCES}
    if loaded.library.startswith("timm"):
        channels, *size = loaded.model.pretrained_cfg.get("input_size", (3, 224, 224))  # type: ignore[union-attr, operator]
        return {"images": _photograph(channels, size, next(loaded.model.parameters()).dtype)}
    model = loaded.model.get_base_model() if loaded.library.startswith("peft") else loaded.model  # type: ignore[operator]
    names = signature(model.forward).parameters
    config: Any = model.config
    inputs: dict[str, Any] = {}
    if "input_ids" in names:
        inputs |= _tokens(Path(config._name_or_path or path), config)
        if "decoder_input_ids" in names:
            inputs["decoder_input_ids"] = inputs["input_ids"]
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        size = [size, size] if isinstance(size, int) else list(size)
        dtype = next(model.parameters()).dtype
        inputs["pixel_values"] = _photograph(getattr(vision, "num_channels", 3), size, dtype)
    return inputs


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from logging and from drawing progress bars."""
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    bars: Any = import_module("transformers.utils.logging") if find_spec("transformers") is not None else None
    shown = bars is not None and bars.is_progress_bar_enabled()
    if shown:
        bars.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for tensors that a library makes because the folder lacks them
            yield
    finally:
        if shown:
            bars.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require(name: str) -> Any:
    if find_spec(name) is None:
        raise NotLoadableError(f"{name.replace('_', '-')} is not installed")
    return import_module(name)


def _named(library: Any) -> str:
    return f"{library.__name__.replace('_', '-')} {library.__version__}"


def _sentence_model(folder: ModelFolder) -> Loaded:
    library = _require("sentence_transformers")
    listed = json.loads((folder.path / "modules.json").read_text(encoding="utf-8"))
    # It would run code of a folder on the disk.
    if own := [
        entry.get("type") for entry in listed if not str(entry.get("type")).startswith("sentence_transformers.")
    ]:
        raise NotLoadableError(f"modules.json names classes that are not of sentence-transformers ({own[0]})")
    model = library.SentenceTransformer(str(folder.path), device="cpu", local_files_only=True)
    parts = {entry["path"]: model[number] for number, entry in enumerate(listed)}
    return Loaded(_named(library), type(model).__name__, model, parts)


def load_transformers(path: Path, config: Mapping[str, Any], kind: str | None = None) -> Loaded:
    """Load a folder of transformers as a class of it, by default that of its configuration.

    Raises:
        NotLoadableError: If transformers is not installed.
    """
    library = _require("transformers")
    found: Any = getattr(library, kind or next(iter(config.get("architectures") or ()), ""), None)
    if not (isinstance(found, type) and issubclass(found, library.PreTrainedModel)):
        found = library.AutoModel
    options = {"local_files_only": True, "trust_remote_code": False}
    model, info = found.from_pretrained(path, **options, output_loading_info=True)
    problems = {f"{kind.replace('_', ' ')}: {name}" for kind, names in info.items() for name in map(str, names or ())}
    return Loaded(_named(library), type(model).__name__, model, {"": model}, problems)


def _adapter(folder: ModelFolder) -> Loaded:
    library = _require("peft")
    _require("transformers")
    config = folder.config(ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise NotLoadableError(f"its base model {base or ''} is no folder here".replace("  ", " "))
    of_base = ModelFolder(base).config()
    model = load_transformers(Path(base), of_base, (config.get("auto_mapping") or {}).get("base_model_class")).model
    adapted = library.PeftModel.from_pretrained(model, str(folder.path))
    return Loaded(_named(library), type(model).__name__, adapted, {"": _AdapterTensors(adapted, library)})


class _AdapterTensors(nn.Module):
    """The tensors of an adapter under the names that they have in its file."""

    def __init__(self, adapted: nn.Module, library: Any) -> None:
        super().__init__()
        self._tensors = library.get_peft_model_state_dict(adapted)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._tensors


def _timm(path: Path) -> Loaded:
    library = _require("timm")
    model = library.create_model(f"local-dir:{path}", pretrained=True)
    return Loaded(_named(library), type(model).__name__, model, {"": model})


def _tokens(path: Path, config: Any) -> dict[str, Tensor]:
    """Sentences as the folder's tokenizer divides them, or the first ids if it cannot be loaded."""
    text = getattr(config, "text_config", config)
    size, longest = getattr(text, "vocab_size", 1), getattr(text, "max_position_embeddings", None) or 16
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        made = tokenizer(SENTENCES, padding=True, truncation=True, max_length=min(16, longest), return_tensors="pt")
        if made["input_ids"].max() < size and made["input_ids"].shape[1] <= longest:
            return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
    except Exception:  # libraries raise many types for tokenizers that are not there or not whole
        pass
    ids = torch.arange(3 * min(8, longest)).view(3, -1) % size
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _photograph(channels: int, size: list[int], dtype: torch.dtype) -> Tensor:
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255 - 0.5
    image = nn.functional.interpolate(image, size=tuple(size), mode="bilinear", antialias=True)
    return (image if channels == 3 else image.mean(dim=1, keepdim=True).repeat(1, channels, 1, 1)).to(dtype)
