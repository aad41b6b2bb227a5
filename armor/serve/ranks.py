"""Which blocks the ranks of a tensor-parallel group would cut, told from a checkpoint's layouts before vLLM starts.

transformers has a plan for most families (`base_model_tp_plan`): which linears are divided by output channels, and
which by input channels. vLLM divides the same ones so, but for heads of keys and values, which ranks share where there
are fewer heads than ranks. What no plan tells, and what vLLM might divide otherwise, is passed over. The plugin refuses
that within vLLM (`armor.serve.plugin`).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedConfig

from armor.format.checkpoint import PackedLinear
from armor.serve.cut import cut

__all__ = ["check_ranks", "ranks_asked"]

BY_OUTPUT, BY_INPUT = "colwise", "rowwise"
"""How styles of a plan begin."""
EXPERTS: dict[str, str] = {leaf: BY_OUTPUT for leaf in ("gate_proj", "up_proj", "w1", "w3")}
EXPERTS |= {leaf: BY_INPUT for leaf in ("down_proj", "w2")}
"""How the linears of an expert are divided, where a plan divides experts."""
OF_EXPERT = re.compile(r"\.experts\.\d+\.\w+$")
FUSED = ("phi3", "glm4")
"""The families whose linears that are one on disk are several to vLLM. Others it divides as they lie on disk."""


class _Heads(NamedTuple):
    """What all layers of a model have in their attention."""

    queries: int
    keys: int
    size: int
    """Channels of each."""


def ranks_asked(options: Sequence[str]) -> int:
    """The tensor parallel size among vLLM's `options`; 1 where they say none, nonsense, or name an implementation."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "--tensor_parallel_size", "-tp", dest="ranks", type=int, default=1)
    parser.add_argument("--model-impl", "--model_impl", dest="made_by", default="auto")
    try:
        found, _ = parser.parse_known_args(list(options))
    except argparse.ArgumentError:  # vLLM will say it
        return 1
    return found.ranks if found.made_by == "auto" else 1


def check_ranks(config: PreTrainedConfig, linears: Mapping[str, PackedLinear], ranks: int) -> None:
    """Raises ArmorError for the first of `linears` of which one of `ranks` ranks would cut a block.

    `config` is that of the whole model. Nothing is raised where it has no plan, and where vLLM itself cannot divide the
    model over so many ranks.
    """
    config = config.get_text_config()
    queries, plan = getattr(config, "num_attention_heads", None), config.base_model_tp_plan or {}
    if ranks < 2 or not isinstance(queries, int) or queries % ranks:
        return
    seen = set()
    for name, layout in linears.items():
        leaf = name.rpartition(".")[2]
        kind = leaf, _style(name, leaf, plan), layout
        if kind not in seen:
            seen.add(kind)
            for rows, columns in _pieces(*kind, config, ranks):
                cut(name, layout, rows, columns, ranks)


def _style(name: str, leaf: str, plan: Mapping[str, str]) -> str:
    """How the plan divides linear `name`, "" where it does not tell."""
    if OF_EXPERT.search(name):
        return EXPERTS.get(leaf, "") if any(key.endswith(".experts") for key in plan) else ""
    for key, style in plan.items():
        if re.search(rf"(^|\.){re.escape(key).replace(re.escape('*'), '[0-9]+')}$", name):
            return style
    return ""


def _pieces(
    leaf: str, style: str, layout: PackedLinear, config: PreTrainedConfig, ranks: int
) -> Iterator[tuple[tuple[range, ...], range]]:
    """The output and the input channels of every rank; none where it is not certain."""
    out, columns = layout.out_features, layout.in_features
    if style.startswith(BY_INPUT) and leaf in ("o_proj", "down_proj", "w2") and columns % ranks == 0:
        for rank in range(ranks):
            yield (range(out),), range(rank * columns // ranks, (rank + 1) * columns // ranks)
    parts = _parts(leaf, out, config, ranks) if style.startswith(BY_OUTPUT) else []
    if parts and not any(size % pieces or ranks % pieces for size, pieces in parts):
        for rank in range(ranks):
            rows, offset = [], 0
            for size, pieces in parts:
                own = offset + rank * pieces // ranks * (size // pieces)
                rows.append(range(own, own + size // pieces))
                offset += size
            yield tuple(rows), range(columns)


def _parts(leaf: str, out: int, config: PreTrainedConfig, ranks: int) -> list[tuple[int, int]]:
    """The linears that vLLM makes of the one on disk: the output channels of each, and into how many pieces it cuts
    them. None where it is not certain."""
    if leaf in ("q_proj", "gate_proj", "up_proj", "w1", "w3"):
        return [(out, ranks)]
    if leaf == "gate_up_proj" and config.model_type in FUSED:
        return [(out // 2, ranks)] * 2
    if (heads := _heads(config)) is not None:
        keys = heads.keys * heads.size, min(ranks, heads.keys)  # more ranks share heads
        queries = heads.queries * heads.size, ranks
        if leaf in ("k_proj", "v_proj") and out == keys[0]:
            return [keys]
        if leaf == "qkv_proj" and config.model_type in FUSED and out == queries[0] + 2 * keys[0]:
            return [queries, keys, keys]
    return []


def _heads(config: PreTrainedConfig) -> _Heads | None:
    """The heads of every layer; None where layers may differ."""
    if getattr(config, "is_heterogeneous", False):
        return None
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    others = [value for key, value in vars(config).items() if "key_value_heads" in key and value is not None]
    if not isinstance(keys, int) or any(value != keys for value in others):
        return None
    return _Heads(queries, keys, getattr(config, "head_dim", None) or config.hidden_size // queries)
