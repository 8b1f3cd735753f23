import pytest
import torch

from lightning_odem.parameters.low_rank import FactorPair, with_factors, with_updates

SHAPES = {
    "wide": ((3, 40), (20, 3)),
    "tall": ((3, 20), (40, 3)),
    "convolution": ((3, 8, 3, 3), (12, 3, 1, 1)),
}


def best(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix.flatten(1).double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vh[:rank]).view(matrix.shape)


@pytest.mark.parametrize("kind", SHAPES)
def test_factors_of_an_update_are_its_best_approximation_by_their_rank(kind):
    torch.manual_seed(0)
    first, second = (torch.randn(shape) for shape in SHAPES[kind])
    pair = FactorPair("A", "B", scale=-0.5)
    update = pair.product(first, second) + pair.product(torch.randn_like(first), torch.randn_like(second))

    found = pair.factors(update, pair.rank(first))

    assert [tensor.shape for tensor in found] == [first.shape, second.shape]
    torch.testing.assert_close(pair.product(*found).double(), best(update, 3), rtol=1e-4, atol=1e-5)


def test_factors_stored_with_inputs_first_give_the_transposed_update():
    torch.manual_seed(0)
    first, second = torch.randn(3, 20), torch.randn(12, 3)
    pair, flipped = (FactorPair("A", "B", 2.0, inputs_first) for inputs_first in (False, True))
    update = pair.product(first, second)

    torch.testing.assert_close(flipped.product(first.T, second.T), update.T)
    found = flipped.factors(update.T, 3)
    assert [tensor.shape for tensor in found] == [(20, 3), (3, 12)]
    torch.testing.assert_close(flipped.product(*found), update.T, rtol=1e-4, atol=1e-4)


def test_an_update_of_smaller_rank_leaves_each_direction_a_factor_that_is_not_zero():
    pair = FactorPair("A", "B", 1.0)
    update = torch.zeros(4, 6)
    update[0, 0] = 1.0

    for matrix in (update, update.T):
        first, second = pair.factors(matrix, 3)
        torch.testing.assert_close(pair.product(first, second), matrix)
        assert (first.norm(dim=1) + second.norm(dim=0) > 0.5).all()


def test_a_rank_above_that_of_any_matrix_of_the_shape_is_filled_up():
    pair = FactorPair("A", "B", 1.0)
    update = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    first, second = pair.factors(update, 5)
    assert first.shape == (5, 6)
    assert second.shape == (2, 5)
    torch.testing.assert_close(pair.product(first, second), update)


def test_updates_take_the_place_of_factors_and_give_them_back():
    torch.manual_seed(0)
    pairs = {"A": FactorPair("A", "B", 4.0)}
    tensors = {"bias": torch.ones(2), "A": torch.randn(2, 8), "B": torch.randn(6, 2)}

    seen = with_updates(tensors, pairs)
    assert seen.keys() == {"bias", "A"}
    assert with_updates(seen, pairs).keys() == seen.keys()  # there is nothing left to multiply
    back, cut = with_factors(seen, pairs, tensors)

    assert back.keys() == tensors.keys()
    assert cut == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(pairs["A"].product(back["A"], back["B"]), seen["A"])


def test_what_was_cut_is_told_relative_to_all_updates():
    pairs = {name: FactorPair(name, f"{name}'", 1.0) for name in ("A", "C")}
    like = {"A": torch.zeros(1, 2), "C": torch.zeros(1, 2)}
    updates = {"A": torch.diag(torch.tensor([3.0, 1.0])), "C": torch.tensor([[2.0, 0.0], [0.0, 0.0]])}
    assert with_factors(updates, pairs, like)[1] == pytest.approx((1 / 14) ** 0.5)


def test_a_pair_is_what_its_plain_form_makes():
    pair = FactorPair("A", "B", 0.5, inputs_first=True)
    assert FactorPair(*pair.plain()) == pair


@pytest.mark.parametrize("inputs_first", [False, True])
def test_a_projected_gradient_is_what_the_factors_can_follow(inputs_first):
    torch.manual_seed(0)
    pair = FactorPair("A", "B", 2.0, inputs_first)
    first, second, gradient = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 9), (6, 2), (6, 9)))
    if inputs_first:
        first, second, gradient = first.T, second.T, gradient.T
    # Of all changes that changes of the factors make, the one nearest to the gradient, by least squares.
    jacobian = torch.autograd.functional.jacobian(
        lambda a, b: (a @ b if inputs_first else b @ a).flatten(), (first, second)
    )
    columns = torch.cat([part.flatten(1) for part in jacobian], dim=1)
    nearest = columns @ torch.linalg.lstsq(columns, gradient.flatten(), driver="gelsd").solution

    pair.project_(gradient, first, second)

    torch.testing.assert_close(gradient.flatten(), nearest)


def test_a_gradient_where_the_factors_have_no_directions_is_left_whole():
    gradient = torch.ones(6, 9)
    FactorPair("A", "B", 1.0).project_(gradient, torch.eye(2, 9), torch.zeros(6, 2))
    assert torch.equal(gradient, torch.ones(6, 9))


@pytest.mark.parametrize(
    ("kind", "inputs_first"),
    [("wide", False), ("tall", False), ("convolution", False), ("wide", True), ("tall", True)],
)
def test_a_sum_of_updates_is_cut_as_if_it_was_formed(kind, inputs_first):
    torch.manual_seed(0)
    pair = FactorPair("A", "B", -0.5, inputs_first)
    terms = [(share, *(torch.randn(shape) for shape in SHAPES[kind])) for share in (0.5, 0.3, 0.2)]
    if inputs_first:
        terms = [(share, first.T, second.T) for share, first, second in terms]
    update = sum(share * pair.product(first, second) for share, first, second in terms)

    *found, values = pair.combination(terms, 3)

    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in terms[0][1:]]
    torch.testing.assert_close(pair.product(*found).double(), best(update, 3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[:5], torch.linalg.svdvals(update.flatten(1).double())[:5])


def test_a_sum_of_updates_is_cut_without_memory_for_the_update():
    size = 2**20  # its square would take 8 TB
    first, second = torch.ones(1, size), torch.ones(size, 1)
    first, second, values = FactorPair("A", "B", 1.0).combination([(0.5, first, second), (0.5, first, second)], 1)
    torch.testing.assert_close(values[0], torch.tensor(float(size)).double())
    torch.testing.assert_close((second[:3] @ first[:, :3]), torch.ones(3, 3))


@pytest.mark.parametrize("directions", [6, 40, 100])
def test_the_directions_of_an_update_are_found_however_many_there_are(directions):
    torch.manual_seed(0)
    update = torch.randn(128, directions) @ torch.randn(directions, 160)
    pair = FactorPair("A", "B", 2.0)
    found = pair.factors(update, 4)
    torch.testing.assert_close(pair.product(*found).double(), best(update, 4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0] @ found[0].T, torch.eye(4), rtol=0.0, atol=1e-5)
