"""Teaches transformers to read and write ARMOR checkpoints: `import armor.hf`, then `from_pretrained` as ever.

transformers finds a quantizer by the `quant_method` in config.json. It lets it swap modules while the model is still on
the meta device, and then loads tensors by name. The swapped linears' names are the checkpoint's, so shards, offloading
and saving work as for any model. What it does not do is refuse: a missing tensor becomes random numbers and a warning,
an extra one a warning, a broken mask nothing at all. So the files are checked here before they are loaded, and the
names that transformers could not match after; each defect is one ArmorError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from armor.core.errors import ArmorError
from armor.core.factorization import Factorization, owner
from armor.format.checkpoint import (
    QUANT_METHOD,
    PackedLinear,
    check_headers,
    modules_of,
    quantization_config,
    tombstone,
)
from armor.format.checksums import Hashing, check_contents, loaded_files, read_checksums
from armor.format.scaled import is_scaled
from armor.format.shards import INDEX, SINGLE, Shards
from armor.runtime.conv1d import Turned, conv1d
from armor.runtime.experts import Experts
from armor.runtime.fused import fused_experts, unfuse
from armor.runtime.linear import ArmorLinear, know_each_other
from armor.runtime.names import Names

__all__ = ["ArmorConfig", "ArmorQuantizer", "pack_linears", "swap_linears", "swap_skeleton"]

_HOOK = "_adjust_missing_and_unexpected_keys"


class ArmorConfig(QuantizationConfigMixin):
    """`quantization_config` of an ARMOR checkpoint (docs/FORMAT.md). Raises ArmorError for keys or values unknown."""

    def __init__(self, quant_method: str = QUANT_METHOD, **keys: Any) -> None:
        self.__dict__["quant_method"] = quant_method  # the class above knows those of transformers alone
        self.__dict__.update(keys)
        modules_of(self.__dict__)
        self.format_version: int = keys["format_version"]
        self.groups: list[dict] = keys["groups"]

    def modules(self) -> dict[str, PackedLinear]:
        """The compressed linears by name, in order."""
        return modules_of(self.to_dict())

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key: transformers asks like this when the config of a loaded model serves to load another."""
        return self.to_dict().get(key, default)


class ArmorQuantizer(HfQuantizer):
    """Puts ArmorLinear where config.json says, before the weights arrive, and checks them.

    transformers takes its time for every tensor, and there are four for each linear (docs/TRIED.md). So they are
    put in their places here where a model is loaded into the memory of the host, and hidden from it. Where the dtype
    stays they are views of the mapped file. Files are hashed meanwhile; the model is handed out when both are done.
    """

    _hashing: Hashing | None = None
    _own: Sequence[str] = ()  # weights of the first expert of every list of experts that are modules of their own
    _idle: Sequence[list[str]] = ()  # source patterns of conversions that find nothing

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ArmorError(
                "quantization_config: given for a dense model; compress it with armor, then load that folder"
            )

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The first time that transformers says where the model lies (to Auto classes); nothing to do with attention.

        An edited config.json or a broken index would make it stumble later, over something that names no file.
        """
        folder = Path(config.name_or_path or "no folder")
        if any((folder / name).is_file() for name in (INDEX, SINGLE)):
            shards = Shards(folder)
            sums = read_checksums(shards)
            Hashing(shards, sums, {*loaded_files(shards)} - {*shards.files}).wait()
            self._hashing = Hashing(shards, sums, shards.files)
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: dict[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        try:
            self._make_room(model, checkpoint_files, device_map)
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        """Read no more of a checkpoint that is refused."""
        if self._hashing is not None:
            self._hashing.stop()

    def _make_room(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None, device_map: dict[str, Any] | str | None
    ) -> None:
        """Put ArmorLinears into `model`, on the meta device, and into them what the host can hold of its files."""
        modules = self.quantization_config.modules()
        if not checkpoint_files:
            self._swap(model, modules, model.name_or_path or "no folder")
            return
        with torch.device("cpu"):  # the model is being made on the meta device
            shards = _open(checkpoint_files)
            prefix = f"{model.base_model_prefix}."
            modules = {
                _named(name, prefix, lambda n: f"{n}.core_values" in shards) or name: layout
                for name, layout in modules.items()
            }
            check_headers(shards, modules)
        self._idle = Names(model).without_work(shards.names())
        known = self._swap(model, modules, shards.place)
        renamed = shards.renamed(Names(model).here)
        _check_shapes(model, renamed)
        devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else {str(device_map or "cpu")}
        if devices == {"meta"}:  # no numbers are wanted
            return
        with torch.device("cpu"):
            sums = read_checksums(shards)
            if self._hashing is None:
                self._hashing = Hashing(shards, sums, loaded_files(shards))
            if sums is None:  # what was hashed was checked when it was written
                check_contents(shards, modules)
            if known is not None and devices == {"cpu"}:
                filled = _fill(model, renamed)  # hidden, so the loader does not know whether it lacks the prefix
                known |= filled | {name.removeprefix(prefix) for name in filled}

    def _swap(self, model: PreTrainedModel, modules: Mapping[str, PackedLinear], where: Path | str) -> set[str] | None:
        """Put ArmorLinears into `model`; the tensors that its loader must not ask a place for, None if it cannot tell.

        What is saved from the model names its modules as its tensors are named here.
        """
        known = {tombstone(modules), Names(model).here(tombstone(modules))}
        is_watched = _watch_keys(model, known, where, self._stop)
        renamed = swap_linears(model, modules)
        _keep_from_initialization(model, renamed)
        self._own = [
            f"{path}.0.{name}.weight"
            for path, module in model.named_modules()
            if isinstance(module, Experts)
            for name, _ in module.get_submodule("0").named_children()
        ]
        saved = Names(model).saved_module
        modules = {saved(name): _renamed(layout, name, saved) for name, layout in renamed.items()}
        self.quantization_config = ArmorConfig(**quantization_config(modules))
        return known if is_watched else None

    def update_weight_conversions(  # pyright: ignore[reportIncompatibleMethodOverride]  versions give more or less
        self, weight_conversions: list, *others: Any
    ) -> list:
        """transformers' conversions without those that fuse experts which are modules of their own, or find nothing.

        What splits a tensor would otherwise take the packed tensors of its parts for it: in_proj_a for in_proj.
        """
        weight_conversions = [
            entry
            for entry in weight_conversions
            if not (
                isinstance(entry, WeightConverter)
                and (entry.source_patterns in self._idle or any(entry.rename_source_key(name)[1] for name in self._own))
            )
        ]
        return super().update_weight_conversions(weight_conversions, *others)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self._hashing is not None:
            hashing, self._hashing = self._hashing, None
            hashing.wait()
        for module in model.modules():
            if isinstance(module, ArmorLinear):
                module.hide_packed = False
                for parameter in module.parameters(recurse=False):  # transformers made them trainable
                    if parameter is not module.bias:
                        parameter.requires_grad_(False)
                if not module.runs_packed:
                    module.unpack()
        return model

    def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride]  the same
        self, model: PreTrainedModel
    ) -> tuple[dict | None, dict]:
        """What save_pretrained writes: the packed tensors and the one that stops readers without armor."""
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters are saved alone
            return None, {}
        guard = tombstone(self.quantization_config.modules())
        return model.state_dict() | {guard: torch.zeros(1, dtype=torch.uint8)}, {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        own: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # of a config once saved
        for name, packed in [(n, m) for n, m in model.named_modules() if isinstance(m, ArmorLinear)]:
            weight = packed.dense_weight(own)
            with torch.device("meta"):
                linear = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.register_parameter("bias", packed.bias)
            model.set_submodule(name, conv1d(linear) if packed.of_conv1d else linear)
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  as in its other quantizers
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]  the same
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def swap_linears(model: PreTrainedModel, modules: Mapping[str, PackedLinear]) -> dict[str, PackedLinear]:
    """Replace each linear in `modules` by an empty ArmorLinear, on its device and in its dtype.

    Where experts are among them, all of the model's become modules of their own first. Returns `modules` under the
    names that `model` has for them: a name may carry the base model's prefix where `model` has none (AutoModel), or
    lack it, or be another altogether (`armor.runtime.names`). Raises ArmorError for a module that `model` does not
    have, that is not a linear, or that has another shape.
    """
    prefix, names = f"{model.base_model_prefix}.", Names(model)
    fused = tuple(f"{path}." for path in fused_experts(model))
    found: dict[str, nn.Module] = dict(model.named_modules())
    named = {name: names.module_here(name) for name in modules}
    if any(_named(name, prefix, lambda n: n.startswith(fused)) for name in named.values()):
        unfuse(model)
        found = dict(model.named_modules())
    renamed = {}
    for name, layout in modules.items():
        here = _named(named[name], prefix, found.__contains__)
        where = f"config.json: quantization_config: {name}"
        if here is None:
            raise ArmorError(f"{where}: {type(model).__name__} has no such module; was config.json edited?")
        module = found[here]
        linear = Turned(module) if isinstance(module, Conv1D) else module
        if not isinstance(linear, nn.Linear):
            raise ArmorError(f"{where}: is a {type(linear).__name__} in {type(model).__name__}, expected a Linear")
        expected, shape = (layout.out_features, layout.in_features), (linear.out_features, linear.in_features)
        if shape != expected:
            raise ArmorError(
                f"{where}: shape {shape} in {type(model).__name__}, {expected} here; was config.json edited?"
            )
        weight, layout = linear.weight, _renamed(layout, name, names.module_here)
        packed = ArmorLinear(layout, linear.bias is not None, device=weight.device, dtype=weight.dtype)
        packed.of_conv1d = isinstance(linear, Turned)
        model.set_submodule(here, packed)
        renamed[here] = layout
    know_each_other(model)
    return renamed


def _renamed(layout: PackedLinear, name: str, rename: Callable[[str], str]) -> PackedLinear:
    """The layout of module `name` where modules are renamed: the one that holds its B is, too."""
    if layout.right_of is None:
        return layout
    return replace(layout, right_of=rename(owner(name, "right", layout.right_of)).rpartition(".")[2])


def _keep_from_initialization(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Let transformers draw no random numbers for what holds a packed linear: Mamba's draw weights of their parts.

    What a checkpoint lacks of them is refused in any case. Not where a module has buffers that no checkpoint holds:
    they are computed at the same place, for what is deep inside by the model, as Falcon-H1's are.
    """
    names = list(names)
    holders = {name.rpartition(".")[0] for name in names}
    paths = {".".join(parts[:count]) for parts in (name.split(".") for name in names) for count in range(1, len(parts))}
    for path in paths:
        module = model.get_submodule(path)
        inside = [module] if path in holders else module.modules()
        if not any(inner._non_persistent_buffers_set for inner in inside):
            setattr(module, "_is_hf_initialized", True)  # noqa: B010  not known to nn.Module


def swap_skeleton(model: PreTrainedModel, shards: Shards) -> None:
    """Put empty ArmorLinears into a model without weights, and check its files as loading does. Dense: do nothing.

    `model` is as transformers makes one from the config.json of a checkpoint, `shards` are its tensors.
    """
    config = getattr(model.config, "quantization_config", None)
    if config is not None and not is_scaled(config):
        modules = modules_of(config)
        check_headers(shards, modules)
        sums = read_checksums(shards)
        Hashing(shards, sums, loaded_files(shards)).wait()
        if sums is None:
            check_contents(shards, modules)
        swap_linears(model, modules)


def pack_linears(model: PreTrainedModel, factors: Mapping[str, Factorization]) -> None:
    """Put factorizations in the place of the linears of `model` that they are of; device, dtype and bias stay.

    The model is then as one that was loaded from a checkpoint: it runs packed, and save_pretrained writes a checkpoint.
    """
    modules, saved = {}, Names(model).saved_module
    for name, found in factors.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        packed = ArmorLinear.of(found, linear.bias).to(linear.weight.device, linear.weight.dtype)
        packed.of_conv1d = isinstance(linear, Turned)
        model.set_submodule(name, packed)
        modules[saved(name)] = _renamed(packed.layout, name, saved)
    know_each_other(model)
    quantizer = ArmorQuantizer(ArmorConfig(**quantization_config(modules)), pre_quantized=True)
    told = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": QUANT_METHOD}
    for name, value in told.items():  # nn.Module's type knows of tensors and modules alone
        setattr(model, name, value)
    quantizer.postprocess_model(model)


def _named(name: str, prefix: str, there: Callable[[str], bool]) -> str | None:
    """The form of a module's name that is `there`: as it is, or with the base model's prefix taken off or put on."""
    return next((form for form in (name, name.removeprefix(prefix), prefix + name) if there(form)), None)


def _open(files: list[str]) -> Shards:
    """The shards that transformers is about to load."""
    shards = Shards(Path(files[0]).parent)
    loaded = sorted(Path(file).name for file in files)
    if loaded != sorted(shards.files):
        found, expected = (", ".join(names[:3]) for names in (loaded, shards.files))
        raise ArmorError(f"{shards.folder}: {found} would be loaded, expected {expected}; delete what is stale")
    return shards


def _fill(model: PreTrainedModel, shards: Shards) -> set[str]:
    """Give every ArmorLinear its packed tensors from `shards`, hide them, and return their names in the checkpoint."""
    prefix = f"{model.base_model_prefix}."
    places = {}
    for name, module in model.named_modules():
        if isinstance(module, ArmorLinear):
            module.hide_packed = True
            for suffix in module.layout.shapes():
                places[_named(f"{name}.{suffix}", prefix, shards.__contains__)] = module, suffix
    for file in shards.files:
        for tensor, value in shards.mapped(file):
            if tensor in places:
                module, suffix = places[tensor]
                empty = getattr(module, suffix)
                if isinstance(empty, nn.Parameter):
                    value = nn.Parameter(value.to(empty.dtype), requires_grad=False)
                setattr(module, suffix, value)
    return set(places)


def _check_shapes(model: PreTrainedModel, shards: Shards) -> None:
    """Hold the shapes of the dense tensors, and whether they are floats, against the model's. Raises ArmorError.

    A head may differ where the class is not the checkpoint's own, as in `_watch_keys`.
    """
    prefix = f"{model.base_model_prefix}."
    is_base, same_class = _kind(model)
    expected = model.state_dict()
    for name in shards.names():
        here = _named(name, prefix, expected.__contains__)
        if here is None or not (same_class or is_base or here.startswith(prefix)):
            continue
        where = shards.where(name)
        shape = tuple(expected[here].shape)
        if shards.shape(name) != shape:
            raise ArmorError(f"{where}: shape {shards.shape(name)}, {shape} in {type(model).__name__}; was it edited?")
        if expected[here].is_floating_point() != ("float" in shards.dtype(name)):
            raise ArmorError(
                f"{where}: dtype {shards.dtype(name)}, {expected[here].dtype} in {type(model).__name__}; was it edited?"
            )


def _kind(model: PreTrainedModel) -> tuple[bool, bool]:
    """Whether `model` is a base model, without a head; whether it is of the class that the checkpoint was made of."""
    is_base = not hasattr(model, model.base_model_prefix)
    return is_base, type(model).__name__ in (model.config.architectures or ())


def _watch_keys(model: PreTrainedModel, known: set[str], where: Path | str, stop: Callable[[], None]) -> bool:
    """Make the loader refuse what it would otherwise warn of: tensors it misses, and those but `known` it cannot place.

    `stop` is called before. A head may be missing or left over where the class is not the checkpoint's own (a
    classifier on a language model); the base model may not. transformers shows these names in one place only, a private
    method, overridden here for one load. In a release without it (False is returned) transformers warns of them as for
    any model.
    """
    adjust = getattr(model, _HOOK, None)
    if adjust is None:
        return False
    prefix = f"{model.base_model_prefix}."
    is_base, same_class = _kind(model)

    def strict(loading_info: Any) -> None:
        delattr(model, _HOOK)
        loading_info.unexpected_keys -= known
        adjust(loading_info)
        missing = {key for key in loading_info.missing_keys if same_class or is_base or key.startswith(prefix)}
        unexpected = {key for key in loading_info.unexpected_keys if same_class or key.startswith(prefix)}
        if missing or unexpected:
            stop()
        if missing:
            raise ArmorError(f"{where}: {min(missing)}: missing; assemble or copy the checkpoint again")
        if unexpected:
            raise ArmorError(f"{where}: {min(unexpected)}: {type(model).__name__} has no place for it; was it added?")

    setattr(model, _HOOK, strict)
    return True


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # registering twice, as after a reload, raises
    register_quantization_config(QUANT_METHOD)(ArmorConfig)
    register_quantizer(QUANT_METHOD)(ArmorQuantizer)
