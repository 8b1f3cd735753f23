"""The stream of tasks that are merged, one model after the other."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.calibration.calibration_set import CalibrationSet
from lightning_odem.calibration.placement import may_move
from lightning_odem.calibration.prediction_loss import calibration_loss
from lightning_odem.calibration.scaling import loss_scale
from lightning_odem.calibration.source import draw_by_index
from lightning_odem.flow import operating_time
from lightning_odem.methods import MergeMethod, method_name, resolve_method
from lightning_odem.methods.base import Whole
from lightning_odem.methods.kept_state import copy_containers
from lightning_odem.methods.sharding import check_sharding
from lightning_odem.parameters.adapters import Adapters
from lightning_odem.parameters.division import Division
from lightning_odem.parameters.frozen_base import check_frozen_base, frozen_base
from lightning_odem.parameters.low_rank import FactorPair
from lightning_odem.parameters.snapshot import Snapshot, load_snapshot, take_snapshot
from lightning_odem.parameters.task_parameters import OwnParameters
from lightning_odem.parameters.vector import ParameterVector, canonical_name
from lightning_odem.report import MergeRecord
from lightning_odem.stream.addition import Addition
from lightning_odem.stream.growth import grow, with_own_rows
from lightning_odem.stream.identity import merged_names, model_fingerprint
from lightning_odem.stream.merging import merging
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.trace import TrainingTrace


class Stream:
    """Merges models into one, one after the other; callback, comparisons, studies and merges of files all use it.

    The stream holds the base model, the merged model, the calibration samples, the parameters that tasks keep for
    themselves, the method's state and the report. It holds an incoming model only during its merge.

    Args:
        method: A merge method or its name. Before each merge the method gets the state that it has in this stream, so
            one instance may serve several streams in turn.
        base: Parameters and buffers of the base model by name, for methods that need it.
        calibration_size: Samples kept of all tasks together.
        exclude: Patterns of parameters that are not merged, besides the module's ``task_specific``.
        growing: Patterns of parameters that may get further rows between tasks.
        batch_norm: Policy for running statistics, see :class:`~lightning_odem.calibration.BatchNormStatistics`.
        calibration: Further settings of the calibration.
        whole: The model, if the modules hold only some of its parameters. The method must then be one that merges
            :attr:`by_tensor <lightning_odem.methods.MergeMethod>`.
        layout: What a module without layers does not tell, see :class:`~lightning_odem.stream.state.StreamState`.

    Attributes:
        state: All that the stream keeps, a :class:`~lightning_odem.stream.state.StreamState`. A merge replaces it.
        division: Tells which parameters are merged.

    Example:
        >>> import torch
        >>> stream = Stream("average")
        >>> for task, value in {"a": 0.0, "b": 3.0, "c": 6.0}.items():
        ...     record = stream.merge(nn.Linear(1, 1, bias=False), {"weight": torch.tensor([[value]])}, task)
        >>> stream.state.merged["weight"], record.t
        (tensor([[3.]]), 0.3333333333333333)
    """

    def __init__(
        self,
        method: MergeMethod | str,
        *,
        base: Snapshot | None = None,
        calibration_size: int = 1024,
        exclude: tuple[str, ...] = (),
        growing: tuple[str, ...] = (),
        batch_norm: str = "average",
        calibration: CalibrationOptions = CalibrationOptions(),
        whole: Whole | None = None,
        layout: Mapping[str, Any] = {},
    ) -> None:
        self.method = resolve_method(method)
        self.division = Division(exclude, self._frozen_names)
        self.growing = growing
        self.batch_norm = batch_norm
        self.calibration = calibration
        self.whole = whole
        self.layout = layout
        self.state = StreamState(calibration.buffer(calibration_size), base=base)

    @property
    def needs_samples(self) -> bool:
        """Whether a merge reads calibration samples."""
        return any(need.from_samples for need in self.method.needs) or self.batch_norm == "recalibrate"

    def check(self, module: nn.Module) -> None:
        """Refuse, before any training, a module that could not be merged after it.

        Raises:
            ValueError: As :meth:`~lightning_odem.parameters.Division.check`; if the parameters are sharded and the
                method cannot merge shards; if an adapter has another scale than in the merged model; or if the frozen
                base of a model with adapters is another one.
        """
        self.division.check(module)
        if ParameterVector(module, self.division.patterns(module)).shards is not None:
            check_sharding(self.method)
        self.check_fixed(module)
        pairs = Adapters(module, self.division.patterns(module)).pairs
        known = self.state.merged or {}
        new = [name for name, pair in pairs.items() if {name, pair.second} <= known.keys() - self.state.adapters.keys()]
        if new and self.state.method:
            rank_zero_warn(
                f"{new[0]} and its partner were merged one by one so far, and will be by their product. Sums of the "
                "single factors are of no use for that: the merged model counts as one task from here on."
            )
            self.state.method = {}

    def check_fixed(self, module: nn.Module) -> None:
        """Check what the state's adapters rely on: their scales, and the frozen base under them.

        Raises:
            ValueError: If the module has others.
        """
        known = {name: FactorPair(*plain) for name, plain in self.state.adapters.items()}
        found = Adapters(module, self.division.patterns(module)).pairs if known else {}
        for name in found.keys() & known.keys():
            if found[name] != known[name]:
                raise ValueError(
                    f"The update of {name} is {found[name].scale:g} times the product of its factors, and was "
                    f"{known[name].scale:g} times it in the merges before. Use the same alpha and r as there."
                )
        check_frozen_base(module, self.state.frozen)

    def begin(self, module: nn.Module) -> None:
        """Take a module's weights as the base model; the frozen base under adapters is known by its fingerprints."""
        self.state.frozen = frozen_base(module, self.division.patterns(module))
        self.state.base = take_snapshot(module, self.division.shared(module))

    def thaw(self, module: nn.Module) -> None:
        """Add parameters that were frozen so far and are trained from now on to the base and the merged model."""
        state, frozen = self.state, self.state.frozen
        trained = {canonical_name(name) for name, tensor in module.named_parameters() if tensor.requires_grad}
        new = take_snapshot(module, lambda name: name in frozen and name in trained)
        if new:
            state.frozen = {name: digest for name, digest in frozen.items() if name not in new}
            state.base = {**(state.base or {}), **new}
            state.merged = None if state.merged is None else {**state.merged, **new}
            state.fingerprints = {}  # those known are of the other tensors alone

    def _frozen_names(self) -> dict[str, str]:
        return self.state.frozen

    def load_method(self) -> None:
        """Give the method the state that it has in this stream.

        Raises:
            ValueError: If the method cannot use what the stream keeps for it.
        """
        try:
            self.method.load_state_dict(copy_containers(self.state.method))
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            where = f" in {self.state.dirpath}" if self.state.dirpath else ""
            raise ValueError(
                f"Section 'method' of the stream{where} is no state of {method_name(self.method)!r}: {error!r}."
            ) from error

    def merge(
        self,
        module: nn.Module,
        incoming: Snapshot,
        task: str,
        weight: float = 1.0,
        samples: Any = None,
        trace: TrainingTrace = TrainingTrace(),
        on_step: Callable[[int, int], None] | None = None,
    ) -> MergeRecord:
        """Merge the next model; if that fails, the stream stays what it was. No score is measured.

        Args:
            module: A module of the model's architecture, with the parameters that the task keeps for itself. Its other
                parameters do not matter. Afterwards it holds the merged model. Methods that measure a loss need a
                LightningModule attached to a Trainer.
            incoming: Parameters and buffers of the incoming model by name.
            task: Name of its task.
            weight: Utility weight.
            samples: Samples [n, ...] of the task for the calibration buffer, on the CPU; with labels if the calibration
                loss reads them.
            trace: What the method needs of the incoming model's training.
            on_step: Called with the number of steps done and that of all steps.

        Raises:
            ValueError: If names or shapes differ, or something that the method needs is missing.
        """
        load_snapshot(module, incoming, self.division.shared(module))
        buffer = self.buffer_with(task, samples, weight)
        with self.merging(module, task, weight, buffer=buffer, trace=trace, on_step=on_step) as addition:
            state = addition.state(accuracy=[math.nan] * (len(self.state.report.tasks) + 1))
        self.state = state
        return addition.record

    @contextmanager
    def merging(
        self,
        module: nn.Module,
        task: str,
        weight: float,
        *,
        buffer: CalibrationBuffer | None = None,
        trace: TrainingTrace = TrainingTrace(),
        on_step: Callable[[int, int], None] | None = None,
        fingerprint: bool = False,
    ) -> Iterator[Addition]:
        """Merge the incoming model as a transaction, see :func:`~lightning_odem.stream.merging.merging`.

        The stream itself does not change. The caller sets its state to the addition's once all has succeeded.

        Args:
            module: The module, which holds the incoming model. In the block it holds the merged model.
            task: Name of its task.
            weight: Utility weight.
            buffer: Calibration samples of all tasks, this one included, see :meth:`buffer_with`.
            trace: What the method needs of the incoming model's training.
            on_step: Called with the number of steps done and that of all steps.
            fingerprint: Whether to record the fingerprint of the incoming model. A removal of the task checks it.
        """
        check_frozen_base(module, self.state.frozen)
        names = merged_names(module, self.division.patterns(module), self.batch_norm)
        names["parameters"] = [name for name in names["parameters"] if name not in self.state.frozen]
        digest = model_fingerprint(module, names) if fingerprint else None
        own = take_snapshot(module, self.division.task_specific(module))
        self.load_method()
        before = self._with_rows_of(module)
        with merging(
            module,
            self.method,
            task=task,
            t=operating_time([*self.state.report.weights, weight]),
            merged=before.merged,
            base=before.base or {},
            calibration=self.measured_on(module, buffer, finds_size=True) if buffer is not None else None,
            exclude=self.division.patterns(module),
            batch_norm=self.batch_norm,
            trace=trace,
            on_step=on_step,
            whole=self.whole,
            layout=self.layout,
        ) as merge:
            yield Addition(before, self.method, self.division, merge, task, weight, own, buffer, names, digest)

    def grow(self, module: nn.Module) -> None:
        """Take up the shapes that the module has before it is trained.

        Raises:
            ValueError: As :func:`~lightning_odem.stream.growth.grow`.
        """
        self.state = grow(self.state, module, self.division.shared(module), self.growing)

    def _with_rows_of(self, module: nn.Module) -> StreamState:
        """The state with all rows that are not merged taken from the incoming model."""
        rows = self.state.rows
        if not rows:
            return self.state
        incoming = {canonical_name(name): tensor for name, tensor in module.named_parameters()}
        merged, base = (with_own_rows(one or {}, incoming, rows) for one in (self.state.merged, self.state.base))
        return replace(self.state, merged=merged or None, base=base)

    def buffer_with(self, task: str, samples: Any, weight: float = 1.0) -> CalibrationBuffer | None:
        """A copy of the calibration buffer with the samples of one more task; None if it is empty."""
        buffer = self.state.buffer.copy()
        if samples is not None:
            buffer.add(task, samples, weight=weight)
        return buffer if len(buffer) else None

    def measured_on(self, module: nn.Module, buffer: CalibrationBuffer, *, finds_size: bool = False) -> CalibrationSet:
        """The loss on a buffer; the samples of each task go through the module with the task's own parameters.

        Args:
            module: The module.
            buffer: The samples.
            finds_size: Whether a merge may find the size of its micro-batches, if the stream has none yet.
        """
        loss = calibration_loss(module, self.calibration.loss)  # type: ignore[arg-type]
        as_task = OwnParameters(module, self.state.task_parameters)
        trainer: L.Trainer = module.trainer  # type: ignore[assignment]
        found = self.state.measured.get("batch_size")
        size = self.calibration.micro_batch_size(trainer.train_dataloader, found)
        keep_on_device = self.calibration.keep_on_device and may_move(module)  # type: ignore[arg-type]
        finds_size = finds_size and self.calibration.batch_size == "auto" and found is None
        return CalibrationSet(buffer, loss, size, loss_scale(trainer), as_task, keep_on_device, finds_size)

    def draw(self, dataset: Any, weight: float = 1.0) -> Any:
        """Calibration samples of the next task from its dataset of ``(input, label)``, as many as it gets places.

        The choice is class-balanced if the dataset has integer ``targets`` and the calibration loss reads labels. It is
        the same for every method.
        """
        buffer = self.state.buffer
        room = max(buffer.room_for_next(weight), 1)
        return draw_by_index(dataset, room, buffer.generator(), balanced=buffer.balanced)
