"""Time of a merge beside the forward and backward passes that it makes: all that is more is overhead.

``python examples/flow_times.py MODEL`` takes a timm model, ``test_vit`` (as in configs/digits.yaml), ``resnet20``,
``minilm``, ``quickstart`` or the folder of a Hugging Face text classifier, with random samples. Times are processor
times of one thread, on a GPU wall times: the smallest of all turns, and the median of their overheads. The bare passes
are in batches of one size and, for the second overhead, of the same sizes as the rule's. TFLOP/s are those of the
passes over the time of the merge; the peak is a matrix product's. ``--sizes 32 64`` tries batch sizes.
"""

import argparse
import time
from itertools import product
from pathlib import Path
from statistics import median

import lightning as L
import torch
from flow_models import SEEN, Classifier, passes
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_odem.calibration import CalibrationOptions
from lightning_odem.parameters.snapshot import take_snapshot, undisturbed
from lightning_odem.stream.stream import Stream

ON_GPU = torch.cuda.is_available()


class FlowTimes(L.Callback):  # passes belong to modules that a Trainer runs
    def __init__(self, samples, turns, sizes, rows, **options):
        self.n, self.turns, self.sizes, self.rows = samples, turns, sizes, rows
        self.options = CalibrationOptions(**options)
        names = "rule", "t", "samples", "bare s", "same s", "merge s", "overhead", "TFLOP/s", "of peak", "memory"
        self.table = Table(*names)

    def on_fit_start(self, trainer, module):
        self.module, self.plugin, size = module, trainer.precision_plugin, self.options.batch_size
        base, first, second = take_snapshot(module), module.draw(self.n // 2), module.draw(self.n // 2)
        incoming = {name: value + 1e-3 * torch.randn(value.shape).to(value.dtype) for name, value in base.items()}
        self.drawn = trainer.strategy.batch_to_device(self.plugin.convert_input(first))
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.bare({(True, size): len(first[1])})
        flops, model_bytes = counter.get_total_flops() / len(first[1]), sum(value.nbytes for value in base.values())
        factor = self.plugin.convert_input(torch.randn(*[8192 if ON_GPU else 1024] * 2, device=module.device))
        with self.plugin.forward_context():
            peak = 2 * len(factor) ** 3 / min(seconds(lambda: factor @ factor) for _ in range(9))
        n = 4 * max(self.sizes, default=0)
        self.ms = {
            tried: 1000 / n * min(self.bare({(True, tried): n}) for _ in range(self.turns)) for tried in self.sizes
        }
        for rule, t in self.rows:
            turns = []
            for _ in range(self.turns):
                stream = Stream(rule, base=base, calibration_size=self.n, calibration=self.options)
                stream.merge(module, incoming, "first", 1 / t - 1, first)
                SEEN.clear()
                before = memory(reset=True)
                merged = seconds(lambda: stream.merge(module, incoming, "second", 1.0, second))  # noqa: B023
                held, made = (memory() - before) / model_bytes, dict(SEEN)
                count = {kind: sum(n for key, n in made.items() if key[0] is kind) for kind in (True, False)}
                turns.append((merged, self.bare({(kind, size): n for kind, n in count.items()}), self.bare(made), held))
            merged, bare, same, held = zip(*turns, strict=True)
            speed = flops * (count[True] + count[False] / 3) / min(merged)
            over = [f"{median(turn[0] / turn[k] - 1 for turn in turns):.1%}" if made else "—" for k in (1, 2)]
            cells = f"{min(bare):.3f}", f"{min(same):.3f}", f"{min(merged):.3f}", ", ".join(over)
            cells += f"{speed / 1e12:.4g}", f"{speed / peak:.0%}", f"{max(held):.1f}"
            self.table.add_row(rule, f"{t:g}", f"{count[True]} + {count[False]}", *cells)

    def bare(self, made):
        """Seconds of the passes alone."""
        made = {(kind, min(size, len(self.drawn[1]))): n for (kind, size), n in made.items()}
        with undisturbed(self.module):
            return seconds(lambda: passes(self.module, self.plugin, self.drawn, made))


def seconds(work):
    clock, wait = (time.perf_counter, torch.cuda.synchronize) if ON_GPU else (time.process_time, int)
    started = (wait(), clock())[1]
    return (work(), wait(), clock())[2] - started


def memory(reset=False):
    """Bytes: the peak since the last reset; at a reset, what is held."""
    if ON_GPU:
        return (reset and torch.cuda.reset_peak_memory_stats(), torch.cuda.max_memory_allocated())[1]
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name, default in {"--batch-size": 128, "--samples": 1024, "--turns": 3}.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--sizes", type=int, nargs="*", default=[])
    parser.add_argument("--times", type=float, nargs="*", default=[0.5, 0.125])
    parser.add_argument("--rules", nargs="*", default=["ode_paper", "ode", "isotropic"])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--keep-on-device", action="store_true")
    arguments = vars(parser.parse_args())
    model, precision = map(arguments.pop, ("model", "precision"))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    times = FlowTimes(rows=list(product(arguments.pop("rules"), arguments.pop("times"))), **arguments)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(max_steps=0, devices=1, precision=precision, callbacks=[times], **quiet)
    trainer.fit(Classifier(model), DataLoader([(torch.zeros(1), 0)]))
    Console(width=120).print(times.table, "ms per sample by batch size:", times.ms)


if __name__ == "__main__":
    main()
