import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from lightning_odem.calibration.item_loading import load_items


class Numbered(Dataset):
    """Items that tell which process has loaded them."""

    def __len__(self):
        return 70

    def __getitem__(self, index):
        worker = get_worker_info()
        return {"index": torch.tensor(index), "worker": -1 if worker is None else worker.id}


def test_items_come_in_order_by_hand_and_from_workers():
    loader = DataLoader(Numbered(), batch_size=4, num_workers=2)
    for items, workers in ((load_items(Numbered()), {-1}), (load_items(Numbered(), loader), {0, 1})):
        assert [int(item["index"]) for item in items] == list(range(70))
        assert {item["worker"] for item in items} == workers
        assert not any(item["index"].is_shared() for item in items)


def test_progress_is_told_now_and_then():
    told = []
    load_items(Numbered(), on_item=lambda *numbers: told.append(numbers))
    assert told == [(0, 70), (32, 70), (64, 70)]


def test_without_workers_the_loader_makes_no_difference():
    assert load_items([1, 2, 3], DataLoader(Numbered())) == [1, 2, 3]
