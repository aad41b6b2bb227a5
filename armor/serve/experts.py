"""Packed experts in vLLM: each is a module of its own, and no expert is made dense.

vLLM has all experts of a layer in one `RoutedExperts`, and a router that says which of them a token goes to. Here that
holds the same `Experts` as in transformers (`armor.runtime.experts`), with what this rank needs of each expert's
linears. Tensors of a checkpoint come through parameters without numbers that vLLM finds by name, and their loaders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]  it has its own environment
from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]  the same
from vllm.model_executor.layers.fused_moe.activation import (  # pyright: ignore[reportMissingImports]  its environment
    MoEActivation,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (  # pyright: ignore[reportMissingImports]
    FusedMoEMethodBase,
)

from armor.core.errors import ArmorError
from armor.format.checkpoint import PackedLinear
from armor.runtime.experts import Expert, Experts
from armor.runtime.linear import ArmorLinear, know_each_other
from armor.serve.check import Refused
from armor.serve.cut import Piece, cut
from armor.serve.tensors import LIBRARY, PAIR, SCALES, SUFFIXES, parameter, view

__all__ = ["ArmorExpertsMethod"]

ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
}
INSTEAD = "serve the checkpoint with transformers, or multiply it out with armor export"
ORDER = ("w1", "w3", "w2")
"""vLLM's names of an expert's gate, up and down projection."""


class _Between(nn.Module):
    """What lies between the linears of an expert, as `Experts` asks for it."""

    def __init__(self, activation: MoEActivation) -> None:
        super().__init__()
        self.act_fn = ACTIVATIONS[activation]


class ArmorExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer of vLLM; `modules` has the layouts of the compressed linears by vLLM's names."""

    def __init__(self, layer: Any, modules: dict[str, PackedLinear]) -> None:
        super().__init__(layer.moe_config)
        leaves = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        self.leaves: dict[str, str] = dict(zip(ORDER, leaves, strict=True))
        self.names = {
            (expert, shard): f"{layer.layer_name}.{expert}.{leaf}"
            for expert in range(layer.moe_config.num_experts)
            for shard, leaf in self.leaves.items()
        }
        own = {name for name in modules if name.startswith(f"{layer.layer_name}.")}
        if strange := sorted(own - {*self.names.values()}):
            raise Refused(f"{strange[0]}: compressed, but vLLM calls the experts of this model otherwise; {INSTEAD}")
        if why_not := _why_not(layer):
            raise Refused(f"{min(own)}: compressed, and vLLM is asked for {why_not}; {INSTEAD}")
        self.layouts = {key: modules.get(name) for key, name in self.names.items()}
        self.pieces: dict[tuple[int, str], Piece] = {}
        self.awaited: set[tuple[int, str, str]] = set()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        ranks, rank, width = self.moe.tp_size, self.moe.tp_rank, intermediate_size_per_partition
        own, hidden = range(rank * width, (rank + 1) * width), range(hidden_size)
        experts = []
        for expert in range(num_experts):
            linears = {}
            for shard in ORDER:
                rows, columns = (hidden, own) if shard == "w2" else (own, hidden)
                whole = (hidden_size, width * ranks) if shard == "w2" else (width * ranks, hidden_size)
                linears[self.leaves[shard]] = self._linear((expert, shard), rows, columns, whole, params_dtype)
            experts.append(Expert(linears))
        layer.packed = Experts(_Between(layer.activation), experts, is_stored_fused=False)
        know_each_other(layer.packed)
        get_current_vllm_config().compilation_config.static_forward_context[self._place(layer)] = layer
        for part in ("w13", "w2"):
            for suffix in (*SUFFIXES, *SCALES, *PAIR, "weight"):
                entrance = parameter((0,), torch.uint8 if suffix == "core_mask" else params_dtype)
                entrance.weight_loader = self._loader(layer, suffix)  # pyright: ignore[reportAttributeAccessIssue]
                layer.register_parameter(f"{part}_{suffix}", entrance)

    def _linear(
        self, key: tuple[int, str], rows: range, columns: range, whole: tuple[int, int], dtype: torch.dtype
    ) -> nn.Linear:
        """What this rank has of a linear, its tensors empty."""
        name, layout = self.names[key], self.layouts[key]
        if layout and (layout.out_features, layout.in_features) != whole:
            raise Refused(
                f"config.json: quantization_config: {name}: shape {(layout.out_features, layout.in_features)}, "
                f"{whole} in vLLM; was config.json edited?"
            )
        try:
            piece = self.pieces[key] = cut(name, layout, (rows,), columns, self.moe.tp_size)
        except ArmorError as error:
            raise Refused(str(error)) from None
        self.awaited |= {(*key, suffix) for suffix in piece.shapes()}
        if piece.packed is None:
            empty = nn.Linear(len(columns), len(rows), bias=False, device="meta", dtype=dtype)  # draws no numbers
            return empty.to_empty(device=torch.get_default_device()).requires_grad_(False)
        return ArmorLinear(piece.packed, dtype=dtype)

    def _loader(self, layer: Any, suffix: str) -> Callable[..., bool]:
        """What takes `suffix` of the linears on disk."""

        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            """Take what this rank needs of the tensor of one expert's gate, up or down projection."""
            if not (suffix == "weight" and loaded_weight.dtype == torch.uint8):  # the tombstone
                linear = layer.packed.get_submodule(f"{expert_id}.{self.leaves[shard_id]}")
                own, found = getattr(linear, suffix), self.pieces[expert_id, shard_id].take(suffix, loaded_weight)
                if own.is_meta:  # what is written there now vLLM would drop
                    raise Refused(
                        f"{self.names[expert_id, shard_id]}: compressed experts cannot be loaded anew in place"
                    )
                assert found.shape == own.shape, (suffix, found.shape, own.shape)
                if not view(own, found):
                    own.data.copy_(found)
                self.awaited.discard((expert_id, shard_id, suffix))
            return True

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.awaited:
            expert, shard, suffix = min(self.awaited)
            raise Refused(f"{self.names[expert, shard]}.{suffix}: not loaded; assemble or copy the checkpoint again")

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """For vLLM's own kernels, which are not called."""

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **shared: Any) -> Tensor:
        """x (tokens, hidden) -> (tokens, hidden), the outputs of each token's experts times its weights, summed."""
        if x.device.type == "cpu" and torch.compiler.is_compiling():
            return torch.ops.armor.vllm_experts(x, topk_weights, topk_ids, self._place(layer))
        return layer.packed(x, topk_ids, topk_weights)

    @staticmethod
    def _place(layer: Any) -> str:
        """Where vLLM keeps the layer for the calls of compiled code."""
        return f"{layer.layer_name}.packed"


def _by_name(x: Tensor, weights: Tensor, experts: Tensor, prefix: str) -> Tensor:
    return get_forward_context().no_compile_layers[prefix].packed(x, experts, weights)


LIBRARY.define("vllm_experts(Tensor x, Tensor weights, Tensor experts, str prefix) -> Tensor")
LIBRARY.impl("vllm_experts", _by_name, "CPU")
torch.library.register_fake("armor::vllm_experts", lambda x, *_: torch.empty_like(x), lib=LIBRARY)


def _why_not(layer: Any) -> str | None:
    """What is asked of experts that packed ones have not."""
    moe = layer.moe_config
    if moe.use_ep:
        return "expert parallelism"
    if moe.is_lora_enabled:
        return "adapters (--enable-lora)"
    if get_current_vllm_config().compilation_config.cudagraph_mode.name != "NONE":
        return "CUDA graphs, which cannot hold what the host decides (start with --enforce-eager)"
    if moe.has_bias:
        return "experts with a bias"
    if layer.activation not in ACTIVATIONS or any((layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)):
        return f"the activation {layer.activation.value}"
    return "the router's weights on the input of experts" if layer.apply_router_weight_on_input else None
