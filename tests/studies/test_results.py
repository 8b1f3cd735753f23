import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from torch import nan

from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.studies.results import (
    CellResult,
    Comparison,
    mean_and_std,
    one_per_stream,
    paired_difference,
)


def cell(method: str = "odem", order: int = 0, acc: float = 0.6, weighting: str = "uniform", **values) -> CellResult:
    path = {"t": [0.0, 0.25], "loss": [1.0, 0.5], "alignment": [-1.0], "gamma": [1.0], "alignment_ratio": [0.5]}
    costs = [(9.0, 0, 0), (0.5, 4, 40), (0.25, 2, 30)]
    merges = [
        MergeRecord(
            task, 1 / 3, method, path, merge_seconds=seconds, gradient_evaluations=full, sample_gradients=single
        )
        for task, (seconds, full, single) in zip("abc", costs, strict=True)
    ]
    report = StreamReport(
        tasks=["a", "b", "c"],
        weights=[1.0] * 3 if weighting == "uniform" else [2.0, 1.0, 1.0],
        accuracy=[[0.9], [nan, 0.7], [acc, 0.75, 0.1 + 0.2]],
        pretrained=[0.1, nan, 0.3],
        fine_tuned=[0.9, 0.8, 0.95],
        before_training=[nan] * 3,
        merges=merges,
    )
    arguments = {"seed": 0, "calibration_size": 64, "peak_memory": [nan, 2e6, 5e6], **values}
    return CellResult(method=method, order=order, weighting=weighting, report=report, **arguments)


@pytest.fixture
def comparison() -> Comparison:
    cells = [cell("average", weighting="dirichlet", calibration_size=512), cell("a b, c", 1), cell("average", seed=3)]
    return Comparison(cells, joint={0: {"a": 0.9, "checkpoint": 0.5}, 3: {"a": nan}})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_costs_are_means_over_the_merges_after_the_first() -> None:
    expected = {
        "seconds_per_merge": 0.375,
        "gradient_evaluations": 3.0,
        "sample_gradients": 35.0,
        "peak_memory_mb": 3.5,
    }
    assert cell().per_merge() == expected


def test_unmeasured_memory_is_nan_and_the_other_costs_stay() -> None:
    costs = cell(peak_memory=[nan, nan, 1e6]).per_merge()
    assert math.isnan(costs["peak_memory_mb"])
    assert costs["seconds_per_merge"] == 0.375
    assert math.isnan(cell(peak_memory=[]).per_merge()["peak_memory_mb"])


def test_costs_of_a_single_merge_are_nan() -> None:
    report = StreamReport(["a"], [1.0], [[0.5]], [0.1], [0.5], [nan], [MergeRecord("a", 1.0, "odem")])
    costs = CellResult("odem", 0, 0, "uniform", 64, report, [nan]).per_merge()
    assert all(map(math.isnan, costs.values()))


def test_comparison_lists_what_occurs(comparison: Comparison) -> None:
    assert comparison.methods == ["average", "a b, c"]
    assert comparison.weightings == ["uniform", "dirichlet"]
    assert comparison.calibration_sizes == [64, 512]
    assert comparison.select(method="average", seed=3) == [comparison.cells[2]]
    assert comparison.select(method="average", seed=1) == []


def test_saved_comparison_loads_the_same(comparison: Comparison, tmp_path: Path) -> None:
    written = comparison.save(tmp_path / "new" / "dir")
    assert sorted(file.name for file in (tmp_path / "new" / "dir").iterdir()) == sorted(file.name for file in written)
    assert [file.name for file in written] == ["results.json", "cells.csv", "accuracies.csv"]
    assert repr(Comparison.load(tmp_path / "new" / "dir")) == repr(comparison)  # NaN equals itself in text only


def test_empty_comparison_loads_the_same(tmp_path: Path) -> None:
    _, cells, accuracies = Comparison([]).save(tmp_path)
    assert Comparison.load(tmp_path) == Comparison([], {})
    assert rows(cells) == rows(accuracies) == []
    assert cells.read_text().startswith("method,seed,order,weighting,calibration_size,tasks,weights,acc,bwt,")


def test_json_holds_null_for_nan(comparison: Comparison, tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(comparison.save(tmp_path)[0].read_text(), parse_constant=refuse)
    assert data["cells"][0]["peak_memory"] == [None, 2e6, 5e6]
    assert data["cells"][0]["report"]["accuracy"][1] == [None, 0.7]
    assert data["joint"][-1] == {"seed": 3, "task": "a", "accuracy": None}


def test_cells_csv_has_one_row_per_cell(comparison: Comparison, tmp_path: Path) -> None:
    first, second, third = rows(comparison.save(tmp_path)[1])
    assert first == {
        "method": "average", "seed": "0", "order": "0", "weighting": "dirichlet", "calibration_size": "512",
        "tasks": "a b c", "weights": "2.0 1.0 1.0", "acc": first["acc"], "bwt": first["bwt"],
        "seconds_per_merge": "0.375", "gradient_evaluations": "3.0", "sample_gradients": "35.0",
        "peak_memory_mb": "3.5",
    }  # fmt: skip
    assert float(first["acc"]) == pytest.approx((2 * 0.6 + 0.75 + 0.3) / 4)
    assert float(first["bwt"]) == pytest.approx((2 * (0.6 - 0.9) + (0.75 - 0.7)) / 3)
    assert (second["method"], second["order"], third["seed"]) == ("a b, c", "1", "3")
    assert float(second["acc"]) == pytest.approx((0.6 + 0.75 + 0.3) / 3)


def test_accuracies_csv_has_one_row_per_cell_merge_and_task(comparison: Comparison, tmp_path: Path) -> None:
    table = rows(comparison.save(tmp_path)[2])
    assert len(table) == 3 * (1 + 2 + 3)
    assert [(row["merge"], row["task"], row["accuracy"]) for row in table[6:12]] == [
        ("1", "a", "0.9"), ("2", "a", ""), ("2", "b", "0.7"), ("3", "a", "0.6"), ("3", "b", "0.75"),
        ("3", "c", repr(0.1 + 0.2)),
    ]  # fmt: skip
    assert {row["method"] for row in table[6:12]} == {"a b, c"}


def test_failed_write_keeps_the_old_file_and_leaves_no_draft(comparison: Comparison, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = comparison.save(tmp_path)[0]
    before, names = path.read_bytes(), sorted(tmp_path.iterdir())
    comparison.cells.pop()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4, limits[1]))  # the disk is full half-way
    try:
        with pytest.raises(OSError, match="large"):
            comparison.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == names


@pytest.mark.parametrize("garbage", ["", "{", "[1, 2]", "null", "{}", '{"cells": [{}]}', '{"cells": {"a": 1}}', "\x00"])
def test_load_of_garbage_names_the_file(tmp_path: Path, garbage: str) -> None:
    (tmp_path / "results.json").write_text(garbage)
    with pytest.raises(ValueError, match=r"results\.json is not a comparison"):
        Comparison.load(tmp_path)


def test_load_of_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Comparison.load(tmp_path)


def test_one_cell_stands_for_each_stream() -> None:
    cells = [cell("average"), cell("odem"), cell("average", order=1), cell("odem", weighting="dirichlet")]
    assert one_per_stream(cells) == [cells[0], cells[2], cells[3]]


def test_mean_and_std_are_those_of_the_sample() -> None:
    values = [0.3, 0.1, 0.7, 0.45]
    assert mean_and_std(values) == pytest.approx((statistics.mean(values), statistics.stdev(values)))


@pytest.mark.parametrize(
    ("values", "undefined"), [([], [True, True]), ([0.5], [False, True]), ([0.5, nan], [True] * 2)]
)
def test_mean_and_std_are_nan_where_undefined(values: list[float], undefined: list[bool]) -> None:
    assert [math.isnan(value) for value in mean_and_std(values)] == undefined


def test_difference_is_paired_by_setting() -> None:
    gains, base = [0.03, 0.06, 0.03, 0.12], [0.2, 0.9, 0.5, 0.7]
    average = [cell("average", order, acc) for order, acc in enumerate(base)]
    odem = [cell("odem", order, acc + gain) for order, (acc, gain) in enumerate(zip(base, gains, strict=True))]
    unpaired = [cell("average", 9, 0.0), cell("odem", 8, 1.0), cell("odem", 0, 1.0, seed=1), cell("other", 0, 0.0)]
    cells = [*reversed(odem), *unpaired, *average]
    mean, error = paired_difference(cells, "odem", "average")
    assert mean == pytest.approx(statistics.mean(gains) / 3)  # one task of three differs
    assert error == pytest.approx(statistics.stdev(gains) / 3 / 2)


def test_error_of_one_pair_and_difference_without_pairs_are_nan() -> None:
    mean, error = paired_difference([cell("average", 0, 0.3), cell("odem", 0, 0.6)], "odem", "average")
    assert mean == pytest.approx(0.1)
    assert math.isnan(error)
    assert all(map(math.isnan, paired_difference([cell("average"), cell("odem", 1)], "odem", "average")))
