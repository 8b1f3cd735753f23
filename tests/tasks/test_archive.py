import io
import time
import zipfile

import numpy as np
import pytest

from lightning_odem.tasks import NpzStream
from lightning_odem.tasks.archive import NpzArchive


def contents(**changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("val", 4), ("test", 5)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 3, (count, 1), dtype=np.uint8)
    return {key: value for key, value in (arrays | changes).items() if value is not None}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "task.npz"


def test_labels_and_images_are_those_of_the_file(path):
    arrays = contents()
    np.savez(path, **arrays)
    archive = NpzArchive(path)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(archive.images(split), arrays[f"{split}_images"])
        np.testing.assert_array_equal(archive.labels[split], arrays[f"{split}_labels"][:, 0])
        assert archive.labels[split].dtype == np.int64


def test_flat_labels_of_any_integer_type_and_unknown_keys_are_accepted(path):
    np.savez(path, **contents(train_labels=np.arange(12, dtype=np.uint64), note=np.array("hello")))
    assert NpzArchive(path).labels["train"].tolist() == list(range(12))


def test_opening_reads_no_images(path):
    images = np.random.default_rng(0).integers(0, 256, (12, 64, 64), dtype=np.uint8)
    np.savez(path, **contents(train_images=images))
    path.write_bytes(path.read_bytes().replace(images[-1].tobytes(), images[0].tobytes()))
    archive = NpzArchive(path)
    with pytest.raises(ValueError, match="task.npz: cannot read train_images: .*CRC"):
        archive.images("train")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"test_images": None, "test_labels": None}, r"lacks \['test_images', 'test_labels'\]; found \['train_images'"),
        ({"val_labels": None}, r"lacks \['val_labels'\]"),
        ({"train_images": np.zeros((12, 5, 4))}, r"train_images must be uint8.*float64 \[12, 5, 4\]"),
        ({"train_images": np.zeros((12, 20), np.uint8)}, r"train_images must be uint8 \[N, H, W\].*\[12, 20\]"),
        ({"test_images": np.zeros((5, 5, 4, 2), np.uint8)}, r"test_images must be.*\[5, 5, 4, 2\]"),
        ({"test_images": np.zeros((5, 0, 4), np.uint8)}, r"test_images must be.*\[5, 0, 4\]"),
        ({"train_images": np.zeros((11, 5, 4), np.uint8)}, "train has 11 images but 12 labels"),
        ({"val_labels": np.zeros((5, 1), np.uint8)}, "val has 4 images but 5 labels"),
        ({"train_labels": np.zeros((12, 14), np.uint8)}, "train_labels has 14 labels per image"),
        ({"train_labels": np.zeros((12, 1, 1), np.uint8)}, r"train_labels must be integer.*\[12, 1, 1\]"),
        ({"train_labels": np.zeros((12, 0), np.uint8)}, r"train_labels must be integer.*\[12, 0\]"),
        ({"train_labels": np.uint8(3)}, r"train_labels must be integer.*\[\]"),
        ({"train_labels": np.zeros(12)}, "train_labels must be integer.*float64"),
        ({"train_labels": np.array(["a"] * 12)}, "train_labels must be integer.*<U1"),
        ({"train_labels": np.array([{}] * 12)}, "cannot read train_labels: .*allow_pickle=False"),
        ({"train_images": np.array([{}] * 12)}, "train_images must be uint8.*object"),
    ],
)
def test_another_content_is_refused_by_file_and_finding(path, changes, found):
    np.savez(path, **contents(**changes))
    with pytest.raises(ValueError, match=f"{path}.*{found}"):
        NpzArchive(path)


def npy():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", npy()], ids=["empty", "text", "start", "npy"])
def test_a_file_that_is_no_archive_is_named(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path} is not a readable .npz file"):
        NpzArchive(path)


def test_a_member_that_is_no_array_is_named(path):
    np.savez(path, **contents(train_labels=None))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_labels.npy", "hello")
    with pytest.raises(ValueError, match=f"{path}: cannot read train_labels"):
        NpzArchive(path)


def test_a_header_that_hides_samples_is_refused(path):
    np.savez(path, **contents(train_labels=None))
    file = io.BytesIO()
    np.save(file, np.zeros(12, dtype=np.uint8))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_labels.npy", file.getvalue().replace(b"(12,)", b"(11,)"))
    with pytest.raises(ValueError, match="train_labels.*more data"):
        NpzArchive(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
class TestDamage:
    """A damaged file is refused by name, or read as it was."""

    @pytest.fixture
    def intact(self, path, save):
        save(path, **contents())
        return path.read_bytes()

    def read_or_refuse(self, path, data):
        path.write_bytes(data)
        try:
            task = NpzStream(path.parent, channels=1)[0]
            task.setup()
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            return False
        for split, dataset in task.splits._asdict().items():
            shown = np.stack([dataset[i][0][0].numpy() for i in range(len(dataset))])
            np.testing.assert_array_equal(shown, contents()[f"{split}_images"])
            np.testing.assert_array_equal(dataset.targets, contents()[f"{split}_labels"][:, 0])
        return True

    def test_a_truncated_file_is_refused(self, path, intact):
        for length in range(0, len(intact), 17):
            assert not self.read_or_refuse(path, intact[:length])

    def test_a_flipped_bit_never_changes_the_data(self, path, intact):
        assert self.read_or_refuse(path, intact)
        rng = np.random.default_rng(0)
        outcomes = []
        for position in rng.choice(len(intact), 250, replace=False):
            data = bytearray(intact)
            data[position] ^= 1 << rng.integers(8)
            outcomes.append(self.read_or_refuse(path, bytes(data)))
        assert outcomes.count(False) > 100


def test_labels_that_would_make_a_head_of_any_size_are_refused(path):
    np.savez(path, **contents(test_labels=np.full(3, 10**12)))
    with pytest.raises(
        ValueError, match=r"test_labels goes up to 1000000000000, which would make 1000000000001 classes"
    ):
        NpzArchive(path)


def test_an_array_made_to_fill_the_memory_is_refused_unread(path):
    """Zeros of 4 GB that take 4 MB in the file, written piece by piece."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in contents().items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                if name != "train_labels":
                    np.lib.format.write_array(member, np.asarray(array))
                    continue
                header = {"descr": "|u1", "fortran_order": False, "shape": (2**31 + 2**20,)}
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(2**7 + 1):
                    member.write(bytes(2**24))
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"cannot read train_labels: .*unpacks from \d+ to \d+ bytes"):
        NpzArchive(path)
    assert time.monotonic() - started < 5.0
