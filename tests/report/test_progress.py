import io
import re

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, TensorDataset

from lightning_odem.report.progress import progress


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Merging(L.Callback):
    """Shows two lines one after the other, the second of which may be broken off."""

    def __init__(self, look=lambda trainer: None, fails=False):
        self.look, self.fails, self.seen = look, fails, []

    def on_train_end(self, trainer, pl_module):
        for name in ("merging digits", "evaluating"):
            with progress(trainer, name) as advance:
                for done in range(3):
                    advance(done, 2)
                    self.seen.append(self.look(trainer))
                if self.fails:
                    raise KeyError(name)
        self.seen.append(self.look(trainer))


def fit(*callbacks, **settings):
    data = DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=2, callbacks=list(callbacks), **quiet | settings)
    trainer.fit(Module(), data, data)
    return trainer


def visible_lines(trainer):
    """Description, done and total of the lines that Rich shows for us."""
    tasks = trainer.progress_bar_callback.progress.tasks
    ours = [task for task in tasks if task.visible and ("merging" in task.description or "eval" in task.description)]
    return [(task.description, task.completed, task.total) for task in ours]


def rich_bar(out):
    return RichProgressBar(console_kwargs={"file": out, "force_terminal": True, "width": 80})


@pytest.mark.parametrize("bar_first", [True, False])
def test_rich_shows_a_line_while_the_block_runs(bar_first):
    out, merging = io.StringIO(), Merging(visible_lines)
    bar = rich_bar(out)
    fit(*((bar, merging) if bar_first else (merging, bar)))
    expected = [[(name, done, 2)] for name in ("merging digits", "evaluating") for done in range(3)]
    assert merging.seen == [*expected, []]
    assert "merging digits" in out.getvalue()
    # The bars of the Trainer are the last thing on the screen.
    assert "merging" not in out.getvalue().split("Epoch 1/1")[-1]


class ManySteps(L.Callback):
    def on_train_end(self, trainer, pl_module):
        with progress(trainer, "merging") as advance:
            for done in range(1000):
                advance(done, 1000)


def test_rich_draws_some_of_many_fast_steps():
    out = io.StringIO()
    fit(rich_bar(out), ManySteps())
    assert 1 <= len(re.findall(r"merging .*\d+/1000", out.getvalue())) < 100


def test_rich_removes_the_line_after_an_error():
    bar = rich_bar(io.StringIO())
    with pytest.raises(KeyError, match="merging digits"):
        fit(bar, Merging(fails=True))
    assert not [task for task in bar.progress.tasks if task.visible and task.description == "merging digits"]


def test_rich_trains_on_after_a_merge():
    out, merging = io.StringIO(), Merging(visible_lines)
    trainer = fit(rich_bar(out), merging)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(Module(), DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=2))
    assert len(merging.seen) == 14
    assert merging.seen[6] == merging.seen[13] == []


@pytest.mark.parametrize("fails", [False, True])
def test_tqdm_shows_a_line_below_its_own_and_clears_it(capsys, fails):
    merging = Merging(fails=fails)
    if fails:
        with pytest.raises(KeyError, match="merging digits"):
            fit(TQDMProgressBar(), merging)
    else:
        fit(TQDMProgressBar(), merging)
    shown = "".join(capsys.readouterr())
    lines = re.split(r"[\r\n]+", shown)
    assert any(re.search(r"merging digits:\s+50%.*1/2", line) for line in lines)
    # Each refresh starts at the beginning of the line; the last one leaves it blank.
    last = max(index for index, line in enumerate(lines) if "merging digits" in line)
    assert not lines[last + 1].replace("\x1b[A", "").strip()


@pytest.mark.parametrize(
    ("bars", "settings"),
    [
        ([], {"enable_progress_bar": False}),
        ([], {"enable_progress_bar": False, "fast_dev_run": 1}),
        ([RichProgressBar(refresh_rate=0)], {}),
        ([TQDMProgressBar(refresh_rate=0)], {}),
        ([], {"barebones": True}),
    ],
)
def test_nothing_is_shown_where_the_trainer_shows_nothing(capsys, bars, settings):
    if "barebones" in settings:
        settings = {"barebones": True, "logger": None, "enable_checkpointing": None, "enable_model_summary": None}
    merging = Merging()
    fit(*bars, merging, **settings)
    assert len(merging.seen) == 7
    assert "merging" not in "".join(capsys.readouterr())
