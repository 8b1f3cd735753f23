import pytest
from images import make_model, make_stream, make_trainer

from lightning_odem.studies.preparation import prepare


def test_pretraining_without_a_source_task_is_refused():
    with pytest.raises(ValueError, match="pretrain_epochs=2 needs a stream with a source task.*got TaskStream"):
        prepare(make_trainer(), make_model(), make_stream(), pretrain_epochs=2)


def test_all_tasks_are_set_up_before_any_is_trained():
    stream = make_stream()
    prepare(make_trainer(), make_model(), stream)
    assert [len(task.splits.train) for task in stream] == [36] * 3
