"""`import armor.hf` teaches transformers to read and write packed checkpoints, by `armor.runtime.quantizer`."""

from armor.runtime.quantizer import ArmorConfig, ArmorQuantizer

__all__ = ["ArmorConfig", "ArmorQuantizer"]
