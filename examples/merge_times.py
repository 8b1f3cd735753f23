"""Processor time per merge of the methods that need no data, on weights of a real model's size.

Run it with ``python examples/merge_times.py``; the default model, ViT-B/32, takes some minutes and 5 GB. Weights are
random: the time does not depend on what they are worth. Processor time is that of all threads together, so it hardly
depends on what else the machine does; the second column is the share of it inside matrix decompositions.
"""

import argparse
import time

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from lightning_odem.folding import Folding
from lightning_odem.methods import DOPMerge, NUFILTMerge, resolve_method
from lightning_odem.snapshot import take_snapshot

DECOMPOSITIONS = ("aten::_linalg_svd", "aten::_linalg_eigh")
METHODS = {
    "average": "average",
    "interpolation": "interpolation",
    "task arithmetic": "task_arithmetic",
    "TIES": "ties",
    "MagMax": "magmax",
    "OPCM": "opcm",
    "NUFILT": "nufilt",
    "NUFILT, null space only": NUFILTMerge("null_space"),
    "DOP, closed form": DOPMerge(solver="sylvester"),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_base_patch32_clip_224", help="timm model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    module = timm.create_model(arguments.model, num_classes=0)
    base = take_snapshot(module)
    # Task vectors of full rank, as fine-tuning leaves them.
    models = [{name: value + 1e-3 * torch.randn(value.shape) for name, value in base.items()} for _ in range(3)]
    size = sum(value.numel() for value in base.values())
    title = f"{arguments.model}, {size / 1e6:.0f} M weights"
    table = Table("method", "CPU s per merge", "in decompositions", title=title)
    for label in arguments.methods:
        folding = Folding(module, resolve_method(METHODS[label]), base=base)
        folding.fold(models[0], "first")
        folding.fold(models[1], "second")
        started = time.process_time()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            folding.fold(models[2], "third")
        seconds = time.process_time() - started
        averages = profiler.key_averages()
        inside = sum(entry.cpu_time_total for entry in averages if entry.key in DECOMPOSITIONS) / 1e6
        table.add_row(label, f"{seconds:.1f}", f"{inside / seconds:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
