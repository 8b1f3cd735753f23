import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies.deepspeed import _DEEPSPEED_AVAILABLE
from scripts import run_processes, run_script
from toy import Classifier, Task, close, everything, fit

from lightning_odem.parameters.checkpoint import read_checkpoint
from lightning_odem.parameters.sharded_folder import refuse_sharded_folder

STATE = {"body.weight": torch.arange(6.0).view(2, 3), "model.bias": torch.ones(2)}
DEEPSPEED = ("latest", "zero_to_fp32.py", "checkpoint/mp_rank_00_model_states.pt")
needs_deepspeed = pytest.mark.skipif(not _DEEPSPEED_AVAILABLE, reason="DeepSpeed is not installed")


def command_for(folder):
    with pytest.raises(ValueError, match="in shards .* Make one file of it and give that") as refused:
        read_checkpoint(folder)
    return shlex.split(str(refused.value).splitlines()[1])


def write_dcp(folder, state):
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 1}, folder / "meta.pt")


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "model_parallel",
        "fsdp",
        pytest.param("deepspeed2", marks=needs_deepspeed),
        pytest.param("deepspeed3", marks=needs_deepspeed),
    ],
)
def test_the_command_named_makes_a_file_of_what_two_processes_saved(kind, tmp_path, monkeypatch):
    folder = tmp_path / "epoch=1 step=6.ckpt"
    script = Path(__file__).parents[1] / "helpers" / "sharded_folders.py"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_processes(script, kind, folder)
    command = command_for(folder)
    assert command[0] == "python"
    done = run_script(*command[1:])
    assert done.returncode == 0, done.stderr

    class Alone(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.1)

    expected = Alone()
    fit(expected, Task(0, batch_size=24))  # one step per epoch: two processes shuffle otherwise
    assert close(read_checkpoint(tmp_path / "epoch=1 step=6-whole.ckpt"), everything(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("state_dict", "torch.distributed.checkpoint.format_utils"),
        ("model", "lightning.pytorch.utilities.consolidate_checkpoint"),
    ],
    ids=["ModelParallelStrategy", "FSDPStrategy"],
)
def test_shards_of_lightnings_strategies_are_told_apart_by_the_names_of_their_tensors(tmp_path, key, module):
    write_dcp(tmp_path, {key: STATE, "optimizer_0": {"state": {"model.bias": {"step": torch.tensor(1)}}}})
    assert module in command_for(tmp_path)


def test_shards_of_torch_without_lightning_are_converted_by_torch(tmp_path):
    dcp.save(STATE, checkpoint_id=tmp_path, no_dist=True)
    assert "torch.distributed.checkpoint.format_utils" in command_for(tmp_path)


def test_an_unfinished_checkpoint_is_not_to_be_converted(tmp_path):
    write_dcp(tmp_path, {"state_dict": STATE})
    (tmp_path / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"unfinished .*\(meta.pt, __0_0.distcp\) but no .metadata.*Take another one"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("given", [".", "checkpoint"])
def test_the_folder_of_deepspeed_is_named_also_for_the_one_within(tmp_path, monkeypatch, given):
    write_files(tmp_path, *DEEPSPEED)
    monkeypatch.chdir(tmp_path)
    *_, folder, file = command_for(given)
    assert (folder, file) == (str(tmp_path), f"{tmp_path}-whole.ckpt")
    with pytest.raises(ValueError, match=re.escape(f"is a checkpoint of DeepSpeed in shards ({', '.join(DEEPSPEED)})")):
        read_checkpoint(given)


def test_a_folder_of_shards_with_whole_weights_beside_them_is_read(tmp_path):
    write_files(tmp_path, *DEEPSPEED)
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path).keys() == STATE.keys()


def test_other_folders_pass(tmp_path):
    write_files(tmp_path, "latest", "config.json", "states/optimizer.pt")
    refuse_sharded_folder(tmp_path)
