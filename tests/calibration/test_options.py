import pytest

from lightning_odem.calibration import CalibrationBuffer, CalibrationOptions
from lightning_odem.calibration.buffer import QUOTAS


def test_defaults_are_those_of_the_buffer():
    buffer, options = CalibrationBuffer(), CalibrationOptions()
    assert (options.quota, options.seed) == (buffer.quota, buffer.seed)


@pytest.mark.parametrize("quota", QUOTAS)
def test_known_quotas_are_taken(quota):
    assert CalibrationOptions(quota=quota).quota == quota


@pytest.mark.parametrize(
    ("settings", "message"), [({"batch_size": 0}, "batch_size=0"), ({"quota": "fair"}, "'fair'; .* equal, utility")]
)
def test_unusable_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CalibrationOptions(**settings)
