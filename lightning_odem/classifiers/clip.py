"""A LightningModule for CLIP: the vision tower is fine-tuned and merged, the text tower makes the heads."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from lightning_odem.classifiers.classification import ClassificationSteps
from lightning_odem.classifiers.clip_prompts import DEFAULT_PROMPTS, PROMPTS
from lightning_odem.classifiers.clip_weights import read_clip, read_clip_vision


class ClipClassifier(ClassificationSteps):
    r"""CLIP with a zero-shot head per task, as in the experiments of the ODE-M paper.

    The logits of an image are :math:`e^s \cos(P f(x), h_c)` with the vision tower f, the visual projection P, the logit
    scale s, and the head :math:`h_c` of class c. The head is the mean of the text embeddings of the class name in each
    prompt template. Each embedding and the mean are scaled to length 1. Everything comes from one base model. Only the
    vision tower, ``vision_model.*``, is trained and merged; the rest is frozen. The module's state holds the heads, but
    not the text tower.

    A task's head is made when a Trainer first runs with its datamodule, which has the attributes ``task_name`` and
    ``class_names`` (:class:`~lightning_odem.tasks.Task` has both), or by :meth:`add_task`. Batches are images [B, C, H,
    W], uint8 in [0, 255] or floating in [0, 1], and labels [B]. ``forward`` resizes, crops and normalises images as the
    base model's ``CLIPImageProcessor`` does, and repeats grey ones to three channels.

    Args:
        model: The base model: a folder that ``CLIPModel.save_pretrained`` wrote, with tokenizer and image processor, or
            a model id on the Hugging Face hub, such as ``openai/clip-vit-base-patch32``.
        class_names: Names of the classes in the order of their labels, by task. They replace the datamodule's.
        prompts: Prompt templates with ``{}`` in the place of the class name, by task. They replace those in
            :mod:`lightning_odem.classifiers.clip_prompts`, and ``"a photo of a {}."`` for tasks that are not in that
            module.
        lr: Learning rate of Adam, constant. The published vision towers were fine-tuned with 1e-5.

    Raises:
        ImportError: If ``transformers`` is not installed.
        FileNotFoundError: If there is no such model.
        ValueError: If the model is incomplete or corrupt, or a template has no ``{}``.

    Example::

        model = ClipClassifier("openai/clip-vit-base-patch32", class_names={"pets": ["cat", "dog"]})
        model(images, "pets").softmax(dim=1)
    """

    task_specific = ("heads",)

    def __init__(
        self,
        model: str,
        class_names: dict[str, list[str]] | None = None,
        prompts: dict[str, list[str]] | None = None,
        lr: float = 1e-5,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.prompts = {**PROMPTS, **(prompts or {})}
        for task, templates in self.prompts.items():
            if not templates or any("{}" not in template for template in templates):
                raise ValueError(f"Prompts of task {task!r} need {{}} for the class name, at least one: {templates}.")
        clip, tokenizer, processor = read_clip(model)
        self.vision_model: Any = clip.vision_model
        self.visual_projection = clip.visual_projection.requires_grad_(False)
        self.logit_scale = nn.Parameter(clip.logit_scale.detach(), requires_grad=False)
        self.heads = nn.ParameterDict()
        self.lr = lr
        self._text = TextEncoder(clip, tokenizer)
        self._resize, self._crop = processor.size["shortest_edge"], processor.crop_size
        self._mean, self._std = list(processor.image_mean), list(processor.image_std)
        self._current_task: str | None = None
        for task, names in (class_names or {}).items():
            self.add_task(task, names)
        self.train()

    @property
    def current_task(self) -> str | None:
        """Name of the task of the last Trainer run, which ``forward`` uses by default."""
        return self._current_task

    def add_task(self, task: str, class_names: Sequence[str]) -> None:
        """Make a task's zero-shot head, replacing any that it has.

        Raises:
            ValueError: If there are no class names, or the task's name cannot name a head.
        """
        if isinstance(class_names, str) or not class_names:
            raise ValueError(f"Task {task!r} needs a list of class names, got {class_names!r}.")
        self._set_head(task, self._text.head(class_names, self.prompts.get(task, DEFAULT_PROMPTS)))

    def read_checkpoint(self, source: str) -> dict[str, Tensor]:
        """Read a fine-tuned vision tower under this module's names, to be loaded or merged.

        Args:
            source: Folder or model id, such as ``tanganke/clip-vit-base-patch32_mnist``; see
                :func:`~lightning_odem.classifiers.clip_weights.read_clip_vision` for what it raises.

        Raises:
            ValueError: If the tower's shape shows that it was not fine-tuned from this module's base model.
        """
        return read_clip_vision(source, self.vision_model.config)

    def features(self, images: Tensor) -> Tensor:
        """Image embeddings [B, D] of length 1."""
        pooled = self.vision_model(pixel_values=self.preprocess(images)).pooler_output
        # Multiplied by the logit scale of 100, the rounding of bf16 would change which class is ahead.
        with torch.autocast(images.device.type, enabled=False):
            return normalize(self.visual_projection(pooled.to(self.visual_projection.weight.dtype)), dim=-1)

    def forward(self, images: Tensor, task: str | None = None) -> Tensor:
        """Logits [B, classes] of a task, by default the current one.

        Raises:
            ValueError: If the task has no head.
        """
        task = self._current_task if task is None else task
        if task is None or task not in self.heads:
            raise ValueError(
                f"There is no head for task {task!r}; there are heads for {list(self.heads)}. add_task makes one from "
                "the names of the classes."
            )
        features = self.features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.logit_scale.exp() * features @ self.heads[task].T

    def preprocess(self, images: Tensor) -> Tensor:
        """Convert images [B, C, H, W] to what the vision tower takes: [B, 3, S, S], normalised."""
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"Images are uint8 in [0, 255] or floating in [0, 1], found {images.dtype}.")
        images = transforms.resize(images, [self._resize], InterpolationMode.BICUBIC, antialias=True)
        images = transforms.center_crop(images, [self._crop["height"], self._crop["width"]])
        images = transforms.to_dtype(images, torch.float32, scale=True)
        return transforms.normalize(images.expand(-1, 3, -1, -1), self._mean, self._std)

    def setup(self, stage: str) -> None:
        """Make the datamodule's task the current one, and its head if it is new.

        Raises:
            ValueError: If the datamodule does not name its task or, for a new one, its classes, or the head has
                another number of classes than the data.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        task = getattr(data, "task_name", None)
        if task is None:
            raise ValueError(
                f"ClipClassifier reads the attribute `task_name` of the datamodule, found none on "
                f"{type(data).__name__}. Pass `datamodule=` with it to the Trainer."
            )
        if task not in self.heads:
            names = getattr(data, "class_names", None)
            if not names:
                raise ValueError(
                    f"The classes of task {task!r} have no names that {type(data).__name__} knows, so there is no "
                    f"zero-shot head for them. Pass class_names={{{task!r}: [...]}} to ClipClassifier."
                )
            self.add_task(task, names)
        classes = getattr(data, "num_classes", None)
        if classes is not None and len(self.heads[task]) != classes:
            raise ValueError(
                f"The head of task {task!r} has {len(self.heads[task])} classes, the datamodule has {classes}."
            )
        self._current_task = task

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Create the heads that the checkpoint has."""
        for name, head in checkpoint["state_dict"].items():
            if name.startswith("heads.") and name.removeprefix("heads.") not in self.heads:
                self._set_head(name.removeprefix("heads."), torch.empty_like(head))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the vision tower."""
        return torch.optim.Adam(self.vision_model.parameters(), lr=self.lr)

    def _set_head(self, task: str, head: Tensor) -> None:
        try:
            self.heads[task] = nn.Parameter(head.to(self.device), requires_grad=False)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"Task name {task!r} cannot name a head: {error}. Use a non-empty string without dots that is not a "
                "method of nn.ParameterDict."
            ) from error


class TextEncoder:
    """Tokenizer, text tower and text projection of a CLIP model, on the CPU.

    This is deliberately not an ``nn.Module``, so a module that holds one does not merge, copy or save it.

    Args:
        clip: The ``CLIPModel``.
        tokenizer: The ``CLIPTokenizer`` of the model.
    """

    def __init__(self, clip: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text_model = clip.text_model.eval()
        self.projection = clip.text_projection
        self.max_length = clip.config.text_config.max_position_embeddings

    def __deepcopy__(self, memo: dict) -> "TextEncoder":
        return self  # nothing in it ever changes

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [N, D] of texts, each of length 1. Text beyond the tower's context is cut off."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        pooled = self.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        return normalize(self.projection(pooled), dim=-1)

    def head(self, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot head [C, D]: for each class the mean of its prompts' embeddings, scaled to length 1.

        Args:
            class_names: Names of the classes in the order of their labels.
            templates: Prompts with ``{}`` in the place of the class name.
        """
        means = [self.embed([template.format(name) for template in templates]).mean(0) for name in class_names]
        return normalize(torch.stack(means), dim=-1)
