import pytest

from lightning_odem.classifiers.classification import ClassificationSteps


def test_steps_without_logits_are_no_module():  # or the command line would offer them as one
    with pytest.raises(TypeError, match="abstract"):
        ClassificationSteps()
