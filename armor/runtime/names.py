"""Names of tensors in checkpoints and in transformers' model, where the two differ: by transformers' own mapping.

transformers renames what it loads and names it back when it saves (`transformers.conversion_mapping`). Records,
patterns and packed checkpoints have the names of the checkpoints on the Hub. Here one becomes the other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from armor.format.shards import Part

__all__ = ["Names"]


SPLITS: tuple[type[Chunk], ...] = (Chunk, getattr(core_model_loading, "Split", Chunk))  # vLLM has an older transformers


class Names:
    """What checkpoints and `model` call the same tensor."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.splitting = [entry for entry in self.converters if _is_split(entry)]
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        # As save_pretrained does: by what was used to load the model, else by the mapping without old spellings.
        used: Sequence[WeightTransform] | None = getattr(model, "_weight_conversions", None)
        if used is None:
            without_old = get_model_conversion_mapping(model, add_legacy=False)
            used = [entry for entry in without_old if not isinstance(entry, PrefixChange)]
        reverse = [entry.reverse_transform() for entry in used[::-1] if isinstance(entry, WeightRenaming)]
        self._reverse = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
        # A checkpoint of a base model has its names: h.0.ln_1, where the model with a head says transformer.h.0.ln_1.
        self._prefix = f"{model.base_model_prefix}."
        own, base = (dict(part.named_children()) for part in (model, model.base_model))
        self._of_base = base.keys() - own.keys()
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}

    def here(self, tensor: str) -> str:
        """The model's name of a tensor of a checkpoint."""
        renamed, same = self._based(_renamed(tensor, self._renamings)), self._based(tensor)
        # As in transformers: a name that the model has is no old spelling.
        return same if renamed not in self._shapes and same in self._shapes else renamed

    def _based(self, name: str) -> str:
        """With the prefix of the base model where it must have that."""
        return self._prefix + name if name.partition(".")[0] in self._of_base else name

    def module_here(self, module: str) -> str:
        """The model's name of a module that a checkpoint names."""
        return self.here(f"{module}.weight").removesuffix(".weight")

    def saved(self, tensor: str) -> str:
        """What a checkpoint that save_pretrained writes calls a tensor of the model."""
        return _renamed(tensor, self._reverse)

    def saved_module(self, module: str) -> str:
        """The same of a module."""
        return self.saved(f"{module}.weight").removesuffix(".weight")

    def joins(self, tensors: Collection[str]) -> dict[int, dict[str, list[str]]]:
        """The tensors of the model that a checkpoint with the `tensors`, by the names of either, has in parts.

        By the axis in which transformers joins them, like q_conv1d, k_conv1d and v_conv1d of linear attention. Experts
        are not among them.
        """
        found: dict[int, dict[str, list[str]]] = {}
        for converter in self.converters:
            if len(converter.operations) == 1 and isinstance(joining := converter.operations[0], Concatenate):
                first, *others = (pattern.replace("\\", "") for pattern in converter.source_patterns)
                target = converter.target_patterns[0].replace("\\", "")
                for name in tensors:
                    parts = [name, *(name.replace(first, other) for other in others)]
                    if first in name and all(part in tensors for part in parts):
                        found.setdefault(joining.dim, {})[name.replace(first, target)] = parts
        return found

    def splits(self, tensors: Collection[str]) -> dict[str, Part]:
        """What the model has as linears of their own in a checkpoint with the `tensors`, by the checkpoint's names.

        Like q, k and v, which are rows of one query_key_value there.
        """
        found: dict[str, Part] = {}
        for converter in self.splitting:
            found |= self._split(converter, tensors)
        return found

    def without_work(self, tensors: Collection[str]) -> list[list[str]]:
        """The source patterns of what splits a tensor, but none of `tensors`."""
        return [converter.source_patterns for converter in self.splitting if not self._split(converter, tensors)]

    def _split(self, converter: WeightConverter, tensors: Collection[str]) -> dict[str, Part]:
        found: dict[str, Part] = {}
        (source,) = converter.source_patterns
        for name in tensors:
            parts = [name.replace(source, target) for target in converter.target_patterns]
            if source in name and all(self.here(part) in self._shapes for part in parts):
                start = 0
                for part in parts:
                    rows = slice(start, start := start + self._shapes[self.here(part)][0])
                    found[part] = Part(name, None, rows, transposed=False)
        return found


def _is_split(converter: WeightConverter) -> bool:
    """Whether it makes tensors of the rows of one, and does no more."""
    (operation, *others) = converter.operations
    return not others and isinstance(operation, SPLITS) and operation.dim == 0


def _renamed(tensor: str, renamings: Sequence[WeightRenaming]) -> str:
    """A name after all renamings, in order; transformers has this as a function from 5.20 alone."""
    for renaming in renamings:
        tensor, _ = renaming.rename_source_key(tensor)
    return tensor
