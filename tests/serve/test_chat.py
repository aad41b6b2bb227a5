"""`armor chat`: every model answers every question as transformers generates, in its own talk."""

import re

import pytest

from armor.serve.chat import Speaker
from tests.forks import fork

TEMPLATE = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def speaker(root):
    return Speaker.of("compressed", root / "checkpoint")


def generated(speaker, prompt, new_tokens):
    tokens = speaker.tokenizer(prompt, return_tensors="pt").input_ids
    written = speaker.model.generate(tokens, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    return speaker.tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_an_answer_is_what_transformers_generates_after_the_talk_so_far(speaker, template, capsys):
    speaker.said.clear()
    speaker.tokenizer.chat_template = template
    assert speaker.answer("of a river", 6) > 0
    first = generated(speaker, "<user>of a river<assistant>" if template else "of a river", 6)
    assert capsys.readouterr().out.strip() == first.strip()
    speaker.answer("and then", 6)
    talk = "<user>of a river<assistant>{}<user>and then<assistant>" if template else "of a river\n{}\nand then"
    assert speaker.said[-1]["content"] == generated(speaker, talk.format(first), 6)


def test_the_command_answers_with_both_models_and_says_their_speed(root):
    def work():
        import io
        import sys

        from armor.command import cli

        sys.stdin = io.StringIO("of a river\n\nagain\n")
        sys.argv = ["armor", "chat", "checkpoint", "--against", "source", "--max-tokens", "4"]
        cli.main()

    done = fork(work, root)
    assert done.returncode == 0, done.stderr
    speeds = re.findall(r"^\[(\w+): ([\d.]+) tokens/s\]$", done.stdout, re.MULTILINE)
    assert [name for name, _ in speeds] == ["dense", "compressed"] * 2
