import dataclasses

import pytest
import torch

from armor.core.errors import ArmorError
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, top_n_mask
from armor.format.factors import join_factors, read_factors, write_factors


def factorization(out=6, inner=8, left=3, right=4, pattern="2:4"):
    pattern = Pattern.parse(pattern)
    mask = top_n_mask(torch.rand(out, inner), pattern)
    blocks = [torch.randn(n // d, d, d) if d else None for n, d in ((out, left), (inner, right))]
    return Factorization(torch.randn(out, inner) * mask, mask, pattern, *blocks, loss=0.25, start_loss=0.5)


def test_the_file_gives_back_what_was_written(tmp_path):
    factors = {"q": factorization(), "k": factorization(left=None, right=None, pattern="50%")}
    write_factors(tmp_path / "a", factors, {"layer": 3})
    found, header = read_factors(tmp_path / "a")
    assert header["layer"] == 3 and found.keys() == factors.keys()
    for name, f in factors.items():
        for field in dataclasses.fields(f):
            mine, theirs = getattr(f, field.name), getattr(found[name], field.name)
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


def test_files_that_are_joined_are_the_file_of_all(tmp_path):
    factors = {name: factorization(left=left, right=4) for name, left in (("q", 3), ("k", 6), ("v", None), ("o", 1))}
    k = factors["k"]
    factors["k"] = dataclasses.replace(k, core=k.core.bfloat16(), left=k.left.bfloat16(), right=k.right.bfloat16())
    write_factors(tmp_path / "all", factors, {"layer": 3})
    parts = {"a": ("o", "q"), "b": (), "c": ("k", "v")}
    for file, names in parts.items():
        write_factors(tmp_path / file, {name: factors[name] for name in names}, {"layer": 7})
    join_factors(tmp_path / "joined", [tmp_path / file for file in parts], {"layer": 3})
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "all").read_bytes()
    with pytest.raises(ArmorError, match="c: k: is in another of the files too"):
        join_factors(tmp_path / "twice", [tmp_path / "all", tmp_path / "c"], {})
    assert not (tmp_path / "twice").exists()


def test_another_file_is_refused_in_one_line(tmp_path):
    write_factors(tmp_path / "a", {"q": factorization()}, {})
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-5])
    (tmp_path / "text").write_text("no safetensors")
    for name in ("cut", "text", "missing"):
        with pytest.raises(ArmorError, match=f"{name}: ") as error:
            read_factors(tmp_path / name)
        assert "\n" not in str(error.value)
