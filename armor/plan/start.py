"""A first configuration for a model: the usual calibration, recipes and evaluations, cut down until this machine can.

What is cut, in this order: the tokens of a sequence, the benchmark (which has all models in memory at once), the
sequences. Each try is planned (`armor.plan.table`), and the first without a problem is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from armor.config.reading import parse_settings
from armor.config.run import Config
from armor.core.errors import ArmorError
from armor.plan.machine import USUAL
from armor.plan.run import opened
from armor.plan.table import describe, planned

__all__ = ["first_configuration"]

LENGTHS = (4096, 2048, 1024, 512, 256, 128)
SEQUENCES = (128, 64, 32)
BLOCK_SIZES = (128, 64, 32, 16)
BITS = 0.75
"""Of the dense ones, that a weight may take with the block size that is chosen."""
C4 = {"dataset": "allenai/c4", "subset": "en", "streaming": True}
WIKITEXT = {"dataset": "Salesforce/wikitext", "subset": "wikitext-2-raw-v1", "split": "test"}
HEADER = """\
# {described}
# Every key: config/README.md. Others to try: block_size, refine, tasks. `armor plan` says what a change takes.

"""


def first_configuration(model: str, folder: Path) -> str:
    """The text of a configuration for `model` (a name on the hub, a folder or a GGUF file) that fits this machine.

    Raises ArmorError where the model cannot be planned, and where nothing fits.
    """
    last = model.removesuffix(".gguf").rstrip("/").rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9._+-]+", "-", last).lstrip("._+-") or "model"
    source = _source(model)
    recipes = {f"block-{size}": {"block_size": size} for size in BLOCK_SIZES}
    tried = parse_settings(Config, _content(name, source, LENGTHS[-1], SEQUENCES[-1], recipes, benchmark=False))
    with opened(tried, USUAL, folder) as (plan, results):
        subject = plan.subjects[name]
        bits = {size: subject.packed[f"block-{size}"].bits for size in BLOCK_SIZES}
        block = next((size for size in BLOCK_SIZES if bits[size] <= BITS * subject.dense_bits), BLOCK_SIZES[-1])
        packed = {"armor": subject.packed[f"block-{block}"]}
        chosen = {"dense": {"method": "dense"}, "armor": {"method": "armor", "block_size": block}}
        subject = replace(subject, packed=packed)
        problems: list[str] = []
        for content in _tries(name, source, subject.topology.context_length, chosen):
            config = parse_settings(Config, content)
            this = replace(plan, config=config, subjects={name: subject}, notes={})
            found = planned(this, results, None)
            if not found.problems:
                text = yaml.safe_dump(content, sort_keys=False, width=110)
                return HEADER.format(described=f"{model}: {describe(subject)}") + text
            problems += found.problems
    raise ArmorError(f"{model}: nothing that was tried fits this machine: {problems[0]}")


def _source(model: str) -> dict[str, str]:
    """Where a model is, as a configuration has it."""
    if model.endswith(".gguf"):
        return {"gguf": model}
    is_folder = Path(model).expanduser().is_dir() or model.startswith((".", "/", "~"))
    return {"folder" if is_folder else "hub": model}


def _tries(name: str, source: dict[str, str], longest: int | None, recipes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Configurations from the usual one to the smallest."""
    known = [length for length in LENGTHS if longest is None or length <= longest] or [longest]
    for sequences in SEQUENCES:
        for benchmark in (True, False):
            for length in known:
                yield _content(name, source, length, sequences, recipes, benchmark)


def _content(
    name: str, source: dict[str, str], length: int | None, sequences: int, recipes: dict[str, Any], benchmark: bool
) -> dict[str, Any]:
    """A configuration."""
    content: dict[str, Any] = {
        "models": {name: source},
        "calibrations": {"c4": {"text": C4, "sequences": sequences, "sequence_length": length}},
        "recipes": recipes,
        "evaluations": {"wikitext2": {"text": WIKITEXT, "sequence_length": length}},
    }
    return content | ({"benchmarks": {"decode": {}}} if benchmark else {})
