"""``lightning-odem extract``: writes the difference of two models as an adapter of low rank."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from lightning_odem.arguments import check_integer
from lightning_odem.cli.load_check import check_adapter_by_loading
from lightning_odem.cli.loaders import Loaded, NotLoadableError, load_transformers, quiet
from lightning_odem.parameters.files import replacing_folder
from lightning_odem.parameters.low_rank import FactorPair
from lightning_odem.parameters.model_folder import ADAPTER_CONFIG, ModelFolder
from lightning_odem.parameters.weights_writer import WeightsWriter
from lightning_odem.report.plain import plain


@dataclass
class Extracted:
    """The result of an extraction.

    Args:
        modules: Names of the layers that the adapter adapts.
        cut: The share of the difference of their weights that the rank cannot hold, by norm.
        left_out: The norm of the difference of each other tensor.
        share_left_out: The share of these in the whole difference, by norm.
        notes: All this and what else a user should know, a line each.
        checked: What loading the adapter with peft has shown.
    """

    modules: list[str]
    cut: float
    left_out: dict[str, float]
    share_left_out: float
    notes: list[str] = field(default_factory=list)
    checked: str = ""


def extract_adapter(model: str, base: str, output: str, rank: int = 8, overwrite: bool = False) -> Extracted:
    """Write the difference of a fine-tuned model and its base model as a LoRA adapter of peft.

    The weight of every linear layer that differs gets the best update of the given rank, by a singular value
    decomposition of the difference. Embeddings, convolutions, norms and biases are not adapted; how much of the
    difference lies in them is said.

    Args:
        model: Folder of the fine-tuned model, as save_pretrained of transformers writes it.
        base: Folder of the base model. The adapter's configuration names it.
        output: Folder of the adapter.
        rank: Rank of the updates.
        overwrite: Replace an output that exists.

    Returns:
        What was extracted, and what was left out.

    Raises:
        FileExistsError: If the output exists.
        FileNotFoundError: If there are no weights.
        ValueError: If the models do not fit together, or no linear layer differs.
    """
    check_integer("rank", rank, 1)
    target = Path(output).resolve()
    if any(target == entry or target in entry.parents for entry in (Path(model).resolve(), Path(base).resolve())):
        raise ValueError(f"The output {output} would overwrite one of the models; choose another name.")
    if target.exists() and (not overwrite or not (target / ADAPTER_CONFIG).is_file()):
        raise FileExistsError(f"{output} exists already. Choose another output, or overwrite an adapter.")
    own, tuned = _load(base), _load(model, base)
    found, before, after = _differences(own, tuned, model, base)
    layers = {name: module for name, module in own.model.named_modules() if _is_linear(module)}
    names = {f"{name}.weight": name for name in layers if f"{name}.weight" in found}
    tied = {name for name in names if _is_shared(own.model, before[name])}
    adapted = {weight: name for weight, name in names.items() if weight not in tied}
    if not adapted:
        raise ValueError(f"No linear layer of {model} differs from that of {base}: there is nothing to extract.")
    tensors: dict[str, Tensor] = {}
    cut, lost = 0.0, dict.fromkeys(adapted.values(), 0.0)
    for weight, name in adapted.items():
        inputs_first = not isinstance(layers[name], nn.Linear)
        difference = after[weight].float() - before[weight].float()
        first, second = _factors(difference.T if inputs_first else difference, rank)
        tensors |= {f"base_model.model.{name}.lora_A.weight": first, f"base_model.model.{name}.lora_B.weight": second}
        update = (second @ first).T if inputs_first else second @ first
        lost[name] = float(torch.linalg.vector_norm(difference - update))
        before[weight].copy_(before[weight].float() + update)
        cut += lost[name] ** 2
    held = sum(found[weight] ** 2 for weight in adapted) ** 0.5
    left_out = {name: norm for name, norm in found.items() if name not in adapted}
    rest = sum(norm**2 for norm in left_out.values()) ** 0.5
    result = Extracted([*adapted.values()], cut**0.5 / held, left_out, rest / (held**2 + rest**2) ** 0.5)
    result.notes = _notes(result, lost, rank, tuned.problems ^ own.problems)
    turned = any(not isinstance(layers[name], nn.Linear) for name in result.modules)
    config = _config(base, own, result.modules, rank, turned)
    with replacing_folder(output) as draft:
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        header = {"format": "pt", "model": model, "base": base}
        with WeightsWriter(draft / "adapter_model.safetensors", tensors, header) as writer:
            writer.write(tensors)
        result.checked = check_adapter_by_loading(draft, own, Path(base))
    return result


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lightning-odem extract``."""
    parser = ArgumentParser(
        prog="lightning-odem extract", description="Write the difference of two models as a LoRA adapter of peft."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_function_arguments(extract_adapter, as_positional=False, as_group=False, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="Replace an adapter that exists.")
    given = parser.instantiate_classes(parser.parse_args(args))
    del given.config
    try:
        result = extract_adapter(**vars(given))
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(*(f"{plain(line)}\n" for line in [*result.notes, result.checked]), sep="", end="")
    print(f"Adapter: {given.output}")


def _load(path: str, base: str | None = None) -> Loaded:
    """A model in memory, as the class of the base model."""
    config = ModelFolder(base or path).config()
    if "model_type" not in config:
        raise ValueError(f"{base or path} has no config.json of transformers. Give folders that save_pretrained wrote.")
    try:
        with quiet():
            return load_transformers(Path(path), config)
    except NotLoadableError as error:
        raise ValueError(f"To extract an adapter, models are loaded with transformers, and {error}.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error


def _differences(
    own: Loaded, tuned: Loaded, model: str, base: str
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Tensor]]:
    """The norm of the difference of each tensor that differs, and the parameters of both models."""
    before, after = ({name: tensor.detach() for name, tensor in each.model.named_parameters()} for each in (own, tuned))
    shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (before, after)]
    if wrong := [name for name in {**before, **after} if shapes[0].get(name) != shapes[1].get(name)]:
        raise ValueError(
            f"{model} does not have the tensors of {base} in their shapes: {', '.join(wrong[:9])}. Give the model that "
            "it was fine-tuned from."
        )
    # A tensor that is in one folder only has made-up values in the other model.
    absent = {problem.partition(": ")[2] for problem in own.problems | tuned.problems if problem.startswith("missing")}
    before, after = ({name: each[name] for name in each if name not in absent} for each in (before, after))
    norms = {name: float(torch.linalg.vector_norm(after[name].double() - before[name].double())) for name in before}
    if broken := [name for name, norm in norms.items() if norm != norm or norm == float("inf")]:
        raise ValueError(f"{model} or {base} holds infinite or NaN values in {', '.join(broken)}.")
    return {name: norm for name, norm in norms.items() if norm > 0}, before, after


def _is_linear(module: nn.Module) -> bool:
    """A linear layer, or that of transformers with its weight [in, out]."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _is_shared(model: nn.Module, weight: Tensor) -> bool:
    places = [tensor for _, tensor in model.named_parameters(remove_duplicate=False)]
    return sum(tensor.data_ptr() == weight.data_ptr() for tensor in places) > 1


def _factors(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the best update of a rank; of large matrices by a randomised decomposition."""
    if min(difference.shape) <= max(2048, 4 * rank):
        return FactorPair("A", "B", 1.0).factors(difference, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, sizes, right = torch.svd_lowrank(difference, q=min(2 * rank + 8, min(difference.shape)), niter=6)
    return right[:, :rank].T.contiguous(), (left * sizes)[:, :rank].contiguous()


def _notes(result: Extracted, lost: dict[str, float], rank: int, problems: set[str]) -> list[str]:
    worst = max(lost, key=lambda name: lost[name])
    notes = [
        f"Rank {rank} holds all of the difference of {len(result.modules)} linear weights but {result.cut:.2%} (by "
        f"norm), which is discarded; most of it in {worst}."
    ]
    if result.left_out:
        largest = sorted(result.left_out, key=lambda name: -result.left_out[name])
        notes.append(
            f"{len(largest)} other tensors differ and are left out, {result.share_left_out:.2%} of the whole "
            f"difference (by norm): {', '.join(largest[:5])}{', ...' if len(largest) > 5 else ''}."
        )
    if unknown := sorted(problems):
        notes.append(f"What only one of the models has is left out: {', '.join(unknown[:9])}.")
    return notes


def _config(base: str, own: Loaded, modules: list[str], rank: int, turned: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "auto_mapping": {"base_model_class": own.kind, "parent_library": type(own.model).__module__},
        "task_type": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": modules,
        "fan_in_fan_out": turned,
        "bias": "none",
        "inference_mode": True,
    }
