import logging
import warnings

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_odem.cli.quiet import quieten


def test_remarks_are_left_out_and_the_rest_is_shown(caplog):
    with warnings.catch_warnings():
        quieten()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        rank_zero_info("Loading `train_dataloader` to estimate number of stepping batches.")
        rank_zero_info("Task 1 of 4: top")
    assert [record.getMessage() for record in caplog.records] == ["Task 1 of 4: top"]


def test_warnings_of_lightnings_own_making_are_left_out():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quieten()
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning, stacklevel=1)
        warnings.warn("The 'val_dataloader' does not have many workers which may be", UserWarning, stacklevel=1)
        warnings.warn("The loss is odd", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["The loss is odd"]
