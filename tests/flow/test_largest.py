import math

import pytest

from lightning_odem.flow.largest import first_largest, largest


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ([1.0, 3.0, 2.0], 2, [1, 2]),
        ([1.0, 3.0, 2.0], 5, [0, 1, 2]),
        ([1.0, 1.0 + 1e-12, 1.0 - 1e-12], 2, [0, 1]),
        ([1.0 - 1e-12, 1.0, 1.0, 2.0], 2, [0, 3]),
        ([1.0, 1.0 - 1e-12, 2.0, 3.0], 2, [2, 3]),
        ([0.0, math.inf, math.inf, 1.0], 1, [1]),
        ([], 2, []),
    ],
)
def test_of_values_that_differ_by_rounding_the_first_count(values, count, expected):
    assert largest(dict(enumerate(values)), count, tolerance=1e-9) == expected


def test_the_first_of_the_largest_is_found():
    assert first_largest([0.5, 0.8 - 1e-12, 0.8], tolerance=1e-9) == 1
    assert first_largest([0.5, 0.8 - 1e-6, 0.8], tolerance=1e-9) == 2
