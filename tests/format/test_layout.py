"""Names of result files: layers come by number, and the paths of the rules are those of the stages."""

from __future__ import annotations

from pathlib import Path

from armor.format.layout import Results
from armor.format.names import layer_file, layer_files


def test_the_files_of_layers_come_by_number(tmp_path):
    for index in (10, 2, 0):
        for suffix in (".json", ".safetensors"):
            layer_file(tmp_path, index).with_suffix(suffix).touch()
    assert layer_files(tmp_path) == [layer_file(tmp_path, index) for index in (0, 2, 10)]
    assert layer_files(tmp_path, ".json") == [layer_file(tmp_path, k).with_suffix(".json") for k in (0, 2, 10)]


def test_a_rules_path_is_that_of_the_file():
    assert Path(Results().factors("m", "r", 3)) == layer_file(Path(Results().layers("m", "r")), 3)
    assert Path(Results().prices("m", "r", 3)) == layer_file(Path("results/m/r/prices"), 3).with_suffix(".json")
