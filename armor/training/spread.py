"""One model over several devices: its decoder layers in order, some on each, the states handed from one to the next.

One device computes at a time. What is won is room: parameters, gradients and moments are spread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

__all__ = ["hand_on", "leased", "spread"]


def leased(device: str) -> list[str]:
    """All torch devices of a job that was given `device`: of CUDA every one that it sees."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device.startswith("cuda") else [device]


def spread(sizes: Sequence[int], count: int, first: int = 0) -> list[int]:
    """The device, 0 to `count` - 1, of each of consecutive parts of these `sizes` in bytes.

    Each device has neighbours, and the fullest has as little as can be. The first one holds `first` bytes already.
    """

    def filled(room: int) -> list[int]:
        place, used, places = 0, first, []
        for size in sizes:
            while used + size > room and place < count:
                place, used = place + 1, 0
            used += size
            places.append(place)
        return places

    most = first + sum(sizes)
    return filled(bisect_left(range(most), True, key=lambda room: max(filled(room), default=0) < count))


def hand_on(layers: Sequence[nn.Module], places: Sequence[str], home: str) -> None:
    """Let each layer fetch what it is called with to its device, and the last one return its output to `home`.

    Fetching is a part of its forward. So one that is run again for its gradient fetches again: what layers share, like
    keys and values, has gone on to later devices by then.
    """
    for layer, place in zip(layers, places, strict=True):
        layer.forward = partial(_fetched, place, layer.forward)
    layers[-1].register_forward_hook(lambda _, args, output: send_to_device(output, home))


def _fetched(place: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*send_to_device(args, place), **send_to_device(kwargs, place))
