"""``lightning-odem remove``: takes a task out of a stream in a directory."""

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from lightning_odem.calibration import CalibrationBuffer
from lightning_odem.methods import METHODS, MergeMethod, resolve_method
from lightning_odem.report import StreamReport, render_table
from lightning_odem.stream.directory import RunDirectory
from lightning_odem.stream.removal import describe, remove_task
from lightning_odem.stream.state import StreamState
from lightning_odem.stream.store import StreamInUseError


def remove_from_stream(
    stream: str, task: str, checkpoint: str, method: str | MergeMethod | None = None
) -> StreamReport:
    """Take a task out of a stream, as if it had never been merged, up to rounding.

    Args:
        stream: Directory of the stream.
        task: Name of the task.
        checkpoint: The fine-tuned model that the task was merged with: a .safetensors file, a state dict, a Lightning
            checkpoint written before the merge, or a folder as Hugging Face's save_pretrained writes them.
        method: The method with which the stream was merged; by default the one that the stream names. Streams of
            earlier versions do not store its settings.

    Returns:
        The report of the remaining stream.

    Raises:
        FileNotFoundError: If there is no stream or no checkpoint.
        StreamInUseError: If a process is fitting a task of the stream.
        ValueError: If the task is not in the stream or cannot be taken out, or the model is not the one merged.
    """
    directory, state = RunDirectory(stream), StreamState(CalibrationBuffer())
    if not directory.holds_stream:
        raise FileNotFoundError(f"There is no stream in {stream}.")
    state = directory.read(state)
    chosen = method_of(state) if method is None else resolve_method(method)
    return remove_task(directory, state, chosen, task, checkpoint).report


def method_of(state: StreamState) -> MergeMethod:
    """The method of a stream with its settings, or with default settings if the state does not have them."""
    settings = dict(state.settings) or {"name": state.report.merges[-1].method}
    name = settings.pop("name")
    rule = METHODS.get(name)
    return rule(**settings) if isinstance(rule, type) else resolve_method(name)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lightning-odem remove``."""
    parser = ArgumentParser(prog="lightning-odem remove", description="Take a task out of a stream.")
    parser.add_argument("--config", action="config", help="YAML file with any of the options.")
    parser.add_function_arguments(remove_from_stream, as_positional=True, as_group=False, skip={"checkpoint"})
    parser.add_argument("--checkpoint", required=True, help="The fine-tuned model that the task was merged with.")
    given = parser.instantiate_classes(parser.parse_args(args))
    del given.config
    try:
        report = remove_from_stream(**vars(given))
    except (FileNotFoundError, StreamInUseError, ValueError) as error:
        parser.error(str(error))
    print(render_table(report))
    print(describe(report))
