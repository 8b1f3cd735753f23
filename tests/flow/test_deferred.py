import pytest
import torch
from reads import Reads

from lightning_odem.flow.deferred import Deferred, GradientOverflowError, fetch, settle


def total(numbers):
    return numbers.sum().item()


def test_numbers_of_several_results_are_read_at_once():
    with Reads() as reads:
        one, other = Deferred(torch.ones(3), total), Deferred(torch.ones(2, dtype=torch.bfloat16), total)
        assert reads.number == 0
        fetch(one, other)
        fetch(one)
        assert (one.result(), other.result()) == (3.0, 2.0)
    assert reads.number == 1


def test_numbers_are_not_rounded():
    value = 1.0 + 2.0**-40
    wide, narrow = Deferred(torch.tensor([value], dtype=torch.float64), total), Deferred(torch.tensor([0.1]), total)
    fetch(wide, narrow)
    assert (wide.result(), narrow.result()) == (value, torch.tensor(0.1).item())


@pytest.mark.parametrize("value", [2.0, torch.tensor(2.0), torch.tensor([2.0]), Deferred(torch.tensor([2.0]), total)])
def test_any_number_can_be_deferred(value):
    assert Deferred.of(value).result() == 2.0


def test_a_number_that_is_known_is_not_read():
    with Reads() as reads:
        assert Deferred.of(2.0).result() == 2.0
    assert reads.number == 0


def test_a_further_number_is_read_with_the_others():
    with Reads() as reads:
        for first in (Deferred(torch.ones(3), total), Deferred.of(3.0)):
            both = first.followed_by(torch.full((), 4.0), lambda result, number: result * number)
            assert both.result() == 12.0
    assert reads.number == 2


def test_a_gradient_is_taken_again_until_it_does_not_overflow():
    taken = []

    def attempt():
        taken.append(None)

        def finish(numbers):
            if len(taken) < 3:
                raise GradientOverflowError(attempt)
            return numbers.item()

        return Deferred(torch.tensor([5.0]), finish), torch.full((2,), float(len(taken)))

    loss, grad = settle(attempt)
    assert (loss, grad.tolist(), len(taken)) == (5.0, [3.0, 3.0], 3)
