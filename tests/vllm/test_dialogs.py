"""`benchmarks.dialogs` behind a real server, asked for more at once than vLLM reads in one step."""

import json

from transformers import AutoTokenizer

from benchmarks.dialogs import main
from tests.packed import packed
from tests.vllm.served import SHAPE

HEAD = "Be kind, and answer what you are asked. " * 3  # 64 of it are more tokens than one step has
TEMPLATE = f"{HEAD}{{% for turn in messages %}}[{{{{ turn.role }}}}]{{{{ turn.content }}}}[end]{{% endfor %}}"


def test_a_model_writes_dialogs(tmp_path, capsys):
    folder, output = tmp_path / "checkpoint", tmp_path / "dialogs.jsonl"
    packed(tmp_path, "llama", **SHAPE, max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "checksums.json").unlink()
    main(folder, output, count=64, options=["--enforce-eager"])
    found = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    assert f"{len(found)} dialogs of 64" in capsys.readouterr().out
    assert len(found) > 8
    assert all(text.startswith(f"{HEAD}[user]") and "[end][assistant]" in text for text in found)
