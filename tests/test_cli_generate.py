"""`lorakit generate`: the answers of the library, as text, as JSON and side by side."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
from language_runs import Files, as_other_run, as_run, command, made, ran, refused, reopened

import lorakit as lk
from lorakit.cli.generate import generate

from lorakit.finetune.generation.generate import Request, ends_of, generate as answers_to  # isort: skip
from lorakit.finetune.generation.prompts import prompter_of
from lorakit.finetune.generation.steps import Sampling

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


def test_rows_of_the_run_s_columns_are_prompts(files, tmp_path):
    other = as_other_run(files, tmp_path / "js")
    with (other / "config.yaml").open("a") as config:
        config.write("columns: {prompt: ask, completion: say}\n")
    path = tmp_path / "d.jsonl"
    path.write_text('{"ask": "One"}\n{"ask": "Two", "say": "x"}\n')
    for place in ((other,), (files.base, "--adapter", other)):
        assert [each["prompt"] for each in lines(*place, "--file", path)] == ["One", "Two"]


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


def test_each_adapter_is_asked_as_its_own_run_was_trained(files, tmp_path):
    other = as_other_run(files, tmp_path / "js", "instruction")
    heading = "### Instruction:\nhi\n\n### Response:\n"
    wanted = expected(files, heading, "js")
    assert lines(other, "hi")[0]["text"] == wanted != expected(files, "hi", "js")
    assert lines(files.base, "hi", "--adapter", f"x={other}")[0]["text"] == wanted, "with the base named"
    both = lines(files.run, "hi", "--adapter", f"x={other}")
    assert [each["text"] for each in both] == [expected(files, "hi", "sql"), wanted]
    raw = lines(files.run, "hi", "--adapter", f"x={other}", "--raw")
    assert [each["text"] for each in raw] == [expected(files, "hi", "sql"), expected(files, "hi", "js")]
    template = lines(files.run, "hi", "--adapter", f"x={other}", "--template", "Q: {prompt} A:")
    assert [each["text"] for each in template] == [expected(files, "Q: hi A:", name) for name in ("sql", "js")]
    # The base is asked like what it is compared with.
    compared = lines(files.run, "hi", "--adapter", f"x={other}", "--use", "base,x")
    assert [each["text"] for each in compared] == [expected(files, heading, None), wanted]
    plain = lines(files.base, "hi", "--adapter", files.js)
    assert plain[0]["text"] == expected(files, "hi", "js"), "of no run"


def test_the_template_and_the_ends_are_those_of_each_run(tmp_path):
    files = made(tmp_path, chat=True, kind="messages")
    (tmp_path / "t.txt").write_text("Q: {prompt} A:")
    other = as_other_run(files, tmp_path / "project" / "other", "prompt", "t.txt")  # seen from a directory above it
    base = reopened(files)
    chat = prompter_of(base, kind="messages")
    asked = Request(chat.tokens("hi"), "sql", chat.ends())
    assert base.tokenizer.convert_tokens_to_ids("<|im_end|>") in chat.ends() - ends_of(base)
    found = lines(files.run, "hi", "--adapter", f"x={other}")
    assert found[0]["text"] == answers_to(base, [asked], Sampling(8))[0].text
    assert found[1]["text"] == expected(files, "Q: hi A:", "js")


def test_a_mixture_is_asked_as_its_first_and_that_is_said(files, tmp_path):
    other = as_other_run(files, tmp_path / "js", "instruction")
    how = ("hi", "--adapter", f"x={other}", "--use", "sql=0.5+x=0.5")
    assert lines(files.run, *how)[0]["text"] == expected(files, "hi", {"sql": 0.5, "js": 0.5})
    said = ran(app, "generate", files.run, *how, "--max-new-tokens", 2).stderr
    assert said == "lorakit: sql=0.5+x=0.5 is asked as sql was trained; x was trained in another way\n"


def test_draws_of_one_prompt_differ_whatever_is_in_a_batch(files, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("A\n" * 20)
    how = ("--file", path, "--temperature", 1.5, "--seed", 3)
    texts = [each["text"] for each in lines(files.base, *how)]
    assert len(set(texts)) == 20
    assert [each["text"] for each in lines(files.base, *how, "--batch-size", 1)] == texts
    streamed = ran(app, "generate", files.base, *how, "--stream", "--max-new-tokens", 8).stdout
    blocks = ran(app, "generate", files.base, *how, "--max-new-tokens", 8).stdout
    assert all(f"\n{text}\n" in streamed and f"\n{text}\n" in blocks for text in texts)


def test_a_base_that_moved_is_said_with_the_cure(tmp_path, monkeypatch):
    files = made(tmp_path)
    monkeypatch.chdir(tmp_path)
    as_run(files.run, "m/mv", files.data, "prompt")
    said = refused(r"run/config\.yaml names", app, "generate", "run", "A")
    assert "there is no directory m/mv" in said and "lorakit generate NEWPLACE --adapter run" in said
    files.base.rename(tmp_path / "moved")
    said = refused("adapter_config.json names", app, "generate", "sql", "A")
    assert "--adapter sql" in said
    assert lines("moved", "A", "--adapter", "sql")[0]["adapter"] == "sql"
    assert "names" not in refused("m/mv", app, "generate", "m/mv", "A")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_stdin_that_is_no_text_is_one_message(files, locale):
    process = subprocess.run(
        [sys.executable, "-m", "lorakit", "generate", str(files.run), "--file", "-"],
        input=b"\xff\xfe",
        capture_output=True,
        env={**os.environ, "LC_ALL": locale, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = process.stderr.decode()
    assert process.returncode != 0 and "stdin is no UTF-8" in said and "Traceback" not in said, said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which prompt"),
        (("\udcff",), "prompt 1: .*half a character"),
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
