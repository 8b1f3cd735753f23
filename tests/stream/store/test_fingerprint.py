import hashlib

import pytest
import torch

from lightning_odem.stream.store import differences, fingerprint
from lightning_odem.stream.store.fingerprint import hash_tensors

MODEL = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2), "steps": torch.tensor(3)}

CHANGES = {
    "renamed": ({"weights": MODEL["weight"], "bias": MODEL["bias"], "steps": MODEL["steps"]}, "1 of 3 tensors missing"),
    "one less": ({"weight": MODEL["weight"], "bias": MODEL["bias"]}, "1 of 3 tensors missing: steps"),
    "one more": ({**MODEL, "more": torch.ones(1)}, "1 tensor more: more"),
    "value": ({**MODEL, "weight": MODEL["weight"] + 0.5}, "differs: weight by up to 0.5"),
    "sign of zero": ({**MODEL, "bias": -MODEL["bias"]}, "differs: bias by up to 0"),
    "not a number": ({**MODEL, "bias": torch.tensor([0.0, torch.nan])}, "differs: bias by up to nan"),
    "dtype": ({**MODEL, "bias": MODEL["bias"].double()}, "bias in dtype, torch.float64 instead of torch.float32"),
    "shape": ({**MODEL, "weight": MODEL["weight"].reshape(3, 2)}, r"weight in shape, \(3, 2\) instead of \(2, 3\)"),
    "complex": ({**MODEL, "bias": MODEL["bias"].to(torch.complex64)}, "bias in dtype"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_changes_the_fingerprint_and_is_described(change):
    other, description = CHANGES[change]
    assert fingerprint(other) != fingerprint(MODEL)
    with pytest.raises(ValueError, match=description):
        raise ValueError("; ".join(differences(MODEL, other)))


def test_the_order_of_names_strides_and_devices_views_do_not_matter():
    wide = torch.zeros(2, 6)
    wide[:, ::2] = MODEL["weight"]
    same = {"steps": MODEL["steps"].clone(), "bias": MODEL["bias"], "weight": wide[:, ::2]}
    assert fingerprint(same) == fingerprint(MODEL)
    assert differences(MODEL, same) == []


def test_several_differences_name_the_first():
    other = {name: tensor + 1 for name, tensor in MODEL.items()}
    assert differences(MODEL, other) == ["3 of 3 common tensors differ, first weight by up to 1"]


def test_nan_is_the_same_as_itself():
    model = {"weight": torch.tensor([torch.nan, -0.0])}
    assert differences(model, {"weight": model["weight"].clone()}) == []


def test_the_hash_is_sha256_of_names_shapes_dtypes_and_bytes():
    model = {"b": torch.tensor([1, 2], dtype=torch.uint8), "a": torch.tensor(3, dtype=torch.int16)}
    b, a = b"b(2,)torch.uint8\x01\x02", b"a()torch.int16\x03\x00"
    assert hash_tensors(model) == hashlib.sha256(b + a).hexdigest()
    assert fingerprint(model) == hashlib.sha256(a + b).hexdigest()
