"""Samples of datasets and dataloaders whose batches are anything but tensors of one shape in plain containers."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from lightning_odem.calibration import TaskSamples
from lightning_odem.calibration.batches import Kept
from lightning_odem.calibration.containers import CannotBeKeptError
from lightning_odem.calibration.items import Items
from lightning_odem.calibration.keeping import join, keep, keep_items
from lightning_odem.stream.store import decode, encode

Pair = namedtuple("Pair", ["ids", "label"])
TEXTS = [{"ids": torch.arange(1, 2 + index % 5), "label": index % 3} for index in range(9)]


@dataclass
class Record:
    ids: torch.Tensor
    label: torch.Tensor
    origin: str = "web"


def ids(samples, **options):
    return pad_sequence([sample["ids"] for sample in samples], batch_first=True, **options)


def labels(samples):
    return torch.tensor([sample["label"] for sample in samples])


def boxes(samples):
    """All boxes in one tensor, with the number of their image."""
    return torch.cat([torch.stack([torch.full_like(s["ids"], row), s["ids"]], 1) for row, s in enumerate(samples)])


def left(samples):
    longest = max(len(sample["ids"]) for sample in samples)
    return torch.stack([torch.nn.functional.pad(s["ids"], (longest - len(s["ids"]), 0), value=9) for s in samples])


COLLATES = {
    "dict": lambda s: {"ids": ids(s), "mask": ids(s) > 0, "labels": ids(s, padding_value=-100), "label": labels(s)},
    "user_dict": lambda s: UserDict(ids=ids(s), label=labels(s)),
    "named_tuple": lambda s: Pair(ids(s), labels(s)),
    "dataclass": lambda s: Record(ids(s), labels(s)),
    "padded_at_the_start": lambda s: (left(s), labels(s)),
    "time_first": lambda s: (pad_sequence([sample["ids"] for sample in s]), labels(s)),
    "two_dimensions": lambda s: (ids([{"ids": x["ids"][:, None].expand(-1, 2)} for x in s]), labels(s)),
    "carried": lambda s: {"ids": ids(s), "label": labels(s), "t": torch.tensor(0.5), "none": None, "name": "a", "n": 3},
    "classes": lambda s: {"ids": ids(s), "label": labels(s), "prompts": torch.arange(12).view(3, 4)},
    "of_the_whole": lambda s: {"ids": ids(s), "label": labels(s), "tokens": int((ids(s) > 0).sum())},
    "lists": lambda s: ([sample["ids"] for sample in s], [{"label": sample["label"]} for sample in s]),
    "list_of_samples": list,
    "strings": lambda s: {"ids": ids(s), "text": [str(sample["ids"].tolist()) for sample in s]},
    "boxes_in_a_row": lambda s: (torch.stack([sample["ids"][:1] for sample in s]), boxes(s)),
    "arrays": lambda s: [sample["ids"].numpy() for sample in s],
}


def reopened(kept):
    """The samples as a later process reads them."""
    return TaskSamples.from_state(decode(*encode(TaskSamples(kept).state()))).samples


def micro_batches(kept, size):
    """Every batch that user code gets, with the numbers of its samples."""
    for start in range(0, len(kept), size):
        for batch, index in kept.view(slice(start, start + size)).batches():
            yield batch, (start + index).tolist()


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", COLLATES)
def test_a_micro_batch_is_what_the_collate_function_makes_of_its_samples(name, later):
    collate = COLLATES[name]
    kept = keep_items(TEXTS, collate, 4)
    if later:
        kept = reopened(kept)
        kept = kept.collated_by(collate) if isinstance(kept, Items) else kept
    seen = []
    for batch, rows in micro_batches(kept, 4):
        expected = collate([TEXTS[row] for row in rows])
        assert type(batch) is type(expected)
        assert str(batch) == str(expected)
        seen += rows
    assert seen == list(range(9))


@pytest.mark.parametrize("name", COLLATES)
def test_a_selection_is_of_the_samples_asked_for(name):
    chosen = keep_items(TEXTS, COLLATES[name], 4).select(torch.tensor([7, 2, 3]))
    ((batch, index),) = chosen.batches()
    assert index.tolist() == [0, 1, 2]
    assert str(batch) == str(COLLATES[name]([TEXTS[row] for row in (7, 2, 3)]))


def test_only_what_padding_cannot_remake_is_collated_again():
    kept = {name: type(keep_items(TEXTS, collate, 4)) for name, collate in COLLATES.items()}
    assert [name for name, kind in kept.items() if kind is Items] == ["of_the_whole", "boxes_in_a_row"]


def test_tensors_of_one_shape_are_kept_as_before():
    items = [(torch.ones(2) * number, number % 2) for number in range(5)]
    for collate in (default_collate, lambda samples: default_collate(samples)):
        kept = keep_items(items, collate, 2)
        assert str(kept) == str(default_collate(items))
    with_strings = keep_items([(x, str(y)) for x, y in items], default_collate)
    assert isinstance(with_strings, Kept)
    assert next(with_strings.batches())[0][1] == ("0", "1", "0", "1", "0")


def test_random_masks_stay_and_padding_is_found_behind_them():
    def mask(samples):
        whole = ids(samples)
        hidden = (torch.rand(whole.shape) < 0.5) & (whole > 0)
        return {"ids": whole.masked_fill(hidden, 99), "labels": whole.masked_fill(~hidden, -100)}

    kept = keep_items(TEXTS, mask, 4)
    first, second = (next(kept.batches())[0] for _ in range(2))
    assert str(first) == str(second)
    batch, whole = first, ids(TEXTS)
    assert torch.equal(torch.where(batch["ids"] == 99, batch["labels"], batch["ids"]), whole)


def test_samples_of_different_sizes_go_in_batches_of_one_size():
    items = [(torch.full((1, 2 + number % 3, 2), float(number)), number) for number in range(9)]
    kept = keep_items(items, default_collate, 1)
    parts = list(kept.batches())
    assert sorted(len(index) for _, index in parts) == [3, 3, 3]
    for (images, numbers), index in parts:
        assert images.shape[0] == len(index)
        assert images[:, 0, 0, 0].tolist() == numbers.tolist() == index.tolist()


@pytest.mark.parametrize("failing", [False, True])
def test_a_collate_function_for_batches_of_one_gets_one(failing):
    def first(samples):
        assert not failing or len(samples) == 1
        return samples[0]

    items = [(torch.full((3, 2 + number % 2, 2), float(number)), number) for number in range(5)]
    parts = list(keep_items(items, first, 1).batches())
    assert [(image.shape[0], float(image.max()), label) for (image, label), _ in parts] == [
        (3, float(number), number) for number in range(5)
    ]


def test_a_collate_function_that_takes_its_samples_to_pieces_harms_no_other_call():
    def collate(samples):
        popped = [sample.pop("label") for sample in samples]
        return {"ids": ids(samples), "label": torch.tensor(popped)}

    kept = keep_items([dict(text) for text in TEXTS], collate, 4)
    assert str(next(kept.batches())[0]) == str(collate([dict(text) for text in TEXTS]))


def picture(number):
    return Image.new("L", (3 + number % 2, 2), number)


def test_pictures_are_kept_as_the_tensors_that_the_collate_function_makes():
    def collate(samples):
        return [torch.from_numpy(np.array(image)) for image, _ in samples], torch.tensor([y for _, y in samples])

    kept = keep_items([(picture(number), number) for number in range(4)], collate, 2)
    ((images, _), _) = next(kept.batches())
    assert [image.shape for image in images] == [(2, 3), (2, 4)] * 2
    assert str(next(reopened(kept).batches())) == str(next(kept.batches()))


@pytest.mark.parametrize("collate", [default_collate, list])
def test_pictures_that_nobody_makes_tensors_of_are_refused(collate):
    with pytest.raises(CannotBeKeptError, match=r"PIL\.Image"):
        keep_items([(picture(number), number) for number in range(4)], collate, 2)


def streamed(collate, sizes):
    start = 0
    for size in sizes:
        yield collate([TEXTS[(start + row) % 9] for row in range(size)])
        start += size


@pytest.mark.parametrize("name", sorted(set(COLLATES) - {"of_the_whole", "boxes_in_a_row", "time_first", "classes"}))
def test_batches_of_a_loader_are_cut_and_padded_anew(name):
    collate = COLLATES[name]
    taken = []
    for batch in streamed(collate, [4, 4, 4, 4, 2]):
        taken.append(keep(batch, 4, taken[0] if taken else None))
    kept = join(taken)
    assert len(kept) == 18
    for row in range(18):
        ((batch, _),) = kept.view(slice(row, row + 1)).batches()
        assert str(batch) == str(collate([TEXTS[row % 9]]))
    together = [TEXTS[row % 9] for row in range(18)]
    ((batch, index),) = kept.batches()
    assert index.tolist() == list(range(18))
    assert str(batch) == str(collate(together))


@pytest.mark.parametrize("batch_size", [4, None])
def test_lists_count_samples_whose_tensors_agree_by_chance(batch_size):
    def batch(size):
        return [torch.ones(1, 2, 2)] * size, [{"boxes": torch.ones(1, 4)} for _ in range(size)]

    assert len(keep(batch(4), batch_size)) == 4
    assert len(keep(batch(3), batch_size, keep(batch(4), batch_size))) == 3


def test_what_belongs_to_a_batch_stays_with_its_samples():
    kept = join([keep({"x": torch.zeros(2, 1), "t": torch.tensor(float(number))}) for number in range(3)])
    assert [(len(index), batch["t"].item()) for batch, index in kept.batches()] == [(2, 0.0), (2, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.zeros(2), "f": object()}, "builtins.object"),
        ((torch.zeros(2), torch.zeros(3)), "disagree on the number of samples"),
        ({"t": torch.tensor(1.0), "name": "a"}, "nothing in their batch counts"),
    ],
)
def test_a_batch_that_cannot_be_cut_or_kept_is_refused(batch, message):
    with pytest.raises(CannotBeKeptError, match=message):
        keep(batch)


def test_labels_are_found_in_any_container():
    for name in ("user_dict", "dataclass", "named_tuple", "carried", "of_the_whole"):
        kept = keep_items(TEXTS, COLLATES[name], 4)
        assert kept.labels().tolist() == [text["label"] for text in TEXTS]
    assert keep_items(TEXTS, COLLATES["strings"], 4).labels() is None
