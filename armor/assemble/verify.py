"""Verify: everything that can be wrong with a checkpoint folder, checked; no more than one linear in memory.

The same checks guard loading (`armor.hf`). Here they cover every file and tensor that checksums.json lists. They also
say whether transformers makes a model of the whole, with no tensor missing or left over. Beside the source model more
can be said: how far each W is from its factors, and whether all else is the source's to the byte. That distance is not
what the solver minimises (which weights inputs by their size), so it compares modules and checkpoints, and does not
rank methods. Norms and biases that were trained (provenance.json lists them) are not the source's, and are counted.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from armor.assemble.folder import natural
from armor.core.errors import ArmorError
from armor.core.factorization import SUFFIXES
from armor.core.typed import Typed
from armor.execution.files import read_json
from armor.execution.log import progress
from armor.execution.table import text_table
from armor.format.checkpoint import PackedLinear, read_packed, tombstone
from armor.format.checksums import Hashing, check_contents, open_checkpoint, read_checksums
from armor.format.provenance import PROVENANCE
from armor.format.records.checkpoint import ProvenanceRecord
from armor.format.scaled import is_scaled
from armor.format.shards import Shards
from armor.model.tensors import recorded_tensors
from armor.runtime.load import check_names

__all__ = ["Distance", "Verified", "table", "verify"]


class Distance(Typed):
    """How far a checkpoint is from its source."""

    against: str
    """The source's folder."""
    equal_tensors: int
    """Tensors that are the source's own, to the byte."""
    trained_tensors: int
    """Norms and biases that were trained, and so are not the source's."""
    relative_errors: dict[str, float]
    """‖W − Ŵ‖ / ‖W‖ (Frobenius) by module, Ŵ the factors multiplied out."""


class Verified(Typed):
    """What a sound checkpoint holds."""

    folder: str
    shards: int
    tensors: int
    bytes: int
    """Of all tensors."""
    compressed_count: int
    """Compressed linears."""
    patterns: dict[str, int]
    """How many of them have each pattern."""
    bits_per_weight: float | None
    """Of the compressed linears; null without any."""
    checksums: bool
    """Whether there is a checksums.json to check by; save_pretrained writes none."""
    distance: Distance | None = None
    """Null where no source was named."""


def verify(folder: Path | str, against: Path | str | None = None) -> Verified:
    """Check a checkpoint: config, index, shards, names, shapes, dtypes, hashes, patterns, NaN.

    With the folder of the source model in `against`, its linears are compared to those, and every other tensor is held
    against the source's. Raises ArmorError, one line, for the first thing that is wrong.
    """
    _, shards, modules = open_checkpoint(folder)
    source = None if against is None else _open_source(Path(against), shards, modules)
    sums = read_checksums(shards)
    with Hashing(shards, sums, sums.files if sums else ()):
        check_contents(shards, modules, sums and sums.tensors)
    check_names(shards.folder)
    packed = [f"{name}.{suffix}" for name in modules for suffix in SUFFIXES]
    packed_bytes = sum(shards.bytes_of(name) for name in packed if name in shards)
    weights = sum(layout.out_features * layout.in_features for layout in modules.values())
    names = shards.names()
    patterns = Counter(str(layout.pattern) for layout in modules.values())
    return Verified(
        folder=str(folder),
        shards=len(shards.files),
        tensors=len(names),
        bytes=sum(shards.bytes_of(name) for name in names),
        compressed_count=len(modules),
        patterns=dict(patterns),
        bits_per_weight=8 * packed_bytes / weights if weights else None,
        checksums=sums is not None,
        distance=None if source is None else _compare(shards, modules, source),
    )


def _copied(shards: Shards, modules: dict[str, PackedLinear]) -> list[str]:
    """The tensors of a checkpoint that are the source's own."""
    ours = {f"{name}.{suffix}" for name in modules for suffix in SUFFIXES}
    return [name for name in shards.names() if name not in ours and not (modules and name == tombstone(modules))]


def _open_source(folder: Path, shards: Shards, modules: dict[str, PackedLinear]) -> Shards:
    """The tensors of the source model, whose names and shapes must be those that the checkpoint was made of."""
    found = read_json(folder / "config.json").get("quantization_config") if (folder / "config.json").is_file() else None
    if found and not is_scaled(found):
        raise ArmorError(f"{folder}: is quantized itself; expected the model that {shards.folder} was made of")
    source = recorded_tensors(folder, modules)
    expected = {f"{name}.weight": (layout.out_features, layout.in_features) for name, layout in modules.items()}
    expected |= {name: shards.shape(name) for name in _copied(shards, modules)}
    if different := sorted(expected.keys() ^ set(source.names()), key=natural):
        name = different[0]
        here, there = (folder, shards.folder) if name in expected else (shards.folder, folder)
        raise ArmorError(f"{here}: {name}: missing, {there} has it; is {folder} the model that was compressed?")
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise ArmorError(
                f"{folder / source.file_of(name)}: {name}: shape {source.shape(name)}, {shape} in {shards.folder}; is "
                f"{folder} the model that was compressed?"
            )
    return source


def _compare(shards: Shards, modules: dict[str, PackedLinear], source: Shards) -> Distance:
    """The distance of every compressed linear from the source's; raises ArmorError for another tensor that differs."""
    made = ProvenanceRecord.read_if_there(shards.folder / PROVENANCE)
    trained = set(made.trained if made else ())
    copied = [name for name in _copied(shards, modules) if name not in trained]
    for name in copied:
        ours, theirs = shards.read(name), source.read(name)
        if ours.dtype != theirs.dtype or not torch.equal(*(t.view(-1).view(torch.uint8) for t in (ours, theirs))):
            raise ArmorError(
                f"{shards.folder / shards.file_of(name)}: {name}: {str(ours.dtype)[6:]} numbers that are not those of "
                f"{source.folder} ({str(theirs.dtype)[6:]}); is that the model that was compressed?"
            )
    errors = {}
    for name, layout in progress(modules.items(), "compare", total=len(modules), unit="linear"):
        weight = source.read(f"{name}.weight", torch.float32)
        norm = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        distance = weight.sub_(read_packed(shards, name, layout).reconstruct())
        errors[name] = torch.linalg.vector_norm(distance, dtype=torch.float64).item() / (norm or 1.0)
    return Distance(
        against=str(source.folder), equal_tensors=len(copied), trained_tensors=len(trained), relative_errors=errors
    )


def table(found: Verified) -> str:
    """What `verify` returns, for a terminal: a line for each fact, and relative errors with a row for each layer."""
    patterns = ", ".join(f"{count} x {pattern}" for pattern, count in found.patterns.items())
    compressed = f"{found.compressed_count} linears ({patterns}), {found.bits_per_weight or 0:.2f} bits per weight"
    facts = {
        "tensors": f"{found.tensors:,} in {found.shards} file{'s' * (found.shards > 1)}",
        "size": f"{found.bytes / 1e6:,.1f} MB",
        "compressed": compressed if found.compressed_count else "nothing",
        "checksums": "every file is as it was written" if found.checksums else "none here to check by",
    }
    if distance := found.distance:
        facts["source"] = f"{distance.against}: the other {distance.equal_tensors} tensors are equal"
        if trained := distance.trained_tensors:
            facts["source"] += f", {trained} norms and biases were trained"
    lines = [f"{found.folder}: sound", text_table(facts.items(), align="ll")]
    if errors := distance and distance.relative_errors:
        lines += ["", "relative error ‖W − Ŵ‖ / ‖W‖, Ŵ the factors multiplied out", _grid(errors)]
        worst = max(errors, key=errors.__getitem__)
        lines.append(f"mean {sum(errors.values()) / len(errors):.4f}, largest {errors[worst]:.4f} ({worst})")
    return "\n".join(lines)


def _grid(errors: dict[str, float]) -> str:
    """A row for each layer, a column for each kind of linear: a name is split behind its last number."""
    cells: dict[str, dict[str, str]] = {}
    for name, error in sorted(errors.items(), key=lambda item: natural(item[0])):
        parts = name.split(".")
        cut = max((i for i, part in enumerate(parts, 1) if part.isdigit()), default=0)
        cells.setdefault(".".join(parts[:cut]), {})[".".join(parts[cut:])] = f"{error:.4f}"
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    heads = [column.rpartition(".")[2] for column in columns]
    if len(set(heads)) < len(heads):
        heads = columns
    rows = [(layer, *(row.get(column, "–") for column in columns)) for layer, row in cells.items()]
    return text_table(rows, ("", *heads))
