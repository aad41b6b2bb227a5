"""vLLM says of every family what transformers says of the same checkpoint, with packed weights."""

import pytest

from armor.serve.check import check
from tests.vllm.served import BOUND, FAMILIES, checkpoint, difference, expected, served


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers(family, tmp_path):
    folder = checkpoint(tmp_path, family)
    references = expected(folder)
    if "num_experts_per_tok" in (folder / "config.json").read_text():
        assert any(".experts." in name for name in check(folder))
    with served(folder) as llm:
        found = difference(llm, references)
    print(f"{family}: {found:.1e}")
    assert found < BOUND
