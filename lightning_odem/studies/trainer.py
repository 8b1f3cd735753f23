"""A Trainer that goes through a stream of tasks."""

from functools import partial
from itertools import pairwise
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_odem.callback.callback import ContinualMergeCallback
from lightning_odem.methods import MergeMethod, resolve_method
from lightning_odem.report import StreamReport
from lightning_odem.report.conclusions import in_words
from lightning_odem.studies.comparison_report import save as save_comparison
from lightning_odem.studies.engine import run_comparison
from lightning_odem.studies.path import check_points
from lightning_odem.studies.plan import plan_streams
from lightning_odem.studies.results import Comparison
from lightning_odem.studies.schedule import ScheduleStudy, run_schedule
from lightning_odem.studies.schedule_report import render_schedule, save_schedule
from lightning_odem.studies.study import Study, prepare
from lightning_odem.studies.tables import render_comparison
from lightning_odem.studies.trajectory import PairPath, check_pairs, run_trajectory
from lightning_odem.studies.trajectory_report import render_trajectory, save_trajectory
from lightning_odem.tasks import TaskStream


class ContinualTrainer(L.Trainer):
    """Lightning's Trainer with ``fit_tasks``, which fine-tunes and merges one task after the other.

    Example::

        trainer = ContinualTrainer(max_epochs=3, callbacks=[ContinualMergeCallback()])
        report = trainer.fit_tasks(model, DigitsStream())
    """

    def fit_tasks(self, model: L.LightningModule, datamodule: TaskStream, pretrain_epochs: int = 0) -> StreamReport:
        """Fine-tune and merge every task of a stream that is not merged yet, and print the table and what it says.

        Each task is trained for the Trainer's ``max_epochs`` (or ``max_steps``). If no ContinualMergeCallback is among
        the Trainer's callbacks, one with its defaults is added. If there is one with a ``dirpath``, the same command
        continues the stream in that directory, and pretrains nothing.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks, in order.
            pretrain_epochs: Epochs to pretrain the base model on the stream's source task first; 0 for a model that
                is pretrained already.

        Returns:
            The report of the stream.

        Raises:
            ValueError: If pretraining is asked for but the stream has no source task or the module no backbone.
        """
        merge = next((found for found in self.callbacks if isinstance(found, ContinualMergeCallback)), None)  # type: ignore[attr-defined]
        if merge is None:
            merge = ContinualMergeCallback()
            self.callbacks.insert(0, merge)  # type: ignore[attr-defined]
        begun = bool(merge.report.tasks)
        prepare(self, model, datamodule, 0 if begun else pretrain_epochs)
        if begun:
            rank_zero_info(f"The stream goes on after {len(merge.report.tasks)} merged tasks")
            merge.load_base(model)
        for task in merge.remaining(datamodule):
            rank_zero_info(f"Task {len(merge.report.tasks) + 1} of {len(datamodule)}: {task.task_name}")
            self.fit(model, datamodule=task)
        rank_zero_only(print)(merge.table())
        rank_zero_only(print)(in_words(merge.report, merge.dirpath))
        return merge.report

    def compare(
        self,
        model: L.LightningModule,
        datamodule: TaskStream,
        methods: dict[str, str | MergeMethod] | list[str] = ["average", "ode"],  # noqa: B006 (shown in --help)
        orders: int = 5,
        weighting: list[Literal["uniform", "dirichlet"]] = ["uniform"],  # noqa: B006
        concentration: float = 1.0,
        seeds: list[int] = [0],  # noqa: B006
        calibration_sizes: list[int] = [1024],  # noqa: B006
        checkpoints: dict[str, str] | str | None = None,
        split: Literal["test", "val"] = "test",
        full_matrix: bool = True,
        joint: bool = True,
        dirpath: str = "comparison",
        models: str | None = None,
        pretrain_epochs: int = 0,
    ) -> Comparison:
        """Compare merge methods on the same fine-tuned models, orders, utility weights and samples.

        Every task is fine-tuned once per seed with this Trainer's settings. Models and results are kept in ``dirpath``,
        and a comparison that is started again does only what is missing. The options of a ContinualMergeCallback among
        the Trainer's callbacks apply: excluded parameters, batch-norm policy and the choice of calibration samples.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks; their own weights are not used.
            methods: Merge methods by label, or a list of names.
            orders: Number of task orders: the stream's own and random ones.
            weighting: ``"uniform"`` utility weights, ``"dirichlet"`` draws (one per order), or both.
            concentration: Concentration of the symmetric Dirichlet distribution. 1 is uniform over all possible
                weights; the paper does not state its distribution.
            seeds: Seeds of the fine-tuning and of the choice of calibration samples.
            calibration_sizes: Samples kept of all tasks together, N.
            checkpoints: Files or folders with models fine-tuned elsewhere, by task name, or one path for all tasks
                with ``{task}`` in it.
            split: Split on which accuracies are measured: ``"test"``, or ``"val"`` for choosing settings.
            full_matrix: Evaluate all tasks seen after each merge. If False, only what the final ACC and BWT need is
                evaluated.
            joint: Also train on all tasks jointly, as an upper bound.
            dirpath: Directory of models, cells and results.
            models: ``dirpath`` of an earlier comparison. Its fine-tuned models and cells are used again if they are the
                same, and new ones are kept there.
            pretrain_epochs: Epochs to pretrain the base model first, as in :meth:`fit_tasks`.

        Returns:
            All cells. Tables, figures, CSV and JSON files are in ``dirpath``.

        Raises:
            ValueError: For no or an unknown method, an unknown task or weighting, fewer samples than tasks, or a method
                whose needs cannot be met.
        """
        if isinstance(methods, list):
            methods = {name: name for name in methods}
        if not methods:
            raise ValueError("A comparison needs at least one merge method, got none.")
        resolved = {label: resolve_method(method) for label, method in methods.items()}
        plans = plan_streams(
            datamodule.names,
            orders=orders,
            weighting=weighting,
            concentration=concentration,
            seeds=seeds,
            calibration_sizes=calibration_sizes,
        )
        run = partial(run_comparison, methods=resolved, plans=plans, split=split, full_matrix=full_matrix, joint=joint)
        needs = [need for method in resolved.values() for need in method.needs]
        study = Study("compare", run, render_comparison, save_comparison, needs)
        return study.conduct(self, model, datamodule, dirpath, checkpoints, pretrain_epochs, models)

    def trajectory(
        self,
        model: L.LightningModule,
        datamodule: TaskStream,
        pairs: list[tuple[str, str]] | None = None,
        method: str | MergeMethod = "ode_paper",
        points: int = 11,
        calibration_size: int = 1024,
        seed: int = 0,
        checkpoints: dict[str, str] | str | None = None,
        dirpath: str = "comparison",
        pretrain_epochs: int = 0,
    ) -> list[PairPath]:
        """Evaluate the models along the whole path from one fine-tuned model to another (Table 6 of the paper).

        For each pair the flow is integrated once, from t = 0 to 1, with calibration samples of both tasks. The straight
        line between the two models is measured too. Fine-tuned models are those of :meth:`compare` in the same
        ``dirpath``, and a study that is started again does only what is missing.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks.
            pairs: Names of the tasks where a path starts and ends; by default each task of the stream and the next.
            method: The flow, a :class:`~lightning_odem.methods.PaperODEMerge`.
            points: Number of evenly spaced times at which the model is evaluated on both test sets, 0 and 1 included.
                Their distance is a multiple of the flow's step size.
            calibration_size: Samples of both tasks together.
            seed: Seed of the fine-tuning and of the choice of calibration samples.
            checkpoints: Files or folders with models fine-tuned elsewhere, by task name, or one path for all tasks
                with ``{task}`` in it.
            dirpath: Directory of models and results.
            pretrain_epochs: Epochs to pretrain the base model first, as in :meth:`fit_tasks`.

        Returns:
            Two paths per pair. Table, figure, CSV and JSON files are in ``dirpath``.

        Raises:
            TypeError: For a method that is no flow.
            ValueError: For an unknown task, or if a point lies between two steps.
        """
        flow = resolve_method(method)
        check_points(flow, points)
        pairs = list(pairwise(datamodule.names)) if pairs is None else pairs
        check_pairs(pairs, datamodule.names)
        run = partial(
            run_trajectory, pairs=pairs, method=flow, points=points, calibration_size=calibration_size, seed=seed
        )
        study = Study("trajectory", run, render_trajectory, save_trajectory)
        return study.conduct(self, model, datamodule, dirpath, checkpoints, pretrain_epochs)

    def schedule(
        self,
        model: L.LightningModule,
        datamodule: TaskStream,
        orders: int = 5,
        method: str | MergeMethod = "ode_paper",
        points: int = 21,
        follow: Literal["schedule", "best"] = "schedule",
        calibration_size: int = 1024,
        seed: int = 0,
        checkpoints: dict[str, str] | str | None = None,
        dirpath: str = "comparison",
        pretrain_epochs: int = 0,
    ) -> list[ScheduleStudy]:
        """Find the best operating time of every merge, to compare it with 1 / k (Table 7 of the paper).

        In each merge the flow is integrated once, from t = 0 to 1, and the models along its path are evaluated on the
        validation data of the tasks seen. Fine-tuned models are those of :meth:`compare` in the same ``dirpath``, and a
        study that is started again does only missing orders.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks. All have the same utility weight.
            orders: Number of task orders: the stream's own and random ones, those of :meth:`compare`.
            method: The flow, a :class:`~lightning_odem.methods.PaperODEMerge`.
            points: Number of candidates at evenly spaced times, 0 and 1 included. Their distance is a multiple of the
                flow's step size. If candidates are equally good, the one with the smallest time is chosen.
            follow: Model from which the stream continues: ``"schedule"``, the one at t = 1 / k, as Algorithm 1 defines
                the merged model; or ``"best"``, the candidate chosen. The paper does not say which it used.
            calibration_size: Samples kept of all tasks together.
            seed: Seed of the fine-tuning and of the choice of calibration samples.
            checkpoints: Files or folders with models fine-tuned elsewhere, by task name, or one path for all tasks
                with ``{task}`` in it.
            dirpath: Directory of models and results.
            pretrain_epochs: Epochs to pretrain the base model first, as in :meth:`fit_tasks`.

        Returns:
            One result per order. Table, figure, CSV and JSON files are in ``dirpath``.

        Raises:
            TypeError: For a method that is no flow.
            ValueError: For a stream of one task, more orders than there are, or if a candidate lies between two steps.
        """
        flow = resolve_method(method)
        check_points(flow, points)
        if len(datamodule) < 2:
            raise ValueError(f"The stream has {len(datamodule)} task; a merge needs two at least. Add tasks to it.")
        plans = plan_streams(
            datamodule.names,
            orders=orders,
            weighting=["uniform"],
            concentration=1.0,
            seeds=[seed],
            calibration_sizes=[calibration_size],
        )
        run = partial(run_schedule, plans=plans, method=flow, points=points, follow=follow)
        study = Study("schedule", run, render_schedule, save_schedule)
        return study.conduct(self, model, datamodule, dirpath, checkpoints, pretrain_epochs)
