import pytest

from lightning_odem.methods import (
    METHODS,
    AverageMerge,
    MergeMethod,
    ODEMerge,
    PaperODEMerge,
    method_name,
    resolve_method,
)


@pytest.mark.parametrize(("name", "kind"), [("ode", ODEMerge), ("ode_paper", PaperODEMerge), ("average", AverageMerge)])
def test_names_give_methods_and_methods_their_names(name, kind):
    method = resolve_method(name)
    assert type(method) is kind
    assert method_name(method) == name


def test_every_registered_method_can_be_made_without_arguments():
    assert [method_name(resolve_method(name)) for name in METHODS] == list(METHODS)
    assert all(isinstance(resolve_method(name), MergeMethod) for name in METHODS)


def test_an_instance_is_taken_as_it_is():
    method = PaperODEMerge(step_size=0.5)
    assert resolve_method(method) is method


def test_each_name_gives_a_method_of_its_own():
    assert resolve_method("ode") is not resolve_method("ode")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=f"Unknown merge method 'odem'; the methods are {', '.join(sorted(METHODS))}"):
        resolve_method("odem")


def test_a_method_of_the_users_goes_by_its_class_name():
    class Overwrite(AverageMerge):
        pass

    assert method_name(Overwrite()) == "Overwrite"


@pytest.mark.parametrize(
    "name", ["..x", ".x", "..", "a..b", "\0.x", 3, None, ["ode"], "torch.nn.Linear", "torch.nothing"]
)
def test_whatever_is_no_method_is_refused_in_words(name):
    with pytest.raises(ValueError, match="merge method"):
        resolve_method(name)
