import csv
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from lightning_odem.tasks import SUITE_8, SUITE_14, SUITE_20, TorchvisionStream

# Each writer below puts a dataset of these labels on disk, in the format that torchvision reads. The brightness of an
# image tells its label.
LABELS = {"train": [0, 1] * 10, "val": [0, 1, 1], "test": [1, 0, 1, 0]}
BRIGHTNESS = np.array([60, 200], dtype=np.uint8)
OFFICIAL_VAL = {"dtd", "oxford_flowers102", "pcam", "rendered-sst2"}
WITHOUT_SPLITS = {"sun397", "resisc45", "eurosat"}
BY_HAND = ("stanford-cars", "resisc45", "fer2013")


def pixels(split, size):
    """The images of a split, uint8 [N, size, size]."""
    return np.tile(BRIGHTNESS[LABELS[split]][:, None, None], (1, size, size))


def save(path, label, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 24), BRIGHTNESS[label], np.uint8)).convert(mode).save(path)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_idx(folder, prefixes, first_label=0):
    folder.mkdir(parents=True)
    for split, prefix in prefixes.items():
        images = pixels(split, 28)
        header = np.array([2051, *images.shape], dtype=">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.array(LABELS[split], dtype=np.uint8) + first_label
        header = np.array([2049, len(labels)], dtype=">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


def write_mnist(root, patch, name="MNIST"):
    write_idx(root / name / "raw", {"train": "train", "test": "t10k"})


def write_fashion_mnist(root, patch):
    write_mnist(root, patch, "FashionMNIST")


def write_kmnist(root, patch):
    write_mnist(root, patch, "KMNIST")


def write_emnist_letters(root, patch):
    prefixes = {split: f"emnist-letters-{split}" for split in ("train", "test")}
    write_idx(root / "EMNIST" / "raw", prefixes, first_label=1)


def write_cifar(root, patch, dataset, files, key):
    folder = root / dataset.base_folder
    folder.mkdir()
    for split, name in files.items():
        data = pixels(split, 32)[:, None].repeat(3, axis=1).reshape(len(LABELS[split]), -1)
        (folder / name).write_bytes(pickle.dumps({"data": data, key: LABELS[split]}))
        patch.setattr(dataset, f"{split}_list", [[name, md5(folder / name)]])
    meta = folder / dataset.meta["filename"]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: ["dark", "bright"]}))
    patch.setattr(dataset, "meta", dataset.meta | {"md5": md5(meta)})


def write_cifar10(root, patch):
    write_cifar(root, patch, datasets.CIFAR10, {"train": "data_batch_1", "test": "test_batch"}, "labels")


def write_cifar100(root, patch):
    write_cifar(root, patch, datasets.CIFAR100, {"train": "train", "test": "test"}, "fine_labels")


def write_svhn(root, patch):
    checksums = {}
    for split in ("train", "test"):
        images = pixels(split, 32).transpose(1, 2, 0)[:, :, None].repeat(3, axis=2)
        path = root / f"{split}_32x32.mat"
        savemat(path, {"X": images, "y": np.where(np.array(LABELS[split]) == 0, 10, 1)[:, None]})
        checksums[split] = ["", path.name, md5(path)]
    patch.setattr(datasets.SVHN, "split_list", checksums)


def write_stl10(root, patch):
    folder = root / "stl10_binary"
    folder.mkdir()
    for split in ("train", "test"):
        pixels(split, 96)[:, None].repeat(3, axis=1).tofile(folder / f"{split}_X.bin")
        (np.array(LABELS[split], dtype=np.uint8) + 1).tofile(folder / f"{split}_y.bin")
        files = [folder / f"{split}_{part}.bin" for part in "Xy"]
        patch.setattr(datasets.STL10, f"{split}_list", [[path.name, md5(path)] for path in files])


def write_fer2013(root, patch):
    path = root / "fer2013" / "fer2013.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for split, usage in (("train", "Training"), ("test", "PrivateTest")):
            for label, image in zip(LABELS[split], pixels(split, 48), strict=True):
                writer.writerow([label, " ".join(map(str, image.ravel())), usage])
    patch.setitem(datasets.FER2013._RESOURCES, "fer", (path.name, md5(path)))


def write_oxford_flowers102(root, patch):
    folder = root / "flowers-102"
    labels = sum(LABELS.values(), [])
    for index, label in enumerate(labels, start=1):
        save(folder / "jpg" / f"image_{index:05d}.jpg", label)
    ends = np.cumsum([len(part) for part in LABELS.values()])
    ids = np.split(np.arange(1, len(labels) + 1), ends[:-1])
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), ids, strict=True)))
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels) + 1})
    checksums = {"label": "imagelabels.mat", "setid": "setid.mat"}
    for key, name in checksums.items():
        patch.setitem(datasets.Flowers102._file_dict, key, (name, md5(folder / name)))


def write_stanford_cars(root, patch):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["dark", "bright"], dtype=object)})
    annotations = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, name in annotations.items():
        rows = np.zeros(len(LABELS[split]), dtype=[("class", object), ("fname", object)])
        for index, label in enumerate(LABELS[split]):
            save(folder / f"cars_{split}" / f"{index}.jpg", label)
            rows[index] = (np.uint8(label + 1), f"{index}.jpg")
        savemat(folder / name, {"annotations": rows})


def write_gtsrb(root, patch):
    folder = root / "gtsrb" / "GTSRB"
    for index, label in enumerate(LABELS["train"]):
        save(folder / "Training" / f"{label:05d}" / f"{index}.ppm", label)
    with (root / "gtsrb" / "GT-final_test.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Filename", "ClassId"])
        for index, label in enumerate(LABELS["test"]):
            save(folder / "Final_Test" / "Images" / f"{index}.ppm", label)
            writer.writerow([f"{index}.ppm", label])


def write_dtd(root, patch):
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    for split, labels in LABELS.items():
        names = [f"{'ab'[label]}/{split}{index}.jpg" for index, label in enumerate(labels)]
        (folder / "labels" / f"{split}1.txt").write_text("\n".join(names))
        for name, label in zip(names, labels, strict=True):
            save(folder / "images" / name, label)


def write_oxford_iiit_pet(root, patch):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for split, name in (("train", "trainval"), ("test", "test")):
        lines = [f"pet{label}_{split}{index} {label + 1} 1 1" for index, label in enumerate(LABELS[split])]
        (folder / "annotations" / f"{name}.txt").write_text("\n".join(lines))
        for line, label in zip(lines, LABELS[split], strict=True):
            save(folder / "images" / f"{line.split()[0]}.jpg", label)


def write_food101(root, patch):
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        paths = {"apple": [], "bread": []}
        for index, label in enumerate(LABELS[split]):
            name = f"{list(paths)[label]}/{split}{index}"
            paths[name.split("/")[0]].append(name)
            save(folder / "images" / f"{name}.jpg", label)
        (folder / "meta" / f"{split}.json").write_text(json.dumps(paths))


def write_rendered_sst2(root, patch):
    for split, labels in LABELS.items():
        folder = root / "rendered-sst2" / {"val": "valid"}.get(split, split)
        for index, label in enumerate(labels):
            save(folder / ("negative", "positive")[label] / f"{index}.png", label)


def write_eurosat(root, patch):
    for index, label in enumerate(LABELS["train"]):
        save(root / "eurosat" / "2750" / ("Forest", "River")[label] / f"{index}.jpg", label)


def write_sun397(root, patch):
    for index, label in enumerate(LABELS["train"]):
        save(root / "SUN397" / ("a/abbey", "b/bakery/shop")[label] / f"sun_{index}.jpg", label)
    (root / "SUN397" / "ClassName.txt").write_text("/a/abbey\n/b/bakery/shop\n")


def write_pcam(root, patch):
    h5py = pytest.importorskip("h5py")
    (root / "pcam").mkdir()
    for split, labels in LABELS.items():
        files = {kind: file[0] for kind, file in datasets.PCAM._FILES[split].items()}
        with h5py.File(root / "pcam" / files["images"], "w") as file:
            file["x"] = pixels(split, 96)[..., None].repeat(3, axis=3)
        with h5py.File(root / "pcam" / files["targets"], "w") as file:
            file["y"] = np.array(labels, dtype=np.uint8).reshape(-1, 1, 1, 1)


def write_resisc45(root, patch):
    for index, label in enumerate(LABELS["train"]):
        save(root / "NWPU-RESISC45" / ("airplane", "beach")[label] / f"{index}.jpg", label)


def write(name, root, patch):
    globals()[f"write_{name.replace('-', '_')}"](root, patch)


def test_the_suites_have_their_sizes_and_contain_each_other():
    assert [len(set(suite)) for suite in (SUITE_8, SUITE_14, SUITE_20)] == [8, 14, 20]
    assert SUITE_20[:14] == SUITE_14
    assert SUITE_14[:8] == SUITE_8


@pytest.mark.parametrize("name", SUITE_20)
def test_a_dataset_is_read_from_the_files_of_torchvision(name, tmp_path, monkeypatch):
    write(name, tmp_path, monkeypatch)
    task = TorchvisionStream(tmp_path, tasks=[name], image_size=16)[0]
    splits = task.splits
    if name in OFFICIAL_VAL:
        expected = {split: sorted(labels) for split, labels in LABELS.items()}
    elif name in WITHOUT_SPLITS:
        expected = {"train": [0] * 7 + [1] * 7, "val": [0, 1], "test": [0, 0, 1, 1]}
    else:
        expected = {"train": [0] * 9 + [1] * 9, "val": [0, 1], "test": sorted(LABELS["test"])}
    assert {split: sorted(data.targets) for split, data in splits._asdict().items()} == expected
    for split in splits:
        for index in range(len(split)):
            image, label = split[index]
            assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.uint8, split.targets[index])
            assert (image.int() - int(BRIGHTNESS[label])).abs().max() <= 3


def test_constructing_a_stream_reads_no_data(tmp_path, monkeypatch):
    write("mnist", tmp_path, monkeypatch)
    monkeypatch.setattr(datasets.MNIST, "_load_data", lambda _: pytest.fail("read"))
    assert TorchvisionStream(tmp_path, tasks=["mnist"]).num_classes == 10


@pytest.mark.parametrize("name", SUITE_20)
def test_a_missing_dataset_is_refused_at_construction_with_the_place_it_should_have(name, tmp_path):
    advice = "torchvision cannot download it" if name in BY_HAND else "Set download=True"
    with pytest.raises(FileNotFoundError, match=f"Task '{name}': {tmp_path}/.* does not exist. {advice}"):
        TorchvisionStream(tmp_path, tasks=[name])


@pytest.mark.parametrize("name", BY_HAND)
def test_what_cannot_be_downloaded_is_refused_at_construction_all_the_same(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="torchvision cannot download it"):
        TorchvisionStream(tmp_path, tasks=[name], download=True)


def test_an_unknown_name_lists_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="'imagenet'.*'sun397'.*'rendered-sst2'"):
        TorchvisionStream(tmp_path, tasks=["imagenet"])


def test_downloading_is_left_to_prepare_data_and_skips_what_is_there(tmp_path, monkeypatch):
    calls = []
    task = TorchvisionStream(tmp_path, tasks=["mnist"], download=True)[0]
    write("mnist", tmp_path, monkeypatch)
    original = datasets.MNIST.download
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: (calls.append(self.train), original(self)))
    task.setup()
    assert calls == []
    task = TorchvisionStream(tmp_path, tasks=["mnist"], download=True)[0]
    task.prepare_data()
    assert calls == [True, False]


def test_files_that_cannot_be_read_are_named_by_task_and_folder(tmp_path, monkeypatch):
    write("mnist", tmp_path, monkeypatch)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    with pytest.raises(RuntimeError, match=f"'mnist': torchvision cannot read it in {tmp_path}"):
        TorchvisionStream(tmp_path, tasks=["mnist"])[0].setup()


def test_an_incomplete_dataset_is_named(tmp_path, monkeypatch):
    write("mnist", tmp_path, monkeypatch)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RuntimeError, match="'mnist'.*Dataset not found"):
        TorchvisionStream(tmp_path, tasks=["mnist"])[0].setup()


def test_cut_splits_depend_on_the_seed_and_not_on_the_order_of_the_folder(tmp_path, monkeypatch):
    write("sun397", tmp_path, monkeypatch)

    def test_files(seed):
        test = TorchvisionStream(tmp_path, tasks=["sun397"], seed=seed)[0].splits.test
        return [test.dataset._image_files[index] for index in test.indices]

    chosen = test_files(seed=0)
    listing = type(tmp_path).rglob
    monkeypatch.setattr(type(tmp_path), "rglob", lambda self, pattern: reversed(list(listing(self, pattern))))
    assert test_files(seed=0) == chosen
    assert test_files(seed=1) != chosen


def test_trainer_fits_one_dataset(tmp_path, monkeypatch, fit):
    write("kmnist", tmp_path, monkeypatch)
    images, _ = fit(TorchvisionStream(tmp_path, tasks=["kmnist"], image_size=20, batch_size=4)).seen[0]
    assert images.shape == (4, 3, 20, 20)
