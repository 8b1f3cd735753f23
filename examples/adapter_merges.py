r"""Adapters of text tasks merged by this package, and the same adapters by peft's ``add_weighted_adapter``.

Every task is learned by LoRA adapters on a sentence encoder, once, from the base model. Then the same adapters are
merged by each method. The table has the mean accuracy over the tasks, and how far the merged update is from the mean of
the tasks' updates, relative to its norm. Data and encoder are those of examples/text_classification.py. In the root of
the repository, with DIR for the folder of the tasks and MODEL for that of the encoder:

    PYTHONPATH=. python examples/adapter_merges.py DIR MODEL --tasks snips emotion agnews
"""

import time
from argparse import ArgumentParser

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from examples.text_classification import SentenceEncoder, TextStream
from lightning_odem import Stream, TaskClassifier
from lightning_odem.parameters import Snapshot, load_snapshot, take_snapshot
from lightning_odem.stream.attach import attached
from lightning_odem.tasks import Task

METHODS = ("average", "task_arithmetic", "ties", "closed_form", "isotropic", "opcm", "ode")
PEFT = {"svd": {}, "cat": {}, "linear": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.5}}
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])


def updates(model: nn.Module, adapter: str) -> Tensor:
    layers = [layer for layer in model.modules() if hasattr(layer, "get_delta_weight")]
    return torch.cat([layer.get_delta_weight(adapter).detach().flatten() for layer in layers])


def trainer(**options: int) -> L.Trainer:
    return L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu", **options)


def accuracies(model: TaskClassifier, tasks: list[Task]) -> list[float]:
    return [100 * trainer().test(model, datamodule=task, verbose=False)[0]["test/acc"] for task in tasks]


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("encoder")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    L.seed_everything(0)
    tasks = list(TextStream(given.root, given.encoder, given.samples, tasks=given.tasks, batch_size=32))
    model = TaskClassifier(get_peft_model(SentenceEncoder(given.encoder), CONFIG), lr=2e-3)
    model.normalize = nn.Identity()  # type: ignore[assignment]  # token ids are no images

    def is_adapter(name: str) -> bool:
        return ".lora_" in name and ".default." in name

    def shared(name: str) -> bool:
        return not name.startswith("heads")

    base, incoming, tuned = take_snapshot(model, shared), {}, []
    products: list[Tensor] = []
    for task in tasks:
        load_snapshot(model, base, shared)
        trainer(max_epochs=given.epochs).fit(model, datamodule=task)
        incoming[task.task_name] = take_snapshot(model, shared)
        products.append(updates(model, "default"))
        tuned += accuracies(model, [task])
    mean = torch.stack(products).mean(0)

    def show(name: str, found: list[float], update: Tensor, seconds: float = 0.0) -> None:
        distance = float((update - mean).norm() / mean.norm())
        print(f"{name:24} {' '.join(f'{each:5.1f}' for each in found)}  {sum(found) / len(found):5.1f}"
              f"  {distance:8.3f}  {seconds:7.2f}", flush=True)  # fmt: skip

    print(f"{'':24} {' '.join(f'{name[:5]:>5}' for name in incoming)}    ACC  distance  seconds")
    show("fine-tuned", tuned, mean)
    for method in METHODS:
        stream = Stream(method, base=base, calibration_size=96)
        with attached(model):
            start = time.perf_counter()
            for task in tasks:
                samples = stream.draw(task.calibration_dataset()) if stream.needs_samples else None
                stream.merge(model, incoming[task.task_name], task.task_name, samples=samples)
            seconds = time.perf_counter() - start
        show(method, accuracies(model, tasks), updates(model, "default"), seconds)

    peft_model = model.backbone
    for name, snapshot in incoming.items():
        peft_model.add_adapter(name, CONFIG)
        own: Snapshot = {key.replace("default", name): value for key, value in snapshot.items() if is_adapter(key)}
        load_snapshot(model, own, own.__contains__)
    for kind, options in PEFT.items():
        shares = [1.0 if "ties" in kind else 1.0 / len(tasks)] * len(tasks)
        start = time.perf_counter()
        peft_model.add_weighted_adapter(list(incoming), shares, kind, kind, svd_rank=CONFIG.r, **options)
        seconds = time.perf_counter() - start
        peft_model.set_adapter(kind)
        show(f"peft {kind}", accuracies(model, tasks), updates(model, kind), seconds)


if __name__ == "__main__":
    main()
