import numpy as np
import pytest
import torch

from lightning_odem.tasks import ArrayDataset


@pytest.mark.parametrize(
    ("shape", "item"), [((3, 5, 4), (1, 5, 4)), ((3, 5, 4, 3), (3, 5, 4)), ((3, 5, 4, 1), (1, 5, 4))]
)
def test_items_are_uint8_channels_first(shape, item):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image, label = ArrayDataset(images, [2, 0, 1])[1]
    assert (image.shape, image.dtype, label, type(label)) == (item, torch.uint8, 0, int)
    np.testing.assert_array_equal(image.permute(1, 2, 0).squeeze().numpy(), images[1].squeeze())


def test_views_with_negative_strides_and_read_only_memory_are_read():
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)[:, :, ::-1]
    images.flags.writeable = False
    assert ArrayDataset(images, [0, 1])[0][0].tolist() == [[[2, 1, 0], [5, 4, 3], [8, 7, 6]]]


def test_changing_a_sample_leaves_the_array_alone():
    dataset = ArrayDataset(np.zeros((1, 2, 2), dtype=np.uint8), [0])
    dataset[0][0].fill_(9)
    assert dataset[0][0].max() == 0


def test_the_transform_is_applied_to_images():
    assert ArrayDataset(np.zeros((1, 2, 2), dtype=np.uint8), [0], transform=lambda image: image + 3)[0][0].min() == 3


@pytest.mark.parametrize("labels", [[1, 0], (1, 0), torch.tensor([1, 0]), np.array([1, 0], dtype=np.uint8)])
def test_labels_of_any_kind_become_int64_targets(labels):
    targets = ArrayDataset(np.zeros((2, 2, 2), dtype=np.uint8), labels).targets
    assert targets.dtype == np.int64
    assert targets.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("images", "labels", "error", "found"),
    [
        (np.zeros((2, 2, 2)), [0, 1], TypeError, "float64"),
        (np.zeros((2, 2), dtype=np.uint8), [0, 1], ValueError, r"\[2, 2\]"),
        (np.zeros((2, 2, 2), dtype=np.uint8), [0], ValueError, "2 images"),
        (np.zeros((2, 2, 2), dtype=np.uint8), [[0], [1]], ValueError, r"\[2, 1\]"),
        (np.zeros((2, 2, 2), dtype=np.uint8), [0.0, 1.0], TypeError, "float64"),
    ],
)
def test_arrays_of_another_form_are_refused(images, labels, error, found):
    with pytest.raises(error, match=found):
        ArrayDataset(images, labels)
