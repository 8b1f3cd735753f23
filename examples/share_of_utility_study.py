"""A study of the trade-off: a stream merged for shares w of its last task from 0 to 1; the others share the rest.

Run it with ``python examples/share_of_utility_study.py`` (two minutes on two CPU cores, nothing is downloaded), or add
``--config STREAM.yaml --tasks '[a, b]' --dirpath comparison`` for a stream of one's own. Models and merges are kept in
``dirpath``, as by ``lightning-odem compare``. The last line tells how well each rule serves all shares.
"""

import sys
from itertools import cycle
from pathlib import Path

import lightning as L
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from lightning_odem import ContinualTrainer, TaskStream
from lightning_odem.cli import ContinualCLI
from lightning_odem.methods import resolve_method
from lightning_odem.metrics import ACCURACY
from lightning_odem.report.drawing import COLORS, new_figure, open_frame
from lightning_odem.report.tables import number
from lightning_odem.studies import Comparison, StreamPlan, Workbench, run_comparison
from lightning_odem.studies.study import prepare

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"


class SharesTrainer(ContinualTrainer):
    def utility_shares(
        self,
        model: L.LightningModule,
        datamodule: TaskStream,
        tasks: list[str] | None = None,  # the stream's first two
        shares: list[float] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0],  # noqa: B006 (shown in --help)
        methods: list[str] = ["average", "ode"],  # noqa: B006
        calibration_size: int = 1024,
        dirpath: str = "comparison",
        pretrain_epochs: int = 0,
    ) -> Comparison:
        names = tuple(tasks or datamodule.names[:2])
        if not names[1:]:
            raise ValueError(f"A share of the utility needs two tasks at least, got {len(names)}.")
        stream = TaskStream({name: lambda name=name, **_: datamodule[name] for name in names})
        stream.pretraining = datamodule.pretraining
        prepare(self, model, stream, pretrain_epochs)
        others = len(names) - 1
        weights = [(*[(1 - w) / others] * others, w) for w in shares]
        plans = [StreamPlan(0, order, "share", calibration_size, names, w) for order, w in enumerate(weights)]
        bench, resolved = Workbench(self, model, stream, dirpath), {name: resolve_method(name) for name in methods}
        comparison = run_comparison(bench, resolved, plans, Path(dirpath), joint=False)
        figure(comparison).savefig(Path(dirpath) / "utility_shares.png")
        Console().print(table(comparison))
        return comparison


def table(comparison: Comparison) -> Table:
    tasks = comparison.cells[0].report.tasks
    result = Table("method", f"w of {tasks[-1]}", *tasks, "ACC_w", "loss", title="Accuracy (%) of the merged model")
    for method in comparison.methods:
        for report in (cell.report for cell in comparison.select(method=method)):
            percents = map(ACCURACY.text, (*report.accuracy[-1], report.acc()))
            loss = number(report.merges[-1].loss_after, ".3f")
            result.add_row(method, f"{report.weights[-1]:.2f}", *percents, loss)
        result.add_section()
    means = (100 * np.mean([cell.report.acc() for cell in comparison.select(method=m)]) for m in comparison.methods)
    result.caption = f"Mean ACC_w of {', '.join(comparison.methods)}: {', '.join(f'{mean:.1f}' for mean in means)}"
    return result


def figure(comparison: Comparison) -> Figure:
    drawn = new_figure(7.2, 5.0)
    upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for method, style in zip(comparison.methods, cycle(("--", "-", ":", "-.")), strict=False):
        reports = sorted(
            (cell.report for cell in comparison.select(method=method)), key=lambda found: found.weights[-1]
        )
        shares, (*others, last) = [report.weights[-1] for report in reports], reports[0].tasks
        accuracy = 100 * np.array([report.accuracy[-1] for report in reports])
        curves = {
            others[0] if len(others) == 1 else f"mean of the {len(others)} others": accuracy[:, :-1].mean(1),
            last: accuracy[:, -1],
            r"$\mathrm{ACC}_w$": [100 * report.acc() for report in reports],
        }
        if len(others) > 1:
            upper.plot(shares, accuracy[:, :-1], style, color=COLORS[0], linewidth=0.4)
        for (name, values), color in zip(curves.items(), (*COLORS[:2], "black"), strict=True):
            upper.plot(shares, values, style, color=color, marker=".", label=f"{name}, {method}")
        lower.plot(shares, [report.merges[-1].loss_after for report in reports], style, color=COLORS[2], marker=".")
    upper.set_ylabel("accuracy (%)")
    lower.set_ylabel("calibration loss")
    lower.set_xlabel(f"share w of {last} in the utility")
    list(map(open_frame, (upper, lower)))
    drawn.legend(loc="outside right upper", frameon=False)
    return drawn


class SharesCLI(ContinualCLI):
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"utility_shares": {"model", "datamodule"}}


def main() -> None:
    SharesCLI(
        L.LightningModule,
        TaskStream,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=SharesTrainer,
        save_config_callback=None,
        seed_everything_default=0,
        args=["utility_shares", *(sys.argv[1:] or ["--config", str(DIGITS)])],
    )


if __name__ == "__main__":
    main()
