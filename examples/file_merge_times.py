"""Time and memory of merging folders of models, as ``lightning-odem merge`` does.

Run it with ``python examples/file_merge_times.py``. It writes a base model and three models of random weights and
merges them by each method, in a process of its own. Memory is what a merge takes at most above what the process holds
before it, in sizes of one model's file. With ``--mergekit /path/to/mergekit-pytorch``, that program merges the same
files too; what it takes to print its help is subtracted. ``--fusionbench`` measures FusionBench, if it is installed.
"""

import argparse
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from file_merge_peers import FUSION_BENCH, MERGEKIT, measure_fusionbench, measure_mergekit, resident
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import multiprocessing

from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.methods import BaseModel, resolve_method

METHODS = ("average", "interpolation", "task_arithmetic", "ties", "magmax", "opcm", "isotropic", "closed_form")


def write_folders(model: str, place: Path, dtype: torch.dtype) -> None:
    """A base model and three models fine-tuned from it, each in a folder."""
    torch.manual_seed(0)
    base = timm.create_model(model, num_classes=0).state_dict()
    for name in ("base", "first", "second", "third"):
        step = 0.0 if name == "base" else 1e-3
        found = {key: (value + step * torch.randn(value.shape)).to(dtype) for key, value in base.items()}
        (place / name).mkdir()
        save_file(found, place / name / "model.safetensors")
        (place / name / "config.json").write_text("{}")


def measure_files(place: Path, label: str) -> tuple[float, float]:
    """CPU seconds of a merge of folders, and sizes of one file held at most in it."""
    paths = [str(place / name) for name in ("first", "second", "third")]
    method = resolve_method(label)
    base = str(place / "base") if BaseModel() in method.needs else None
    size = (place / "base" / "model.safetensors").stat().st_size
    before, started = resident(), time.process_time()
    merge_checkpoints(paths, str(place / "merged"), method, base, overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return time.process_time() - started, peak / size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_base_patch32_clip_224", help="timm model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="path of mergekit-pytorch, measured beside")
    parser.add_argument("--fusionbench", action="store_true", help="measure FusionBench beside")
    given = parser.parse_args()
    table = Table("method", "CPU s", "peak, in files", title=f"three files of {given.model}")
    with TemporaryDirectory() as folder:
        # Each in a process of its own: a process's peak never falls, and those that it starts have it too.
        alone = multiprocessing.get_context("spawn").Pool
        with alone(1) as pool:
            pool.apply(write_folders, (given.model, Path(folder), getattr(torch, given.dtype)))
        for label in given.methods:
            with alone(1) as pool:
                seconds, peak = pool.apply(measure_files, (Path(folder), label))
            table.add_row(label, f"{seconds:.1f}", f"{peak:.2f}")
            if given.mergekit and label in MERGEKIT:
                with alone(1) as pool:
                    seconds, peak = pool.apply(measure_mergekit, (Path(folder), label, given.mergekit, given.dtype))
                table.add_row(f"{label}, mergekit", f"{seconds:.1f}", f"{peak:.2f}")
            if given.fusionbench and label in FUSION_BENCH:
                with alone(1) as pool:
                    seconds, peak = pool.apply(measure_fusionbench, (Path(folder), label, given.model))
                table.add_row(f"{label}, FusionBench", f"{seconds:.1f}", f"{peak:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
