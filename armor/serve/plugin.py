"""The plugin by which vLLM runs packed checkpoints: a quantization method named "armor", found by its entry point.

vLLM fuses linears that share an input: q, k and v, gate and up. Each of them may have blocks of its own, so a fused
linear is a list of parts here, one for each linear on disk, with the tensors that this rank needs of it
(`armor.serve.cut`). Linears that are one on disk, such as Phi-3's, are one part. On a CPU the tensors are views of the
mapped files where nothing is converted, embeddings too. No dense weight is made, while loading neither.

`armor.serve.register` imports this module in each of vLLM's processes; nothing else does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]  it has its own environment
from vllm.forward_context import get_forward_context  # pyright: ignore[reportMissingImports]  the same
from vllm.model_executor.layers.fused_moe.routed_experts import (  # pyright: ignore[reportMissingImports]  the same
    RoutedExperts,
)
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]  it has its own environment
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]  the same
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]  the same
    QuantizationConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]  the same
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import set_weight_attrs  # pyright: ignore[reportMissingImports]  the same

from armor.core.errors import ArmorError
from armor.core.factorization import owner
from armor.format.checkpoint import QUANT_METHOD, PackedLinear, modules_of
from armor.runtime import boxed, cpu, cuda
from armor.runtime.library import PARTS
from armor.runtime.operator import Operands
from armor.runtime.product import gathered, multiply, supports
from armor.serve.check import Refused, check
from armor.serve.cut import Piece, cut
from armor.serve.experts import ArmorExpertsMethod
from armor.serve.tensors import LIBRARY, PAIR, SCALES, SUFFIXES, parameter, view

__all__ = ["ArmorConfig", "ArmorLinearMethod", "EmbeddingMethod", "Refused"]

SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the linears in a fused q, k, v; others have numbers


@register_quantization_config(QUANT_METHOD)
class ArmorConfig(QuantizationConfig):
    """The compressed linears of a checkpoint by vLLM's names, which are the checkpoint's but for prefixes."""

    def __init__(self, modules: dict[str, PackedLinear]) -> None:
        super().__init__()
        self.modules = modules

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ArmorConfig:
        try:
            modules = modules_of(config)
        except ArmorError as error:
            raise Refused(str(error)) from None
        return cls(modules)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """vLLM calls this once, before any other process starts: the time to look at the checkpoint's files."""
        try:
            check(model_name, "vLLM")
        except ArmorError as error:
            raise Refused(str(error)) from None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | ArmorExpertsMethod | None:
        if isinstance(layer, RoutedExperts):
            of_layer = any(name.startswith(f"{prefix}.") for name in self.modules)
            return ArmorExpertsMethod(layer, self.modules) if of_layer else None
        if not isinstance(layer, LinearBase):
            if found := next((name for name in self.modules if name == prefix or name.startswith(f"{prefix}.")), None):
                raise Refused(
                    f"{found}: compressed, but in vLLM part of a {type(layer).__name__}, which takes dense weights "
                    "alone; multiply the checkpoint out with armor export and serve that"
                )
            return EmbeddingMethod() if isinstance(layer, VocabParallelEmbedding) else None
        if names := self._names(prefix):
            return ArmorLinearMethod({name: self.modules.get(name) for name in names})
        return UnquantizedLinearMethod()

    def _names(self, prefix: str) -> list[str]:
        """The linears on disk that `prefix` is made of, if any of them is compressed."""
        *parents, leaf = prefix.split(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        for path in (parents, parents[1:]):  # without the base model's own name, as GPT-2 was published
            for leaves in ([leaf], parts):
                names = [".".join((*path, part)) for part in leaves]
                if any(name in self.modules for name in names):
                    return names
        return []


class ArmorLinearMethod(LinearMethodBase):
    """One linear of vLLM, made of the linears on disk that `layouts` names; a dense one has None."""

    def __init__(self, layouts: dict[str, PackedLinear | None]) -> None:
        self.layouts = layouts
        self.parts: list[Piece] = []
        self.awaited: set[tuple[int, str]] = set()
        # By x's dtype, and with a bias or not.
        self.joined: dict[tuple[torch.dtype, bool], cpu.Joined | cuda.Joined | None] = {}

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        try:
            self.parts = self._parts(layer, input_size_per_partition, output_partition_sizes)
        except ArmorError as error:
            raise Refused(str(error)) from None
        layer.armor_table = None
        config = get_current_vllm_config()
        config.compilation_config.static_forward_context[layer.prefix] = layer
        if isinstance(config.additional_config, dict):
            # What `apply` compiles depends on these, so vLLM's cache of compiled models must tell them apart.
            config.additional_config["armor"] = {"boxed": boxed.available(), "tiles": cpu.has_tiles()}
        for index, part in enumerate(self.parts):
            whole = part.packed.dtypes() if part.packed else {}
            for suffix, shape in part.shapes().items():
                dtype = getattr(torch, whole[suffix]) if suffix in whole else params_dtype
                layer.register_parameter(f"{suffix}_{index}", parameter(shape, dtype))
                self.awaited.add((index, suffix))
        # Tensors of a checkpoint find their way by name: to one of these, which has no numbers but a loader.
        for suffix in (*SUFFIXES, *SCALES, *PAIR, "weight"):
            entrance = parameter((0,), torch.uint8 if suffix == "core_mask" else params_dtype)
            set_weight_attrs(entrance, {"weight_loader": self._loader(layer, suffix)})
            layer.register_parameter(suffix, entrance)

    def _parts(self, layer: Any, columns: int, sizes: list[int]) -> list[Piece]:
        """What this rank has of each linear on disk; `columns`, `sizes`: its input and output channels."""
        rank, ranks, totals = layer.tp_rank, layer.tp_size, _output_sizes(layer)
        first = rank * columns if columns < layer.input_size else 0
        offset, ranges = 0, []
        for size, total in zip(sizes, totals, strict=True):
            pieces = total // size
            start = offset + rank * pieces // ranks * size  # ranks may share a piece: heads of k and v
            ranges.append(range(start, start + size))
            offset += total
        if len(self.layouts) == 1:
            wholes, rows = [sum(totals)], [tuple(ranges)]
        else:
            wholes = totals
            starts = [sum(totals[:index]) for index in range(len(totals))]
            rows = [(range(r.start - start, r.stop - start),) for r, start in zip(ranges, starts, strict=True)]
        if len(rows) != len(self.layouts):
            raise ArmorError(f"{layer.prefix}: {len(rows)} linears in vLLM, {len(self.layouts)} in config.json")
        parts = []
        for (name, layout), whole, some in zip(self.layouts.items(), wholes, rows, strict=True):
            if layout and (layout.out_features, layout.in_features) != (whole, layer.input_size):
                raise ArmorError(
                    f"config.json: quantization_config: {name}: shape {(layout.out_features, layout.in_features)}, "
                    f"{(whole, layer.input_size)} in vLLM; was config.json edited?"
                )
            parts.append(cut(name, layout, some, range(first, first + columns), ranks))
            if layout and (holder := owner(name, "right", layout.right_of)) not in self.layouts:
                raise ArmorError(
                    f"{name}: shares the B of {holder}, which is another linear in vLLM; multiply the checkpoint out "
                    "with armor export and serve that"
                )
        return parts

    def _loader(self, layer: Any, suffix: str) -> Callable[..., None]:
        """What takes `suffix` of the linears on disk. A function, for vLLM asks its name when it loads weights anew."""

        def load(_: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
            """Take what this rank needs of the tensor `loaded`; `shard` says of which linear, where there are
            several."""
            if suffix == "weight" and loaded.dtype == torch.uint8:
                return  # the tombstone
            index = SHARDS[shard] if isinstance(shard, str) else shard or 0
            found, own = self.parts[index].take(suffix, loaded), getattr(layer, f"{suffix}_{index}")
            assert found.shape == own.shape, (suffix, found.shape, own.shape)
            # Copied where the table of a compiled model has the address already.
            if layer.armor_table is not None or not view(own, found):
                own.data.copy_(found)
            self.awaited.discard((index, suffix))

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.awaited:
            index, suffix = min(self.awaited)
            name = list(self.layouts)[index]
            raise Refused(f"{name}.{suffix}: not loaded; assemble or copy the checkpoint again")
        self.joined.clear()  # of the weights before, where they are loaded anew
        if layer.armor_table is None and boxed.available():
            layer.armor_table = self._table(layer)

    def _table(self, layer: Any) -> Tensor | None:
        """What `boxed.linears` takes, by which a compiled model multiplies without Python.

        None where the CPU's kernel does not take every part. Weights loaded anew are copied to where these are, by the
        loader or by vLLM. So the table is made once, and is no buffer, which vLLM would copy too.
        """
        columns = len(self.parts[0].columns)
        x = torch.empty(1, columns, dtype=layer.params_dtype, device="cpu")
        own = self._operands(layer, x, layer.bias)
        return None if own is None or len(own) > PARTS else boxed.table(own, columns, x.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out), the outputs of the parts side by side; by one call where the kernels take all."""
        if x.device.type in ("cpu", "cuda") and torch.compiler.is_compiling():
            out = sum(part.out_features for part in self.parts)
            if layer.armor_table is not None and x.dtype == layer.params_dtype and not cpu.has_tiles():
                return boxed.linears(x.contiguous(), layer.armor_table, bias is not None, out)
            return torch.ops.armor.vllm_linear(x, bias, layer.prefix, out)
        return self.multiply(layer, x, bias)

    def multiply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `apply` returns, computed at once."""
        key = x.dtype, bias is not None
        if key not in self.joined:
            self.joined[key] = self._join(layer, x, bias)
        if joined := self.joined[key]:
            return joined(x)
        outputs = []
        for index, (part, own) in enumerate(zip(self.parts, self._tensors(layer, bias), strict=True)):
            layout = part.packed
            if layout is None:
                outputs.append(F.linear(x, getattr(layer, f"weight_{index}"), own[4]))
            else:
                y = multiply(layout, x, *own)
                if layout.rank:
                    down, up = (getattr(layer, f"{suffix}_{index}") for suffix in PAIR)
                    y = y + F.linear(F.linear(x, down), up)
                outputs.append(y)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _join(self, layer: Any, x: Tensor, bias: Tensor | None) -> cpu.Joined | cuda.Joined | None:
        """All parts as one call on what is like x; None where the kernels of its device do not take each of them."""
        if (operands := self._operands(layer, x, bias)) is None:
            return None
        return (cuda if x.device.type == "cuda" else cpu).Joined(operands, x.shape[-1])

    def _operands(self, layer: Any, x: Tensor, bias: Tensor | None) -> list[Operands] | None:
        """Those of all parts; None where the kernels of x's device do not take each of them."""
        operands = []
        for part, own in zip(self.parts, self._tensors(layer, bias), strict=True):
            layout = part.packed
            found = None if layout is None or layout.rank else gathered(layout, *own)
            if layout is None or found is None or not supports(layout, x, found):
                return None
            operands.append(found)
        return operands

    def _tensors(self, layer: Any, bias: Tensor | None) -> list[list[Any]]:
        """What `armor.runtime.linear.multiply` takes of each part, behind x."""
        sizes = [part.out_features for part in self.parts]
        biases = [None] * len(sizes) if bias is None else bias.split(sizes)
        return [
            [*(self._tensor(layer, suffix, index) for suffix in SUFFIXES), own]
            + [self._tensor(layer, suffix, index) for suffix in SCALES]
            for index, own in enumerate(biases)
        ]

    def _tensor(self, layer: Any, suffix: str, index: int) -> Tensor | None:
        """`suffix` of the part `index`; a B that it shares is another part's."""
        part, names = self.parts[index], list(self.layouts)
        if part.layout and part.layout.right_of:
            index = names.index(owner(names[index], suffix, part.layout.right_of))
        return getattr(layer, f"{suffix}_{index}", None)


def _by_name(x: Tensor, bias: Tensor | None, prefix: str, out: int) -> Tensor:
    layer = get_forward_context().no_compile_layers[prefix]
    return layer.quant_method.multiply(layer, x, bias)


# A linear as torch.compile sees it: one call, with the layer's name for its tensors. torch.library.custom_op, or lists
# of tensors, would cost more than a small linear takes (docs/TRIED.md).
LIBRARY.define("vllm_linear(Tensor x, Tensor? bias, str prefix, int out) -> Tensor")
for key in ("CPU", "CUDA"):
    LIBRARY.impl("vllm_linear", _by_name, key)
torch.library.register_fake(
    "armor::vllm_linear", lambda x, bias, prefix, out: x.new_empty(*x.shape[:-1], out), lib=LIBRARY
)


class EmbeddingMethod(UnquantizedEmbeddingMethod):
    """A dense embedding or head, on a CPU a view of the mapped file.

    vLLM copies both, and packs both for its products once more. Here an embedding is packed when it is first multiplied
    with, as that of Gemma 2, which is its head too; most never are.
    """

    def create_weights(self, layer: Any, *sizes: Any, weight_loader: Callable[..., None], **others: Any) -> None:
        def load(param: Tensor, loaded: Tensor) -> None:  # vLLM calls the first so when it loads weights anew
            own = layer.shard_indices
            if not view(param, loaded[own.org_vocab_start_index : own.org_vocab_end_index]):
                weight_loader(param, loaded)

        super().create_weights(layer, *sizes, weight_loader=load, **others)

    def process_weights_after_loading(self, layer: Any) -> None:
        vars(layer).pop("cpu_linear", None)  # of the weights before, where they are loaded anew
        if isinstance(layer, ParallelLMHead):
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.device.type == "cpu" and "cpu_linear" not in vars(layer):
            super().process_weights_after_loading(layer)
        return super().apply(layer, x, bias)


def _output_sizes(layer: Any) -> list[int]:
    """The output channels of the linears that `layer` is made of, on all ranks together."""
    if isinstance(layer, QKVParallelLinear):  # its own list counts heads twice that ranks share
        heads = layer.total_num_kv_heads
        return [layer.total_num_heads * layer.head_size, heads * layer.head_size, heads * layer.v_head_size]
    return list(getattr(layer, "output_sizes", [layer.output_size]))
