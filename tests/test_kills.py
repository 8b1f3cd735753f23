"""Streams whose process is killed, anywhere, and started again end as if nothing had been."""

import json
import os
from pathlib import Path

import pytest
from scripts import Script


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="streams are forked")
def test_a_stream_killed_at_any_point_and_started_again_loses_nothing():
    script = Path(__file__).parent / "helpers" / "killed_stream.py"
    done = Script(script, 12, 3).wait(580)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["lost"] == []
    assert result["on_files"] > 60
    assert result["tried"] > 40
