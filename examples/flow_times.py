"""Time of a merge beside the forward and backward passes that it makes: all that is more is overhead.

``python examples/flow_times.py MODEL`` takes a timm model, ``quickstart``, ``resnet20``, ``minilm`` or the folder of a
Hugging Face text classifier. Weights and samples are random. On a CPU, times are processor times of one thread; on a GPU,
wall times. The smallest of all turns counts. Bare passes are plain torch on as many samples, which are on the device in
micro-batches of the same size. TFLOP/s are those of the passes over the time of the whole merge, and their peak is that of
one large matrix product. Memory is what a merge takes at most besides what is there before it, in sizes of the model.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lightning as L
import timm
import torch
from cifar_resnet import CifarResNet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_odem.calibration import CalibrationOptions
from lightning_odem.parameters.snapshot import take_snapshot, undisturbed
from lightning_odem.stream.stream import Stream

SEEN: Counter[bool] = Counter()  # samples in passes without and with a gradient
ON_GPU = torch.cuda.is_available()


class Classifier(L.LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.shape = {"quickstart": (1, 32, 32), "resnet20": (3, 32, 32)}.get(name, (128,))
        if name == "resnet20":
            self.model: nn.Module = nn.Sequential(CifarResNet(20), nn.Linear(64, 10))
        elif name == "quickstart":
            self.model = timm.create_model("test_vit", in_chans=1, img_size=32, num_classes=10)
        elif name == "minilm" or Path(name).is_dir():
            import transformers as hf

            kind, small = hf.AutoModelForSequenceClassification, {"hidden_size": 384, "intermediate_size": 1536}
            known = name != "minilm" and kind.from_pretrained(name, num_labels=10)
            self.model = known or kind.from_config(hf.BertConfig(num_hidden_layers=6, num_labels=10, **small))
        else:
            self.model = timm.create_model(name, num_classes=10)
            self.shape = self.model.pretrained_cfg["input_size"]

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(n, *self.shape) if len(self.shape) == 3 else torch.randint(1, 30000, (n, *self.shape))
        return inputs, torch.arange(n) % 10

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        SEEN[torch.is_grad_enabled()] += len(batch[1])
        scores = self.model(batch[0])
        return nn.functional.cross_entropy(getattr(scores, "logits", scores), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


class FlowTimes(L.Callback):  # passes belong to modules that a Trainer runs
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.n, self.size, self.turns = arguments.samples, arguments.batch_size, arguments.turns
        self.sizes, self.sweep = arguments.sizes, "ms per sample by batch size"
        self.table = Table("rule", "t", "samples", "bare s", "merge s", "overhead", "TFLOP/s", "of peak", "memory")

    def on_fit_start(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        self.module, self.plugin = pl_module, trainer.precision_plugin
        base, first, second = take_snapshot(pl_module), pl_module.draw(self.n // 2), pl_module.draw(self.n // 2)
        incoming = {name: value + 1e-3 * torch.randn(value.shape).to(value.dtype) for name, value in base.items()}
        self.on_device = trainer.strategy.batch_to_device(self.plugin.convert_input(first))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.bare(True, self.size)
        flops, model_bytes = counter.get_total_flops() / (self.n // 2), sum(value.nbytes for value in base.values())
        factor = self.plugin.convert_input(torch.randn(*[8192 if ON_GPU else 1024] * 2, device=pl_module.device))
        with self.plugin.forward_context():
            peak = 2 * len(factor) ** 3 / min(seconds(lambda: factor @ factor) for _ in range(9))
        for size in self.sizes:
            self.sweep += f", {size}: {1000 * min(self.bare(True, size) for _ in range(self.turns)):.4g}"
        for rule, t in [
            ("ode_paper", 1 / 2),
            ("ode_paper", 1 / 8),
            ("ode", 1 / 2),
            ("ode", 1 / 8),
            ("isotropic", 1 / 2),
        ]:
            bare, merged, held = [], [], []
            for _ in range(self.turns):
                options = CalibrationOptions(batch_size=self.size)
                stream = Stream(rule, base=base, calibration_size=self.n, calibration=options)
                stream.merge(pl_module, incoming, "first", 1 / t - 1, first)
                SEEN.clear()
                before = memory(reset=True)
                merged.append(seconds(lambda: stream.merge(pl_module, incoming, "second", 1.0, second)))  # noqa: B023
                held.append((memory() - before) / model_bytes)
                made = dict(SEEN)
                bare.append(sum(count * self.bare(gradient, self.size) for gradient, count in made.items()))
            least, done = min(merged), flops * (made.get(True, 0) + made.get(False, 0) / 3)
            ratio = f"{100 * (least / min(bare) - 1):.1f} %" if made else "—"
            cells = (
                f"{min(bare):.3f}",
                f"{least:.3f}",
                ratio,
                f"{done / least / 1e12:.4g}",
                f"{done / least / peak:.0%}",
            )
            counts = f"{made.get(True, 0)} + {made.get(False, 0)}"
            self.table.add_row(rule, f"{t:g}", counts, *cells, f"{max(held):.1f}")

    def bare(self, gradient: bool, size: int) -> float:
        """Seconds per sample of a plain loop over micro-batches."""
        batches = list(zip(*(part.split(size) for part in self.on_device), strict=True))

        def loop() -> None:
            self.module.zero_grad()
            for batch in batches:
                with torch.set_grad_enabled(gradient), self.plugin.forward_context():
                    loss = self.module.training_step(batch)
                if gradient:
                    loss.backward()

        with undisturbed(self.module):
            return seconds(loop) / len(self.on_device[1])


def seconds(work: Callable[[], object]) -> float:
    clock = time.perf_counter if ON_GPU else time.process_time
    synchronize = torch.cuda.synchronize if ON_GPU else lambda: None
    synchronize()
    started = clock()
    work()
    synchronize()
    return clock() - started


def memory(reset: bool = False) -> int:
    """Bytes: the peak since the last reset; with a reset, those held now."""
    if ON_GPU:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="*", default=[], help="batch sizes to try")
    parser.add_argument("--precision", default="32-true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    times = FlowTimes(arguments)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(max_steps=0, devices=1, precision=arguments.precision, callbacks=[times], **quiet)
    trainer.fit(Classifier(arguments.model), DataLoader([(torch.zeros(1), 0)]))
    Console(width=120).print(times.table, times.sweep if times.sizes else "")


if __name__ == "__main__":
    main()
