"""A job is a stage and the names that tell it from others; and which jobs a configuration asks for.

`armor.run.stages` says what a stage makes and reads, and here that is asked of one job: its files, settings, code and
inputs. Which jobs there are is known from the configuration, but for the numbers of layers and the groups of experts:
these the model decides, and its record says them when it was inspected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from armor.config.run import Config
from armor.core.typed import Typed
from armor.execution.fingerprint import code_hash
from armor.format.layout import RESULTS, Results
from armor.format.provenance import text_files
from armor.format.records.base import Input, Origin
from armor.format.records.topology import Topology
from armor.run.groups import expert_groups
from armor.run.stages import STAGES, Names, Needed

__all__ = ["Job", "jobs", "jobs_of", "read_topology"]


@dataclass(frozen=True)
class Job:
    """One job of the workflow: its stage, and the names that tell it from others of that stage."""

    stage: str
    names: Names
    results: Results = Results()

    def __str__(self) -> str:
        """As the rule's message announces it."""
        if not STAGES[self.stage].by_layer:
            return " ".join((self.stage, *self.names))
        model, recipe, layer, *experts = self.names
        return " ".join((self.stage, model, recipe, f"layer {layer}", *experts))

    @property
    def outputs(self) -> tuple[Path, ...]:
        return tuple(map(Path, STAGES[self.stage].outputs(self.results, *self.names)))

    @property
    def stored(self) -> tuple[str, ...]:
        """What comes of it, for object storage."""
        row = STAGES[self.stage]
        return (row.stored or row.outputs)(self.results, *self.names)

    @property
    def record(self) -> Path:
        """The JSON among the outputs that says what made them."""
        return next(path for path in self.outputs if path.suffix == ".json")

    @property
    def log(self) -> Path:
        return Path(self.results.log(self.stage, *self.names))

    @property
    def measured(self) -> Path:
        """What Snakemake measured of it."""
        return Path(self.results.measured(self.stage, *self.names))

    def settings(self, config: Config) -> Typed | None:
        """What of the configuration it reads; None if nothing."""
        return STAGES[self.stage].settings(config, *self.names)

    def settings_json(self, config: Config) -> str:
        """Its settings, defaults and all, as JSON text, in the order of the types: equal settings, equal text."""
        settings = self.settings(config)
        return settings.model_dump_json(exclude_none=True) if settings else "{}"

    def code(self, config: Config) -> str:
        """The hash of the code that it executes."""
        stage = STAGES[self.stage]
        return code_hash(stage.entry, *stage.also(config, *self.names))

    def text(self, config: Config) -> str | None:
        """The fingerprint of the local files of text that it reads; where one is not there, what its record says."""
        settings = self.settings(config)
        if settings is None or not settings.local_files():
            return None
        if found := text_files(settings):
            return found
        origin = Origin.within(self.record) if self.record.is_file() else None
        return origin.made_by.inputs.get(Input.TEXT_FILES) if origin else None

    def inputs(self, config: Config) -> list[Needed]:
        """The jobs that it reads from. Without the last of their names all are meant that have the others."""
        return STAGES[self.stage].inputs(config, *self.names)

    def before(self, config: Config) -> Iterator[tuple[str, Job]]:
        """The jobs that it reads from one by one, by what it calls their fingerprints."""
        for name, stage, names in self.inputs(config):
            yield from ((name, job) for job in jobs_of(config, stage, self.results, names))


def jobs_of(config: Config, stage: str, results: Results, names: Names = ()) -> Iterator[Job]:
    """The jobs of one stage: all, or those whose names begin with these, like those of one model and recipe.

    The layer is "?" where their number is not known yet. Groups of experts are none then.
    """
    row = STAGES[stage]
    for own in [names] if names else dict.fromkeys(row.asked(config)):
        if row.by_group and len(own) < 4:
            yield from (Job(stage, found, results) for found in _groups(config, results, *own))
        elif row.by_layer and len(own) == 2:
            yield from (Job(stage, (*own, layer), results) for layer in _layers(results, own[0]))
        else:
            yield Job(stage, own, results)


def jobs(config: Config, root: str = RESULTS) -> Iterator[Job]:
    """Every job that `config` asks for, in the order of the stages."""
    for stage in STAGES:
        yield from jobs_of(config, stage, Results(root))


def _layers(results: Results, model: str) -> list[str]:
    topology = read_topology(results, model)
    return ["?"] if topology is None else [str(layer.index) for layer in topology.layers]


def _groups(config: Config, results: Results, model: str, recipe: str, number: str | None = None) -> Iterator[Names]:
    topology, size = read_topology(results, model), config.recipes[recipe].experts_per_job
    for layer in topology.layers if topology else ():
        if number in (None, str(layer.index)):
            for experts in expert_groups(layer, config.layer_settings(recipe, layer.index), size):
                yield model, recipe, str(layer.index), experts


def read_topology(results: Results, model: str) -> Topology | None:
    """What a model is made of; None where it is not inspected yet. A file is read once, until it is another one."""
    file = Path(results.topology(model))
    if not file.is_file():
        return None
    found = file.stat()
    return _read(file.absolute(), found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=8)
def _read(file: Path, *_: int) -> Topology:
    return Topology.read(file)
