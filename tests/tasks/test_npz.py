import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_odem.tasks import NpzStream


def write(path, shape=(8, 8), classes=3, counts=(30, 6, 9), seed=0):
    """A file in which every pixel of an image but its first is ten times its label plus one."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        if count is not None:
            labels = np.arange(count) % classes
            images = np.broadcast_to((10 * labels + 1).reshape(-1, *[1] * len(shape)), (count, *shape)).astype(np.uint8)
            images[(slice(None), *[0] * len(shape))] = rng.permutation(count)
            arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None].astype(np.uint8)}
    np.savez_compressed(path, **arrays)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "grey.npz", classes=3)
    write(tmp_path / "colour.npz", shape=(8, 8, 3), classes=2)
    return tmp_path


def test_one_task_per_file_in_alphabetical_order(root):
    stream = NpzStream(root)
    assert stream.names == ["colour", "grey"]
    assert [task.num_classes for task in stream] == [2, 3]


def test_constructing_a_stream_reads_no_image(root, monkeypatch):
    monkeypatch.setattr("lightning_odem.tasks.archive.NpzArchive.images", lambda *_: pytest.fail("read"))
    NpzStream(root)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_task_gets_the_asked_channels_and_size(root, channels):
    for task in NpzStream(root, channels=channels, image_size=12):
        images, labels = next(iter(task.test_dataloader()))
        assert images.shape == (9, channels, 12, 12)
        assert images.dtype == torch.uint8
        assert (images[:, 0, 6, 6] - (10 * labels + 1)).abs().max() <= 1  # colour to grey rounds down


def test_the_size_of_the_files_is_kept_by_default(root):
    assert next(iter(NpzStream(root)["grey"].val_dataloader()))[0].shape == (6, 3, 8, 8)


def test_a_class_only_in_the_test_split_counts(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        train_images=np.zeros((10, 4, 4), np.uint8),
        train_labels=np.zeros(10, int),
        test_images=np.zeros((2, 4, 4), np.uint8),
        test_labels=np.array([0, 6]),
    )
    assert NpzStream(tmp_path)[0].num_classes == 7


def test_a_missing_validation_split_is_cut_from_training_by_seed(tmp_path):
    write(tmp_path / "a.npz", counts=(60, None, 9))

    def marks(seed):
        splits = NpzStream(tmp_path, channels=1, seed=seed)[0].splits
        for split in splits:
            for index in range(len(split)):
                image, label = split[index]
                assert image[0, 4, 4] == 10 * label + 1
                assert label == split.targets[index]
        return [[split[i][0][0, 0, 0].item() for i in range(len(split))] for split in splits]

    train, val, test = marks(seed=0)
    assert (len(train), len(val), len(test)) == (54, 6, 9)
    assert sorted(train + val) == list(range(60))
    assert marks(seed=0) == [train, val, test]
    assert marks(seed=1)[1] != val
    np.testing.assert_array_equal(np.bincount(NpzStream(tmp_path)[0].splits.val.targets), [2, 2, 2])


def test_a_negative_label_is_named(tmp_path):
    images = np.zeros((3, 4, 4), np.uint8)
    labels = np.array([0, -1, 1])
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    with pytest.raises(ValueError, match="a.npz has label -1 at index"):
        NpzStream(tmp_path)[0].setup()


def test_an_empty_split_is_named(tmp_path):
    write(tmp_path / "a.npz", counts=(6, 0, 3))
    with pytest.raises(ValueError, match="'a': the val split of .*a.npz is empty"):
        NpzStream(tmp_path)[0].setup()


def test_a_damaged_file_is_refused_at_construction_if_it_is_selected(root):
    (root / "bad.npz").write_bytes(b"hello")
    with pytest.raises(ValueError, match="bad.npz is not a readable .npz file"):
        NpzStream(root)
    assert NpzStream(root, tasks=["grey"]).names == ["grey"]


@pytest.mark.parametrize("folder", ["", "absent"])
def test_a_folder_without_files_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=f"No .npz file in {tmp_path / folder}"):
        NpzStream(tmp_path / folder)


def test_other_numbers_of_channels_are_refused(root):
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        NpzStream(root, channels=2)


def test_the_root_may_be_a_string(root):
    assert len(NpzStream(str(root))) == 2


def test_a_task_survives_pickling_before_and_after_it_is_read(root):
    task = pickle.loads(pickle.dumps(NpzStream(root)["grey"]))
    task.setup()
    again = pickle.loads(pickle.dumps(task))
    assert torch.equal(again.calibration_dataset()[3][0], task.calibration_dataset()[3][0])


def test_trainer_fits_one_file(root, fit):
    images, _ = fit(NpzStream(root, tasks=["grey"], batch_size=10)).seen[0]
    assert images.shape == (10, 3, 8, 8)


@pytest.mark.skipif("LIGHTNING_ODEM_DATA" not in os.environ, reason="LIGHTNING_ODEM_DATA names no folder of .npz tasks")
def test_real_files_are_read_in_full():
    root = Path(os.environ["LIGHTNING_ODEM_DATA"])
    for task in NpzStream(root, batch_size=256):
        with np.load(root / f"{task.task_name}.npz") as arrays:
            for split, loader in (("val", task.val_dataloader()), ("test", task.test_dataloader())):
                images = torch.cat([images for images, _ in loader]).permute(0, 2, 3, 1).numpy()
                expected = arrays[f"{split}_images"]
                np.testing.assert_array_equal(
                    images, expected if expected.ndim == 4 else expected[..., None].repeat(3, -1)
                )
                labels = torch.cat([labels for _, labels in loader])
                np.testing.assert_array_equal(labels.numpy(), arrays[f"{split}_labels"].ravel())
            assert len(task.calibration_dataset()) == len(arrays["train_labels"])
