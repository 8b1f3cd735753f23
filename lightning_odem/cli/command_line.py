"""The command line: LightningCLI with ``fit_tasks`` and studies; ``quickstart`` and work on files beside it."""

import os
import sys
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import lightning_odem.classifiers  # noqa: F401 (registers the short class names that a YAML may use)
from lightning_odem.callback.callback import ContinualMergeCallback
from lightning_odem.cli import extract as extract_command
from lightning_odem.cli import into as into_command
from lightning_odem.cli import merge as merge_command
from lightning_odem.cli import remove as removal_command
from lightning_odem.cli.class_paths import UntrustedPathError, check_class_paths, take_trusted
from lightning_odem.cli.quiet import quieten
from lightning_odem.studies.trainer import ContinualTrainer
from lightning_odem.tasks import TaskStream

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
"""The configuration that ``lightning-odem quickstart`` gives to ``fit_tasks``."""

NEXT_STEPS = f"""
Next:
  plain averaging of the same fine-tuned models, which forgets more:
    lightning-odem quickstart --trainer.callbacks.method average
  several methods and orders side by side:
    lightning-odem compare --config {QUICKSTART} --methods '[average, isotropic, ode]' --orders 3
  your own model and data: one fit per task, with one more callback:
    L.Trainer(max_epochs=3, callbacks=[lightning_odem.ContinualMergeCallback()]).fit(model, datamodule=task)"""
"""What the quickstart says at its end."""


class SaveRunConfig(SaveConfigCallback):
    """Save the configuration as ``config.yaml`` beside the report or, without merging, where Lightning saves it."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave a run with merges to :meth:`on_train_start`, where its directory is known."""
        if _merge_callback(trainer) is None:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save once per stream."""
        merge = _merge_callback(trainer)
        if merge is None or merge.dirpath is None or self.already_saved:
            return
        if trainer.is_global_zero:
            merge.dirpath.mkdir(parents=True, exist_ok=True)
            path = merge.dirpath / self.config_filename
            self.parser.save(self.config, path, overwrite=self.overwrite, multifile=self.multifile)
        self.already_saved = True


def _merge_callback(trainer: L.Trainer) -> ContinualMergeCallback | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((found for found in callbacks if isinstance(found, ContinualMergeCallback)), None)


class ContinualCLI(LightningCLI):
    """LightningCLI with ContinualTrainer's subcommands beside Lightning's own; every argument can come from YAML.

    If the first argument is a subcommand, the parsers of the others stay empty, which saves time.

    Args:
        trusted: Modules besides the known packages whose functions a configuration may name in arguments of this
            package, see :func:`~lightning_odem.cli.class_paths.check_class_paths`.
        **kwargs: LightningCLI's.
    """

    def __init__(self, *args: Any, trusted: Sequence[str] = (), **kwargs: Any) -> None:
        self._trusted = trusted
        given = signature(LightningCLI).bind(*args, **kwargs).arguments.get("args")
        given = sys.argv[1:] if given is None else given
        self._first = given[0] if isinstance(given, list) and given else None
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Refuse what arguments of this package are not meant for."""
        try:
            check_class_paths(self.config, self._trusted)
        except UntrustedPathError as error:
            self.parser.error(str(error))

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's subcommands and those of ContinualTrainer, each with the parameters that are not its options."""
        own = dict.fromkeys(("fit_tasks", "compare", "trajectory", "schedule"), {"model", "datamodule"})
        return {**LightningCLI.subcommands(), **own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._can_reach(subcommand):
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def _can_reach(self, subcommand: str) -> bool:
        """Whether these arguments can lead to a subcommand, or have values for it."""
        if self.parser.default_env or self.parser.default_config_files:
            return True
        # What follows a subcommand is its own, and the help names subcommands without their options. Any other first
        # argument, such as --config, may be followed by any of them.
        return self._first == subcommand or self._first not in {"-h", "--help", *self.subcommands()}


def main(args: list[str] | None = None) -> ContinualCLI | None:
    """Run the command line; ``--help`` after a subcommand describes its options.

    ``quickstart`` is ``fit_tasks --config`` with :data:`QUICKSTART`, and takes its options.

    Classes in the current directory can be named in a YAML by their path, as with ``python -m``.

    Args:
        args: Arguments; by default those of the process.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    trusted, given = take_trusted(sys.argv[1:] if args is None else args)
    if given[:1] == ["merge"]:
        if into_command.is_meant(given):
            into_command.main(given[1:])
        else:
            merge_command.main(given[1:], trusted)
        return None
    if given[:1] == ["extract"]:
        extract_command.main(given[1:])
        return None
    if given[:1] == ["remove"]:
        removal_command.main(given[1:])
        return None
    quieten()
    if is_quickstart := given[:1] == ["quickstart"]:
        given = ["fit_tasks", "--config", str(QUICKSTART), *given[1:]]
    cli = ContinualCLI(
        L.LightningModule,
        TaskStream,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=ContinualTrainer,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        parser_kwargs={
            "epilog": "Further commands: lightning-odem merge --help (folds checkpoints that exist already into one), "
            "lightning-odem remove --help (takes a task out of a stream), lightning-odem extract --help (writes the "
            "difference of two models as an adapter), lightning-odem quickstart (shows how it works; options as in "
            "fit_tasks). A function of your own in an argument of lightning-odem, such as train_transform, needs "
            "--trust MODULE, on the command line only",
        },
        args=args if args is None and not (trusted or is_quickstart) else given,
        trusted=trusted,
    )
    if is_quickstart and cli.trainer.is_global_zero:
        print(NEXT_STEPS)
    return cli


def run() -> None:
    """The console script. It returns nothing, since a return value would become the exit code."""
    main()
