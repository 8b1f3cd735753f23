"""``lightning-odem merge --into``: folds checkpoints into a stream in a directory."""

import glob
import math
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.cli.inputs import check_lists, task_names
from lightning_odem.cli.remove import method_of
from lightning_odem.cli.state_module import StateModule
from lightning_odem.methods import MergeMethod
from lightning_odem.methods.describe import describe_method
from lightning_odem.methods.needs import Offer
from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.model_files import match_names
from lightning_odem.parameters.snapshot import Snapshot
from lightning_odem.parameters.tied_tensors import copies
from lightning_odem.parameters.vector import canonical_name, check_same_shapes, is_excluded
from lightning_odem.report import StreamReport, render_table
from lightning_odem.report.plain import plain
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.merged_files import rewrite_merged
from lightning_odem.stream.merging import check_needs
from lightning_odem.stream.naming import file_name, next_task_name
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import StreamInUseError, StreamStateError
from lightning_odem.stream.stream import Stream

IN_THE_CALLBACK = "Merge the task in the callback: a fit of its data with ContinualMergeCallback(dirpath=...)."
"""The way out for streams that tensors alone cannot go on with."""


def merge_into(
    checkpoints: list[str],
    into: str,
    weights: list[float] | None = None,
    tasks: list[str] | None = None,
    exclude: Sequence[str] = (),
    device: str = "cpu",
) -> StreamReport:
    """Fold checkpoints into a stream that a callback has begun, by the stream's own method and in the order given.

    The result is what the callback would have made of these fine-tuned models. Nothing is measured. Either all
    checkpoints are merged or none. Only tensors are read, so the method must be one that needs neither samples nor the
    training run.

    Args:
        checkpoints: Models that were fine-tuned from the stream's base model: .safetensors files, state dicts,
            Lightning checkpoints or folders as Hugging Face's save_pretrained writes them.
        into: Directory of the stream.
        weights: Utility weights of the new tasks; by default 1.
        tasks: Names of the new tasks; by default those of the files.
        exclude: Patterns of tensors that a new task keeps for itself, if no task before has tensors of these names.
        device: Where merges are computed, such as cpu or cuda:0.

    Returns:
        The report of the stream.

    Raises:
        FileNotFoundError: If there is no stream or no checkpoint.
        StreamInUseError: If a process is fitting a task of the stream.
        ValueError: If a model does not fit the stream, a name is taken, or the stream's method needs more than tensors.
    """
    names = task_names(checkpoints) if tasks is None else tasks
    check_lists(checkpoints, names, weights, exclude)
    directory = RunDirectory(into)
    if not directory.holds_stream:
        raise FileNotFoundError(f"There is no stream in {into}.")
    with directory.locked():
        before = directory.read(StreamState(CalibrationBuffer()))
        _check_names(names, before, into)
        stream = _stream(before, directory, into)
        models = [_Model(path, before, exclude) for path in checkpoints]
        for model, task, weight in zip(models, names, weights or [1.0] * len(names), strict=True):
            _fold(stream, model, task, weight, device)
        state = stream.state
        name = f"merged-{len(state.report.tasks):02d}-{file_name(names[-1])}.ckpt"
        path = rewrite_merged(directory.at(name), before, state, f"with task {names[-1]!r}")
        state.report.merges[-1].checkpoint = path
        directory.rewrite(state)
    return state.report


def is_meant(args: Sequence[str]) -> bool:
    """Whether arguments of ``merge`` name a stream.

    Example:
        >>> is_meant(["a.ckpt", "--into=streams/shop"]), is_meant(["a.ckpt", "--output", "merged.safetensors"])
        (True, False)
    """
    return any(argument.partition("=")[0] == "--into" for argument in args)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lightning-odem merge --into``."""
    parser = ArgumentParser(
        prog="lightning-odem merge",
        usage="lightning-odem merge checkpoint [checkpoint ...] --into STREAM [options]",
        description="Fold checkpoints into a stream, in the order given. Other options of merge do not go with --into: "
        "method, base model and samples are the stream's.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_argument("checkpoints", nargs="+", help="Models to merge, in order.")
    parser.add_argument("--into", required=True, metavar="STREAM", help="Directory of the stream.")
    parser.add_function_arguments(merge_into, skip={"checkpoints", "into"}, as_group=False)
    given = parser.instantiate_classes(parser.parse_args(args))
    del given.config
    try:
        report = merge_into(**vars(given))
    except (OSError, ValueError, StreamInUseError, StreamStateError) as error:
        parser.error(str(error))
    print(render_table(report))
    names = ", ".join(report.tasks[-len(given.checkpoints) :])
    checkpoint = report.merges[-1].checkpoint
    print(f"Merged {plain(names)} into {given.into}." + (f" Merged weights: {checkpoint}" if checkpoint else ""))


def _check_names(names: Sequence[str], state: StreamState, into: str) -> None:
    held = state.report.tasks
    if taken := [name for name in names if name in held]:
        raise ValueError(
            f"{into} holds a task {taken[0]!r} already; its tasks are: {', '.join(held)}. Give the new tasks names of "
            "their own with tasks, or take the old one out with `lightning-odem remove`."
        )
    for name in names:
        next_task_name(None, held, name)  # refuses what no file can hold


def _stream(state: StreamState, directory: RunDirectory, into: str) -> Stream:
    """The stream with its method, for modules that consist of tensors.

    Raises:
        ValueError: If tensors alone do not suffice.
    """
    if not state.layout:
        raise ValueError(f"{into} was merged by an earlier version, which did not record enough. {IN_THE_CALLBACK}")
    if state.adapters or state.frozen:
        raise ValueError(f"{into} is a stream of adapters, whose scales only the module knows. {IN_THE_CALLBACK}")
    if directory.lacks_base:
        raise ValueError(f"The file of the base model in {into} is damaged. A fit with the callback mends it.")
    statistics = [name for name in state.merged or {} if name.endswith("running_var")]
    is_averaged = bool(state.names["statistics"]) or not statistics
    if not is_averaged and len(state.buffer):
        raise ValueError(f"Batch-norm statistics of {into} are estimated on its samples. {IN_THE_CALLBACK}")
    method = _method(state, into)
    try:
        check_needs(method, Offer(base=state.base is not None))
    except ValueError as error:
        raise ValueError(f"Tensors alone do not suffice for {into}. {error} {IN_THE_CALLBACK}") from error
    policy = "average" if is_averaged else "keep"
    stream = Stream(method, batch_norm=policy, layout=state.layout)
    stream.state = state
    return stream


def _method(state: StreamState, into: str) -> MergeMethod:
    """The method of the stream with exactly its settings."""
    settings = state.settings
    try:
        method = method_of(state)
        made = describe_method(method)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The method {settings['name']!r} of {into} cannot be made: {error} {IN_THE_CALLBACK}"
        ) from error
    if different := [key for key, value in settings.items() if made.get(key) != value]:
        raise ValueError(
            f"{into} does not store what its method {settings['name']!r} has for {', '.join(different)}. "
            f"{IN_THE_CALLBACK}"
        )
    return method


class _Model:
    """A fine-tuned model under the names of a stream: what all tasks share, and what its task keeps for itself."""

    def __init__(self, path: str, state: StreamState, exclude: Sequence[str]) -> None:
        found = {canonical_name(name): tensor for name, tensor in read_checkpoint(path).items()}
        wanted, known = state.merged or {}, state.own_names
        there = {name: other for name, other in match_names([*wanted, *known], found).items() if other in found}
        self.shared = {name: found[there[name]] for name in wanted if name in there}
        self.own = {name: found[there[name]] for name in known if name in there}
        more = {name: tensor for name, tensor in found.items() if name not in there.values()}
        self.own |= {name: tensor for name, tensor in more.items() if is_excluded(name, exclude)}
        tied = copies({**self.shared, **more})
        unknown = {
            name: tensor.shape
            for name, tensor in more.items()
            if tensor.is_floating_point() and name not in self.own and name not in tied
        }
        shapes = {name: tensor.shape for name, tensor in self.shared.items()}
        # Counters and position indices come and go with versions of a library.
        needed = {name: tensor.shape for name, tensor in wanted.items() if tensor.is_floating_point() or name in shapes}
        remedy = "exclude= names what the new task keeps for itself"
        check_same_shapes(needed, {**shapes, **unknown}, "stream's", path, remedy)
        if idle := [pattern for pattern in exclude if not any(is_excluded(name, [pattern]) for name in self.own)]:
            raise ValueError(f"exclude={idle} matches nothing in {path} besides what the stream merges.")
        kept = [set(own) for own in state.task_parameters.values()]
        if absent := sorted(set.intersection(*kept) - self.own.keys()) if kept else []:
            raise ValueError(
                f"{path} lacks {', '.join(absent[:3])}, which each task of the stream keeps for itself. Give the "
                "checkpoint of the whole module."
            )


def _fold(stream: Stream, model: _Model, task: str, weight: float, device: str) -> None:
    """Merge a model and take over the stream's new state."""
    state = stream.state
    module = _module(model, state).to(device)
    stream.division.exclude = tuple(map(glob.escape, (model.own | state.fixed).keys()))
    with stream.merging(module, task, weight, fingerprint=True) as addition:
        stream.state = addition.state(accuracy=[math.nan] * (len(state.report.tasks) + 1))


def _module(model: _Model, state: StreamState) -> StateModule:
    """A module that holds the model, in the dtypes of the stream's module and with the same parameters frozen."""
    parameters, merged, base = state.names["parameters"], state.merged or {}, state.base or {}
    others = [name for name in merged if name not in parameters]
    shared: Snapshot = {
        name: model.shared.get(name, merged[name]).to(base.get(name, merged[name]).dtype)
        for name in (*parameters, *others)
    }
    module = StateModule({**shared, **state.fixed, **model.own}, buffers=others)
    trained = {*state.layout["trained"], *(model.own.keys() - state.fixed.keys())}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    return module
