"""The weights that a token reads while a model writes: what its speed is at most."""

from __future__ import annotations

from armor.plan.subject import Packed, Subject
from armor.runtime.load import weights_bytes

__all__ = ["decode_bytes"]


def decode_bytes(subject: Subject, packed: Packed | None) -> int:
    """The bytes of weights that a decoding step reads: all but a table of embeddings that is not the head too."""
    folder = subject.folder if packed is None else packed.folder
    table = 0 if subject.topology.tied_embeddings else subject.table_bytes
    return weights_bytes(folder) - table
