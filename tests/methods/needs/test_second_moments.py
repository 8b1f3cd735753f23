import pytest
import torch
from toy import Classifier, Task, Watching, fit, weights

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods.needs import SecondMoments
from lightning_odem.methods.needs.second_moments import check_second_moments, second_moments

pytestmark = pytest.mark.usefixtures("small_stream")


class WithAdam(Classifier):
    optimizer = torch.optim.Adam

    def configure_optimizers(self):
        self.used = self.optimizer(self.parameters(), 0.01)
        return self.used


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


def test_a_method_gets_the_second_moments_of_the_optimizer():
    module, method = WithAdam(), Watching(SecondMoments())
    fit(module, Task(0), ContinualMergeCallback(method=method))
    expected = {name: module.used.state[tensor]["exp_avg_sq"] for name, tensor in module.named_parameters()}
    assert torch.equal(method.contexts[0][SecondMoments], flat(expected))
    assert (flat(expected) > 0).any()


def test_parameters_that_the_optimizer_never_stepped_have_no_second_moment():
    class HeadOnly(WithAdam):
        def configure_optimizers(self):
            self.used = torch.optim.AdamW(self.head.parameters(), 0.01)
            return self.used

    module, method = HeadOnly(), Watching(SecondMoments())
    fit(module, Task(0), ContinualMergeCallback(method=method))
    moments = dict(zip(method.contexts[0].names, method.contexts[0][SecondMoments].split([32, 8, 24, 3]), strict=True))
    assert moments["body.0.weight"].isnan().all()
    assert moments["head.weight"].isfinite().all()


def test_an_optimizer_without_second_moments_is_refused_before_any_training():
    module = Classifier()
    before = weights(module)
    with pytest.raises(ValueError, match=r"'Watching' needs the optimizer's second moments .* SGD keeps none"):
        fit(module, Task(0), ContinualMergeCallback(method=Watching(SecondMoments())))
    assert all(torch.equal(before[name], value) for name, value in weights(module).items())


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_optimizers_of_adams_family_will_do(optimizer):
    check_second_moments([optimizer([torch.nn.Parameter(torch.ones(2))], lr=0.1)], "any")


def test_the_moments_before_the_first_step_are_none():
    module = Classifier()
    assert second_moments([torch.optim.Adam(module.parameters())], module) == {}
