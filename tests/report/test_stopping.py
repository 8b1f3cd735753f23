from lightning_odem.report import MergeRecord, StreamReport
from lightning_odem.report.stopping import why_there

SEARCH = {"scale": [0.7, 1.0], "scale_loss": [0.75, 0.9], "scale_taken": [0.68], "average_loss": [0.85]}
ENDS = {"t": [0.0, 0.5], "loss": [1.0, 0.7]}


def why(path, t=0.5, weights=(1.0, 1.0)):
    merges = [MergeRecord(str(k), 1.0, "ode") for k in range(len(weights))]
    merges[-1] = MergeRecord("last", t, "ode", path)
    return why_there(StreamReport(list("abc")[: len(weights)], list(weights), merges=merges), len(weights) - 1)


def test_the_first_task_is_its_own_model():
    assert why({}, t=1.0, weights=(2.0,)) == "It is the first task, so its own model is the merged one."


def test_a_time_is_the_share_of_the_weights_or_was_set_by_the_method():
    assert why(ENDS, t=0.75, weights=(1.0, 3.0)) == "t = 0.75 is the task's share of the utility weights so far."
    assert why({}, t=0.3) == "t = 0.3 is not the task's share of the utility weights: the method ode set it."


def test_a_task_that_does_not_count_changes_nothing():
    assert why({}, t=0.0, weights=(1.0, 0.0)) == "t is 0, so the task changes nothing."
    assert why({}, t=0.0, weights=(0.0, 0.0)) == "t is 0, so the task changes nothing."


def test_the_running_average_is_taken_where_it_has_the_lower_loss():
    told = why(SEARCH | {"scale_taken": [0.0], "average_loss": [0.5]})
    assert told.startswith("The running average is taken: its calibration loss is 0.5, the lowest of 2 scales")


def test_pieces_of_the_flow_are_kept_while_held_out_samples_confirm_them():
    flow = {"descent_loss": [0.9, 0.8, 0.82], "descent_taken": [1.0]}
    assert why(SEARCH | flow).endswith(
        "Gradient flow from there: 1 of 2 pieces kept, which took the loss on held-out samples from 0.9 to 0.8; the "
        "next one took it to 0.82, no better than by chance."
    )
    assert why(SEARCH | flow | {"descent_taken": [2.0]}).endswith(
        "2 of 2 pieces kept, which took the loss on held-out samples from 0.9 to 0.82."
    )
    none = why(SEARCH | {"descent_loss": [0.9, 0.95], "descent_taken": [0.0]})
    assert "0 of 1 pieces kept: the first took the loss on held-out samples from 0.9 to 0.95" in none


def test_a_searched_time_has_the_lowest_held_out_loss():
    told = why({"held_out_t": [0.3, 0.4, 0.5], "held_out_loss": [0.8, 0.7, 0.75], "rejected_t": [0.2]}, t=0.4)
    assert told == (
        "The loss on held-out samples is lowest at t = 0.4: 0.7, of 3 times tried from 0.3 to 0.5. "
        "Steps taken back on the way because the loss rose: 1."
    )


def test_losses_on_the_path_that_were_not_finite_are_passed_over():
    lost = {"scale_loss": [float("nan")] * 2, "scale_taken": [0.0]}
    assert why(SEARCH | lost).endswith("the lowest of 2 scales tried on the path nan.")
