"""Attacks on the files of a stream and on arguments, counted by what they end in: the table in docs/reliability.md.

``LIGHTNING_ODEM_ATTACKS=2000 pytest -s tests/test_attacks.py`` runs that many of each kind; ``-s`` shows the table.
"""

import os
import random
import shutil
import warnings
from collections import Counter

import pytest
import torch
from identical import identical
from safetensors.torch import save_file
from toy import Classifier, Task, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.parameters import read_checkpoint
from lightning_odem.stream.sections import check_sections
from lightning_odem.stream.store import StreamStateError, StreamStore

TIMES = int(os.environ.get("LIGHTNING_ODEM_ATTACKS", "40"))
SILENT = "silently something else"


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """The folder of a stream of three tasks, and its generations."""
    directory = tmp_path_factory.mktemp("stream")
    module, merge = Classifier(batch_norm=True), ContinualMergeCallback("average", dirpath=str(directory))
    known = []
    for number in range(3):
        fit(module, Task(number), merge, max_epochs=1)
        known.append(StreamStore(directory / "stream").load())
    return directory / "stream", known[-2:]


def flip(content, numbers):
    place = numbers.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8


def truncate(content, numbers):
    del content[numbers.randrange(len(content)) :]


def overwrite(content, numbers):
    start = numbers.randrange(len(content))
    piece = numbers.randbytes(min(16, len(content) - start))
    if content[start : start + len(piece)] == piece:
        flip(content, numbers)
    content[start : start + len(piece)] = piece


def lengthen(content, numbers):
    content.extend(numbers.randbytes(1 + numbers.randrange(100)))


ATTACKS = {
    "one bit flipped": flip,
    "cut off": truncate,
    "16 bytes overwritten": overwrite,
    "bytes appended": lengthen,
}


def read(directory, known):
    """What a reader of a damaged folder gets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            state = StreamStore(directory).load(check=check_sections, mendable=["base"])
        except StreamStateError as error:
            return "refused, the file named" if str(directory) in str(error) else "refused, no file named"
    told = any(str(directory) in str(warning.message) for warning in caught)
    if identical(state, known[1]):
        return "read as it was"
    if told and identical({**state, "base": known[1]["base"]}, known[1]):
        return "all but the base model, with a warning"
    if told and identical(state, known[0]):
        return "the generation before, with a warning"
    if told and identical({**state, "base": known[0]["base"]}, known[0]):
        return "the generation before but its base model, with a warning"
    return SILENT


def show(title, counts):
    print(f"\n{title}: " + ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items())))


@pytest.mark.parametrize("attack", ATTACKS)
def test_damage_to_the_files_of_a_stream_is_never_silent(stream, attack, tmp_path):
    directory, known = stream
    numbers, counts = random.Random(attack), Counter()
    copy = tmp_path / "stream"
    shutil.copytree(directory, copy)
    files = sorted(path for path in copy.iterdir() if path.suffix in (".json", ".safetensors"))
    for _ in range(TIMES):
        path = numbers.choice(files)
        whole = path.read_bytes()
        content = bytearray(whole)
        ATTACKS[attack](content, numbers)
        path.write_bytes(content)
        counts[read(copy, known)] += 1
        path.write_bytes(whole)
    show(f"{attack}, {TIMES} times", counts)
    assert not counts[SILENT]
    assert not counts["refused, no file named"]


def test_files_that_change_places_or_are_gone_are_never_silent(stream, tmp_path):
    directory, known = stream
    numbers, counts = random.Random(0), Counter()
    for number in range(TIMES):
        copy = tmp_path / str(number)
        shutil.copytree(directory, copy)
        first, second = numbers.sample(sorted(path for path in copy.iterdir() if path.suffix != ".lock"), 2)
        content = first.read_bytes()
        if number % 2:
            first.write_bytes(second.read_bytes())
            second.write_bytes(content)
        elif first != max(copy.glob("0*.json")):  # the report tells of that, see test_callback_durable
            first.unlink()
        counts[read(copy, known)] += 1
        shutil.rmtree(copy)
    show(f"files exchanged or removed, {TIMES} times", counts)
    assert not counts[SILENT]


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_damaged_checkpoint_is_refused_by_name_or_read_as_it_was(kind, tmp_path):
    """A .safetensors file has no checksum of its own: there, only what changes its structure can be found."""
    path, tensors = tmp_path / f"model.{kind}", {"w": torch.arange(300.0), "b": torch.ones(40)}
    if kind == "ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    whole, counts, numbers = path.read_bytes(), Counter(), random.Random(kind)
    for _ in range(TIMES):
        content = bytearray(whole)
        (flip if kind == "ckpt" else truncate)(content, numbers)
        path.write_bytes(content)
        try:
            counts["read as it was" if identical(dict(read_checkpoint(path)), tensors) else SILENT] += 1
        except ValueError as error:
            counts["refused, the file named" if str(path) in str(error) else "refused, no file named"] += 1
    show(f"damaged .{kind}, {TIMES} times", counts)
    assert counts.keys() <= {"read as it was", "refused, the file named"}
