"""What the tests of the report share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import vl_convert

from armor.report import charts


@pytest.fixture(autouse=True, scope="session")
def forget_drawings() -> Iterator[Callable[[], None]]:
    """A chart that was drawn before is not drawn again: most pages here hold the same ones. Returns how to forget."""
    draw = cache(vl_convert.vegalite_to_svg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts.vl_convert, "vegalite_to_svg", draw)
        yield draw.cache_clear
