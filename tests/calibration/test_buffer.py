import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_odem.calibration import CalibrationBuffer

# Per task: its samples, its classes, its weight.
tasks = st.tuples(st.integers(1, 30), st.integers(1, 4), st.sampled_from([0.0, 0.2, 1.0, 1.5, 4.0]))
streams = st.lists(tasks, min_size=1, max_size=6)
capacities = st.integers(6, 40)
quotas = st.sampled_from(["equal", "utility"])


def offer(size, classes=2, task=0):
    """Samples whose first column tells them apart, uint8 like images, with labels."""
    images = torch.stack([torch.arange(size), torch.full((size,), task)], dim=1).to(torch.uint8)
    return images, torch.arange(size) % classes


def filled(stream, capacity=20, quota="equal", seed=0):
    buffer = CalibrationBuffer(capacity, quota, seed)
    for task, (size, classes, weight) in enumerate(stream):
        buffer.add(f"task_{task}", offer(size, classes, task), weight=weight)
    return buffer


def content(buffer, batch_size=7):
    """What the micro-batches hold: per task the samples' numbers and labels, in order."""
    held = {task: ([], []) for task in buffer.counts}
    for batch in buffer.micro_batches(batch_size):
        held[batch.task][0].extend(batch.samples[0][:, 0].tolist())
        held[batch.task][1].extend(batch.samples[1].tolist())
    return held


@given(streams, capacities, quotas)
@settings(deadline=None)
def test_rolling_keeps_the_buffer_full_nested_and_balanced(stream, capacity, quota):
    buffer = CalibrationBuffer(capacity, quota)
    before = {}
    for number, (size, classes, weight) in enumerate(stream):
        task = f"task_{number}"
        available = sum(buffer.counts.values()) + size
        buffer.add(task, offer(size, classes, number), weight=weight)
        counts, held = buffer.counts, content(buffer)
        weights = [weight for _, _, weight in stream[: number + 1]]
        if quota == "equal" or all(weights):
            assert len(buffer) == min(capacity, available)
        for old, (numbers, _) in before.items():
            assert held[old][0] == numbers[: counts[old]]
        for (name, (_, labels)), (offered, of_classes, _) in zip(held.items(), stream, strict=False):
            kept = torch.tensor(labels, dtype=torch.long).bincount(minlength=of_classes)
            whole = offer(offered, of_classes)[1].bincount(minlength=of_classes)
            assert len(labels) == counts[name]
            assert bool(((kept >= kept.max() - 1) | (kept == whole)).all())
        before = held


@given(st.integers(1, 8), capacities)
@settings(deadline=None)
def test_tasks_of_equal_share_hold_the_same_number_or_one_more(number, capacity):
    if number > capacity:
        return
    counts = filled([(capacity, 2, 1.0)] * number, capacity).counts.values()
    assert sum(counts) == capacity
    assert set(counts) <= {capacity // number, capacity // number + 1}


@given(streams, capacities, quotas, st.integers(1, 50))
@settings(deadline=None)
def test_micro_batches_cover_every_sample_once_and_shares_sum_to_one(stream, capacity, quota, batch_size):
    buffer = filled(stream, capacity, quota)
    batches = list(buffer.micro_batches(batch_size))
    assert math.isclose(sum(batch.share for batch in batches), 1.0)
    assert all(1 <= len(batch.samples[0]) <= batch_size for batch in batches)
    numbers = {task: held[0] for task, held in content(buffer, batch_size).items()}
    assert {task: len(set(held)) for task, held in numbers.items()} == buffer.counts
    of_task = dict.fromkeys(buffer.shares(), 0.0)
    for batch in batches:
        of_task[batch.task] += batch.share
        assert math.isclose(
            batch.share, buffer.shares()[batch.task] * len(batch.samples[0]) / buffer.counts[batch.task]
        )
    assert of_task == pytest.approx(buffer.shares())


@given(streams, st.integers(0, 5))
@settings(deadline=None)
def test_the_seed_alone_decides_what_is_kept(stream, seed):
    assert content(filled(stream, seed=seed)) == content(filled(stream, seed=seed))


def test_another_seed_or_task_keeps_other_samples():
    stream = [(200, 1, 1.0)] * 2
    held = content(filled(stream, seed=0))
    assert held["task_0"] != content(filled(stream, seed=1))["task_0"]
    assert held["task_0"] != held["task_1"]


def test_places_and_loss_are_shared_by_utility_weight():
    buffer = filled([(100, 2, 3.0), (100, 2, 1.0)], capacity=20, quota="utility")
    assert buffer.counts == {"task_0": 15, "task_1": 5}
    assert buffer.shares() == {"task_0": 0.75, "task_1": 0.25}


def test_equal_quota_ignores_the_weights():
    buffer = filled([(100, 2, 3.0), (100, 2, 1.0)], capacity=20)
    assert buffer.counts == {"task_0": 10, "task_1": 10}
    assert buffer.shares() == {"task_0": 0.5, "task_1": 0.5}


def test_weightless_tasks_share_the_loss_until_one_of_weight_comes():
    stream = [(10, 2, 0.0), (10, 2, 0.0), (10, 2, 1.0)]
    assert filled(stream[:2], quota="utility").shares() == {"task_0": 0.5, "task_1": 0.5}
    buffer = filled(stream, quota="utility")
    assert buffer.counts == {"task_0": 0, "task_1": 0, "task_2": 10}
    assert buffer.shares() == {"task_2": 1.0}


@pytest.mark.parametrize(
    ("quota", "weight", "places"),
    [("equal", 0.0, 9), ("equal", 5.0, 9), ("utility", 0.0, 0), ("utility", 0.01, 0), ("utility", 1.0, 9)],
)
def test_room_for_the_next_task_is_what_it_then_gets(quota, weight, places):
    buffer = filled([(100, 2, 1.0), (2, 2, 1.0)], quota=quota)
    assert buffer.room_for_next(weight) == places
    buffer.add("next", offer(100), weight=weight)
    assert buffer.counts["next"] == places


@pytest.mark.parametrize(
    ("task", "samples", "weight", "error", "message"),
    [
        ("new", offer(0), 1.0, ValueError, "'new' offers no calibration sample"),
        ("task_0", offer(3), 1.0, ValueError, "'task_0' is in the calibration buffer already; it holds task_0, task_1"),
        ("new", offer(3), math.nan, ValueError, "finite and non-negative, got nan"),
        ("new", offer(3), math.inf, ValueError, "finite and non-negative, got inf"),
        ("new", offer(3), -1.0, ValueError, "finite and non-negative, got -1"),
        ("new", offer(3), 1.0, ValueError, "buffer of 2 samples has no place for task 3; raise the capacity"),
        ("new", (torch.zeros(3), ["a", "b", "c"]), 1.0, TypeError, "got str"),
        ("new", (torch.zeros(3), torch.zeros(4)), 1.0, ValueError, "disagree"),
    ],
)
def test_what_cannot_be_added_changes_nothing(task, samples, weight, error, message):
    buffer = filled([(5, 2, 1.0)] * 2, capacity=2)
    before = content(buffer)
    with pytest.raises(error, match=message):
        buffer.add(task, samples, weight=weight)
    assert content(buffer) == before


def test_unusable_settings_are_refused():
    with pytest.raises(ValueError, match="capacity=0"):
        CalibrationBuffer(0)
    with pytest.raises(ValueError, match="Unknown quota 'fair'; the quotas are equal, utility"):
        CalibrationBuffer(quota="fair")


def test_kept_samples_do_not_hold_their_source_in_memory():
    buffer = CalibrationBuffer(8)
    buffer.add("a", (torch.zeros(5000, 16, dtype=torch.uint8), {"label": torch.zeros(5000, dtype=torch.long)}))
    for held in (8, 4):
        samples = next(buffer.micro_batches(100)).samples
        assert samples[0].dtype == torch.uint8
        assert samples[0].untyped_storage().nbytes() == held * 16
        assert samples[1]["label"].untyped_storage().nbytes() == held * 8
        buffer.add(f"b{held}", offer(8))


def test_what_is_offered_can_be_overwritten_afterwards():
    buffer, samples = CalibrationBuffer(8), offer(3)
    buffer.add("a", samples)
    before = content(buffer)
    samples[0].fill_(99)
    assert content(buffer) == before


def test_a_copy_can_be_added_to_without_touching_the_original():
    buffer = filled([(20, 2, 1.0)], quota="utility", seed=3)
    before = content(buffer)
    other = buffer.copy()
    other.add("next", offer(20), weight=1.0)
    assert content(buffer) == before
    assert (other.capacity, other.quota, other.seed, other.counts["next"]) == (20, "utility", 3, 10)


def test_state_survives_a_safe_checkpoint_and_goes_on_alike():
    stream = [(20, 2, 2.0), (9, 3, 1.0)]
    buffer = filled(stream, capacity=15, quota="utility", seed=4)
    buffer.add("moved", (offer(5)[0], {"label": offer(5)[1]}), transferred=True)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    restored = CalibrationBuffer(1)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for held in (buffer, restored):
        held.add("next", offer(30), weight=1.0)
    pairs = list(zip(buffer.micro_batches(4), restored.micro_batches(4), strict=True))
    assert {batch.task: batch.transferred for batch, _ in pairs}["moved"]
    for mine, theirs in pairs:
        assert (mine.task, mine.share, mine.transferred) == (theirs.task, theirs.share, theirs.transferred)
        assert str(mine.samples) == str(theirs.samples)
        assert type(mine.samples) is type(theirs.samples)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(streams, capacities, quotas, st.integers(1, 50))
@settings(deadline=None)
def test_an_epoch_of_minibatches_holds_every_sample_once(stream, capacity, quota, size):
    buffer = filled(stream, capacity, quota)
    seen = {task: [] for task in buffer.counts}
    lengths = []
    for minibatch in buffer.minibatches(size, generator()):
        lengths.append(sum(len(batch.samples[1]) for batch in minibatch))
        assert len({batch.task for batch in minibatch}) == len(minibatch)
        for batch in minibatch:
            seen[batch.task].extend(zip(batch.samples[0][:, 0].tolist(), batch.samples[1].tolist(), strict=True))
    assert set(lengths[:-1]) <= {size}
    assert 0 < lengths[-1] <= size
    held = {task: sorted(zip(*pairs, strict=True)) for task, pairs in content(buffer).items()}
    assert {task: sorted(pairs) for task, pairs in seen.items()} == held


@given(streams, capacities, quotas, st.integers(1, 50))
@settings(deadline=None)
def test_minibatch_losses_add_up_to_the_calibration_loss_over_an_epoch(stream, capacity, quota, size):
    def loss(batch):
        numbers, tasks = batch.samples[0].double().unbind(1)
        return (numbers.sin() + tasks.cos()).mean().item()

    buffer = filled(stream, capacity, quota)
    expected = math.fsum(batch.share * loss(batch) for batch in buffer.micro_batches(1))
    total = math.fsum(
        batch.share * loss(batch) * sum(len(other.samples[1]) for other in minibatch) / len(buffer)
        for minibatch in buffer.minibatches(size, generator())
        for batch in minibatch
    )
    assert total == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_every_sample_of_a_task_weighs_the_same_in_a_full_minibatch():
    buffer = filled([(12, 2, 3.0), (4, 2, 1.0)], capacity=16, quota="utility")
    for minibatch in buffer.minibatches(4, generator()):
        for batch in minibatch:
            weight = {"task_0": 0.75 / 12, "task_1": 0.25 / 4}[batch.task] * 16 / 4
            assert batch.share / len(batch.samples[1]) == pytest.approx(weight)


def test_minibatches_are_random_and_decided_by_the_generator():
    buffer = filled([(50, 2, 1.0)] * 2, capacity=40)

    def epoch(source):
        return [
            (batch.task, batch.samples[0][:, 0].tolist())
            for batches in buffer.minibatches(7, source)
            for batch in batches
        ]

    source = generator(1)
    first, second = epoch(source), epoch(source)
    assert first == epoch(generator(1))
    assert first != second
    assert first != epoch(generator(2))


def test_minibatches_tell_which_samples_were_transferred():
    buffer = CalibrationBuffer()
    buffer.add("raw", offer(3))
    buffer.add("moved", {"x": offer(3)[0], "label": offer(3)[1]}, transferred=True)
    (whole,) = buffer.minibatches(6, generator())
    assert {batch.task: (batch.transferred, type(batch.samples)) for batch in whole} == {
        "raw": (False, tuple),
        "moved": (True, dict),
    }


def logits_of(buffer, task):
    """Logits that tell the samples apart as their numbers do."""
    numbers = torch.cat([batch.samples[0][:, 0] for batch in buffer.micro_batches_of(task, 3)])
    return torch.stack([numbers, -numbers.float()], dim=1)


def with_logits(stream, **settings):
    buffer = filled(stream, **settings)
    for task in buffer.counts:
        buffer.store_logits(task, logits_of(buffer, task))
    return buffer


def pairs(batches):
    """Number of the sample and its logit, of all micro-batches."""
    return [
        (number, logit)
        for batch in batches
        for number, logit in zip(batch.samples[0][:, 0].tolist(), batch.logits[:, 0].tolist(), strict=True)
    ]


@given(streams, capacities, quotas, st.integers(1, 30))
@settings(deadline=None)
def test_logits_stay_with_their_samples_as_quotas_shrink(stream, capacity, quota, size):
    buffer = CalibrationBuffer(capacity, quota)
    for number, (offered, classes, weight) in enumerate(stream):
        buffer.add(f"task_{number}", offer(offered, classes, number), weight=weight)
        if buffer.counts[f"task_{number}"]:
            buffer.store_logits(f"task_{number}", logits_of(buffer, f"task_{number}"))
        assert buffer.without_logits() == []
        passes = [list(buffer.micro_batches(size)), sum(buffer.minibatches(size, generator()), [])]
        for held in map(pairs, passes):
            assert len(held) == len(buffer)
            assert all(number == logit for number, logit in held)


def test_logits_are_kept_on_a_copy_only():
    buffer = filled([(5, 2, 1.0)])
    other = buffer.copy()
    other.store_logits("task_0", logits_of(other, "task_0"))
    assert buffer.without_logits() == ["task_0"]
    assert other.copy().without_logits() == []


def test_logits_of_another_number_of_samples_are_refused():
    buffer = filled([(5, 2, 1.0)])
    with pytest.raises(ValueError, match="'task_0' holds 5 samples, got logits of 4"):
        buffer.store_logits("task_0", torch.zeros(4, 2))
    assert buffer.without_logits() == ["task_0"]


def test_logits_survive_a_safe_checkpoint_in_their_own_dtype():
    buffer = filled([(6, 2, 1.0), (3, 2, 1.0)])
    logits = torch.randn(6, 2).to(torch.bfloat16).requires_grad_()
    buffer.store_logits("task_0", logits)
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    restored = CalibrationBuffer()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.without_logits() == ["task_1"]
    held = torch.cat([batch.logits for batch in restored.micro_batches_of("task_0", 4)])
    assert torch.equal(held, logits)
    assert (held.dtype, held.requires_grad) == (torch.bfloat16, False)


def test_a_state_from_before_there_were_logits_is_loaded():
    buffer = filled([(6, 2, 1.0)])
    state = buffer.state_dict()
    for held in state["tasks"].values():
        del held["logits"]
    restored = CalibrationBuffer(1)
    restored.load_state_dict(state)
    assert content(restored) == content(buffer)
    assert restored.without_logits() == ["task_0"]


@pytest.mark.parametrize(
    ("quota", "shares", "expected"),
    [
        ("equal", "quota", [0.5, 0.5]),
        ("equal", "equal", [0.5, 0.5]),
        ("equal", "utility", [0.75, 0.25]),
        ("utility", "quota", [0.75, 0.25]),
        ("utility", "equal", [0.5, 0.5]),
        ("utility", "utility", [0.75, 0.25]),
    ],
)
def test_loss_and_places_can_be_shared_by_different_rules(quota, shares, expected):
    buffer = CalibrationBuffer(20, quota, shares=shares)
    for task, weight in {"a": 3.0, "b": 1.0}.items():
        buffer.add(task, offer(100), weight=weight)
    assert list(buffer.counts.values()) == ([15, 5] if quota == "utility" else [10, 10])
    assert list(buffer.shares().values()) == expected
    assert list(buffer.copy().shares().values()) == expected
    other = CalibrationBuffer(shares=shares)
    other.load_state_dict(buffer.state_dict())
    assert list(other.shares().values()) == expected


def test_tasks_without_a_share_are_passed_over():
    buffer = CalibrationBuffer(12, shares="utility")
    for number, weight in enumerate([0.0, 2.0, 0.0, 6.0]):
        buffer.add(f"task_{number}", offer(3, task=number), weight=weight)
        if number == 0:
            assert buffer.shares() == {"task_0": 1.0}
    assert buffer.shares() == {"task_1": 0.25, "task_3": 0.75}
    assert [(batch.task, batch.share) for batch in buffer.micro_batches(5)] == [("task_1", 0.25), ("task_3", 0.75)]
    epoch = [batch for batches in buffer.minibatches(4, generator()) for batch in batches]
    assert sorted({batch.task for batch in epoch}) == ["task_1", "task_3"]
    for task, number in {"task_1": 1, "task_3": 3}.items():
        rows = torch.cat([batch.samples[0] for batch in epoch if batch.task == task])
        assert sorted(rows.tolist()) == [[sample, number] for sample in range(3)]


def test_a_choice_that_is_not_balanced_reads_no_label():
    held = []
    for labels in (torch.arange(50) % 5, torch.zeros(50, dtype=torch.long), None):
        inputs = torch.arange(50).view(50, 1)
        buffer = CalibrationBuffer(10, balanced=False)
        buffer.add("a", inputs if labels is None else (inputs, labels))
        samples = next(buffer.micro_batches(10)).samples
        held.append((samples if labels is None else samples[0]).tolist())
    assert held[0] == held[1] == held[2]


def test_unknown_shares_are_refused():
    with pytest.raises(ValueError, match="Unknown shares 'fair'; there are quota, equal, utility"):
        CalibrationBuffer(shares="fair")


def test_without_a_task_its_places_go_to_the_next_one():
    buffer = CalibrationBuffer(6)
    for name in "ab":
        buffer.add(name, (torch.zeros(8, 2), torch.arange(8) % 2))
    left = buffer.without("a")
    assert left.counts == {"b": 3}
    assert buffer.counts == {"a": 3, "b": 3}
    left.add("c", (torch.zeros(8, 2), torch.arange(8) % 2))
    assert left.counts == {"b": 3, "c": 3}
