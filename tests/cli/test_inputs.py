from lightning_odem.cli.inputs import task_names


def test_task_names_are_unique_even_where_a_file_has_a_number():
    assert task_names(["x/a.pt", "y/a.pt", "a_2.pt", "z/a.pt"]) == ["a", "a_2", "a_2_2", "a_3"]
