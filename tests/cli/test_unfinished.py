import json
import multiprocessing
import os
import pathlib
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import same

from lightning_odem.cli import files_in_pieces
from lightning_odem.cli.merge import merge_checkpoints
from lightning_odem.cli.unfinished import UnfinishedMerge

FOLDER = pathlib.Path(".merged.safetensors.merging")


@pytest.fixture(autouse=True)
def _small_pieces_in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"_PIECE": 1, "_SHARE": 0.0, "_LONG": 0.0}.items():
        monkeypatch.setattr(files_in_pieces, name, value)
    for seed in range(4):
        torch.manual_seed(seed)
        shapes = {"a.weight": (9, 7), "a.bias": (9,), "b.weight": (5, 9), "b.bias": (5,)}
        save_file({name: torch.randn(shape) for name, shape in shapes.items()}, f"{seed}.safetensors")


def merge(method, output="merged.safetensors", **options):
    return merge_checkpoints([f"{seed}.safetensors" for seed in (1, 2, 3)], output, method, "0.safetensors", **options)


def counting(act):
    """Results that are kept, by name; ``act`` is called with their number before each."""
    kept, save = [], UnfinishedMerge.save

    def counted(self, name, value):
        act(len(kept))
        kept.append(name)
        save(self, name, value)

    UnfinishedMerge.save = counted
    return kept


def killed_at(method, number):
    """Merge in a process that kills itself when it has kept so many results."""

    def run():
        counting(lambda done: os.kill(os.getpid(), signal.SIGKILL) if done == number else None)
        merge(method)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture
def kept(monkeypatch):
    monkeypatch.setattr(UnfinishedMerge, "save", UnfinishedMerge.save)
    return counting(lambda done: None)


@pytest.mark.parametrize("number", [1, 3, 7])
@pytest.mark.parametrize("method", ["opcm", "isotropic", "ties", "closed_form"])
def test_a_killed_merge_goes_on_where_it_was(method, number, kept):
    merge(method, "whole.safetensors")
    number = min(number, len(kept) - 1)
    kept.clear()
    killed_at(method, number)
    before = {path.name for path in FOLDER.glob("[0-9]*")}
    assert before
    assert not pathlib.Path("merged.safetensors").exists()
    found = merge(method)
    assert any("interrupted merge of the same models goes on" in note for note in found.notes)
    assert not [name for name in kept if name in before and ("kept" in name or method == "closed_form")]
    assert same(load_file("merged.safetensors"), load_file("whole.safetensors"))
    assert not FOLDER.exists()


def test_another_merge_begins_anew_and_says_so(kept):
    killed_at("opcm", 5)
    merge("opcm", "whole.safetensors", weights=[1.0, 1.0, 2.0])
    full = len(kept)
    kept.clear()
    found = merge("opcm", weights=[1.0, 1.0, 2.0])
    assert any("left by another merge" in note for note in found.notes)
    assert len(kept) == full
    assert same(load_file("merged.safetensors"), load_file("whole.safetensors"))


def test_a_changed_source_begins_anew():
    killed_at("opcm", 5)
    save_file({**load_file("2.safetensors"), "b.bias": torch.ones(5)}, "2.safetensors")
    merge("opcm")
    merge("opcm", "whole.safetensors")
    assert same(load_file("merged.safetensors"), load_file("whole.safetensors"))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_result_is_not_used(damage):
    killed_at("opcm", 6)
    for path in FOLDER.glob("[0-9]*"):
        content = bytearray(path.read_bytes())
        place = content.find(b"\x00FB") if damage == "cut" else len(content) // 3
        content[place] ^= 255
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    merge("opcm")
    merge("opcm", "whole.safetensors")
    assert same(load_file("merged.safetensors"), load_file("whole.safetensors"))


def test_a_journal_that_cannot_be_read_begins_anew():
    killed_at("opcm", 5)
    (FOLDER / "merge.json").write_bytes(b"\xff")
    assert any("left by another merge" in note for note in merge("opcm").notes)


def test_two_processes_do_not_make_the_same_merge():
    with UnfinishedMerge(FOLDER, {}) as unfinished:
        unfinished.save("a", {})
        with pytest.raises(ValueError, match="Another process merges"):
            merge("opcm")
        assert json.loads((FOLDER / "merge.json").read_text()) == {}


@pytest.mark.parametrize(("error", "stays"), [(KeyboardInterrupt, True), (OSError, False)])
def test_only_what_was_interrupted_leaves_results(error, stays, tmp_path):
    def fail():
        with UnfinishedMerge(FOLDER, {}) as unfinished:
            unfinished.save("a", {})
            raise error

    with pytest.raises(error):
        fail()
    assert FOLDER.exists() == stays


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None], ids=["folder", "file"])
def test_what_no_merge_has_left_is_refused_and_stays(make):
    make(FOLDER)
    path = FOLDER / "thesis.txt" if FOLDER.is_dir() else FOLDER
    path.write_text("years of work")
    with pytest.raises(ValueError, match="was not left by one"):
        merge("opcm")
    assert path.read_text() == "years of work"
    assert not pathlib.Path("merged.safetensors").exists()
