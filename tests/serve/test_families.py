"""vLLM is asked for families that were tested; others are one line, from `armor serve` and for vLLM alone."""

import pytest
from transformers import AutoConfig

from armor.core.errors import ArmorError
from armor.serve.check import check
from armor.serve.families import check_family
from tests.packed import packed


def refused(folder):
    """What is said of the family in `folder`, None where it is served."""
    try:
        check_family(folder)
    except ArmorError as error:
        assert "\n" not in str(error) and "armor export" in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["bloom", "falcon_mamba", "gpt_oss", "llama4_text", "mamba", "qwen2_5_vl"])
def test_a_family_that_was_not_tested_is_one_line(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    assert f"{tmp_path}/config.json: model_type {kind}: not tested packed in vLLM" in refused(tmp_path)


def test_the_check_refuses_a_family_for_vllm_alone(tmp_path):
    folder = packed(tmp_path, "gpt_oss") / "checkpoint"
    assert len(check(folder)) == len(check(folder, "transformers")) > 8
    with pytest.raises(ArmorError, match="model_type gpt_oss: not tested packed in vLLM"):
        check(folder, "vLLM")
