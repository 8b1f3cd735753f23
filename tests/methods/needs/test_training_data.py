import pytest
import torch
from toy import Classifier, Task, Watching, fit

from lightning_odem import ContinualMergeCallback
from lightning_odem.methods.needs import TrainingData

pytestmark = pytest.mark.usefixtures("small_stream")


def flat(named):
    return torch.cat([tensor.flatten() for tensor in named.values()])


def test_a_method_gets_the_tasks_own_training_batches_and_their_gradients():
    class Data(Watching):
        def merge(self, merged, incoming, t, context):
            data = context[TrainingData]
            batch = next(iter(data))
            scores = data.evaluate(incoming, lambda: data.predictions(batch)[0])
            loss, grad = data.value_and_grad(
                incoming, batch, lambda: torch.nn.functional.cross_entropy(*data.predictions(batch))
            )
            self.seen = batch, scores, loss, grad, incoming.clone()
            return super().merge(merged, incoming, t, context)

    module, method, merge_t = Classifier(), Data(TrainingData()), 0.5
    merge = ContinualMergeCallback(method=method)
    fit(module, Task(0), merge)
    task = Task(1)
    fit(module, task, merge)
    batch, scores, loss, grad, incoming = method.seen
    assert torch.equal(batch[0], task.train_set.tensors[0][:8])
    twin = Classifier()
    torch.nn.utils.vector_to_parameters(incoming, twin.parameters())
    expected = torch.nn.functional.cross_entropy(twin(batch[0]), batch[1])
    torch.testing.assert_close(scores, twin(batch[0]).detach())
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad, flat(dict(enumerate(torch.autograd.grad(expected, list(twin.parameters()))))))
    assert merge.report.merges[1].sample_gradients == 8
    assert merge.report.merges[1].t == merge_t


def test_the_limit_of_training_batches_holds_for_the_tasks_own_data():
    method = Watching(TrainingData())
    fit(Classifier(), Task(0), ContinualMergeCallback(method=method), limit_train_batches=2)
    assert len(list(method.contexts[0][TrainingData]._batches)) == 2
