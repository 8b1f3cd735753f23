from pathlib import Path

import pytest
from scripts import run_script

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("plain_loop.py", "after striped"),
        ("deploy_for_important_tasks.py", "rotated counts four times: operating times 1.00, 0.20, 0.17"),
        ("own_module.py", "after task_3"),
        ("lora.py", "after rot13"),
        ("share_of_utility_study.py", "w of inverted"),
        ("sentence_classification.py", "after size"),
        ("causal_language_model.py", "after language 2"),
        ("regression.py", "after pressure"),
        ("segmentation.py", "after noisy"),
        ("detection.py", "after blue"),
        ("calibration_cost.py", "pass / step"),
        ("long_streams.py --run average 3 --run ode 2", "report (kB)"),
    ],
)
def test_an_example_runs_as_it_stands(script, expected, tmp_path):
    name, *arguments = script.split()
    done = run_script(EXAMPLES / name, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(script):
    assert len(script.read_text().splitlines()) < 120
