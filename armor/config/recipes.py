"""Settings of how a model is compressed: a recipe, and what it comes to for one decoder layer."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import Field, model_validator

from armor.config.budget import BudgetSettings
from armor.config.common import Name
from armor.config.layers import (
    Choice,
    LayerSettings,
    ModuleSettings,
    Override,
    Sharing,
    check_patterns,
    methods_of,
    sharing_patterns,
)
from armor.config.quantization import QuantizeSettings
from armor.config.training import RefineSettings, TrainingSettings, TuneSettings
from armor.core.errors import ArmorError
from armor.methods import METHODS, UNCHANGED

__all__ = ["Recipe"]


class Recipe(ModuleSettings):
    """A way to compress a model: a method with its settings, a calibration, and exceptions.

    Or, with `base`, a way to go on from what another recipe makes, by refine, quantize, tune or several of them. They
    come in this order, so tune trains what quantize has rounded, through the rounding. refine does so with a quantized
    base.
    """

    budget: BudgetSettings | None = None
    """Choose method, pattern and block size for each linear within so many bits; unset: the same for all."""
    experts_per_job: int | None = Field(default=None, ge=1)
    """How many experts of a decoder layer one job compresses; unset: all, or as many as fit into 16 GB."""
    base: Name | None = None
    """The recipe to start from. It says how the factors are made, and this one how they are trained or rounded."""
    refine: RefineSettings | None = None
    """Train each decoder layer against the dense one; unset: don't."""
    quantize: QuantizeSettings | None = None
    """Then store the factors in few bits, as integers or fp8; unset: don't."""
    tune: TuneSettings | None = None
    """Then train the whole model against the dense one's predictions; unset: don't."""
    share_right: Sharing = False
    """Which linears of a decoder layer share one B, with blocks that fit all of them. They are fed the same tensor and
    have equal settings. true: all of one module, like q_proj, k_proj and v_proj. Lists of last parts of names, like
    [[gate_proj, up_proj]]: these alone. false: none."""
    calibration: Name | None = None
    """The calibration whose statistics serve; unset: the only one there is."""
    keep_dense: list[str] = []
    """Shell-style patterns over full module names; what matches stays as it is."""
    overrides: list[Override] = []
    """Exceptions by layer number and module pattern; later ones win."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        solvers = [self.solver, *(override.solver for override in self.overrides if override.solver)]
        if any(s.selection for s in solvers) and all(s.algorithm != "published" for s in solvers):
            raise ValueError("solver.selection: goes with algorithm: published")
        named = self.methods()
        with_blocks = [name for name, method in METHODS.items() if "block_size" in method.settings]
        for name in (name for name, method in METHODS.items() if method.own is not None and name not in named):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: goes with the method {name}, which this recipe does not name")
        if self.base is not None:
            own = [key for key in Recipe.model_fields if key not in ("base", "refine", "quantize", "tune")]
            if given := [key for key in own if getattr(self, key) != Recipe.model_fields[key].default]:
                raise ValueError(f"{given[0]}: is what the base says; leave it out, or leave base out")
            if not self.stages():
                raise ValueError(
                    "base: goes with refine, quantize or tune; without them this is the recipe that it names"
                )
        elif self.is_dense and self.stages():
            raise ValueError(f"{self.stages()[0]}: a dense recipe has no factors")
        elif self.stages() and (name := self.integers()):
            raise ValueError(
                f"{self.stages()[0]}: {name} makes integers of whole weights, which nothing trains or rounds again"
            )
        elif self.share_right and self.budget is not None:
            raise ValueError("share_right: goes without budget, which chooses for each linear by itself")
        elif self.share_right and not set(with_blocks) & {*named}:
            raise ValueError(
                f"share_right: {self.method} makes no B; leave it out, or choose {' or '.join(with_blocks)}"
            )
        elif self.is_dense and self.budget is not None:
            raise ValueError("budget: a dense recipe has none; choose a method, and list dense in over")
        return self

    def training(self) -> dict[str, TrainingSettings]:
        """The stages of training that it asks for, in order."""
        return {name: found for name, found in (("refine", self.refine), ("tune", self.tune)) if found is not None}

    def stages(self) -> list[str]:
        """The stages after factorization that it asks for, in order."""
        return [name for name in ("refine", "quantize", "tune") if getattr(self, name) is not None]

    def methods(self) -> list[str]:
        """The methods that it names, each once."""
        dense = [Choice(method=UNCHANGED) for _ in self.keep_dense]
        return methods_of(self.method, [*self.overrides, *dense, *(self.budget.over if self.budget else [])])

    def integers(self) -> str | None:
        """The first method it names that makes integers; None where it makes floats alone."""
        return next((name for name in self.methods() if METHODS[name].stored is not None), None)

    def check_model(self, where: str, modules: Iterable[str], layers: int) -> None:
        """Raise ArmorError for a pattern or a decoder layer that is none of a model with these modules and layers."""
        overrides = [*self.overrides, *(self.quantize.overrides if self.quantize else [])]
        shared = sharing_patterns(self.share_right)
        check_patterns(where, [*self.keep_dense, *shared, *(override.modules for override in overrides)], modules)
        if (last := max((n for override in overrides for n in override.layers or []), default=0)) >= layers:
            raise ArmorError(f"{where}: overrides: layers: found {last}, but the model's are 0 to {layers - 1}")

    def for_layer(self, layer: int, seed: int = 0) -> LayerSettings:
        """The recipe resolved for decoder layer `layer`."""
        overrides = [o.replace(layers=None) for o in self.overrides if o.layers is None or layer in o.layers]
        overrides += [Override(modules=pattern, method=UNCHANGED) for pattern in self.keep_dense]
        base = {key: getattr(self, key) for key in ModuleSettings.model_fields}
        over = self.budget.over if self.budget else []
        return LayerSettings(**base, share_right=self.share_right, seed=seed, overrides=overrides, over=over)
