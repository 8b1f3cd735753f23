import numpy as np
import pytest
import torch
from PIL import Image

from lightning_odem.tasks import ImageFolderStream

BRIGHTNESS = {"cat": 40, "dog": 200}


def write(folder, counts, classes=("cat", "dog"), suffix="png"):
    for split, count in counts.items():
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                colour = (BRIGHTNESS.get(name, 0), index, 0)
                Image.new("RGB", (20, 12), colour).save(folder / split / name / f"{index}.{suffix}")


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "pets", {"train": 10, "val": 2, "test": 3})
    write(tmp_path / "more", {"train": 20, "test": 3})
    return tmp_path


def test_one_task_per_folder_with_labels_by_class_name(root):
    (root / ".cache").mkdir()
    stream = ImageFolderStream(root, image_size=8)
    assert stream.names == ["more", "pets"]
    for task in stream:
        assert task.num_classes == 2
        images, labels = next(iter(task.test_dataloader()))
        assert (images.shape, images.dtype) == ((6, 3, 8, 8), torch.uint8)
        assert images[:, 0, 4, 4].tolist() == [list(BRIGHTNESS.values())[label] for label in labels]


def test_targets_match_the_images(root):
    for split in ImageFolderStream(root)["more"].splits:
        shown = [split[i][0][0, 0, 0].item() for i in range(len(split))]
        assert shown == [list(BRIGHTNESS.values())[label] for label in split.targets]


def test_a_missing_validation_split_is_cut_from_training_by_seed(root):
    def files(seed):
        splits = ImageFolderStream(root, tasks=["more"], seed=seed)[0].splits
        return [[tuple(split[i][0][:2, 0, 0].tolist()) for i in range(len(split))] for split in splits]

    train, val, test = files(seed=0)
    assert (len(train), len(val), len(test)) == (36, 4, 6)
    assert len({*train, *val}) == 40
    assert files(seed=0) == [train, val, test]
    assert files(seed=1)[1] != val


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split_is_named(tmp_path, split):
    write(tmp_path / "pets", dict.fromkeys({"train", "test"} - {split}, 2))
    with pytest.raises(FileNotFoundError, match=f"'pets': {tmp_path / 'pets' / split} is missing"):
        ImageFolderStream(tmp_path)


@pytest.mark.parametrize("split", ["val", "test"])
def test_classes_that_differ_between_splits_are_listed(root, split):
    write(root / "pets", {split: 1}, classes=["cow"])
    write(root / "pets", {"train": 1}, classes=["ant"])
    write(root / "pets", dict.fromkeys({"val", "test"} - {split}, 1), classes=["ant"])
    with pytest.raises(ValueError, match=rf"only in train: \['ant'\], only in {split}: \['cow'\]"):
        ImageFolderStream(root)


def test_a_split_without_class_folders_is_named(root):
    (root / "flat" / "train").mkdir(parents=True)
    (root / "flat" / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="flat/train"):
        ImageFolderStream(root)


def test_a_class_may_have_no_images_in_one_split(root):
    for file in (root / "pets" / "val" / "cat").iterdir():
        file.unlink()
    assert ImageFolderStream(root)["pets"].splits.val.targets.tolist() == [1, 1]


def test_a_split_without_any_image_is_named(root):
    for file in (root / "pets" / "val").glob("*/*"):
        file.unlink()
    with pytest.raises(ValueError, match="'pets': the val split of .* is empty"):
        ImageFolderStream(root)["pets"].setup()


@pytest.mark.parametrize("keep", [0, 10, -100])
def test_a_damaged_image_is_named(root, keep):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = root / "pets" / "test" / "cat" / "0.png"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path} is not a readable image"):
        next(iter(ImageFolderStream(root)["pets"].test_dataloader()))


@pytest.mark.parametrize("folder", ["", "absent"])
def test_a_root_without_task_folders_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=f"No task folder in {tmp_path / folder}"):
        ImageFolderStream(tmp_path / folder)


def test_trainer_fits_one_folder(root, fit):
    images, _ = fit(ImageFolderStream(root, tasks=["pets"], batch_size=5)).seen[0]
    assert images.shape == (5, 3, 32, 32)
