import torch

from lightning_odem.tasks.sampler import EpochSampler


def test_every_epoch_reads_each_sample_once_in_another_order():
    sampler = EpochSampler(range(50), seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_an_epoch_has_the_same_order_whatever_was_read_before():
    straight, resumed = EpochSampler(range(50), seed=3), EpochSampler(range(50), seed=3)
    for epoch in range(3):
        straight.set_epoch(epoch)
        order = list(straight)
    resumed.set_epoch(2)
    assert list(resumed) == order


def test_the_order_depends_on_the_seed_and_not_on_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = list(EpochSampler(range(50), seed=3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert order == list(EpochSampler(range(50), seed=3))
    assert order != list(EpochSampler(range(50), seed=4))
