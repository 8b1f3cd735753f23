"""Time and memory of one merge, on weights of a real model's size.

Run it with ``python examples/merge_times.py``; the default model, ViT-B/32, takes about half an hour on one core and
6 GB. Weights are random: time and memory do not depend on what they are worth. Processor time is that of all threads
together, so it hardly depends on what else the machine does. Memory is counted in vectors of the model's size: what the
method keeps from merge to merge, and what the merge takes at most besides what is there before it.

The default method looks at calibration samples; its time is for 64 of them, random pictures of 224 pixels.
"""

import argparse
import resource
import time
from pathlib import Path

import lightning as L
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, multiprocessing, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_odem.methods import Calibration, DOPMerge, MergeMethod, resolve_method
from lightning_odem.parameters.snapshot import take_snapshot
from lightning_odem.stream.stream import Stream

METHODS = {
    "average": "average",
    "interpolation": "interpolation",
    "task arithmetic": "task_arithmetic",
    "TIES": "ties",
    "MagMax": "magmax",
    "OPCM": "opcm",
    "NUFILT": "nufilt",
    "DOP, closed form": DOPMerge(solver="sylvester"),
    "isotropic": "isotropic",
    "closed form": "closed_form",
    "task singular vectors": "task_singular_vectors",
    "default, 64 samples": "ode",
}
SAMPLES = 64


class Classifier(L.LightningModule):
    """A timm model that learns by cross entropy."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Mean cross entropy."""
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent, which never steps."""
        return torch.optim.SGD(self.parameters())


class Merges(L.Callback):
    """Three merges before a training that has no steps: losses are measured on modules that a Trainer runs."""

    def __init__(self, method: MergeMethod) -> None:
        self.method = method

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge, and keep the numbers of the third merge."""
        base = take_snapshot(pl_module)
        size = sum(value.nbytes for value in base.values())
        stream = Stream(self.method, base=base, calibration_size=SAMPLES)
        for task in ("first", "second", "third"):
            # Task vectors of full rank, as fine-tuning leaves them.
            incoming = {name: value + 1e-3 * torch.randn(value.shape) for name, value in base.items()}
            samples = None
            if Calibration() in self.method.needs:
                samples = (torch.randn(SAMPLES, 3, 224, 224), torch.arange(SAMPLES) % 10)
            before, started = resident(), time.process_time()
            stream.merge(pl_module, incoming, task, samples=samples)
            self.seconds = time.process_time() - started
        self.peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / size
        self.kept = (
            sum(leaf.nbytes for leaf in tree_leaves(self.method.state_dict()) if isinstance(leaf, Tensor)) / size
        )


def measure(model: str, label: str) -> tuple[float, float, float]:
    """CPU seconds of the third merge, vectors kept after it and vectors held at most in it."""
    torch.manual_seed(0)
    merges = Merges(resolve_method(METHODS[label]))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(max_steps=0, accelerator="cpu", callbacks=[merges], **quiet)
    trainer.fit(Classifier(model), DataLoader([(torch.zeros(1), 0)]))
    return merges.seconds, merges.kept, merges.peak


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vit_base_patch32_clip_224", help="timm model")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    table = Table("method", "CPU s per merge", "vectors kept", "peak besides", title=arguments.model)
    # A process each, since the peak of a process never falls.
    for label in track(arguments.methods, console=Console(stderr=True), transient=True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, kept, peak = pool.apply(measure, (arguments.model, label))
        table.add_row(label, f"{seconds:.1f}", f"{kept:.2f}", f"{peak:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
