import pytest
import torch

from lightning_odem.flow import Trajectory, integrate


def bump(theta):
    """A loss with a hill of height 1 between its ends, in one dimension."""
    return torch.exp(-(theta[0] ** 2)), torch.stack([-2 * theta[0] * torch.exp(-(theta[0] ** 2))])


def test_the_barrier_of_a_hill_between_equal_ends_is_its_height():
    path = Trajectory(torch.zeros(1), loss1=0.2, t=[0.0, 0.5, 1.0], loss=[0.2, 1.0, 0.2])
    assert path.barrier == pytest.approx(0.8)
    assert path.envelope_excess == pytest.approx(0.8)
    assert path.barrier_bound == 0.0


def test_a_falling_loss_may_leave_the_chord_but_not_the_envelope():
    path = Trajectory(torch.zeros(1), loss1=0.0, t=[0.0, 0.5], loss=[1.0, 1.0])
    assert path.barrier == pytest.approx(0.5)
    assert path.envelope_excess == 0.0
    assert path.barrier <= path.barrier_bound


def test_a_rising_loss_has_the_chord_as_its_envelope():
    path = Trajectory(torch.zeros(1), loss1=3.0, t=[0.0, 0.5], loss=[1.0, 2.5])
    assert path.envelope == path.chord == [1.0, 2.0]
    assert path.envelope_excess == pytest.approx(0.5)


def test_a_path_stopped_at_once_has_no_barrier():
    path = integrate(torch.tensor([-2.0]), torch.tensor([2.0]), bump, 0.0)
    assert path.barrier == path.envelope_excess == 0.0


def test_a_hill_stops_the_flow_where_the_loss_may_not_rise():
    path = integrate(torch.tensor([-2.0]), torch.tensor([2.0]), bump, 0.5)
    assert path.theta.item() == pytest.approx(-2.0)  # in one dimension everything is along the gradient
    assert path.barrier == pytest.approx(0.0, abs=1e-6)


def test_the_dictionary_holds_a_point_more_than_steps():
    data = integrate(torch.tensor([-2.0]), torch.tensor([2.0]), bump, 0.2).as_dict()
    assert {name: len(values) for name, values in data.items()} == {
        "t": 5, "loss": 5, "alignment": 4, "gamma": 4, "alignment_ratio": 4, "step_norm": 4, "damped_share": 4,
    }  # fmt: skip


def test_the_damped_share_is_what_a_step_lacks_of_the_straight_line():
    path = integrate(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 3.0]), bump_beside, 0.2, step_size=0.2)
    straight = 0.2 * torch.tensor([4.0, 3.0])
    missing = straight - (path.theta - torch.tensor([-2.0, 0.0]))
    assert path.damped_share == pytest.approx([(missing.norm() / straight.norm()).item()])
    assert path.damped_share == pytest.approx([0.8])


def bump_beside(theta):
    value, slope = bump(theta)
    return value, torch.cat([slope, torch.zeros(1)])


def test_a_path_that_is_cut_is_the_path_to_the_cut():
    ends = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 3.0])
    path, short = integrate(*ends, bump_beside, 0.4), integrate(*ends, bump_beside, 0.2)
    path.cut(path.t[4])
    assert path.as_dict() == short.as_dict()


def test_of_estimated_losses_only_the_ends_count_for_barrier_and_excess():
    points = {"t": [0.0, 0.2, 0.4], "loss": [1.0, 7.0, 1.5], "estimated": True}
    path = Trajectory(torch.zeros(1), loss1=2.0, **points)
    assert path.barrier == path.envelope_excess == pytest.approx(0.1)


def test_estimates_keep_the_loss_at_both_ends_and_the_budget():
    def noisy(theta):
        value, slope = bump_beside(theta)
        return value + 10.0, slope

    ends = torch.tensor([-2.0, 0.0]), torch.tensor([0.5, 3.0])
    settings = {"loss": lambda theta: bump_beside(theta)[0]}
    exact = integrate(*ends, bump_beside, 0.2, **settings)
    path = integrate(*ends, noisy, 0.2, estimated=True, **settings)
    assert torch.equal(path.theta, exact.theta)
    assert (path.gamma, path.delta_loss) == (exact.gamma, exact.delta_loss)
    assert (path.loss[0], path.loss[-1]) == (exact.loss[0], exact.loss[-1])
    assert path.loss[1:-1] == pytest.approx([loss + 10.0 for loss in exact.loss[1:-1]])
    with pytest.raises(ValueError, match="loss="):
        integrate(*ends, noisy, 0.2, estimated=True)
