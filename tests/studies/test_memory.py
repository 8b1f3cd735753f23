import math
import sys

import pytest
import torch

from lightning_odem.studies.memory import peak_memory


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_a_block_is_what_it_held_beyond_its_start():
    with peak_memory(torch.device("cpu")) as peak:
        block = torch.ones(50_000_000)  # 200 MB
        del block
    assert peak.bytes == pytest.approx(2e8, rel=0.1)
    with peak_memory(torch.device("cpu")) as peak:
        pass
    assert peak.bytes < 2e7


def test_nothing_is_claimed_before_the_block_ends():
    with peak_memory(torch.device("cpu")) as peak:
        assert math.isnan(peak.bytes)
