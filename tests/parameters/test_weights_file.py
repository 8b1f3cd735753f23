import pathlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_odem.parameters.weights_file import load_weights, read_weights


def net(seed=0, **more):
    torch.manual_seed(seed)
    return nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), **more})


def assert_same(module, state):
    own = module.state_dict()
    assert own
    for name, value in own.items():
        assert torch.equal(value, state[name]), name


@pytest.fixture
def state():
    source = net(seed=1, fc=nn.Linear(4, 2))
    source["bn"].running_mean.fill_(3.0)
    return source.state_dict()


def test_reads_safetensors(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    module = net()
    assert load_weights(module, tmp_path / "w.safetensors") == ["fc.bias", "fc.weight"]
    assert_same(module, state)


def test_reads_a_plain_torch_state_dict_from_a_string_path(tmp_path, state):
    torch.save(state, tmp_path / "w.pt")
    module = net()
    load_weights(module, str(tmp_path / "w.pt"))
    assert_same(module, state)


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "module.", "module.model._orig_mod."])
def test_reads_a_checkpoint_whose_names_share_a_prefix(tmp_path, state, prefix):
    wrapped = {prefix + name: value for name, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, tmp_path / "w.ckpt")
    module = net()
    assert load_weights(module, tmp_path / "w.ckpt") == [f"{prefix}fc.bias", f"{prefix}fc.weight"]
    assert_same(module, state)


def test_task_heads_next_to_the_backbone_are_left_out(tmp_path, state):
    wrapped = {f"backbone.{name}": value for name, value in net(seed=1).state_dict().items()}
    torch.save({"state_dict": wrapped | {"heads.digits.weight": torch.zeros(2, 4)}}, tmp_path / "w.ckpt")
    assert load_weights(net(), tmp_path / "w.ckpt") == ["heads.digits.weight"]


def test_a_head_below_a_module_that_stays_is_left_out(tmp_path):
    source = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "head": nn.ModuleDict({"norm": nn.LayerNorm(4)})})
    state = source.state_dict() | {"head.fc.weight": torch.zeros(2, 4)}
    torch.save(state, tmp_path / "w.pt")
    assert load_weights(source, tmp_path / "w.pt") == ["head.fc.weight"]


def test_a_head_the_module_has_is_loaded(tmp_path, state):
    torch.save(state, tmp_path / "w.pt")
    module = net(fc=nn.Linear(4, 2))
    assert load_weights(module, tmp_path / "w.pt") == []
    assert_same(module, state)


def test_a_missing_batch_counter_keeps_its_value(tmp_path, state):
    del state["bn.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pt")
    module = net()
    module["bn"].num_batches_tracked.fill_(7)
    load_weights(module, tmp_path / "w.pt")
    assert module["bn"].num_batches_tracked == 7


def test_all_differences_are_listed_at_once_and_nothing_is_loaded(tmp_path, state):
    state["conv.weight"] = torch.zeros(4, 1, 3, 3)
    state["conv.scale"] = state.pop("conv.bias")
    del state["bn.weight"]
    torch.save(state, tmp_path / "w.pt")
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit ModuleDict") as error:
        load_weights(module, tmp_path / "w.pt")
    assert "missing in the file: conv.bias, bn.weight\n" in str(error.value)
    assert "unknown to the module: conv.scale\n" in str(error.value)
    assert "conv.weight [4, 1, 3, 3] in the file, [4, 3, 3, 3] in the module" in str(error.value)
    assert_same(module, before)


def test_a_head_of_another_size_is_an_error_where_the_module_has_one(tmp_path, state):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"fc.weight \[2, 4\] in the file, \[5, 4\] in the module"):
        load_weights(net(fc=nn.Linear(4, 5)), tmp_path / "w.pt")


def test_a_shared_name_the_module_has_is_not_stripped(tmp_path):
    source = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    module = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
    load_weights(module, tmp_path / "w.pt")
    assert_same(module, source.state_dict())


def test_a_single_foreign_name_without_a_prefix_is_reported(tmp_path):
    torch.save({"scale": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="unknown to the module: scale"):
        load_weights(net(), tmp_path / "w.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        load_weights(net(), tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"hello world, this is not a file of weights", b"\x80\x02}q\x00."[:3]])
def test_a_corrupt_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_weights(net(), tmp_path / name)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_truncated_file_is_named(tmp_path, name, state):
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is corrupt"):
        load_weights(net(), tmp_path / name)


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_file_that_runs_code_is_refused_without_running_it(tmp_path):
    torch.save({"state_dict": {}, "extra": Marker(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="only running code from the file"):
        load_weights(net(), tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_module_is_refused_with_its_class_named(tmp_path):
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"holds torch.nn.modules.container.ModuleDict.*state_dict\(\)"):
        load_weights(net(), tmp_path / "w.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, [1, 2]])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not a state dict of named tensors"):
        load_weights(net(), tmp_path / "w.pt")


def test_entries_that_are_no_tensors_are_named(tmp_path, state):
    torch.save({"model_ema": dict(state), "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"model_ema \(dict\), epoch \(int\)"):
        load_weights(net(), tmp_path / "w.pt")


def test_a_changed_byte_is_noticed_and_the_file_named(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.arange(512.0)}, path)
    content = bytearray(path.read_bytes())
    start = content.index(torch.arange(512.0).numpy().tobytes()[:64])
    for place in (start + 5, start + 1000):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"weights\.pt is corrupt .*checksum of its entry"):
            read_weights(path)


def test_a_directory_of_the_archive_that_lies_before_the_file_is_named(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.arange(300.0)}}, path)
    whole = path.read_bytes()
    for place in range(len(whole) - 22, len(whole)):  # the record at the end of a zip file
        for bit in range(8):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            path.write_bytes(content)
            refusal = str(path)
            try:
                assert torch.equal(read_weights(path)["w"], torch.arange(300.0))
            except ValueError as error:
                refusal = str(error)
            assert str(path) in refusal
