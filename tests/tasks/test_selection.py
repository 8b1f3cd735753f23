import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lightning_odem.tasks import ArrayDataset
from lightning_odem.tasks.selection import Selection, preprocessing


@pytest.fixture
def dataset():
    return ArrayDataset(np.arange(6, dtype=np.uint8).reshape(6, 1, 1), [0] * 6)


def test_a_selection_keeps_images_and_given_labels_together(dataset):
    selection = Selection(dataset, [5, 4, 3, 2, 1, 0], indices=[4, 1])
    assert [(image.item(), label) for image, label in (selection[0], selection[1])] == [(4, 1), (1, 4)]
    assert selection.targets.tolist() == [1, 4]
    assert len(selection) == 2


def test_holding_out_twice_keeps_the_original_indices(dataset):
    rest, first = Selection(dataset, np.arange(6)).hold_out(1 / 3, seed=0)
    stay, second = rest.hold_out(0.5, seed=0)
    parts = [[part[i][0].item() for i in range(len(part))] for part in (stay, second, first)]
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(sum(parts, [])) == list(range(6))
    assert parts == [part.targets.tolist() for part in (stay, second, first)]


@pytest.mark.parametrize("transform", [v2.ToDtype(torch.float32, scale=True), v2.ToPILImage()])
def test_a_transform_that_leaves_uint8_is_refused(dataset, transform):
    with pytest.raises(TypeError, match=type(transform).__name__):
        Selection(dataset, [0] * 6, transform=transform)[0]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocessing_makes_square_uint8_tensors_of_pil_images(mode, channels):
    image = preprocessing(16, channels)(Image.new(mode, (40, 20), color="white"))
    assert (image.shape, image.dtype, image.min().item() >= 254) == ((channels, 16, 16), torch.uint8, True)


def test_preprocessing_repeats_grey():
    grey = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    assert torch.equal(preprocessing(None)(grey), grey.expand(3, 4, 4))
    assert torch.equal(preprocessing(None, channels=1)(grey), grey)
