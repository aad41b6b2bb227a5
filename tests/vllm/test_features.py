"""What vLLM can do with a dense model it can do with a packed one, and says the same."""

import shutil

import pytest
from vllm.lora.request import LoRARequest

from armor.config.recipes import LayerSettings, Override
from armor.runtime import cpu
from armor.runtime.folder import read_config
from armor.serve.check import check
from armor.serve.ranks import check_ranks
from tests.packed import SETTINGS, edit_tensors, packed, quantized
from tests.vllm.served import BOUND, FAMILIES, RANK, SHAPE, adapted, answers, checkpoint, difference, expected, served


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """One whose q, k and v share B, as do gate and up."""
    settings = SETTINGS.model_copy(update={"share_right": True})
    return packed(tmp_path_factory.mktemp("llama"), settings=settings, **SHAPE) / "checkpoint"


@pytest.fixture(scope="module")
def references(llama):
    return expected(llama)


@pytest.mark.parametrize("has_tiles", [False, True])
def test_compiled(llama, references, monkeypatch, has_tiles):
    """The second is as on a processor with AMX, and may not take what was compiled for the first."""
    monkeypatch.setattr(cpu, "_has_tiles", has_tiles)
    with served(llama, enforce_eager=False) as llm:
        assert difference(llm, references) < BOUND


def test_in_half_precision_the_prompt_is_as_likely_up_to_rounding(llama, references):
    with served(llama, dtype="bfloat16") as llm:
        found = answers(llm)
    for (tokens, log_p), (_, scores) in zip(references, found, strict=True):
        for place, said in enumerate(scores[: len(tokens) - 8]):
            for token, score in said.items():
                assert abs(score - log_p[place - 1, token].item()) < 0.2, (place, token)


def test_chunks_of_a_prompt_and_a_cached_prefix(llama, references):
    with served(llama, max_num_batched_tokens=32, enable_chunked_prefill=True, enable_prefix_caching=True) as llm:
        assert difference(llm, references) < BOUND
        assert difference(llm, references, prompts=False) < BOUND  # with what was kept of the prompts


def test_weights_loaded_anew_in_place(llama, references, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other")
    (other / "checksums.json").unlink()
    edit_tensors(
        other, lambda tensors: tensors.update({n: 0.9 * t for n, t in tensors.items() if t.is_floating_point()})
    )
    others = expected(other)
    with served(llama) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        assert difference(llm, others) < BOUND
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(llama)})
        assert difference(llm, references) < BOUND
    assert max((a[1][-1] - b[1][-1]).abs().max() for a, b in zip(others, references, strict=True)) > 100 * BOUND


def test_an_adapter(llama, references, tmp_path):
    others = expected(llama, adapted(llama, tmp_path / "adapter"))
    assert any(a[0] != b[0] for a, b in zip(others, references, strict=True))
    with served(llama, enable_lora=True, max_lora_rank=RANK) as llm:
        request = LoRARequest("mine", 1, str(tmp_path / "adapter"))
        # Without the prompts: of those vLLM itself cannot tell the log-probabilities on a CPU, with adapters.
        assert difference(llm, others, prompts=False, lora_request=request) < BOUND
        assert difference(llm, references, prompts=False) < BOUND


KIND, MIXTURE = FAMILIES["Qwen3 MoE"]
SHARED = SETTINGS.model_copy(update={"share_right": True})
LOW_RANK = LayerSettings(
    method="oats",
    rank=4,
    overrides=[Override(modules="*.v_proj", method="int8"), Override(modules="*.gate_proj", method="int4")],
)
MIXED = SETTINGS.model_copy(
    update={
        "overrides": [
            Override(modules="*.k_proj", method="dense"),
            Override(modules="*.up_proj", block_size=32, pattern="4:8"),
            Override(modules="*.down_proj", method="wanda", pattern="50%"),
        ]
    }
)
SOME_EXPERTS = SHARED.model_copy(
    update={
        "overrides": [
            Override(modules="*.experts.1.*", method="dense"),
            Override(modules="*.layers.1.mlp.experts.2.down_proj", method="int8"),
        ]
    }
)
HELD = {  # what a checkpoint may hold, and in which ways it is served
    "integers": (lambda root: quantized(packed(root, settings=SHARED, **SHAPE)), [1, 2]),
    "low rank and whole integers": (lambda root: packed(root, settings=LOW_RANK, **SHAPE) / "checkpoint", [1, 2]),
    "shards of other blocks and dense": (lambda root: packed(root, settings=MIXED, **SHAPE) / "checkpoint", [1]),
    "experts, some of integers or dense": (
        lambda root: packed(root, KIND, SOME_EXPERTS, **(SHAPE | MIXTURE)) / "checkpoint",
        [2],
    ),
}


@pytest.mark.parametrize("held", HELD)
def test_what_a_checkpoint_may_hold_on_one_rank_and_two(tmp_path, held):
    make, sizes = HELD[held]
    folder = make(tmp_path)
    references = expected(folder)
    for ranks in sizes:
        with served(folder, tensor_parallel_size=ranks) as llm:
            assert difference(llm, references) < BOUND


@pytest.mark.parametrize("family", ["Llama", "Phi-3"])
def test_two_ranks_side_by_side(family, tmp_path):
    folder = checkpoint(tmp_path, family)
    references = expected(folder)
    check_ranks(read_config(folder), check(folder), 2)  # nothing is refused before the start that is served
    with served(folder, tensor_parallel_size=2, enforce_eager=family != "Llama") as llm:
        assert difference(llm, references) < BOUND


def test_two_stages(llama, references):
    """Compiled: eagerly vLLM itself fails at the first request on a CPU, for its second stage was not warmed up."""
    with served(llama, pipeline_parallel_size=2, enforce_eager=False) as llm:
        assert difference(llm, references) < BOUND
