r"""Adapters of text tasks merged by this package, and the same adapters by peft's ``add_weighted_adapter``.

Every task is learned by LoRA adapters on a sentence encoder, once, from the base model. Then the same adapters are
merged by each method one after the other, in several orders; peft merges all at once. The last rows are the same with
all weights of the encoder trained. The tasks' heads are the same in all rows: probes on the base model's features.

Columns are means over the orders: test accuracies, their mean ACC, BWT, the distances of the merged update from the
tasks' mean and from the best approximation of this mean by the adapters' rank, relative to the mean's norm, seconds of
all merges, and MB of what the next merge needs, without samples. Data and encoder are those of
examples/text_classification.py. In the root of the repository, with their folders DIR and MODEL:

    PYTHONPATH=. python examples/adapter_merges.py DIR MODEL --tasks snips emotion agnews
"""

import time
from argparse import ArgumentParser
from statistics import mean

import lightning as L
from peft import LoraConfig, get_peft_model

from examples.adapter_world import World
from examples.text_classification import SentenceEncoder, TextClassifier, TextStream
from lightning_odem import TaskClassifier
from lightning_odem.parameters import load_snapshot

METHODS = ("average", "task_arithmetic", "ties", "closed_form", "isotropic", "opcm", "ode")
FULL = ("average", "ode")
PEFT = {"svd": {}, "cat": {}, "linear": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.5}}
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])


def show(name: str, rows: list[list[float]]) -> None:
    """Print the means over the orders, and the range of ACC."""
    *accuracies, acc, bwt, to_mean, to_best, seconds, size = (mean(column) for column in zip(*rows, strict=True))
    spread = max(row[-6] for row in rows) - min(row[-6] for row in rows)
    each = " ".join(f"{accuracy:8.1f}" for accuracy in accuracies)
    numbers = f"{acc:6.2f} {spread:6.2f} {bwt:6.2f} {to_mean:8.4f} {to_best:8.4f} {seconds:7.1f} {size:7.2f}"
    print(f"{name:16} {each} {numbers}", flush=True)


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("encoder")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--orders", type=int, default=3, help="Orders, each beginning with another task.")
    parser.add_argument("--samples", type=int, default=500, help="Training samples of a task.")
    parser.add_argument("--calibration_size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    L.seed_everything(0)
    tasks = TextStream(given.root, given.encoder, given.samples, tasks=given.tasks, batch_size=32)
    print(f"{'':16} {' '.join(f'{name[:8]:>8}' for name in given.tasks)}    ACC  range    BWT  to mean  to best"
          "       s      MB")  # fmt: skip

    def merge_with(methods: tuple[str, ...], world: World, prefix: str = "") -> None:
        blank = [float("nan")] * 5
        show(f"{prefix}fine-tuned", [[*world.tuned, mean(world.tuned), *blank]])
        for method in methods:
            orders = range(given.orders)
            show(f"{prefix}{method}", [world.merge(method, first, given.calibration_size) for first in orders])

    adapted = TaskClassifier(get_peft_model(SentenceEncoder(given.encoder), CONFIG), lr=2e-3)
    world = World(adapted, tasks, given.epochs, CONFIG.r)
    merge_with(METHODS, world)
    model, incoming = adapted.backbone, world.incoming
    for name, snapshot in incoming.items():
        model.add_adapter(name, CONFIG)
        own = {key.replace(".default.", f".{name}."): tensor for key, tensor in snapshot.items()}
        load_snapshot(adapted, own, own.__contains__)
    for kind, options in PEFT.items():
        shares = [1.0 if "ties" in kind else 1.0 / len(incoming)] * len(incoming)
        start = time.perf_counter()
        model.add_weighted_adapter(list(incoming), shares, kind, kind, svd_rank=CONFIG.r, **options)
        seconds = time.perf_counter() - start
        model.set_adapter(kind)
        merged = [tensor for name, tensor in model.named_parameters() if f".{kind}." in name]
        show(f"peft {kind}", [world.measure([incoming, merged], seconds, kind)])
    merge_with(FULL, World(TextClassifier(given.encoder), tasks, given.epochs, CONFIG.r), "full ")


if __name__ == "__main__":
    main()
