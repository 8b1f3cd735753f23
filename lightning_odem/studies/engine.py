"""Merges every stream of a plan with every method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lightning_odem.methods import MergeMethod
from lightning_odem.methods.describe import describe_method
from lightning_odem.methods.needs import Offer
from lightning_odem.parameters.task_parameters import as_task
from lightning_odem.report import StreamReport
from lightning_odem.stream.attach import attached
from lightning_odem.stream.measurement import load_task_parameters
from lightning_odem.stream.merging import check_needs
from lightning_odem.stream.trace import Epochs, TrainingTrace
from lightning_odem.studies.cells import Cell, run_cells
from lightning_odem.studies.fine_tuned_cache import FineTuned
from lightning_odem.studies.finetuning import measure
from lightning_odem.studies.memory import peak_memory
from lightning_odem.studies.plan import StreamPlan
from lightning_odem.studies.results import CellResult, Comparison
from lightning_odem.studies.workbench import Workbench
from lightning_odem.tasks import Task


def run_comparison(
    bench: Workbench,
    methods: Mapping[str, MergeMethod],
    plans: Sequence[StreamPlan],
    directory: Path,
    *,
    split: str = "test",
    full_matrix: bool = True,
    joint: bool = True,
    show_progress: bool = True,
) -> Comparison:
    """Merge every stream with every method.

    A cell is one stream merged by one method. Its result is written as soon as it is done, under a hash of everything
    that decides it. A comparison that is started again therefore runs only the missing cells.

    Args:
        bench: The fine-tuned models.
        methods: Methods by label.
        plans: The streams.
        directory: Where the cells are kept, in the subdirectory ``cells``.
        split: ``"test"``, or ``"val"`` for choosing settings.
        full_matrix: Evaluate all tasks seen after each merge. Otherwise only what the final ACC and BWT need is
            evaluated: the new task after each merge, and all tasks after the last merge.
        joint: Also train jointly on all tasks, once per seed.
        show_progress: Show how many cells are done and the time left.
    """
    seeds = dict.fromkeys(plan.seed for plan in plans)
    for seed in seeds:
        for task in bench.stream:
            model = bench.fine_tuned(seed, task.task_name)
            for method in methods.values():
                check_needs(method, Offer(True, True, True, model.collected))
    joint_scores = {seed: bench.joint(seed, split) for seed in seeds} if joint else {}
    pairs = [(plan, label) for plan in plans for label in methods]
    cells = [_cell(bench, methods[label], plan, label, split, full_matrix, directory) for plan, label in pairs]
    results = run_cells(cells, show_progress)
    # The same cell may have had another label, or a place in another plan, when it was run.
    named = [
        replace(result, method=label, order=plan.order, weighting=plan.weighting)
        for result, (plan, label) in zip(results, pairs, strict=True)
    ]
    return Comparison(named, joint_scores)


def run_cell(
    bench: Workbench, method: MergeMethod, plan: StreamPlan, label: str, split: str, full_matrix: bool
) -> CellResult:
    """Merge one stream with one method, and measure it."""
    report, peaks = StreamReport(), []
    tasks = {name: bench.stream[name] for name in plan.tasks}
    own = {}
    module = bench.module(plan.seed)
    with attached(module, bench.trainer) as trainer:
        stream = bench.begin(method, plan)
        for name, weight in zip(plan.tasks, plan.weights, strict=True):
            model = bench.fine_tuned(plan.seed, name)
            own[name] = model.own
            load_task_parameters(module, model.own)
            samples = None
            if stream.needs_samples:
                samples = stream.draw(tasks[name].calibration_dataset(), weight)
            with peak_memory(trainer.strategy.root_device) as peak:
                record = stream.merge(module, model.weights, name, weight, samples, _trace(model, tasks[name]))
            peaks.append(peak.bytes)
            every = full_matrix or len(own) == len(plan.tasks)
            scores = {}
            for seen in own:
                if every or seen == name:
                    with as_task(module, own[seen]):
                        scores[seen] = measure(module, tasks[seen], split)
            record.further = {seen: score.further for seen, score in scores.items() if score.further}
            report = report.with_merge(
                record,
                weight=weight,
                accuracy=[scores[seen].value if seen in scores else math.nan for seen in own],
                metrics={seen: score.metric for seen, score in scores.items() if score.metric is not None},
                pretrained=model.pretrained[split],
                fine_tuned=model.fine_tuned[split],
                before_training=math.nan,
            )
    return CellResult(label, plan.seed, plan.order, plan.weighting, plan.calibration_size, report, peaks)


def _cell(
    bench: Workbench,
    method: MergeMethod,
    plan: StreamPlan,
    label: str,
    split: str,
    full_matrix: bool,
    directory: Path,
) -> Cell:
    settings = [describe_method(method), plan.weights, plan.calibration_size, split, full_matrix]
    kept = directory / "cells" / bench.fingerprint(plan.seed, plan.tasks, *settings)
    return Cell(
        kept / "results.json",
        f"{label}, order {plan.order}, {plan.weighting}, N = {plan.calibration_size}",
        run=partial(run_cell, bench, method, plan, label, split, full_matrix),
        write=lambda result, path: Comparison([result]).save(path.parent),
        read=lambda path: Comparison.load(path.parent).cells[0],
    )


def _trace(model: FineTuned, task: Task) -> TrainingTrace:
    return TrainingTrace(Epochs(task.train_dataloader()), model.collected)
