"""The model card of a checkpoint, README.md with the YAML that the Hub reads, from what the layers' records say.

Of the place and the time it was made in it names only model and recipe, as the run calls them. So the same factors give
the same bytes. What the source says of itself, its name on the Hub, its licence, its language, is passed on, and
nothing is guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from tabulate import tabulate

from armor.core.pattern import DENSE
from armor.execution.log import log
from armor.format.names import MODEL
from armor.format.provenance import ranges
from armor.format.records.checkpoint import FactorsMadeBy, ProvenanceRecord
from armor.format.records.layer import LayerRecord
from armor.format.trained import trained

__all__ = ["Sizes", "card", "origins"]

PASSED_ON = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Sizes:
    """Bytes of all tensors, packed and in the source; bits per weight of the decoder layers' linears, likewise.

    `compressed_share` is the share of the decoder layers' weights that is compressed.
    """

    bytes: int
    dense_bytes: int
    bits_per_weight: float
    dense_bits_per_weight: float
    compressed_share: float


def origins(records: Iterable[LayerRecord]) -> tuple[FactorsMadeBy, ...]:
    """What made the layers that `records` describe: settings, code, versions, and which layers share them."""
    found: list[FactorsMadeBy] = []
    for record in records:
        made = record.factorized or record.made_by
        own = FactorsMadeBy(
            layers=(record.layer,), settings=made.settings, code=made.code, versions=record.machine.versions
        )
        same = next((i for i, known in enumerate(found) if known.replace(layers=own.layers) == own), None)
        if same is None:
            found.append(own)
        else:
            found[same] = own.replace(layers=found[same].layers + own.layers)
    return tuple(found)


def card(
    folder: Path,
    source: Path,
    hub: str | None,
    model_type: str,
    records: list[LayerRecord],
    made: ProvenanceRecord,
    sizes: Sizes,
) -> str:
    """The text of README.md.

    `folder` is the checkpoint's, `source` the model's and `hub` its name there, if it has one; `records` are the
    layers', `made` the checkpoint's provenance.
    """
    from transformers import AutoConfig

    from armor.runtime.auto import auto_class

    auto = auto_class(AutoConfig.from_pretrained(source)).__name__
    rows: dict[tuple, list[float]] = {}
    for record in records:
        for entry in record.modules.values():
            blocks = entry.block_sizes
            names = f"{blocks.left} / {blocks.right}" if blocks else f"rank {entry.rank}" if entry.rank else "none"
            rows.setdefault((entry.method, entry.pattern or "none", names), []).append(entry.loss)
    losses = [loss for found in rows.values() for loss in found]
    patterns = sorted({pattern for _, pattern, _ in rows} - {"none"})
    data = ModelCardData(
        **_said_by(source),
        base_model=hub,
        base_model_relation=hub and "quantized",
        library_name="transformers",
        pipeline_tag="text-generation" if auto.endswith("ForCausalLM") else "image-text-to-text",
        tags=["armor", "sparse", *patterns],
    )
    table = tabulate(
        [(*kind, len(found), f"{sum(found) / len(found):.5f}") for kind, found in sorted(rows.items())],
        ("method", "pattern", "block sizes, left / right, or rank", "linears", "mean relative loss"),
        tablefmt="github",
        disable_numparse=True,
    )
    versions = {", ".join(f"{k} {v}" for k, v in sorted(part.versions.items())): None for part in made.factors}
    text = CARD.format(
        title=_title(folder) or hub or f"A {model_type} model",
        folder=folder.name,
        auto=auto,
        origin=f"[{hub}](https://huggingface.co/{hub})" if hub else f"a {model_type} model",
        table=table,
        loss=f"{sum(losses) / len(losses):.5f}" if losses else "0",
        size=f"{sizes.bytes / 1e6:,.1f}",
        dense_size=f"{sizes.dense_bytes / 1e6:,.1f}",
        share=f"{sizes.bytes / sizes.dense_bytes:.0%}",
        bits=f"{sizes.bits_per_weight:.3f}",
        dense_bits=f"{sizes.dense_bits_per_weight:.3f}",
        compressed=f"{sizes.compressed_share:.1%}",
        instead=_instead(sizes.bits_per_weight) if {*patterns} - {str(DENSE)} else "",
        recipe="\n".join(_recipe(part) for part in made.factors),
        integers=_integers(records),
        training="".join(f"{text}\n\n" for text in trained(records)),
        fingerprint=made.fingerprint,
        calibration=made.statistics_fingerprint,
        code=", ".join(dict.fromkeys(part.code for part in made.factors)),
        versions="; ".join(versions),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _title(folder: Path) -> str | None:
    """Model and recipe of a checkpoint in a run's results, in MODEL/RECIPE; None for one that lies elsewhere."""
    recipe = folder.absolute().parent
    model = recipe.parent
    return f"{model.name}, recipe {recipe.name}" if (model / MODEL).is_file() else None


def _said_by(source: Path) -> dict:
    """Licence and language as the source's own card has them."""
    if not (source / "README.md").is_file():
        return {}
    try:
        data = ModelCard.load(source / "README.md").data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        log.warning("%s: not read: %s", source / "README.md", " ".join(str(error).split()))
        return {}
    return {key: data[key] for key in PASSED_ON if data.get(key)}


def _instead(bits: float) -> str:
    """What one could take in the place of so many bits per weight."""
    sizes = {"int8": 8.0, "int4 (GPTQ, groups of 128)": 4 + 16 / 128}
    larger = [name for name, size in sizes.items() if bits > size]
    if len(larger) == len(sizes):
        found = "This checkpoint takes more bits than both, so size is no reason to take it"
    elif larger:
        found = "This checkpoint takes fewer bits than the first and more than the second"
    else:
        found = "This checkpoint takes fewer bits than both"
    told = " and ".join(f"{size:.1f} bits as {name}" for name, size in sizes.items())
    return (
        f"Without pruning a weight takes about {told}. int8 as a rule loses next to nothing. {found}. What each "
        "of them loses, and how fast it decodes, is in the report of a run that has these recipes too.\n\n"
    )


def _integers(records: list[LayerRecord]) -> str:
    """What the numbers are that are no floats, a paragraph for each kind."""
    kinds: Counter[str] = Counter()
    for linear in (linear for record in records for linear in record.modules.values()):
        if own := linear.quantization:
            sides = f"; A and B as {own.blocks}, a scale for each row" if linear.block_sizes and own.blocks else ""
            kinds[f"S as {own.core}, a scale for {own.group} columns of a row{sides}"] += 1
    return "".join(f"Quantized in {count} linears: {kind}.\n\n" for kind, count in kinds.most_common())


def _recipe(part: FactorsMadeBy) -> str:
    settings = yaml.safe_dump(part.settings, sort_keys=True).rstrip()
    return f"Layers {ranges(part.layers)}:\n\n```yaml\n{settings}\n```\n"


CARD = """# {title}: packed sparse linears (ARMOR)

Made from {origin} by ARMOR Pipeline. Each weight matrix W of the decoder layers is stored as A·S·B: a sparse core S
between two block-diagonal matrices (arXiv 2510.05528); or as S + U·V, a core and a pair of low rank; or as S alone
where it was only pruned. All tensors take {size} MB, {share} of the source's {dense_size} MB.

## Load it

```python
import armor.hf  # from ARMOR Pipeline (pip install .); teaches transformers this format
from transformers import {auto}, AutoTokenizer

folder = "{folder}"  # this folder, seen from the one it is in
model = {auto}.from_pretrained(folder, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(folder)
```

Without `import armor.hf` loading stops with a shape error: that is on purpose. `armor verify FOLDER` checks every file,
`armor explain FOLDER` says what made it.

## What was done

{table}

The loss is the share of the calibration-weighted norm of W that is lost, {loss} in the mean over all of these. Packed,
the linears of the decoder layers take {bits} bits per weight, {dense_bits} in the source. Of the decoder layers'
weights, {compressed} are compressed.

{instead}{integers}{recipe}
{training}| made from | |
|---|---|
| source, its fingerprint | `{fingerprint}` |
| calibration, its fingerprint | `{calibration}` |
| code of factorization | `{code}` |
| versions | {versions} |
"""
