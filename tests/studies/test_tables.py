from statistics import fmean, stdev

import pytest
from torch import nan

from lightning_odem.metrics import TaskMetric
from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.studies.results import CellResult, Comparison
from lightning_odem.studies.tables import markdown_comparison, render_comparison, render_sizes

ACC = {"average": [0.50, 0.60, 0.40], "odem": [0.58, 0.66, 0.50], "ties": [0.53, 0.58, 0.40]}
WEIGHTS = [[3.0, 1.0], [1.0, 1.5], [1.0, 3.0]]


def cell(method: str, order: int, acc: float, weighting: str = "uniform", size: int = 64, seed: int = 0) -> CellResult:
    """A stream of two tasks; the final accuracy is ``acc`` on both under any weights, BWT is ``acc`` - 0.9."""
    tasks = ["a", "b"] if order % 2 == 0 else ["b", "a"]
    merges = [
        MergeRecord(task, 0.5, method, merge_seconds=9.0 - 8 * k, sample_gradients=1000 * k * (order + 1))
        for k, task in enumerate(tasks)
    ]
    report = StreamReport(
        tasks=tasks,
        weights=[1.0, 1.0] if weighting == "uniform" else WEIGHTS[order],
        accuracy=[[0.9], [acc, acc]],
        pretrained=[{"a": 0.2, "b": 0.4}[task] for task in tasks],
        fine_tuned=[{"a": 0.9, "b": 0.8}[task] for task in tasks],
        before_training=[nan, nan],
        merges=merges,
    )
    return CellResult(method, seed, order, weighting, size, report, [nan, 1e6 * (order + 1)])


@pytest.fixture
def comparison() -> Comparison:
    cells = [cell(method, order, acc) for method, accs in ACC.items() for order, acc in enumerate(accs)]
    return Comparison(cells, joint={0: {"a": 0.85, "b": 0.75}})


def markdown_rows(text: str, table: int = 0) -> dict[str, dict[str, str]]:
    """Cells of one of the Markdown tables by row and column."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    header, rule, *body = ([entry.strip() for entry in line.strip("|").split(" | ")] for line in blocks[table])
    assert rule == ["|".join([":--"] + ["--:"] * (len(header) - 1))]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in body}


def spread(values: list[float]) -> str:
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def test_rows_are_references_and_methods_in_order_of_appearance(comparison: Comparison) -> None:
    rows = markdown_rows(markdown_comparison(comparison))
    assert list(rows) == ["pretrained", "fine-tuned", "joint", "average", "odem", "ties"]
    comparison.joint = {}
    assert list(markdown_rows(markdown_comparison(comparison)))[:3] == ["pretrained", "fine-tuned", "average"]


def test_accuracies_are_mean_and_sample_standard_deviation(comparison: Comparison) -> None:
    rows = markdown_rows(markdown_comparison(comparison))
    for method, accs in ACC.items():
        assert rows[method]["ACC"] == spread(accs)
        assert rows[method]["BWT"] == spread([acc - 0.9 for acc in accs])
    assert [rows[name]["ACC"] for name in ("pretrained", "fine-tuned", "joint")] == [
        "30.0 ± 0.0", "85.0 ± 0.0", "80.0 ± 0.0",
    ]  # fmt: skip
    assert rows["pretrained"]["BWT"] == rows["joint"]["s per merge"] == ""


def test_positive_backward_transfer_has_a_sign() -> None:
    assert markdown_rows(markdown_comparison(Comparison([cell("odem", 0, 0.95)])))["odem"]["BWT"] == "+5.0"


def test_difference_to_average_is_paired_and_marked_within_noise(comparison: Comparison) -> None:
    rows = markdown_rows(markdown_comparison(comparison))
    gains = [odem - average for odem, average in zip(ACC["odem"], ACC["average"], strict=True)]
    assert rows["odem"]["ACC vs average"] == f"+{100 * fmean(gains):.2f} ± {100 * stdev(gains) / 3**0.5:.2f}"
    assert rows["ties"]["ACC vs average"] == "≈ +0.33 ± 1.45"
    assert rows["average"]["ACC vs average"] == rows["joint"]["ACC vs average"] == ""


def test_mark_ends_at_two_standard_errors() -> None:
    # differences d - 0.01 and d + 0.01: standard error 0.01
    for difference, marked in [(0.019, True), (0.021, False), (-0.019, True), (-0.021, False), (0.0, True)]:
        cells = [cell("average", order, 0.5) for order in range(2)]
        cells += [cell("odem", order, 0.5 + difference + shift) for order, shift in enumerate([0.01, -0.01])]
        text = markdown_rows(markdown_comparison(Comparison(cells)))["odem"]["ACC vs average"]
        assert text == f"{'≈ ' * marked}{100 * difference:+.2f} ± 1.00"


def test_equal_results_are_within_noise() -> None:
    cells = [cell(method, order, 0.5) for order in range(2) for method in ("average", "alias")]
    assert markdown_rows(markdown_comparison(Comparison(cells)))["alias"]["ACC vs average"] == "≈ +0.00 ± 0.00"


def test_single_stream_has_no_deviation_and_no_mark() -> None:
    text = markdown_comparison(Comparison([cell("average", 0, 0.5), cell("odem", 0, 0.52)]))
    row = markdown_rows(text)["odem"]
    assert (row["ACC"], row["ACC vs average"]) == ("52.0", "+2.00")
    assert "Accuracies in percent, of one stream." in text


def test_without_average_there_is_no_difference(comparison: Comparison) -> None:
    comparison.cells = comparison.select(method="odem")
    text = markdown_comparison(comparison)
    assert list(markdown_rows(text)["odem"]) == [
        "ACC", "BWT", "s per merge", "gradients per merge", "peak MB per merge",
    ]  # fmt: skip
    assert "≈" not in text


def test_costs_are_means_over_cells(comparison: Comparison) -> None:
    row = markdown_rows(markdown_comparison(comparison))["odem"]
    costs = [row["s per merge"], row["gradients per merge"], row["peak MB per merge"]]
    assert costs == ["1.00", "2,000", "2.0"]


def test_drawn_weights_have_columns_of_their_own(comparison: Comparison) -> None:
    comparison.cells += [cell("average", order, 0.5, "dirichlet") for order in range(3)]
    comparison.cells += [cell("odem", order, 0.5 + order / 10, "dirichlet") for order in range(3)]
    rows = markdown_rows(markdown_comparison(comparison))
    assert rows["odem"]["ACC"] == spread(ACC["odem"])
    assert rows["odem"]["ACC_w"] == spread([0.5, 0.6, 0.7])
    assert rows["odem"]["BWT_w"] == spread([-0.4, -0.3, -0.2])
    assert rows["odem"]["ACC_w vs average"] == f"≈ +10.00 ± {10 / 3**0.5:.2f}"
    # weights follow the tasks of each order: (a, b), (b, a), (a, b)
    pretrained = [(3 * 0.2 + 0.4) / 4, (0.4 + 1.5 * 0.2) / 2.5, (0.2 + 3 * 0.4) / 4]
    joint = [(3 * 0.85 + 0.75) / 4, (0.75 + 1.5 * 0.85) / 2.5, (0.85 + 3 * 0.75) / 4]
    assert rows["pretrained"]["ACC_w"] == spread(pretrained)
    assert rows["joint"]["ACC_w"] == spread(joint)
    assert rows["ties"]["ACC_w"] == rows["ties"]["ACC_w vs average"] == ""


def test_joint_training_counts_the_seeds_it_was_run_with(comparison: Comparison) -> None:
    comparison.cells += [cell("odem", 0, 0.5, seed=1), cell("odem", 0, 0.5, seed=2)]
    comparison.joint[1] = {"a": 0.95, "b": 0.95}
    rows = markdown_rows(markdown_comparison(comparison))
    assert rows["joint"]["ACC"] == spread([0.8, 0.8, 0.8, 0.95])


def test_unmeasured_is_a_dash(comparison: Comparison) -> None:
    for entry in comparison.select(method="ties"):
        entry.report.accuracy[0] = [nan]
        entry.peak_memory[1] = nan
    del comparison.joint[0]["b"]
    rows = markdown_rows(markdown_comparison(comparison))
    assert (rows["ties"]["ACC"], rows["ties"]["BWT"]) == (spread(ACC["ties"]), "—")
    assert rows["ties"]["peak MB per merge"] == "—"
    assert rows["joint"]["ACC"] == "—"


def test_caption_counts_the_streams(comparison: Comparison) -> None:
    assert "over 3 streams" in markdown_comparison(comparison)
    comparison.cells.pop()
    assert "over 2 to 3 streams" in markdown_comparison(comparison)


@pytest.mark.parametrize("width", [80, 140])
def test_text_has_the_numbers_of_markdown(comparison: Comparison, width: int) -> None:
    text = render_comparison(comparison, width)
    rows = markdown_rows(markdown_comparison(comparison))
    assert max(map(len, text.splitlines())) <= width
    for name, row in rows.items():
        found = " ".join(line.removeprefix(name) for line in text.splitlines() if line.startswith(name))
        assert found.split() == " ".join(row.values()).split()
    caption = markdown_comparison(comparison).splitlines()[-1]
    assert " ".join(text.split()).endswith(caption)
    assert text.startswith("2 tasks, 64 calibration samples\n")


def test_every_calibration_size_has_a_table(comparison: Comparison) -> None:
    comparison.cells += [cell(method, order, 0.7, size=512) for method in ("average", "new") for order in range(3)]
    text = render_comparison(comparison, 140)
    small, large = text.split("2 tasks, 512 calibration samples")
    assert "odem" in small
    assert "new" not in small
    assert "new         70.0 ± 0.0" in large
    assert "odem" not in large
    assert text.count("Accuracies in percent") == 1


def test_sizes_show_accuracy_by_method_and_size(comparison: Comparison) -> None:
    comparison.cells += [cell("odem", order, 0.8 + order / 100, size=512) for order in range(3)]
    text = render_sizes(comparison, 80)
    lines = text.splitlines()
    assert lines[0] == "ACC by calibration samples"
    assert lines[2].split() == ["64", "512"]
    assert " ".join(lines[5].split()) == f"odem {spread(ACC['odem'])} 81.0 ± 1.0"
    assert " ".join(lines[6].split()) == f"ties {spread(ACC['ties'])}"
    assert markdown_rows(markdown_comparison(comparison), 2)["odem"] == {"64": spread(ACC["odem"]), "512": "81.0 ± 1.0"}


def test_sizes_have_a_table_per_weighting(comparison: Comparison) -> None:
    comparison.cells += [cell("odem", order, 0.7, "dirichlet", 512) for order in range(3)]
    uniform, weighted = render_sizes(comparison, 80).split("ACC_w by calibration samples")
    assert "512" in uniform
    assert "70.0 ± 0.0" not in uniform
    assert "70.0 ± 0.0" in weighted


def test_labels_do_not_break_the_markdown_table(comparison: Comparison) -> None:
    comparison.cells.append(cell("a|b", 0, 0.5))
    assert "| a\\|b | 50.0 |" in markdown_comparison(comparison)


def test_empty_comparison_says_so() -> None:
    empty = Comparison([])
    assert render_comparison(empty) == render_sizes(empty) == markdown_comparison(empty) == "No cell yet.\n"


def test_another_metric_is_named_and_shown_in_its_unit(comparison: Comparison) -> None:
    for entry in comparison.cells:
        entry.report.metrics = dict.fromkeys("ab", TaskMetric("Perplexity", "", False))
    text = markdown_comparison(comparison)
    assert markdown_rows(text)["average"]["ACC"] == "0.500 ± 0.100"
    assert markdown_rows(text)["average"]["BWT"] == "+0.400 ± 0.100"
    assert "Perplexity (lower is better): mean ± sample standard deviation" in text
    assert "percent" not in text


def test_of_unlike_metrics_there_is_no_acc(comparison: Comparison) -> None:
    for entry in comparison.cells:
        entry.report.metrics = {"a": TaskMetric("R2Score", "")}
    text = markdown_comparison(comparison)
    assert markdown_rows(text)["odem"]["ACC"].startswith("—")
    assert "No ACC and BWT: the tasks are measured by unlike metrics." in text
