"""The benchmark behind a server, by the real vLLM and its own client."""

from armor.benchmark.serving import benchmark_serving
from armor.config.measures import BenchmarkSettings
from tests.vllm.served import checkpoint

EAGER = ["--enforce-eager", "--max-model-len", "128"]
SETTINGS = BenchmarkSettings(
    engine="vllm", clients=[1, 2], requests=2, prompt_tokens=8, new_tokens=4, repeats=1, options=EAGER
)


def test_the_client_of_vllm_loads_the_server_of_each_model(tmp_path):
    packed = checkpoint(tmp_path, "Qwen3")
    found = benchmark_serving(tmp_path / "source", {"armor": packed}, SETTINGS, tmp_path / "serve.json")
    assert found.engine["vllm"].startswith("0.32.")
    for side in (found.dense, found.recipes["armor"]):
        for count, load in side.clients.items():
            assert load.tokens_per_second.median > 0 < load.token_milliseconds.median
            ratio = load.tokens_per_second.median / load.requests_per_second.median
            assert abs(ratio - SETTINGS.new_tokens) < 1e-6 * ratio, count  # every answer has its length
            assert load.first_token_milliseconds.median > 0
        assert side.memory_bytes.median > side.bytes_on_disk
    speeds = [side.clients["2"].tokens_per_second.median for side in (found.recipes["armor"], found.dense)]
    assert found.recipes["armor"].clients["2"].speedup.median == speeds[0] / speeds[1]
