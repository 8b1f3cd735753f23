import numpy as np
import pytest

from lightning_odem.tasks import shifts

ALL = [
    shifts.upright,
    shifts.rotated,
    shifts.inverted,
    shifts.slanted,
    shifts.striped,
    shifts.noisy,
    shifts.mirrored,
    shifts.occluded,
    shifts.shrunk,
    shifts.outlined,
    shifts.centred,
    shifts.top,
    shifts.right,
    shifts.bottom,
    shifts.left,
]


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (5, 16, 16), dtype=np.uint8)


@pytest.mark.parametrize("shift", ALL)
def test_a_shift_is_a_pure_function(shift, images):
    before = images.copy()
    np.random.seed(0)  # noqa: NPY002
    once = shift(images).copy()
    np.random.seed(1)  # noqa: NPY002
    np.testing.assert_array_equal(shift(images), once)
    np.testing.assert_array_equal(images, before)
    assert (once.dtype, once.shape) == (np.uint8, images.shape)


@pytest.mark.parametrize("shift", ALL)
def test_no_pixels_make_no_images(shift):
    assert shift(np.zeros((0, 16, 16), dtype=np.uint8)).shape == (0, 16, 16)


def test_rotated_moves_the_top_right_corner_to_the_top_left(images):
    np.testing.assert_array_equal(shifts.rotated(images)[:, 0, 0], images[:, 0, -1])


@pytest.mark.parametrize("shift", [shifts.inverted, shifts.mirrored])
def test_a_reflection_applied_twice_is_the_identity(shift, images):
    np.testing.assert_array_equal(shift(shift(images)), images)


def test_four_quarter_turns_are_the_identity(images):
    turned = images
    for _ in range(4):
        turned = shifts.rotated(turned)
    np.testing.assert_array_equal(turned, images)


def test_slanted_moves_rows_apart_and_keeps_the_middle():
    bar = np.zeros((1, 33, 33), dtype=np.uint8)
    bar[:, :, 16] = 255
    centres = shifts.slanted(bar)[0].argmax(axis=1)
    rows = np.arange(-10, 11)
    slope = np.polyfit(rows, centres[16 + rows], 1)[0]
    assert abs(slope) == pytest.approx(np.tan(np.deg2rad(40)), abs=0.05)
    assert centres[16] == 16


def test_striped_covers_every_second_band_of_four_columns(images):
    striped = shifts.striped(images)
    np.testing.assert_array_equal(striped[:, :, :4], images[:, :, :4])
    np.testing.assert_array_equal(striped[:, :, 4:8], np.maximum(images[:, :, 4:8], 200))


def test_noisy_has_the_stated_mean_and_deviation():
    noise = shifts.noisy(np.zeros((50, 32, 32), dtype=np.uint8)).astype(float)
    assert noise.mean() == pytest.approx(96, abs=1)
    assert noise.std() == pytest.approx(48, abs=1.5)


def test_occluded_hides_a_white_square_and_nothing_else():
    hidden = shifts.occluded(np.full((20, 32, 32), 7, dtype=np.uint8))
    assert ((hidden == 255).sum(axis=(1, 2)) == 14 * 14).all()
    assert (hidden[hidden != 255] == 7).all()
    assert len({tuple(np.argwhere(image == 255)[0]) for image in hidden}) > 10


def test_shrunk_keeps_the_whole_image_on_a_black_ground():
    small = shifts.shrunk(np.full((20, 32, 32), 9, dtype=np.uint8))
    assert ((small == 9).sum(axis=(1, 2)) == 20 * 20).all()
    assert (small[small != 9] == 0).all()


def test_outlined_is_black_inside_a_uniform_area():
    square = np.zeros((1, 8, 8), dtype=np.uint8)
    square[:, 2:6, 2:6] = 50
    edges = shifts.outlined(square)[0]
    assert (edges[3:5, 3:5] == 0).all()
    assert (edges[2, 2:6] == 200).all()
    assert (edges[0] == 0).all()


def test_the_places_of_a_third_of_the_size_do_not_overlap(images):
    places = [shifts.centred, shifts.top, shifts.right, shifts.bottom, shifts.left]
    covered = np.sum([place(np.full_like(images, 255)) > 0 for place in places], axis=0)
    assert covered.max() == 1
    assert covered[0].sum() == len(places) * (16 // 3) ** 2
    assert shifts.top(images)[:, :5, 5:10].any()
    assert shifts.left(images)[:, 5:10, :5].any()
