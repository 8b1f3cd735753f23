import pytest
import torch
from safetensors.torch import save_file

from lightning_odem.parameters.model_files import ModelFiles, match_names

NAMES = ["body.weight", "body.bias", "top.weight"]


def state(seed=0, prefix="", **more):
    torch.manual_seed(seed)
    shapes = [(3, 2), (3,), (1, 3)]
    return {f"{prefix}{name}": torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)} | more


@pytest.fixture
def save(tmp_path):
    def save(name, content):
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("here", ["", "model.", "a.b."])
@pytest.mark.parametrize("there", ["", "module.", "vision_model.encoder."])
def test_names_match_but_for_a_beginning_that_all_share(here, there):
    found = match_names([here + name for name in NAMES], [there + name for name in NAMES])
    assert found == {here + name: there + name for name in NAMES}


def test_a_beginning_that_only_some_share_is_part_of_the_names():
    assert match_names(["body.a", "top.a"], ["model.body.a", "other.top.a"]) == {"body.a": "body.a", "top.a": "top.a"}


def test_a_single_layer_is_not_mistaken_for_another_of_a_larger_model():
    assert match_names(["fc.weight"], ["fc.weight", "conv.weight"]) == {"fc.weight": "fc.weight"}


def test_models_are_read_under_the_names_of_the_first(save):
    files = ModelFiles([save("a", state(0, "model.")), save("b", state(1)), save("c", state(2, "module.model."))])
    for seed, path in enumerate("abc"):
        found = files.read(save(path, state(seed, {"a": "model.", "b": "", "c": "module.model."}[path])))
        assert all(torch.equal(found[f"model.{name}"], value) for name, value in state(seed).items())


def test_names_of_compiled_modules_are_those_of_the_modules(save):
    compiled = {name.replace("body", "body._orig_mod"): value for name, value in state(1).items()}
    path = save("b", compiled)
    assert ModelFiles([save("a", state()), path]).read(path).keys() == state().keys()


def test_every_difference_of_every_model_is_listed(save):
    first = save("a", state())
    renamed = state(1)
    renamed["top.scale"] = renamed.pop("top.weight")
    second, third = save("b", renamed), save("c", state(2) | {"body.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match="differ in 2 places") as error:
        ModelFiles([first, second, third])
    for found in ("top.weight: in the", "top.scale: in the", r"body.bias: (3,) in the"):
        assert found in str(error.value)
    assert all(path in str(error.value) for path in (first, second, third))


def test_the_base_model_may_have_more_but_not_less(save):
    first = save("a", state())
    more = save("more", state(1, text=torch.zeros(5)))
    assert ModelFiles([first], more).read(more).keys() == state().keys()
    with pytest.raises(ValueError, match="text: in the"):
        ModelFiles([first, more])
    less = state(1)
    del less["body.bias"]
    with pytest.raises(ValueError, match=r"body\.bias: in the"):
        ModelFiles([first], save("less", less))


def test_a_base_that_is_also_merged_is_held_to_both(save):
    path = save("more", state(1, text=torch.zeros(5)))
    with pytest.raises(ValueError, match="text: in the"):
        ModelFiles([save("a", state()), path], path)


def test_excluded_tensors_may_be_different_ones(save):
    paths = [save("a", state(0) | {"heads.a": torch.ones(2)}), save("b", state(1) | {"heads.b": torch.ones(3)})]
    files = ModelFiles(paths, exclude=["heads"])
    assert files.excluded == {"heads.a", "heads.b"}
    assert list(files.like) == NAMES
    assert files.read_excluded(paths[1])["heads.b"].tolist() == [1, 1, 1]


def test_counters_and_position_indices_may_be_missing(save):
    ids = {"position_ids": torch.arange(4)}
    with_ids, without = save("a", state(0, **ids)), save("b", state(1))
    assert torch.equal(ModelFiles([with_ids, without]).read(without)["position_ids"], ids["position_ids"])
    assert ModelFiles([without, with_ids]).read(with_ids).keys() == state().keys()


def test_counters_may_differ_and_other_integers_may_not(save):
    def model(seed, value):
        return {**state(seed), "bn.num_batches_tracked": torch.tensor(seed), "index": torch.tensor(value)}

    paths = [save("a", model(1, 7)), save("b", model(2, 7))]
    assert ModelFiles(paths).read(paths[1])["bn.num_batches_tracked"] == 2
    with pytest.raises(ValueError, match=r"not floating-point in both: index \(torch.int64\)"):
        ModelFiles([*paths, save("c", model(3, 8))])


def test_quantized_weights_are_refused(save):
    quantized = state(1) | {"body.weight": torch.ones(3, 2, dtype=torch.int8)}
    for paths in ([save("a", state()), save("b", quantized)], [save("b", quantized), save("a", state())]):
        with pytest.raises(ValueError, match=r"Convert quantized weights back"):
            ModelFiles(paths)


def test_weights_that_are_not_finite_are_refused_by_name(save):
    path = save("a", state() | {"body.bias": torch.tensor([1.0, float("nan"), 2.0])})
    with pytest.raises(ValueError, match=r"NaN values in body\.bias"):
        ModelFiles([path]).read(path)


def test_the_common_dtype_is_the_widest_of_the_models_merged(save):
    def model(dtype):
        return {name: value.to(dtype) for name, value in state().items()}

    half, brain = save("half", model(torch.float16)), save("brain", model(torch.bfloat16))
    double = save("double", model(torch.float64))
    assert ModelFiles([half, half]).like["body.bias"].dtype == torch.float16
    assert ModelFiles([half, brain], double).like["body.bias"].dtype == torch.float32


def tied(seed, prefix="", stored=True):
    found = state(seed, prefix)
    return found | ({f"{prefix}zz.head": found[f"{prefix}body.weight"].clone()} if stored else {})


@pytest.mark.parametrize("stored", [True, False])
def test_copies_of_tied_tensors_are_stored_as_in_the_first_model(save, stored):
    paths = [save("a", tied(0, "model.", stored)), save("b", tied(1, "", not stored)), save("c", tied(2, "", stored))]
    files = ModelFiles(paths)
    for seed, path in enumerate(paths):
        found = files.read(path)
        assert found.keys() == tied(seed, "model.", stored).keys()
        assert all(torch.equal(found[name], value) for name, value in tied(seed, "model.", stored).items())


@pytest.fixture
def save_folder(tmp_path):
    def save(name, content):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"tie_word_embeddings": true}')
        save_file(content, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    return save


def test_a_tied_tensor_with_values_of_its_own_elsewhere_is_refused(save, save_folder):
    first, second = save_folder("a", tied(0)), save("b", tied(1) | {"zz.head": torch.randn(3, 2)})
    with pytest.raises(ValueError, match=r"zz\.head is a copy of body\.weight.* and none in .*b\. Give .*b first"):
        ModelFiles([first, second])
    assert torch.equal(ModelFiles([second, first]).read(first)["zz.head"], state(0)["body.weight"])


def test_tied_tensors_are_excluded_together(save_folder):
    paths = [save_folder("a", tied(0)), save_folder("b", tied(1))]
    with pytest.raises(ValueError, match=r"only zz\.head is excluded.*Exclude both or none"):
        ModelFiles(paths, exclude=["zz.head"])
    assert ModelFiles(paths, exclude=["zz.head", "body.weight"]).excluded == {"zz.head", "body.weight"}


def test_tensors_that_are_equal_in_the_first_model_may_differ_in_others(save):
    paths = [save("a", tied(0)), save("b", tied(1) | {"zz.head": torch.randn(3, 2)})]
    assert ModelFiles(paths).read(paths[0]).keys() == tied(0).keys()
    assert ModelFiles(paths, exclude=["zz.head"]).excluded == {"zz.head"}


def test_constants_are_no_copies_of_each_other(save):
    paths = [save("a", state(0, scale=torch.ones(3))), save("b", state(1, scale=torch.ones(3), more=torch.ones(3)))]
    with pytest.raises(ValueError, match="more: in the"):
        ModelFiles(paths)
