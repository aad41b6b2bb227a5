"""A model of which one decoder layer at a time is in memory: for models that are larger than that.

It does what calibration does, on the same skeleton (`armor.runtime.skeleton`), for models dense and packed. A layer is
read, all that is asked goes through it, and then the next is read. What is asked comes in batches. The hidden states of
many wait on the host, up to a quarter of its memory. Further batches go through all layers after these. The price is to
read every weight once for each such group. Text can be generated too, by transformers, with the price that every new
token of a batch reads all weights.

Mixtures of experts are another case. While transformers stacks the experts that a checkpoint has one by one, it holds
them twice. Nothing is stacked here. Where a layer with all its experts is too large, they are read one by one too
(`armor.runtime.apart`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from armor.execution.log import progress
from armor.execution.machine import USABLE, device_memory_bytes, host_memory_bytes
from armor.runtime.apart import HOST_SHARE, Apart, Whole
from armor.runtime.calls import State, finish, moved, observe, readers
from armor.runtime.experts import Experts
from armor.runtime.filling import drop_layer, layer_bytes, load_outside, place_outside, read_layer
from armor.runtime.skeleton import Skeleton, tensors_of

__all__ = ["StreamedModel"]


class StreamedModel:
    """A causal language model on `device`: `skeleton`, made in `dtype`, and the files of `folder` that fill it.

    `name_or_path`, `dtype` and `device` are those of a loaded model. What is wrong with a dense layer shows when it is
    read. For a packed model `armor.runtime.streaming.stream_model` puts packed linears into the skeleton first.
    """

    def __init__(self, skeleton: Skeleton, folder: Path | str, dtype: torch.dtype, device: str) -> None:
        self.skeleton, self.name_or_path, self.dtype, self.device = skeleton, str(folder), dtype, device
        self._shards = tensors_of(skeleton, folder)
        load_outside(skeleton, self._shards, head=True)
        place_outside(skeleton, device)
        self._is_apart = self._has_no_room_for_a_layer()
        if (Path(folder) / "generation_config.json").is_file():
            self.skeleton.model.generation_config = GenerationConfig.from_pretrained(folder)

    @torch.no_grad()
    def logits(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The logits (batch, length, vocabulary) of every batch, in order; batches are tokens (batch, length) int64."""
        for group in self._groups(batches):
            states: list[State] = [(observe(self.skeleton, tokens)[0].to("cpu"),) for tokens in group]
            layers = range(len(self.skeleton.layers))
            for index in progress(layers, f"{len(group)} batches", unit="layers"):
                for number, state in enumerate(self._through(index, group, states)):
                    states[number] = state
            for number, tokens in enumerate(group):
                yield finish(self.skeleton, tokens, states[number][0].to(self.device))

    def _through(self, index: int, group: Sequence[Tensor], states: Sequence[State]) -> Iterator[State]:
        """What decoder layer `index` makes of each of the `states`, which are of the batches of the `group`."""
        layer = read_layer(self.skeleton, index, self._shards, self.device, experts=not self._is_apart)

        def run(number: int, layer: nn.Module) -> State:
            # Recorded again rather than kept: masks of many batches take as much room as their hidden states.
            call = observe(self.skeleton, group[number])[1][index]
            return moved(call.run(layer, moved(states[number], self.device)), "cpu")

        name = f"{self.skeleton.prefix}.{index}"
        runner = Apart(layer, name, self._shards, self.device) if self._is_apart else Whole(layer)
        yield from runner.run([partial(run, number) for number in range(len(group))])
        drop_layer(layer)  # before the next one is read

    def whole(self) -> AbstractContextManager[PreTrainedModel]:
        """The model as transformers' `generate` takes it; every forward pass reads all decoder layers, one by one."""
        return readers(self.skeleton, self._shards, self.device, self._is_apart)

    def _has_no_room_for_a_layer(self) -> bool:
        """Whether a decoder layer with all its experts is too large."""
        if not any(isinstance(module, Experts) for module in self.skeleton.model.modules()):
            return False
        outside = {id(tensor): tensor.nbytes for *_, tensor in self.skeleton.outside(head=True)}  # tied ones once
        room = device_memory_bytes(self.device) or (1 - HOST_SHARE) * host_memory_bytes()
        return sum(outside.values()) + max(map(layer_bytes, self.skeleton.layers)) > USABLE * room

    def _groups(self, batches: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """As many batches at a time as there is room for the hidden states of, at least one."""
        each = self.skeleton.model.config.get_text_config().hidden_size * self.dtype.itemsize
        room = host_memory_bytes() * HOST_SHARE / each
        group: list[Tensor] = []
        held = 0
        for tokens in batches:
            if group and held + tokens.numel() > room:
                yield group
                group, held = [], 0
            group.append(tokens)
            held += tokens.numel()
        if group:
            yield group
