import json
import os
import shutil

import pytest
import torch
from identical import identical
from saving_process import BASE, state_of

from lightning_odem.stream.store import StreamStateError, StreamStore


def files(directory):
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def only(directory, pattern):
    (path,) = directory.glob(pattern)
    return path


@pytest.fixture
def directory(tmp_path):
    """A stream at generation 2; the base is one file for both."""
    store = StreamStore(tmp_path)
    assert [store.save(state_of(number)) for number in (1, 2)] == [1, 2]
    return tmp_path


@pytest.mark.parametrize("mapped", [False, True])
def test_a_state_is_loaded_as_it_was_saved(directory, mapped):
    assert identical(StreamStore(directory).load(mapped), state_of(2))


def test_sections_may_come_and_go(directory):
    store = StreamStore(directory)
    store.save({"new": torch.ones(2), "empty": {}, "none": None})
    assert identical(StreamStore(directory).load(), {"new": torch.ones(2), "empty": {}, "none": None})


@pytest.mark.parametrize("make", [True, False])
def test_an_empty_directory_holds_no_state(tmp_path, make):
    if make:
        (tmp_path / "stream").mkdir()
        (tmp_path / "stream" / "report.json").write_text("{}")
    store = StreamStore(tmp_path / "stream")
    assert store.load() is None
    assert store.number is None
    with pytest.raises(StreamStateError, match="holds no state"):
        store.map("base")


def test_the_number_is_that_of_the_newest_generation_by_whichever_process(directory):
    reader, writer = StreamStore(directory), StreamStore(directory)
    assert reader.number == 2
    writer.save(state_of(3))
    assert reader.number == 3


def test_the_two_newest_generations_are_kept_and_nothing_else_of_the_store(directory):
    (directory / "drafts").mkdir()
    (directory / "drafts" / ".tmpAbCdEf").write_text("of a killed process")
    (directory / "base-0123456789abcdef.safetensors").write_text("orphan")
    others = ["report.json", "model.safetensors", "base-123.safetensors", "lock"]
    for name in others:
        (directory / name).write_text("not the store's")
    store = StreamStore(directory)
    store.load()
    store.save(state_of(3, base=BASE))
    kept = sorted(name.partition("-")[0] for name in files(directory) if name not in others)
    assert kept == ["000002.json", "000003.json", "base", "merged", "merged"]
    assert set(others) < set(files(directory))


def test_generations_are_counted_beyond_six_digits(tmp_path):
    store = StreamStore(tmp_path)
    store.save(state_of(1))
    (tmp_path / "000001.json").rename(tmp_path / "999999.json")
    assert store.save(state_of(2)) == 1_000_000
    assert StreamStore(tmp_path).load()["report"]["number"] == 2


@pytest.mark.parametrize("how", ["saved", "loaded", "mapped", "map"])
def test_the_very_section_that_is_known_is_not_written_again(directory, how):
    store = StreamStore(directory)
    base = {"weight": BASE["weight"].clone()}
    if how == "saved":
        store.save(state_of(3, base))
    elif how == "map":
        base = store.map("base")
    else:
        base = store.load(mapped=how == "mapped")["base"]
    file = only(directory, "base-*")
    before = file.stat()
    store.save(state_of(4, base))
    after = only(directory, "base-*").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert identical(StreamStore(directory).load(), state_of(4))


def test_an_equal_section_in_another_object_is_written_again_under_the_same_name(directory):
    before = files(directory)
    StreamStore(directory).save(state_of(3))
    name = only(directory, "base-*").name
    assert before[name] != files(directory)[name]


def test_a_known_section_whose_file_was_lost_is_written_again(directory):
    store = StreamStore(directory)
    state = store.load(mapped=True)
    only(directory, "base-*").unlink()
    store.save({**state, "report": 3})
    assert identical(StreamStore(directory).load(), {**state_of(2), "report": 3})


def test_a_section_without_tensors_is_always_written(directory):
    store = StreamStore(directory)
    state = store.load()
    state["report"]["number"] = 7
    store.save(state)
    assert StreamStore(directory).load()["report"]["number"] == 7


def test_what_is_written_to_a_mapped_tensor_does_not_reach_the_file(directory):
    StreamStore(directory).map("base")["weight"].zero_()
    assert identical(StreamStore(directory).load(), state_of(2))


def test_a_mapped_section_outlives_its_file(directory):
    store = StreamStore(directory)
    merged = store.map("merged")
    for number in (3, 4, 5):
        store.save(state_of(number))
    shutil.rmtree(directory)
    assert identical(merged, state_of(2)["merged"])


def test_mapping_a_section_that_is_not_there_lists_those_that_are(directory):
    with pytest.raises(ValueError, match="has base, merged, report, but no 'bose'"):
        StreamStore(directory).map("bose")


def test_a_section_without_tensors_can_be_mapped(directory):
    assert StreamStore(directory).map("report") == state_of(2)["report"]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(directory):
    before = files(directory)
    with pytest.raises(TypeError, match=r"report\.callback is a "):
        StreamStore(directory).save({**state_of(3), "report": {"callback": print}})
    with pytest.raises(ValueError, match=r"letters, digits and underscores, got '\.\./base'"):
        StreamStore(directory).save({"../base": BASE})
    assert files(directory) == before


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file/stream"):
        StreamStore(tmp_path / "file" / "stream").save(state_of(1))
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file is no directory"):
        StreamStore(tmp_path / "file").load()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_without_the_right_to_write_the_generations_before_stay(directory):
    directory.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=f"could not be written to {directory}.*before is intact"):
            StreamStore(directory).save(state_of(3))
    finally:
        directory.chmod(0o700)
    assert identical(StreamStore(directory).load(), state_of(2))


def test_an_interrupted_save_leaves_no_trace(directory, monkeypatch):
    before = files(directory)
    sync = os.fsync

    def interrupt(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("manifest.json"):
            raise KeyboardInterrupt
        sync(descriptor)

    store = StreamStore(directory)
    base = store.load()["base"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.save(state_of(3, base))
    assert files(directory) == before
    assert store.save(state_of(3, base)) == 3


def test_everything_is_on_the_disk_before_the_name_that_refers_to_it(directory, monkeypatch):
    steps = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        steps.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).partition("-")[0]))
        sync(descriptor)

    def replaced(source, target):
        steps.append(("rename", os.path.basename(source)))
        replace(source, target)

    store = StreamStore(directory)
    base = store.load()["base"]
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    store.save(state_of(3, base))
    assert steps == [
        ("sync", "merged.safetensors"),
        ("rename", "merged.safetensors"),
        ("sync", "manifest.json"),
        ("sync", directory.name.partition("-")[0]),
        ("rename", "manifest.json"),
        ("sync", directory.name.partition("-")[0]),
    ]


def test_files_have_the_rights_that_any_new_file_has(directory):
    (directory / "any").write_text("")
    modes = {path.stat().st_mode for path in directory.iterdir()}
    assert modes == {(directory / "any").stat().st_mode}


def test_a_manifest_is_json_that_tells_what_there_is(directory):
    manifest = json.loads((directory / "000002.json").read_text())
    assert manifest["format"] == 1
    assert manifest["number"] == 2
    assert manifest["sections"]["report"]["value"]["number"] == 2
    base = manifest["sections"]["base"]
    assert base["value"] == {"weight": {"$tensor": "weight"}}
    assert base["file"]["size"] == only(directory, "base-*").stat().st_size
    assert base["file"]["name"] == f"base-{base['file']['sha256'][:16]}.safetensors"
