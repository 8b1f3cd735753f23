import os

import pytest

from lightning_odem.parameters.files import (
    NotRegularError,
    make_writable,
    read_regular,
    remove_drafts,
    replacing,
    replacing_folder,
)


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "made" / "file.txt"
    with replacing(path) as draft:
        draft.write_text("old")
    with replacing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as draft:
            draft.write_text("half")
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "made" / "folder"
    for text in ("old", "new"):
        with replacing_folder(path) as draft:
            (draft / "inner").mkdir()
            (draft / "inner" / f"{text}.txt").write_text(text)
            assert not (path / "inner" / f"{text}.txt").exists()
    assert [str(file.relative_to(path.parent)) for file in path.parent.rglob("*.txt")] == ["folder/inner/new.txt"]
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old.txt").touch()

    def fail():
        with replacing_folder(path) as draft:
            (draft / "half.txt").touch()
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail()
    assert [file.name for file in path.iterdir()] == ["old.txt"]
    assert list(tmp_path.iterdir()) == [path]


def test_content_and_name_are_on_the_disk_at_the_end_of_the_block(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replaced(source, target):
        steps.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(tmp_path / "file.txt") as draft:
        draft.write_text("new")
    assert steps == [str(draft), "renamed", str(tmp_path)]


def test_drafts_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    kept = [".hidden", "report.json", ".report.json.old", "notes.123"]
    for name in (*kept, ".report.json.123", ".table.txt.7"):
        (tmp_path / name).write_text("")
    remove_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotRegularError, match="pipe is no regular file"):
        read_regular(tmp_path / "pipe")
    with pytest.raises(NotRegularError, match="/dev/zero is no regular file"):
        read_regular("/dev/zero")


def test_a_pipe_in_the_place_of_a_draft_or_of_the_file_is_replaced(tmp_path):
    path = tmp_path / "report.json"
    for pipe in (path, tmp_path / f".report.json.{os.getpid()}"):
        path.unlink(missing_ok=True)
        os.mkfifo(pipe)
        with replacing(path) as draft:
            draft.write_text("complete")
        assert path.read_text() == "complete"


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path):
    make_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError, match=f"{tmp_path}/a/b cannot be written: Not a directory. {tmp_path}/a is a file"):
        make_writable(tmp_path / "a" / "b")


def test_the_folder_whose_permissions_are_in_the_way_is_named_with_them(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith(("pytest-", "popen-")) or folder == tmp_path:
            folder.chmod(folder.stat().st_mode | 0o055)
    reading, writing = os.pipe()
    if not (process := os.fork()):
        if os.getuid() == 0:
            os.setuid(65534)  # permissions do not bind the superuser
        try:
            make_writable(tmp_path / "closed" / "run")
        except PermissionError as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.waitpid(process, 0)
    os.close(writing)
    with open(reading) as message:
        found = message.read()
    assert f"{tmp_path}/closed/run cannot be written: Permission denied. {tmp_path}/closed is of user" in found
    assert "with permissions dr-xr-xr-x" in found
