import json
import math

from lightning_odem.parameters.json_text import JsonText, json_lines, map_values, nan_to_none, none_to_nan


def test_numbers_that_json_has_not_go_there_and_back():
    data = {"values": [1.0, math.nan, {"deep": math.inf}], "checkpoint": None, "name": "a"}
    text = json.dumps(map_values(data, nan_to_none), allow_nan=False)
    back = map_values(json.loads(text), none_to_nan)
    assert math.isnan(back["values"][1])
    assert math.isnan(back["values"][2]["deep"])
    assert (back["checkpoint"], back["name"], back["values"][0]) == (None, "a", 1.0)


def test_text_that_is_json_already_is_taken_as_it_is():
    text = json_lines({"merges": [JsonText(json.dumps({"t": 0.5}))], "tasks": ["a"]}, depth=2)
    assert json.loads(text) == {"merges": [{"t": 0.5}], "tasks": ["a"]}
