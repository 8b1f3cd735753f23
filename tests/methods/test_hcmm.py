import pytest
import torch
from toy import Classifier, Incoming, Task, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods.hcmm import HCMMMerge
from lightning_odem.methods.needs import SecondMoments, TrainingData

pytestmark = pytest.mark.usefixtures("small_stream")


class Adaptive(Classifier):
    """The toy module, trained by Adam."""

    def features(self, inputs):
        return self.body(inputs)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.02)


class Moments(Incoming):
    """Keeps every incoming model and Adam's second moments at the end of its training."""

    def __init__(self):
        super().__init__()
        self.moments = []

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        state = trainer.optimizers[0].state
        self.moments.append({name: state[p]["exp_avg_sq"].clone() for name, p in pl_module.named_parameters()})


def run(tasks=3, **settings):
    """Models, moments, and the merged model after each task."""
    module, seen, merged = Adaptive(), Moments(), []
    merge = ContinualMergeCallback(HCMMMerge(**settings), finetune_from="merged")
    for number in range(tasks):
        fit(module, Task(number, weight=[1.0, 3.0, 0.5][number]), seen, merge)
        merged.append({name: value.clone() for name, value in module.state_dict().items()})
    return seen, merged, merge


def averaged(seen, coefficients):
    """Stage B by its formula."""
    theta, mean, results = seen.models[0], seen.moments[0], [seen.models[0]]
    for model, moment, a in zip(seen.models[1:], seen.moments[1:], coefficients, strict=True):
        old, new = ({name: factor * m[name] for name in m} for factor, m in ((1 - a, mean), (a, moment)))
        mean = {name: old[name] + new[name] for name in old}
        theta = {
            name: torch.where(
                mean[name] > 0,
                (old[name] * theta[name] + new[name] * model[name]) / mean[name],
                (1 - a) * theta[name] + a * model[name],
            )
            for name in mean
        }
        results.append(theta)
    return results


@pytest.mark.parametrize(("coefficient", "shares"), [(0.4, (0.4, 0.4)), (None, (3 / 4, 0.5 / 4.5))])
def test_without_a_correction_a_stream_is_averaged_by_adam_s_moments(coefficient, shares):
    seen, merged, _ = run(coefficient=coefficient, lr=0.0)
    for found, expected in zip(merged, averaged(seen, shares), strict=True):
        torch.testing.assert_close(found, {name: expected[name] for name in found})


def test_each_task_starts_from_the_merged_model():
    seen, merged, _ = run(lr=1e-3)
    for start, before in zip(seen.starts[1:], merged[:-1], strict=True):
        torch.testing.assert_close(start, before, rtol=0, atol=0)


def test_the_correction_moves_one_matrix_towards_the_features_before():
    seen, plain, _ = run(2, lr=0.0)
    again, corrected, merge = run(2, lr=1e-2, layers=["body"])
    for name, value in seen.models[1].items():
        assert torch.equal(again.models[1][name], value)
    assert {name for name, value in plain[1].items() if not torch.equal(corrected[1][name], value)} == {"body.0.weight"}
    inputs = Task(1).train_set.tensors[0]
    features = []
    for state in (plain[0], plain[1], corrected[1]):
        module = Adaptive().eval()
        module.load_state_dict(state)
        features.append(module.features(inputs))
    before, merged, after = features
    assert (after - before).abs().mean() < (merged - before).abs().mean()
    assert [record.sample_gradients for record in merge.report.merges] == [0, 24]


def test_the_released_defaults():
    method = HCMMMerge()
    assert method.method.coefficient == 0.4
    assert (method.lr, method.loss, method.weight_decay, method.clip) == (2e-8, "l1", 0.01, 1.0)
    assert set(method.needs) == {SecondMoments(), TrainingData()}


def test_a_stream_goes_on_with_the_moments_in_a_checkpoint(tmp_path):
    module, merge = Adaptive(), ContinualMergeCallback(HCMMMerge(lr=1e-3), finetune_from="merged")
    for number in range(2):
        fit(module, Task(number), merge)
    resumed = Adaptive()
    again = ContinualMergeCallback(HCMMMerge(lr=1e-3), finetune_from="merged", dirpath=str(tmp_path / "again"))
    again.load_state_dict(merge.state_dict())
    fit(module, Task(2), merge)
    fit(resumed, Task(2), again)
    torch.testing.assert_close(resumed.state_dict(), module.state_dict(), rtol=0, atol=0)
