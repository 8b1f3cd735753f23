"""A ready LightningModule for streams of image classification tasks."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_odem.classifiers.backbone import Normalize, build_backbone
from lightning_odem.classifiers.classification import ClassificationSteps
from lightning_odem.classifiers.probe import extract_features, fit_linear_probe
from lightning_odem.classifiers.tangent import Linearized
from lightning_odem.parameters.weights_file import load_weights


class TaskClassifier(ClassificationSteps):
    """One backbone shared by all tasks and one linear head per task.

    The Trainer's datamodule defines the task by ``task_name`` and ``num_classes``. Its batches are images [B, C, H, W],
    uint8 or floating in [0, 1], and int64 labels [B]. ``forward`` scales and normalises images and repeats grey ones to
    the backbone's channels.

    With ``head="probe"`` a task's head is fitted once, when its training starts, as a linear probe on the features of
    the training samples. Until then it is all zeros, afterwards it is frozen. So only the backbone is fine-tuned and
    merged.

    Args:
        backbone: A timm model name, or a module that returns features [B, D] and may have timm's ``num_features`` (D)
            and ``pretrained_cfg`` (with ``mean`` and ``std``).
        backbone_args: Further arguments of ``timm.create_model``, for example ``{"in_chans": 1, "img_size": 32}``.
        pretrained: Let timm download the weights it publishes for the model.
        checkpoint: File with the backbone's weights, see :func:`~lightning_odem.parameters.load_weights`. Like
            ``pretrained``, it is not saved with the hyperparameters.
        head: ``"probe"`` as above. ``"train"`` also trains the current task's head, from ``nn.Linear``'s initial
            values.
        lr: Largest learning rate of the one-cycle schedule.
        weight_decay: AdamW's weight decay, except for biases and the parameters of normalisation layers.
        freeze_batch_norm: Keep the base model's running statistics while training, so that all models of a stream share
            them; weight and bias still train.
        mean: Channel means of [0, 1] images; by default from ``pretrained_cfg``, else 0.5.
        std: Channel standard deviations, likewise.
        tangent: Fine-tune in the tangent space of the backbone's weights when the first task begins, see
            :class:`~lightning_odem.Linearized`.

    Raises:
        ValueError: If the timm model is unknown, timm's arguments come with a module, or the length of ``mean`` or
            ``std`` is neither 1 nor the number of channels.

    Example:
        >>> model = TaskClassifier("test_resnet")
        >>> model.features(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape
        torch.Size([2, 96])
    """

    task_specific = ("heads",)

    def __init__(
        self,
        backbone: str | nn.Module,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | Path | None = None,
        head: Literal["probe", "train"] = "probe",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        freeze_batch_norm: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tangent: bool = False,
    ) -> None:
        super().__init__()
        ignore = ["pretrained", "checkpoint"] + ([] if isinstance(backbone, str) else ["backbone"])
        self.save_hyperparameters(ignore=ignore)
        self.backbone = build_backbone(backbone, backbone_args, pretrained)
        self.normalize = Normalize(self.backbone, mean, std)
        self.heads = nn.ModuleDict()
        self.trains_head = head == "train"
        self.lr = lr
        self.weight_decay = weight_decay
        self.freeze_batch_norm = freeze_batch_norm
        self._current_task: str | None = None
        if checkpoint is not None:
            load_weights(self.backbone, checkpoint)
        if tangent:
            self.backbone = Linearized(self.backbone)
        self.train()

    @property
    def current_task(self) -> str | None:
        """Name of the task of the last Trainer run, which ``forward`` uses by default."""
        return self._current_task

    def features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, C, H, W]."""
        return self.backbone(self.normalize(images))

    def forward(self, images: Tensor, task: str | None = None) -> Tensor:
        """Logits [B, classes] of a task, by default the current one.

        Raises:
            ValueError: If the task has no head.
        """
        return self._head(task)(self.features(images))

    def train(self, mode: bool = True) -> "TaskClassifier":
        """Set the training mode; frozen BatchNorm layers stay in eval mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def setup(self, stage: str) -> None:
        """Make the datamodule's task the current one; in ``fit``, create its head if it is new.

        Raises:
            ValueError: If the datamodule does not name its task and classes, the name cannot name a head, or the task's
                head has another size.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        task, num_classes = getattr(data, "task_name", None), getattr(data, "num_classes", None)
        if task is None or num_classes is None:
            raise ValueError(
                "TaskClassifier reads the attributes `task_name` and `num_classes` of the datamodule, found "
                f"task_name={task!r} and num_classes={num_classes!r} on {type(data).__name__}. Pass "
                "`datamodule=` with both to the Trainer."
            )
        if task in self.heads and self._head(task).out_features != num_classes:
            raise ValueError(
                f"The head of task {task!r} has {self._head(task).out_features} classes, the datamodule has "
                f"{num_classes}. Give the new task a name of its own."
            )
        self._current_task = task
        if stage == "fit":
            if not self.heads and isinstance(self.backbone, Linearized):
                self.backbone.recenter_()  # whatever the source of the base model's weights is
            if task not in self.heads:
                self._add_head(task, num_classes, self._feature_size())
            for name, head in self.heads.items():
                head.requires_grad_(self.trains_head and name == task)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Create the heads that the checkpoint has."""
        for name, value in checkpoint["state_dict"].items():
            match = re.fullmatch(r"heads\.([^.]+)\.weight", name)
            if match and match[1] not in self.heads:
                self._add_head(match[1], *value.shape)

    def on_train_start(self) -> None:
        """Check the labels and fit the probe.

        Raises:
            ValueError: If a label of the training samples is outside the head.
        """
        targets = getattr(self._training_dataset(), "targets", None)
        if targets is not None:
            self._check_labels(torch.as_tensor(targets))
        if not self.trains_head:
            self._fit_probe()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with a one-cycle schedule over the steps of this run.

        Raises:
            ValueError: If the number of steps of the run is not known.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                "The one-cycle schedule has to know its length: set the Trainer's max_epochs or max_steps."
            )
        from timm.optim import param_groups_weight_decay  # here, since timm takes long to import

        optimizer = torch.optim.AdamW(param_groups_weight_decay(self, self.weight_decay), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _head(self, task: str | None = None) -> nn.Linear:
        task = self._current_task if task is None else task
        if task is None or task not in self.heads:
            raise ValueError(f"There is no head for task {task!r}; there are heads for {list(self.heads)}.")
        return cast(nn.Linear, self.heads[task])

    def _add_head(self, task: str, num_classes: int, num_features: int) -> None:
        head = nn.Linear(num_features, num_classes).requires_grad_(False)
        if not self.trains_head:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        try:
            self.heads[task] = head
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Task name {task!r} cannot name a head: {error}. Use a non-empty string without dots that is not a "
                "method of nn.ModuleDict."
            ) from error

    def _fit_probe(self) -> None:
        """Fit the current task's head on the backbone as it is, unless an earlier fit has made it nonzero."""
        head = self._head()
        if any(parameter.any() for parameter in head.parameters()):
            return
        with self.trainer.precision_plugin.forward_context():
            model = nn.Sequential(self.normalize, self.backbone)
            features, labels = extract_features(model, self._training_dataset(), device=self.device)
        self._check_labels(labels)
        # Every rank has fitted the same samples; the broadcast removes rounding differences between them.
        weight, bias = self.trainer.strategy.broadcast(fit_linear_probe(features, labels, head.out_features))
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)

    def _feature_size(self) -> int:
        # timm: head_hidden_size is what forward returns, num_features what forward_features does.
        size = getattr(self.backbone, "head_hidden_size", None) or getattr(self.backbone, "num_features", None)
        if size is not None:
            return size
        sample = next(iter(self._training_dataset()))
        return extract_features(nn.Sequential(self.normalize, self.backbone), [sample], device=self.device)[0].shape[1]

    def _training_dataset(self) -> Any:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.calibration_dataset() if hasattr(data, "calibration_dataset") else data.train_dataloader().dataset

    def _check_labels(self, labels: Tensor) -> None:
        classes = self._head().out_features
        outside = labels[(labels < 0) | (labels >= classes)]
        if len(outside):
            raise ValueError(
                f"Task {self._current_task!r} has a training sample of label {outside[0].item()}, but its head has "
                f"{classes} classes (labels 0 to {classes - 1})."
            )
