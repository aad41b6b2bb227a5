"""vLLM says of every family what transformers says of the same checkpoint, with packed weights."""

import math

import pytest

from armor.assemble.export import export
from armor.serve.check import check
from armor.serve.families import SERVED
from tests.vllm.served import APART, BOUND, BOUNDS, FAMILIES, answers, checkpoint, difference, expected, served


def test_every_family_that_is_served_has_a_model_here():
    assert {kind for kind, _ in (FAMILIES | APART).values()} == set(SERVED)


@pytest.mark.parametrize("family", [pytest.param(n, marks=pytest.mark.gate if n == "Llama" else ()) for n in FAMILIES])
def test_log_probabilities_are_those_of_transformers(family, tmp_path):
    folder = checkpoint(tmp_path, family)
    references = expected(folder)
    if "num_experts_per_tok" in (folder / "config.json").read_text():
        assert any(".experts." in name for name in check(folder))
    with served(folder) as llm:
        found = difference(llm, references)
    print(f"{family}: {found:.1e}")
    assert found < BOUNDS.get(family, BOUND)


@pytest.mark.parametrize("family", APART)
def test_log_probabilities_are_those_of_the_exported_model(family, tmp_path):
    """Of families that vLLM computes differently from transformers, the dense model too."""
    folder = checkpoint(tmp_path, family)
    assert any(".experts." in name for name in check(folder))
    export(folder, tmp_path / "dense")
    with served(folder) as llm:
        packed = answers(llm)
    with served(tmp_path / "dense") as llm:
        dense = answers(llm)
    assert [tokens for tokens, _ in packed] == [tokens for tokens, _ in dense]
    pairs = [pair for (_, a), (_, b) in zip(packed, dense, strict=True) for pair in zip(a, b, strict=True)]
    found = [abs(a[token] - b[token]) for a, b in pairs for token in a.keys() & b.keys()]
    print(f"{family}: {max(found):.1e}")
    assert len(found) > 100 and not any(map(math.isnan, found)) and max(found) < BOUND
