import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from lightning_odem.tasks import DigitsStream, shifts

ALL = ["rotated", "inverted", "slanted", "striped", "noisy", "mirrored", "occluded", "shrunk", "outlined"]


def arrays(split):
    return np.stack([split[i][0].numpy()[0] for i in range(len(split))])


@pytest.fixture(scope="module")
def stream():
    return DigitsStream(tasks=ALL)


def test_the_default_stream_has_five_tasks_of_ten_classes():
    stream = DigitsStream()
    assert stream.names == ALL[:5]
    assert {task.num_classes for task in stream} == {10}


def test_constructing_a_stream_reads_no_data(monkeypatch):
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: pytest.fail("read"))
    DigitsStream()


def test_splits_have_the_documented_sizes_and_every_class(stream):
    splits = stream["rotated"].splits
    assert [len(split) for split in splits] == [1294, 144, 359]
    for split in splits:
        shares = np.bincount(split.targets) / len(split)
        np.testing.assert_allclose(shares, 0.1, atol=0.015)


def test_splits_share_no_image():
    splits = DigitsStream().pretraining.splits
    train, val, test = ({image.tobytes() for image in arrays(split)} for split in splits)
    assert not train & val
    assert not train & test
    assert not val & test


@pytest.mark.parametrize("name", ALL)
def test_a_task_is_the_pretraining_task_shifted_image_by_image(stream, name):
    upright, task = stream.pretraining.splits, stream[name].splits
    # The noise of an image is drawn by its place in the whole set, so the guise is compared there.
    digits = load_digits()
    whole = shifts.resized((digits.images * 255 / 16).round().astype(np.uint8), 32, 32)
    guise = dict(zip((image.tobytes() for image in whole), getattr(shifts, name)(whole), strict=True))
    for split, shifted in zip(upright, task, strict=True):
        np.testing.assert_array_equal(split.targets, shifted.targets)
        expected = np.stack([guise[image.tobytes()] for image in arrays(split)])
        np.testing.assert_array_equal(arrays(shifted), expected)


def test_the_pretraining_task_shows_the_digits_of_scikit_learn():
    digits = load_digits()
    splits = DigitsStream(image_size=8).pretraining.splits
    shown = {
        (image.tobytes(), label) for split in splits for image, label in zip(arrays(split), split.targets, strict=True)
    }
    scaled = (digits.images / 16 * 255).round().astype(np.uint8)
    assert shown == {(image.tobytes(), label) for image, label in zip(scaled, digits.target, strict=True)}


def test_images_are_grey_uint8_of_the_asked_size():
    image, _ = DigitsStream(tasks=["shrunk"], image_size=20)[0].calibration_dataset()[0]
    assert (image.shape, image.dtype) == ((1, 20, 20), torch.uint8)


def test_the_same_seed_gives_the_same_data_and_another_seed_another_split(stream):
    again, other = DigitsStream(tasks=["noisy"]), DigitsStream(tasks=["noisy"], seed=1)
    np.testing.assert_array_equal(arrays(again[0].splits.test), arrays(stream["noisy"].splits.test))
    assert {i.tobytes() for i in arrays(again[0].splits.test)} != {i.tobytes() for i in arrays(other[0].splits.test)}


def test_common_arguments_reach_the_pretraining_task():
    pretraining = DigitsStream(batch_size=7, seed=5, weights={"upright": 3.0}).pretraining
    assert (pretraining.task_name, pretraining.batch_size, pretraining.seed) == ("upright", 7, 5)
    assert pretraining.task_weight == 1.0


def test_a_task_survives_pickling_before_it_is_read():
    task = pickle.loads(pickle.dumps(DigitsStream(tasks=["slanted"])[0]))
    assert len(task.calibration_dataset()) == 1294


def test_images_smaller_than_the_digits_are_refused():
    with pytest.raises(ValueError, match="at least 8"):
        DigitsStream(image_size=4)


def test_trainer_fits_a_digits_task(fit):
    images, labels = fit(DigitsStream(tasks=["inverted"], batch_size=16)).seen[0]
    assert images.shape == (16, 1, 32, 32)
    assert images.float().mean() > 128
    assert labels.dtype == torch.int64


@pytest.mark.slow
def test_every_shift_hurts_a_net_trained_on_the_upright_digits(stream):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    loader = stream.pretraining.train_dataloader()
    for _ in range(10):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images / 255 - 0.3), labels).backward()
            optimizer.step()

    @torch.no_grad()
    def accuracy(task):
        hits = [net(images / 255 - 0.3).argmax(dim=1) == labels for images, labels in task.test_dataloader()]
        return torch.cat(hits).float().mean().item()

    accuracies = {task.task_name: accuracy(task) for task in stream}
    assert accuracy(stream.pretraining) > 0.9
    assert max(accuracies.values()) < 0.7, accuracies


def test_the_source_task_can_have_another_form():
    stream = DigitsStream(tasks=["top"], image_size=24, pretrained_on="centred")
    assert stream.pretraining.task_name == "centred"
    assert arrays(stream.pretraining.splits.val)[:, 8:16, 8:16].any()
    with pytest.raises(ValueError, match=r"pretrained_on is one of rotated, .*left, got 'middle'"):
        DigitsStream(pretrained_on="middle")
