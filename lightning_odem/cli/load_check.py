"""The check of a merged folder: its library loads it, and it computes what the merged weights compute."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_odem.cli.loaders import Loaded, NotLoadableError, inputs_for, load_folder, outputs, quiet
from lightning_odem.parameters.model_files import match_names

_COPIES = 3  # of the model in memory, while one is loaded and another compared with it


def check_by_loading(draft: Path, first: Path, written: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Load a merged folder with the library that it is for, and compare it with the merged weights.

    The expected outputs are those of the first folder's model with the merged tensors copied into it by name, so they
    need neither the file nor the configuration that was written. Inputs are sentences, by the folder's tokenizer, and a
    photograph. A model that is too large for the free memory is not loaded.

    Args:
        draft: The merged folder.
        first: The folder that it is made after.
        written: The merged tensors, for each sub-folder.

    Returns:
        What was checked, or why nothing was, in a line.

    Raises:
        ValueError: If the first folder can be loaded and the merged one cannot, or computes something else.
    """
    size = sum(tensor.nbytes for tensors in written.values() for tensor in tensors.values())
    if _COPIES * size > _free_memory():
        return f"Not checked by loading: {_COPIES} models of {size / 1e9:.1f} GB need more than the free memory."
    with quiet():
        try:
            model = load_folder(first)
        except NotLoadableError as error:
            return f"Not checked by loading: {error}."
        except Exception as error:  # libraries raise many types
            return f"Not checked by loading: {first} cannot be loaded either ({_line(error)})."
        whole = False
        try:
            whole = _fill(model, written)
            inputs = inputs_for(model, first)
            expected = outputs(model, inputs) if inputs else []
            reason = "" if inputs else "its inputs are of no known kind"
        except Exception as error:
            inputs, expected, reason = {}, [], _line(error)
        known, name = model.problems, f"{model.library} ({model.kind})"
    with quiet():
        filled = {place: dict(part.state_dict()) for place, part in model.parts.items()}
        del model
        try:
            loaded = load_folder(draft)
        except Exception as error:
            raise ValueError(
                f"{name} loads {first}, but not the merged folder, so it was not written: {error}"
            ) from error
        if more := sorted(loaded.problems - known):
            raise ValueError(f"{name} does not load the merged folder as a whole, so it was not written: {more[:9]}.")
        _compare_tensors(loaded, filled if whole else {}, written, name)
        if not inputs:
            return f"Checked by loading with {name}: its weights are the merged ones. Outputs not compared: {reason}."
        found = outputs(loaded, inputs)
    if any(bool(each.isnan().any()) or not torch.isfinite(each).any() for each in found):
        raise ValueError(f"The merged model gives no finite numbers in {name}, so it was not written.")
    if whole and [each.dtype for each in expected] == [each.dtype for each in found]:
        _compare_outputs(expected, found, name)
        return f"Checked by loading with {name}: its outputs for {_described(inputs)} are those of the merged weights."
    return f"Checked by loading with {name}: its outputs for {_described(inputs)} are finite."


def check_adapter_by_loading(draft: Path, adapted: Loaded, base: Path) -> str:
    """Load an adapter with peft and compare its outputs with those of the base model that has its updates.

    Args:
        draft: The folder of the adapter.
        adapted: The base model with the updates in its weights.
        base: The folder of the base model.

    Returns:
        What was checked, or why nothing was, in a line.

    Raises:
        ValueError: If peft computes something else.
    """
    with quiet():
        try:
            loaded = load_folder(draft)
            inputs = inputs_for(adapted, base)
            if not inputs:
                return "Checked by loading only: the model's inputs are of no known kind."
            expected = outputs(adapted, inputs)
        except NotLoadableError as error:
            return f"Not checked by loading: {error}."
        except Exception as error:
            raise ValueError(f"The adapter cannot be loaded, so it was not written: {_line(error)}") from error
        found, name = outputs(loaded, inputs), f"{loaded.library} ({loaded.kind})"
    _compare_outputs(expected, found, name)
    return f"Checked by loading with {name}: its outputs for {_described(inputs)} are those of the extracted updates."


def _free_memory() -> float:
    """Bytes of main memory that are free or hold nothing but copies of files; infinite where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def _fill(model: Loaded, written: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Copy merged tensors into a model; whether each of them has a place there."""
    whole = True
    for place, tensors in written.items():
        part = model.parts.get(place, nn.Module())
        inner = next((each for each in part.modules() if hasattr(type(each), "from_pretrained")), None)
        if inner is not None:
            # Names in a file may differ from those in memory; the library itself translates them.
            made, info = type(inner).from_pretrained(  # type: ignore[attr-defined]
                None, config=inner.config, state_dict=dict(tensors), output_loading_info=True
            )
            absent = {str(name) for name in info["missing_keys"]}
            part, tensors = inner, {name: value for name, value in made.state_dict().items() if name not in absent}
            whole &= not info["unexpected_keys"]
        own = part.state_dict()
        names = {name: there for name, there in match_names(list(own), list(tensors)).items() if there in tensors}
        floating = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
        whole &= floating <= set(names.values())
        for name, there in names.items():
            own[name].copy_(tensors[there])
    return whole


def _compare_tensors(
    loaded: Loaded, expected: Mapping[str, Mapping[str, Tensor]], written: Mapping[str, Mapping[str, Tensor]], name: str
) -> None:
    for place in expected.keys() & written.keys():
        found = loaded.parts[place].state_dict()
        wrong = [key for key, tensor in expected[place].items() if key not in found or not _is_same(tensor, found[key])]
        if wrong:
            raise ValueError(f"{name} loads other values than the merged ones, so nothing was written: {wrong[:9]}.")


def _is_same(tensor: Tensor, found: Tensor) -> bool:
    # The file of several precisions has the widest of them.
    return tensor.shape == found.shape and torch.equal(tensor, found.to(tensor.dtype))


def _compare_outputs(expected: list[Tensor], found: list[Tensor], name: str) -> None:
    for own, other in zip(expected, found, strict=True):
        own, other = own.float(), other.float()
        if not torch.allclose(own, other, rtol=1e-3, atol=1e-4 * float(own.abs().max())):
            raise ValueError(
                f"{name} computes other outputs from the merged folder than from the merged weights (by up to "
                f"{float((own - other).abs().max()):.2g}), so it was not written."
            )


def _described(inputs: Mapping[str, object]) -> str:
    kinds = {"input_ids": "3 sentences", "sentences": "3 sentences", "images": "a photograph"}
    kinds |= {"pixel_values": "a photograph"}
    return " and ".join(dict.fromkeys(kinds[key] for key in inputs if key in kinds))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
