"""A Trainer that goes through a stream of tasks."""

from itertools import pairwise
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_odem.callback.callback import ContinualMergeCallback
from lightning_odem.classifiers.classifier import TaskClassifier
from lightning_odem.classifiers.pretraining import pretrain
from lightning_odem.methods import MergeMethod, resolve_method
from lightning_odem.report import StreamReport
from lightning_odem.studies import (
    Comparison,
    PairPath,
    ScheduleStudy,
    Workbench,
    check_pairs,
    check_points,
    plan_streams,
    render_comparison,
    render_schedule,
    render_trajectory,
    run_comparison,
    run_schedule,
    run_trajectory,
    save_schedule,
    save_trajectory,
)
from lightning_odem.studies import save as save_comparison
from lightning_odem.tasks import TaskStream


class ContinualTrainer(L.Trainer):
    """Lightning's Trainer with ``fit_tasks``: fine-tune and merge one task after the other.

    Example::

        trainer = ContinualTrainer(max_epochs=3, callbacks=[ContinualMergeCallback()])
        report = trainer.fit_tasks(model, DigitsStream())
    """

    def fit_tasks(self, model: L.LightningModule, datamodule: TaskStream, pretrain_epochs: int = 0) -> StreamReport:
        """Fine-tune and merge every task of a stream that is not merged yet, and print the table.

        Each task is trained for the Trainer's ``max_epochs`` (or ``max_steps``). Without a ContinualMergeCallback
        among the Trainer's callbacks one with its defaults is added. With one that has a ``dirpath``, the same command
        goes on with the stream that is there, and pretrains nothing.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks, in order.
            pretrain_epochs: Epochs to pretrain the base model on the stream's source task first; 0 for a model that
                is pretrained already.

        Returns:
            What was measured.

        Raises:
            ValueError: If pretraining is asked for but the stream has no source task or the module no backbone.
        """
        merge = next((found for found in self.callbacks if isinstance(found, ContinualMergeCallback)), None)  # type: ignore[attr-defined]
        if merge is None:
            merge = ContinualMergeCallback()
            self.callbacks.insert(0, merge)  # type: ignore[attr-defined]
        begun = bool(merge.report.tasks)
        self._prepare(model, datamodule, 0 if begun else pretrain_epochs)
        if begun:
            rank_zero_info(f"The stream goes on after {len(merge.report.tasks)} merged tasks")
            merge.load_base(model)
        for task in merge.remaining(datamodule):
            rank_zero_info(f"Task {len(merge.report.tasks) + 1} of {len(datamodule)}: {task.task_name}")
            self.fit(model, datamodule=task)
        rank_zero_only(print)(merge.table())
        if merge.dirpath is not None:
            rank_zero_info(f"Report, table, figures and merged weights: {merge.dirpath}")
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
        """Run merge methods side by side on the same fine-tuned models, orders, utility weights and samples.

        Every task is fine-tuned once per seed with this Trainer's settings. Models and results are kept in ``dirpath``;
        started again, a comparison does only what is missing. A ContinualMergeCallback among the Trainer's callbacks
        says what is excluded, what becomes of batch-norm statistics and how calibration samples are chosen.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks; their own weights are not used.
            methods: Merge methods by label, or a list of names.
            orders: Number of task orders: the stream's own and random ones.
            weighting: ``"uniform"`` utility weights, ``"dirichlet"`` draws (one per order), or both.
            concentration: Of the symmetric Dirichlet distribution. 1 is uniform over all possible weights; the paper
                does not state its distribution.
            seeds: Seeds of the fine-tuning and of the choice of calibration samples.
            calibration_sizes: Samples kept of all tasks together, N.
            checkpoints: Files or folders with models fine-tuned elsewhere, by name of the task, or one path for all
                with ``{task}`` in it.
            split: Where accuracies are measured: ``"test"``, or ``"val"`` for choosing settings.
            full_matrix: Evaluate all tasks seen after each merge; False only what the final ACC and BWT need.
            joint: Train on all tasks jointly as well, as an upper bound.
            dirpath: Where everything is kept.
            models: ``dirpath`` of an earlier comparison, whose fine-tuned models and cells are used again as far as
                they are the same; what is new of them goes there too.
            pretrain_epochs: As in :meth:`fit_tasks`.

        Returns:
            All cells; tables, figures, CSV and JSON are in ``dirpath``.

        Raises:
            ValueError: For no or an unknown method, an unknown task or weighting, fewer samples than tasks, or if a
                method needs what there is not.
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
        self._save_config(dirpath, "compare")
        self._prepare(model, datamodule, pretrain_epochs)
        kept = models or dirpath
        needs = [need for method in resolved.values() for need in method.needs]
        bench = Workbench(self, model, datamodule, kept, checkpoints, needs)
        comparison = run_comparison(
            bench,
            resolved,
            plans,
            Path(kept),
            split=split,
            full_matrix=full_matrix,
            joint=joint,
            show_progress=self.progress_bar_callback is not None,
        )
        save_comparison(comparison, dirpath)
        print(render_comparison(comparison))
        rank_zero_info(f"Cells, tables and figures: {dirpath}")
        return comparison

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

        For each pair the flow is integrated once, from t = 0 to 1, with calibration samples of both tasks; the straight
        line between the two models is measured beside it. Fine-tuned models are those of :meth:`compare` in the same
        ``dirpath``; started again, only what is missing is done.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks.
            pairs: Names of the tasks where a path starts and ends; by default each task of the stream and the next.
            method: The flow, a :class:`~lightning_odem.methods.PaperODEMerge`.
            points: Evenly spaced times at which the model is evaluated on both test sets, 0 and 1 included. Their
                distance is a multiple of the flow's step size.
            calibration_size: Samples of both tasks together.
            seed: Seed of the fine-tuning and of the choice of calibration samples.
            checkpoints: Files or folders with models fine-tuned elsewhere, by name of the task, or one path for all
                with ``{task}`` in it.
            dirpath: Where everything is kept.
            pretrain_epochs: As in :meth:`fit_tasks`.

        Returns:
            Two paths per pair; table, figure, CSV and JSON are in ``dirpath``.

        Raises:
            TypeError: For a method that is no flow.
            ValueError: For an unknown task, or if a point lies between two steps.
        """
        flow = resolve_method(method)
        check_points(flow, points)
        pairs = list(pairwise(datamodule.names)) if pairs is None else pairs
        check_pairs(pairs, datamodule.names)
        self._save_config(dirpath, "trajectory")
        self._prepare(model, datamodule, pretrain_epochs)
        paths = run_trajectory(
            Workbench(self, model, datamodule, dirpath, checkpoints),
            pairs,
            flow,
            Path(dirpath),
            points=points,
            calibration_size=calibration_size,
            seed=seed,
            show_progress=self.progress_bar_callback is not None,
        )
        save_trajectory(paths, dirpath)
        print(render_trajectory(paths))
        rank_zero_info(f"Results, table and figure: {dirpath}")
        return paths

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

        In each merge the flow is integrated once, from t = 0 to 1, and the models on its way are evaluated on the
        validation data of the tasks seen. Fine-tuned models are those of :meth:`compare` in the same ``dirpath``;
        started again, only orders that are missing are done.

        Args:
            model: The module; its weights are the base model.
            datamodule: The tasks; all count the same.
            orders: Number of task orders: the stream's own and random ones, those of :meth:`compare`.
            method: The flow, a :class:`~lightning_odem.methods.PaperODEMerge`.
            points: Candidates at evenly spaced times, 0 and 1 included. Their distance is a multiple of the flow's
                step size. Of equally good ones the smallest time counts as the best.
            follow: Model that the stream goes on with: ``"schedule"``, the one at t = 1 / k, as Algorithm 1 defines
                the merged model; or ``"best"``, the candidate chosen. The paper does not say which it took.
            calibration_size: Samples kept of all tasks together.
            seed: Seed of the fine-tuning and of the choice of calibration samples.
            checkpoints: Files or folders with models fine-tuned elsewhere, by name of the task, or one path for all
                with ``{task}`` in it.
            dirpath: Where everything is kept.
            pretrain_epochs: As in :meth:`fit_tasks`.

        Returns:
            One per order; table, figure, CSV and JSON are in ``dirpath``.

        Raises:
            TypeError: For a method that is no flow.
            ValueError: For a stream of one task, more orders than there are, or if a candidate lies between two steps.
        """
        flow = resolve_method(method)
        check_points(flow, points)
        if len(datamodule) < 2:
            raise ValueError(f"The stream has {len(datamodule)} task; a merge needs two at least.")
        plans = plan_streams(
            datamodule.names,
            orders=orders,
            weighting=["uniform"],
            concentration=1.0,
            seeds=[seed],
            calibration_sizes=[calibration_size],
        )
        self._save_config(dirpath, "schedule")
        self._prepare(model, datamodule, pretrain_epochs)
        studies = run_schedule(
            Workbench(self, model, datamodule, dirpath, checkpoints),
            plans,
            flow,
            Path(dirpath),
            points=points,
            follow=follow,
            show_progress=self.progress_bar_callback is not None,
        )
        save_schedule(studies, dirpath)
        print(render_schedule(studies))
        rank_zero_info(f"Results, table and figure: {dirpath}")
        return studies

    def _save_config(self, directory: str, name: str) -> None:
        """Save the command line's configuration beside the results, not with each fit."""
        callbacks: list[L.Callback] = self.callbacks  # type: ignore[attr-defined]
        for saver in [callback for callback in callbacks if isinstance(callback, SaveConfigCallback)]:
            callbacks.remove(saver)
            Path(directory).mkdir(parents=True, exist_ok=True)
            saver.parser.save(saver.config, Path(directory) / f"{name}.yaml", overwrite=True)

    def _prepare(self, model: L.LightningModule, datamodule: TaskStream, pretrain_epochs: int) -> None:
        for task in datamodule:  # bad data of the last task is found before the first is trained
            task.prepare_data()
            task.setup("fit")
        if pretrain_epochs:
            self._pretrain(model, datamodule, pretrain_epochs)

    def _pretrain(self, model: L.LightningModule, stream: TaskStream, epochs: int) -> None:
        if stream.pretraining is None or not isinstance(model, TaskClassifier):
            raise ValueError(
                f"pretrain_epochs={epochs} needs a stream with a source task and a TaskClassifier, got "
                f"{type(stream).__name__} and {type(model).__name__}. Set pretrain_epochs to 0 and load pretrained "
                "weights instead, for example with TaskClassifier's checkpoint."
            )
        rank_zero_info(f"Pretraining the base model on {stream.pretraining.task_name} for {epochs} epochs")
        pretrain(
            model,
            stream.pretraining,
            epochs,
            accelerator=self.strategy.root_device.type,
            fast_dev_run=self.fast_dev_run,  # type: ignore[attr-defined]
            limit_train_batches=self.limit_train_batches,
            enable_progress_bar=self.progress_bar_callback is not None,
        )
