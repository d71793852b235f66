"""`lorakit generate`: the answers of the library, as text, as JSON and side by side."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from language_runs import Files, command, made, ran, refused, reopened

import lorakit as lk
from lorakit.cli.generate import generate

from lorakit.finetune.generation import Request, generate as answers_to  # isort: skip
from lorakit.finetune.generation_steps import Sampling

app = command(generate, "generate")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return made(tmp_path_factory.mktemp("files"))


def expected(files: Files, prompt: str, chosen, length: int = 8) -> str:
    base = reopened(files)
    return answers_to(base, [Request(tuple(base.tokenizer(prompt)["input_ids"]), chosen)], Sampling(length))[0].text


def lines(*arguments: object, **how) -> list[dict]:
    said = ran(app, "generate", *arguments, "--json", "--max-new-tokens", 8, "--device", "cpu", **how).stdout
    return [json.loads(line) for line in said.splitlines()]


def test_one_prompt_gives_its_continuation_alone(files):
    said = ran(app, "generate", files.base, "Hello", "--max-new-tokens", 8)
    assert said.stdout == expected(files, "Hello", None) + "\n" and said.stderr == ""
    with_run = ran(app, "generate", files.run, "Hello", "--max-new-tokens", 8).stdout
    assert with_run == expected(files, "Hello", "sql") + "\n" != said.stdout
    assert ran(app, "generate", files.sql, "Hello", "--max-new-tokens", 8).stdout == with_run
    streamed = ran(app, "generate", files.run, "Hello", "--max-new-tokens", 8, "--stream").stdout
    assert streamed == with_run


def test_several_prompts_by_several_adapters(files):
    adapters = ("--adapter", files.sql, "--adapter", f"second={files.js}")
    found = lines(files.base, "A", "--prompt", "Be", *adapters, "--use", "second,base,sql")
    assert [(each["prompt"], each["adapter"]) for each in found] == [
        (prompt, name) for prompt in ("A", "Be") for name in ("second", "base", "sql")
    ]
    names = {"second": "js", "base": None, "sql": "sql"}
    for each in found:
        assert each["text"] == expected(files, each["prompt"], names[each["adapter"]])
        assert set(each) == {"prompt", "adapter", "text", "tokens", "ended", "seconds"} and 0 <= each["tokens"] <= 8
    assert [each["adapter"] for each in lines(files.base, "A", *adapters)] == ["sql", "second"]
    blocks = ran(app, "generate", files.base, "A", "B\nC", *adapters, "--max-new-tokens", 8).stdout
    assert blocks.count("--- sql") == blocks.count("--- second") == 2
    assert "=== A\n" in blocks and "=== B … (1 more line)\n" in blocks
    streamed = ran(app, "generate", files.base, "A", *adapters, "--max-new-tokens", 8, "--stream").stdout
    assert all(f"--- {each['adapter']}\n{each['text']}\n" in streamed for each in lines(files.base, "A", *adapters))


def test_a_mixture_acts_with_its_strengths_and_says_that_it_takes_longer(files):
    adapters = ("--adapter", files.sql, "--adapter", files.js, "--use", "sql=0.7+js=0.3,base")
    found = lines(files.base, "A", *adapters)
    assert [each["adapter"] for each in found] == ["sql=0.7+js=0.3", "base"]
    assert found[0]["text"] == expected(files, "A", {"sql": 0.7, "js": 0.3})
    said = ran(app, "generate", files.base, "A", *adapters, "--max-new-tokens", 2).stderr
    assert "one adapter after the other" in said and len(said.splitlines()) == 1


def test_compare_puts_the_base_first(files):
    found = lines(files.run, "A", "--compare")
    assert [each["adapter"] for each in found] == ["base", "sql"] and found[0]["text"] != found[1]["text"]
    plain = ran(app, "generate", files.run, "A", "--side-by-side", "--max-new-tokens", 8).stdout
    assert f"--- base\n{found[0]['text']}\n" in plain and f"--- sql\n{found[1]['text']}\n" in plain
    refused("nothing to compare", app, "generate", files.base, "A", "--compare")


def test_prompts_from_files_and_stdin(files, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("One\n\nTwo\n")
    assert [each["prompt"] for each in lines(files.base, "Zero", "--file", path)] == ["Zero", "One", "Two"]
    assert [each["prompt"] for each in lines(files.base, "--file", "-", input="One\nTwo\n")] == ["One", "Two"]
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"prompt": "x" * (1 + i % 7)}) + "\n" for i in range(40)))
    found = lines(files.run, "--file", many, "--batch-size", 2, "--compare")
    assert [each["prompt"] for each in found] == ["x" * (1 + i % 7) for i in range(40) for _ in range(2)]
    assert len({(each["prompt"], each["adapter"], each["text"]) for each in found}) == 14


def test_the_same_seed_draws_the_same(files):
    how = ("--temperature", 1, "--top-p", 0.95, "--top-k", 40, "--repetition-penalty", 1.1)
    texts = [lines(files.base, "A", *how, "--seed", seed)[0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_it_ends_before_a_stop_text(files):
    text = expected(files, "A", None)
    stop = text[2:4]
    found = lines(files.base, "A", "--stop", stop)
    assert found[0]["text"] == text.partition(stop)[0] and found[0]["ended"] == "stop"


def test_a_chat_template_is_used_where_training_did_and_raw_text_is_raw(tmp_path):
    files = made(tmp_path, chat=True, kind="messages")
    base = reopened(files)
    asked = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert lines(files.base, "hi")[0]["text"] == expected(files, asked, None) != expected(files, "hi", None)
    assert lines(files.run, "hi")[0]["text"] == expected(files, asked, "sql")
    assert lines(files.base, "hi", "--raw")[0]["text"] == expected(files, "hi", None)
    (files.run / "run.json").write_text('{"kind": "prompt"}')
    assert lines(files.run, "hi")[0]["text"] == expected(files, "hi", "sql"), "as it was trained"
    assert lines(files.base, "hi", "--template", "Q: {prompt} A:")[0]["text"] == expected(files, "Q: hi A:", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which prompt"),
        (("A", "--stream", "--json"), "do not go together"),
        (("A", "--use", "sqll"), "no adapter 'sqll': there are sql, base"),
        (("A", "--use", "sql,sql"), "twice"),
        (("A", "--use", "sql+sql"), "twice"),
        (("A", "--use", "sql=x"), "must be a number"),
        (("A", "--use", "sql=nan"), "finite"),
        (("A", "--use", ","), "names nobody"),
        (("A", "--adapter", "x=nowhere"), "nowhere"),
        (("A", "--adapter", "sql=nowhere"), "loaded already"),
        (("A", "--adapter", "no/where"), "no/where"),
        (("A", "--adapter", "base=nowhere"), "nowhere"),
        (("A", "--temperature", "-1"), "temperature"),
        (("A", "--max-new-tokens", "0"), "max_new_tokens"),
        (("A", "--verify", "no"), "--verify 'no' must be"),
        (("A", "--device", "cudaa"), "no device"),
        (("A" * 200,), "leaves no room"),
        (("A", "--template", "nothing"), "template"),
        (("--file", "no.txt"), r"cannot read the prompts in no\.txt"),
        (("A", "--batch-size", "0"), "batch_size"),
    ],
)
def test_each_wrong_input_is_one_message(files, arguments, message):
    refused(message, app, "generate", files.run, *arguments)


def test_the_name_of_the_base_is_not_given_to_an_adapter(files):
    refused("'base' is the base alone", app, "generate", files.run, "A", "--adapter", f"base={files.js}")


def test_a_base_in_another_dtype_is_said_on_stderr(files):
    said = ran(app, "generate", files.run, "A", "--max-new-tokens", 2, "--dtype", "bfloat16").stderr
    assert "lorakit: sql: the base is in another dtype" in said


SCRIPT = """
import sys
from language_runs import command
from lorakit.cli.generate import generate
command(generate, "generate")(sys.argv[1:])
"""


def on_a_terminal(*arguments: object) -> str:
    """What a person sees on a terminal of 100 columns."""
    parent, child = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "generate", *map(str, arguments)],
        stdout=child,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(child)
    got = b""
    try:
        while piece := os.read(parent, 4096):
            got += piece
    except OSError:  # Linux says so at the end of a terminal
        pass
    assert process.wait(timeout=60) == 0, process.stderr.read()
    process.stderr.close()
    os.close(parent)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", got.decode()).replace("\r\n", "\n")


def test_on_a_terminal_answers_stand_side_by_side(files):
    said = on_a_terminal(files.run, "Hello", "--compare", "--max-new-tokens", 8)
    header = next(line for line in said.splitlines() if "prompt" in line)
    assert header.split() == ["prompt", "base", "sql"] and "Hello" in said
    assert lk.adapters(reopened(files).model).keys() == {"sql", "js"}
