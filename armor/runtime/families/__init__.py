"""What a family needs beyond transformers' experts interface: a module for each, one class in it.

A class stands for transformers' module of the name `OF`. Its `LAYOUT` says what modules that know the interface say
of themselves: how the tensors of the experts lie.
"""

from armor.runtime.experts import Experts
from armor.runtime.families.llama4 import Llama4Experts
from armor.runtime.families.longcat_flash import LongcatFlashExperts

__all__ = ["ADAPTERS"]

ADAPTERS: dict[str, type[Experts]] = {kind.OF: kind for kind in (Llama4Experts, LongcatFlashExperts)}
"""By the name of transformers' class."""
