import hashlib
import json
import os
import random
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from identical import identical
from scripts import Script

from lightning_odem.stream.store import StreamStateError, StreamStore


def state_of(number):
    return {
        "base": {"w": torch.arange(4.0)},
        "merged": {"w": torch.full((3,), number)},
        "report": {"k": [number, (0.5,)]},
    }


@pytest.fixture
def directory(tmp_path):
    store = StreamStore(tmp_path / "stream")
    first = state_of(1)
    store.save(first)
    store.save({**state_of(2), "base": first["base"]})
    return tmp_path / "stream"


def load(directory):
    """The number of the generation loaded and the warnings; 0 with the message if it is refused."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            state = StreamStore(directory).load()
        except StreamStateError as error:
            return 0, str(error)
    number = state["report"]["k"][0]
    assert identical(state, state_of(number))
    return number, " ".join(str(warning.message) for warning in caught)


def newest(directory):
    """The files of the newest generation, and where a stream goes on that has lost one of them."""
    sections = json.loads((directory / "000002.json").read_text())["sections"]
    return {
        directory / "000002.json": 1,
        directory / sections["merged"]["file"]["name"]: 1,
        directory / sections["base"]["file"]["name"]: 0,
    }


@pytest.fixture
def no_waiting():
    """Ends a test that waits for a pipe."""

    def give_up(*_):
        raise RuntimeError("waited for a pipe")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_a_pipe_in_the_place_of_a_file_of_tensors_is_damage(directory, tmp_path):
    path = next(path for path in newest(directory) if path.suffix == ".safetensors")
    path.unlink()
    os.mkfifo(path)
    script = tmp_path / "load.py"
    script.write_text(
        "import sys; from lightning_odem.stream.store import StreamStore; print(StreamStore(sys.argv[1]).load())"
    )
    # In a process, since nothing else ends what waits for a pipe in safetensors.
    assert f"{path.name} is no regular file" in Script(script, directory).wait(100).stderr


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("/")], ids=["pipe", "file", "link"]
)
def test_what_is_in_the_way_of_drafts_is_told_and_harms_nothing(directory, make, no_waiting):
    make(directory / "drafts")
    store = StreamStore(directory)
    store.load()
    with pytest.raises(OSError, match="drafts.* What was saved there before is intact"):
        store.save(state_of(3))
    assert load(directory)[0] == 2


def damages(content):
    """Files that are not the one that was written."""
    yield from (content[:at] + bytes([byte ^ 1 << at % 8]) + content[at + 1 :] for at, byte in enumerate(content))
    yield from (content[:at] for at in range(0, len(content), 11))
    yield from (content + more for more in (b"\0", b" ", b"\n", content))
    numbers = random.Random(0)
    yield from (numbers.randbytes(size) for size in (1, 8, len(content), 5000))
    values = (None, 1, "text", [], {}, {"format": 1}, {"sections": {}}, {"checksum": 64 * "0"})
    yield from (json.dumps(value).encode() for value in values)
    yield b"[" * 200_000
    yield (1 << 40).to_bytes(8, "little") + content[8:]


@pytest.mark.parametrize("part", range(3))
def test_every_damage_to_a_file_is_found_and_names_it(directory, part):
    path, goes_on_from = list(newest(directory).items())[part]
    whole = path.read_bytes()
    count = 0
    for damaged in damages(whole):
        path.write_bytes(damaged)
        number, message = load(directory)
        assert (number, str(path) in message) == (goes_on_from, True), (damaged, message)
        count += 1
    assert count > len(whole)
    path.write_bytes(whole)
    assert load(directory) == (2, "")


@pytest.mark.parametrize("part", range(3))
def test_a_file_that_is_missing_or_a_directory_is_named(directory, part):
    path, goes_on_from = list(newest(directory).items())[part]
    path.unlink()
    if part:
        number, message = load(directory)
        assert (number, f"{path} is missing" in message) == (goes_on_from, True)
    path.mkdir()
    number, message = load(directory)
    assert number in (0, goes_on_from)
    assert str(path) in message


def test_a_generation_passed_over_is_told_and_what_is_lost(directory):
    (directory / "000002.json").write_text("")
    with pytest.warns(UserWarning, match="newest state .* is damaged: .*000002.json.* goes on from generation 1"):
        StreamStore(directory).load()


def test_a_manifest_of_another_generation_is_found(directory):
    shutil.copy(directory / "000001.json", directory / "000002.json")
    assert load(directory)[0] == 1
    assert "000002.json is the manifest of generation 1" in load(directory)[1]


def test_without_a_whole_generation_all_damage_is_told(directory):
    for number in (1, 2):
        (directory / f"00000{number}.json").write_text("")
    number, message = load(directory)
    assert number == 0
    assert message.startswith(f"No state of the stream in {directory} is whole")
    assert "000001.json" in message
    assert "000002.json" in message


def test_after_a_fall_back_the_whole_generation_is_the_one_that_is_kept(directory):
    (directory / "000002.json").write_text("")
    store = StreamStore(directory)
    with pytest.warns(UserWarning, match="damaged"):
        state = store.load()
    assert store.save({**state, "report": {"k": [3, (0.5,)]}}) == 3
    assert sorted(path.name for path in directory.glob("*.json")) == ["000001.json", "000003.json"]
    (directory / "000003.json").write_text("")
    assert load(directory)[0] == 1


def test_a_damaged_section_cannot_be_mapped(directory):
    path = next(directory.glob("base-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(StreamStateError, match=f"{path} has changed since it was written"):
        StreamStore(directory).map("base")


def test_to_save_over_a_damaged_file_repairs_it(directory):
    path = next(directory.glob("base-*"))
    path.write_bytes(b"")
    StreamStore(directory).save(state_of(3))
    assert load(directory) == (3, "")
    (directory / "000003.json").unlink()
    assert load(directory) == (2, "")


def sign(directory, content, number=2):
    """Write a manifest that vouches for itself, whatever it says."""
    body = json.dumps(content)[1:].encode()
    line = b'{"checksum": "%s",' % hashlib.sha256(body).hexdigest().encode()
    (directory / f"00000{number}.json").write_bytes(line + body)


def content_of(directory):
    content = json.loads((directory / "000002.json").read_text())
    del content["checksum"]
    return content


def test_a_newer_format_is_refused_and_nothing_older_taken_for_it(directory):
    sign(directory, {**content_of(directory), "format": 2, "package": "9.9.0", "sections": "quite different"})
    number, message = load(directory)
    assert number == 0
    assert "000002.json has format 2, written by version '9.9.0'" in message
    assert "reads format 1" in message


def test_a_manifest_cannot_point_to_a_file_elsewhere(directory):
    content = content_of(directory)
    file = content["sections"]["merged"]["file"]
    shutil.copy(directory / file["name"], directory.parent / file["name"])
    for name in (f"../{file['name']}", str(directory.parent / file["name"]), "000001.json"):
        file["name"] = name
        sign(directory, content)
        number, message = load(directory)
        assert number == 1
        assert "000002.json does not tell where section 'merged' is" in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["$tensor", "a"]), inner, max_size=2),
    max_leaves=4,
)


def places(content, at=()):
    yield at
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in children:
        yield from places(child, (*at, key))


def put(content, place, value):
    if not place:
        return value if isinstance(value, dict) and value else {"a": value}
    copy = content.copy()
    copy[place[0]] = put(content[place[0]], place[1:], value)
    return copy


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_manifest_that_vouches_for_nonsense_is_refused_by_name_or_says_what_it_says(directory, data):
    original = directory.parent / "original.json"
    shutil.copy(
        *((original, directory / "000002.json") if original.exists() else (directory / "000002.json", original))
    )
    content = content_of(directory)
    place = data.draw(st.sampled_from(list(places(content))))
    sign(directory, put(content, place, data.draw(json_values)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refusal = None
        try:
            state = StreamStore(directory).load()
        except StreamStateError as error:
            refusal = str(error)
    if refusal is not None:
        # Generation 1 is whole: nothing but another format keeps the stream from going on from there.
        assert place in ((), ("format",))
        assert "000002.json has format" in refusal
    elif caught:
        assert str(directory) in str(caught[0].message)
        assert identical(state, state_of(1))
    else:
        # What the manifest says of its files and itself can only be right; the rest is the state.
        assert place == () or place[0] == "package" or "file" not in place or place[-1] == "file"


def test_tensor_files_that_safetensors_refuses_are_named(directory):
    content = content_of(directory)
    file = content["sections"]["merged"]["file"]
    path = directory / file["name"]
    for garbage in (b"", b"\0" * 8, (2).to_bytes(8, "little") + b"{}x", b"\xff" * 64, b"junk"):
        path.write_bytes(garbage)
        file.update(size=len(garbage), sha256=hashlib.sha256(garbage).hexdigest())
        sign(directory, content)
        number, message = load(directory)
        assert (number, str(path) in message) == (1, True)


def test_a_tensor_that_a_file_does_not_have_is_named(directory):
    content = content_of(directory)
    content["sections"]["merged"]["value"] = {"$tensor": "absent"}
    sign(directory, content)
    assert load(directory)[0] == 1
    assert "000002.json, section 'merged': The structure refers to the tensor 'absent'" in load(directory)[1]


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_of_a_damaged_file_the_whole_tensors_are_told_and_of_the_state_the_whole_sections(directory):
    for path in directory.glob("merged-*"):
        flip(path)
    number, message = load(directory)
    assert number == 0
    assert "0 of its 1 tensors verify; damaged are w. Whole are base, report." in message


def test_a_header_that_is_damaged_tells_of_no_tensor(directory):
    for path in directory.glob("merged-*"):
        flip(path, 20)
    assert "verify" not in load(directory)[1]


def test_a_section_that_can_be_given_again_is_no_reason_to_refuse_the_rest(directory):
    (path,) = directory.glob("base-*")
    whole, base = path.read_bytes(), state_of(2)["base"]
    flip(path)
    store = StreamStore(directory)
    with pytest.warns(UserWarning, match="base-.*has changed.* it is given what was in there .base."):
        state = store.load(mendable=["base"])
    assert identical(state, {**state_of(2), "base": None})
    with pytest.raises(StreamStateError, match="lacks base"):
        store.save({**state, "base": base})
    other = {name: value + 1 for name, value in base.items()}
    assert (store.mend("base", other), store.lacking) == (False, ["base"])
    assert (store.mend("base", base), store.lacking) == (True, [])
    assert path.read_bytes() == whole
    assert identical(StreamStore(directory).load(), state_of(2))
    assert store.save({**state, "base": base}) == 3
