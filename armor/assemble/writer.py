"""Assemble: the factors of all decoder layers and everything else of the source become a checkpoint folder.

Tensors are copied shard by shard (`armor.assemble.folder`), so no more than one shard is in memory. Every factors file
is checked before the first byte is written, and the record comes after all else. So an interrupted run leaves no
checkpoint, never half a one. The next run keeps the shards that are finished. The same input gives the same bytes. The
format is in docs/FORMAT.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armor.assemble.card import Sizes, card, origins
from armor.assemble.folder import MAX_SHARD_BYTES, copy_others, growing, natural, seal, write_tensors
from armor.core.errors import ArmorError
from armor.core.factorization import SUFFIXES
from armor.core.pattern import Pattern
from armor.core.quantization import Quantization
from armor.execution.files import open_safetensors, read_json, sha256, write_json
from armor.execution.log import log
from armor.execution.machine import current_machine, peak_memory_bytes
from armor.execution.resume import resumable
from armor.format.checkpoint import PackedLinear, check_tensor, quantization_config, tombstone
from armor.format.checksums import CHECKSUMS
from armor.format.factors import FactorsHeader
from armor.format.names import beside, layer_file, record_beside, record_of_folder
from armor.format.provenance import PROVENANCE, combined, made_by
from armor.format.records.base import BlockSizes, Input
from armor.format.records.checkpoint import CheckpointRecord, ProvenanceRecord
from armor.format.records.layer import LayerRecord, LinearRecord
from armor.format.records.topology import DecoderLayer, Linear, Topology
from armor.format.shards import DTYPES, Shards
from armor.model.source import Source
from armor.model.tensors import recorded_tensors

__all__ = ["assemble", "bits_per_weight", "tensor_bytes"]


@dataclass(frozen=True)
class _Layer:
    """The factors of one decoder layer: its compressed linears, the sizes of their tensors, the record.

    `others` are the tensors that take the place of the source's: norms and biases that were trained.
    """

    file: Path
    modules: dict[str, PackedLinear]
    bytes: dict[str, int]
    others: tuple[str, ...]
    record: LayerRecord


def assemble(
    source: Source, topology: Topology, factors: Path | str, output: Path | str, max_shard_bytes: int = MAX_SHARD_BYTES
) -> CheckpointRecord:
    """Write checkpoint/ beside `output`, the record, from the layer_{k} files in `factors`, then `output` itself.

    Returns what `output` holds. Raises ArmorError if factors are missing, broken or of another model, if a tensor holds
    NaN, or if the disk is full. What `output` and checkpoint/ held before is then gone or untouched, never mixed.
    """
    factors, output = Path(factors), Path(output)
    source.check(topology.fingerprint)
    target = beside(output)
    if target.exists() and not (target / CHECKSUMS).is_file():
        raise ArmorError(
            f"{target}: in the way, and not a checkpoint of this pipeline; move it or choose another output"
        )
    shards = recorded_tensors(source.path, (linear.name for linear in topology.linears()))
    layers = [_read_layer(factors, layer, topology.fingerprint, shards) for layer in topology.layers]
    modules = {name: layout for layer in layers for name, layout in layer.modules.items()}
    kept_dense = tuple(linear.name for linear in topology.linears() if linear.name not in modules)
    kept = recorded_tensors(source.path, modules)  # experts that are stored fused stay so if none is compressed
    origin = {tensor: layer.file for layer in layers for tensor in (*layer.bytes, *layer.others)}
    packed = {tensor: size for layer in layers for tensor, size in layer.bytes.items()}
    sizes = tensor_bytes(kept, packed, modules)
    work = {
        "fingerprint": source.fingerprint,
        "factors": [layer.record.sha256 for layer in layers],
        "sizes": list(sizes.items()),
        "max_shard_bytes": max_shard_bytes,
    }
    records = [layer.record for layer in layers]
    made = _made(source, records, sorted((name for layer in layers for name in layer.others), key=natural))
    with resumable(output, __name__, "cpu", **work) as steps:
        output.unlink(missing_ok=True)
        if target.exists():
            shutil.rmtree(target)
        with growing(target, steps) as part:
            read = partial(_read_tensor, modules=modules, origin=origin, kept=kept)
            sums = write_tensors(part, sizes, read, max_shard_bytes, "assemble", steps)
            copy_others(source.path, part)
            write_json(part / "config.json", _config(source.path, modules))
            bits, dense_bits = bits_per_weight(topology, packed, shards)
            if modules and bits >= dense_bits:
                log.warning(
                    "%s: %.2f bits a weight, and %.2f in %s: the checkpoint is not smaller",
                    *(target, bits, dense_bits, source.path),
                )
            made.write(part / PROVENANCE)
            whole = Sizes(
                sum(sizes.values()),
                sum(map(shards.stored_bytes, shards.names())),
                bits,
                dense_bits,
                topology.compressed_share(kept_dense),
            )
            text = card(target, source.path, source.hub, topology.model_type, records, made, whole)
            (part / "README.md").write_text(text, encoding="utf-8")
            files = seal(part, sums)
        record = CheckpointRecord(
            fingerprint=source.fingerprint,
            statistics_fingerprint=made.statistics_fingerprint,
            checkpoint_bytes=sum(file.bytes for file in files.values()),
            bits_per_weight=bits,
            dense_bits_per_weight=dense_bits,
            made_by=made.made_by,
            factors=made.factors,
            machine=current_machine(),
            compressed_count=len(modules),
            kept_dense=kept_dense,
            files=files,
            seconds=steps.seconds(),
            peak_memory_bytes=peak_memory_bytes(),
        )
        record.write(output)
    return record


def _read_tensor(name: str, *, modules: Mapping[str, PackedLinear], origin: Mapping[str, Path], kept: Shards) -> Tensor:
    """A tensor of the checkpoint: from the factors' file where `origin` has one for it, else the source's own."""
    if modules and name == tombstone(modules):
        return torch.zeros(1, dtype=torch.uint8)
    if name in origin:
        with open_safetensors(origin[name]) as opened:
            tensor = opened.get_tensor(name).clone()  # else the file stays mapped once for every tensor of it
    else:
        tensor = kept.read(name)
    check_tensor(str(origin.get(name) or kept.folder / kept.file_of(name)), name, tensor, modules)
    return tensor


def _config(source: Path, modules: Mapping[str, PackedLinear]) -> dict[str, Any]:
    """The checkpoint's config.json: the source's, and what says how `modules` are packed."""
    config = read_json(source / "config.json")
    config.pop("quantization_config", None)  # of a source in FP8 or MXFP4: what stays dense is bfloat16 here
    return config | ({"quantization_config": quantization_config(modules)} if modules else {})


def _made(source: Source, records: list[LayerRecord], trained: list[str]) -> ProvenanceRecord:
    """The checkpoint's provenance: that of its own making and of the factors, and which other tensors were trained."""
    inputs = {Input.LAYER.format(record.layer): record.sha256 for record in records}
    statistics = combined(record.statistics_fingerprint for record in records)
    made = made_by(__name__, None, {Input.MODEL: source.fingerprint, Input.STATISTICS: statistics, **inputs})
    return ProvenanceRecord(
        fingerprint=source.fingerprint,
        statistics_fingerprint=statistics,
        made_by=made,
        factors=origins(records),
        trained=tuple(trained),
    )


def _again(record: LayerRecord, folder: Path) -> str:
    """What to do about a layer's factors in `folder`."""
    stage = record.made_by.stage.rpartition(".")[2]
    if stage == "tune":  # all layers at once
        return f"run armor tune again, or delete {record_of_folder(folder)} and run the workflow"
    return f"{'factorize' if stage == 'layer' else stage} layer {record.layer} again"


def _read_layer(folder: Path, layer: DecoderLayer, fingerprint: str, shards: Shards) -> _Layer:
    """Read and check one layer's JSON and the header of its factors."""
    file = layer_file(folder, layer.index)
    described = record_beside(file)
    record = LayerRecord.read(described)
    again = _again(record, folder)
    if record.fingerprint != fingerprint:
        raise ArmorError(f"{described}: factors of another model (its fingerprint differs); {again}")
    linears = {linear.name: linear for linear in layer.linears}
    if different := sorted(linears.keys() ^ record.modules.keys()):
        what = "missing" if different[0] in linears else "not in this model's layer"
        raise ArmorError(f"{described}: {different[0]}: {what}; {again}")
    if not file.is_file() or sha256(file) != record.sha256:
        raise ArmorError(f"{file}: {'not what its JSON describes' if file.is_file() else 'missing'}; {again}")
    modules: dict[str, PackedLinear] = {}
    sizes: dict[str, int] = {}
    with open_safetensors(file) as opened:
        header = FactorsHeader.of(opened)
        if header.fingerprint != fingerprint:
            raise ArmorError(f"{file}: factors of another model (its fingerprint differs); {again}")
        names = set(opened.keys())
        for name, linear in linears.items():
            entry = record.modules[name]
            if entry.pattern is None:
                continue
            found = header.patterns.get(name)
            if found != entry.pattern:
                expected = f"expected {entry.pattern} as {described.name} says"
                raise ArmorError(f"{file}: {name}: pattern {found}, {expected}; {again}")
            modules[name] = layout = _layout(linear, entry, header.quantizations.get(name))
            for suffix, shape in layout.shapes().items():
                tensor = f"{name}.{suffix}"
                if tensor not in names:
                    raise ArmorError(f"{file}: {tensor}: missing, expected shape {shape}; {again}")
                piece = opened.get_slice(tensor)
                if tuple(piece.get_shape()) != shape:
                    raise ArmorError(f"{file}: {tensor}: shape {tuple(piece.get_shape())}, expected {shape}; {again}")
                names.remove(tensor)
                sizes[tensor] = torch.Size(shape).numel() * DTYPES[piece.get_dtype()][1]
        if unknown := names.symmetric_difference(header.others):
            raise ArmorError(f"{file}: {min(unknown)}: not a tensor that {described.name} describes; {again}")
        _check_others(file, {name: opened.get_slice(name) for name in header.others}, shards)
    return _Layer(file, modules, sizes, header.others, record)


def _check_others(file: Path, pieces: dict[str, Any], shards: Shards) -> None:
    """Tensors that take the place of the source's are as those are."""
    for name, piece in pieces.items():
        found = tuple(piece.get_shape()), DTYPES[piece.get_dtype()][0]
        if found != (expected := (shards.shape(name), shards.dtype(name))):
            raise ArmorError(f"{file}: {name}: {found[1]} of shape {found[0]}, expected {expected[1]} of {expected[0]}")


def _layout(linear: Linear, entry: LinearRecord, quantization: Quantization | None) -> PackedLinear:
    blocks, pattern = entry.block_sizes or BlockSizes(), Pattern.parse(entry.pattern or "")
    shape = linear.out_features, linear.in_features
    return PackedLinear(*shape, pattern, blocks.left, blocks.right, quantization, entry.right_of, entry.rank)


def tensor_bytes(shards: Shards, packed: Mapping[str, int], modules: Mapping[str, PackedLinear]) -> dict[str, int]:
    """The bytes of every tensor of a checkpoint: the source's in natural order, weights of `modules` replaced.

    `packed` are the bytes of the factors' tensors by name.
    """
    sizes: dict[str, int] = {}
    for name in sorted(shards.names(), key=natural):
        module = name.removesuffix(".weight")
        if name == module or module not in modules:
            sizes[name] = shards.bytes_of(name)
            continue
        sizes |= {key: packed[key] for key in (f"{module}.{suffix}" for suffix in SUFFIXES) if key in packed}
        if name == tombstone(modules):
            sizes[name] = 1
    return sizes


def bits_per_weight(topology: Topology, packed: Mapping[str, int], shards: Shards) -> tuple[float, float]:
    """Bits per weight over all linears of the decoder layers, compressed and dense; biases do not count.

    `packed` are the bytes of the factors' tensors by name.
    """
    dense = compressed = 0
    for linear in topology.linears():
        weight = f"{linear.name}.weight"
        factors = [packed[key] for key in (f"{linear.name}.{suffix}" for suffix in SUFFIXES) if key in packed]
        dense += shards.stored_bytes(weight)
        compressed += sum(factors) if factors else shards.bytes_of(weight)
    weights = topology.linear_parameters
    return 8 * compressed / weights, 8 * dense / weights
