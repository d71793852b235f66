"""`lorakit chat`: what was said is remembered as the template has it, and adapters change between two lines."""

import os
import signal
import subprocess
import sys
import time

import pytest
from language_runs import Files, as_other_run, command, made, ran, refused, reopened
from safetensors.torch import load_file, save_file

import lorakit as lk
from lorakit.cli.chat import chat
from lorakit.errors import LorakitError
from lorakit.finetune.generation.conversation import Conversation
from lorakit.finetune.generation.generate import Request, generate
from lorakit.finetune.generation.prompts import prompter_of
from lorakit.finetune.generation.steps import Sampling

app = command(chat, "chat")
LENGTH = 6


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Files:
    return made(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return made(tmp_path_factory.mktemp("chat"), chat=True, kind="messages")


def said(files: Files, *typed: str, where=None, more: tuple = ()) -> str:
    """What is on stdout after these lines."""
    how = ("--device", "cpu", "--max-new-tokens", LENGTH, *more)
    return ran(app, "chat", where or files.base, *how, input="".join(f"{line}\n" for line in typed)).stdout


class Wanted:
    """The same chat by hand."""

    def __init__(self, files: Files) -> None:
        self.base = reopened(files)
        self.turns: list[dict[str, str]] = []

    def __call__(self, text: str, chosen=None) -> str:
        self.turns.append({"role": "user", "content": text})
        tokenizer = self.base.tokenizer
        asked = tokenizer.apply_chat_template(self.turns, add_generation_prompt=True, tokenize=False)
        ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        tokens = tuple(tokenizer(asked)["input_ids"])
        answer = generate(self.base, [Request(tokens, chosen)], Sampling(LENGTH), ends=ends)[0].text
        self.turns.append({"role": "assistant", "content": answer})
        return answer + "\n"


def test_turns_are_remembered_and_adapters_change_between_them(files):
    wanted = Wanted(files)
    adapters = ("--adapter", files.sql, "--adapter", files.js)
    got = said(files, "Hi", "/use js", "More", "/use base", "Third", more=(*adapters, "--use", "sql"))
    assert got == (
        wanted("Hi", "sql") + "(js answers)\n" + wanted("More", "js") + "(base answers)\n" + wanted("Third", None)
    )


def test_a_run_answers_with_its_adapter_and_another_may_be_loaded_and_mixed(files):
    wanted = Wanted(files)
    got = said(files, "Hi", f"/load other={files.js}", "/use sql=0.7,other=0.3", "Mix", where=files.run)
    first = wanted("Hi", "sql")
    mixed = wanted("Mix", {"sql": 0.7, "js": 0.3})
    assert got == first + "(other is there; /use other)\n(sql=0.7+other=0.3 answers)\n" + mixed


def test_reset_forgets_and_system_is_told_first(files):
    wanted = Wanted(files)
    first = wanted("Hi")
    wanted.turns = [{"role": "system", "content": "Be short"}]
    again = wanted("Hi")
    assert said(files, "Hi", "/reset", "/system Be short", "Hi") == f"{first}(forgotten)\n(told)\n{again}"
    assert said(files, "Hi", more=("--system", "Be short")) == again
    assert said(files, "/system", "Hi") == f"(told nothing)\n{first}"


def test_commands_that_are_wrong_change_nothing(files):
    wanted = Wanted(files)
    typed = ("/use nobody", "/us x", "/load nowhere", "/load", "/load base=x", f"/load {files.sql}")
    typed = (*typed, "/use sql=inf", "/foo")
    lines = said(files, *typed, "", "  ", "//x", more=("--adapter", files.sql, "--use", "base")).splitlines()
    marks = ("no adapter 'nobody'", "did you mean /use", "nowhere", "which adapter", "the base alone", "already")
    for line, mark in zip(lines, (*marks, "finite", "/help"), strict=False):
        assert line.startswith("(") and mark in line
    assert "\n".join(lines[len(typed) :]) + "\n" == wanted("/x")


def test_adapters_and_help_are_listed(files):
    got = said(files, "/adapters", "/help", "/quit", "never", where=files.run)
    assert (
        got.startswith("* sql  LoRA(rank=2")
        and "\n  base\n" in got
        and "/use js" in got
        and len(got.splitlines()) == 10
    )
    assert said(files, "/quit ", "never") == said(files, "/exit") == said(files) == ""


def test_without_a_template_each_line_is_by_itself_and_that_is_said(plain):
    got = said(plain, "Once", "Once", where=plain.run)
    base = reopened(plain)
    text = generate(base, [Request(tuple(base.tokenizer("Once")["input_ids"]), "sql")], Sampling(LENGTH))[0].text
    assert got == (
        f"(each line is continued by itself, and nothing is remembered: there is no chat template)\n{text}\n{text}\n"
    )
    assert "no place for it" in said(plain, "/system x")
    refused("--system needs a chat template", app, "chat", plain.base, "--system", "x", input="")
    refused("no adapter 'x'", app, "chat", plain.base, "--use", "x", input="")


def test_the_oldest_turns_go_when_the_context_is_full(files):
    base = reopened(files)
    talk = Conversation(prompter_of(base), room=20)
    talk.system = "S"
    dropped = 0
    for i in range(12):
        ready = talk.asked(f"question {i}")
        dropped += ready.dropped
        assert len(ready.tokens) <= 128 - 20
        text = base.tokenizer.decode(ready.tokens)
        assert text.count("<|im_start|>user") == talk.turns == i + 1 - dropped
        assert text.startswith("<|im_start|>system\nS") and f"question {i}<" in text and f"question {dropped}<" in text
        talk.answered("answer")
    assert 0 < dropped < 12
    with pytest.raises(LorakitError, match="no more than 108 leave room"):
        talk.asked("x" * 200)
    before = talk.turns
    assert talk.asked("short").tokens and talk.turns <= before + 1
    talk.unasked()
    talk.reset()
    assert talk.turns == 0
    lines = said(files, *(f"question {i}" for i in range(9)), "y" * 200, "z").splitlines()
    counts = [int(line[1:].split()[0]) for line in lines if line.endswith("turns no longer fit, and are forgotten)")]
    assert counts == sorted(set(counts)) and counts[0] > 1, "said when there are more"
    one = said(files, "q" * 42, "r" * 42, where=files.base).splitlines()
    assert "(1 turn no longer fits, and is forgotten)" in one
    assert any(line.startswith("(that is ") and "leave room for an answer" in line for line in lines)


def test_each_adapter_sees_the_turns_as_its_run_was_trained(files, tmp_path):
    base = reopened(files)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    other = as_other_run(files, tmp_path / "js", "messages", template)
    ways = {"sql": prompter_of(base, kind="messages"), "js": prompter_of(base, kind="messages", template=template)}
    turns: list[dict[str, str]] = []

    def wanted(text: str, chosen: str | None, like: str) -> str:
        turns.append({"role": "user", "content": text})
        request = Request(ways[like].tokens({"messages": turns}), chosen, ways[like].ends())
        answer = generate(base, [request], Sampling(LENGTH))[0].text
        turns.append({"role": "assistant", "content": answer})
        return f"{answer}\n"

    lines = (wanted("Hi", "sql", "sql"), wanted("More", "js", "js"), wanted("Third", None, "sql"))
    answers = "(x answers)\n".join(lines[:2]) + "(base answers)\n" + lines[2]
    typed = ("Hi", "/use x", "More", "/use base", "Third")
    assert said(files, *typed, where=files.run, more=("--adapter", f"x={other}")) == answers
    loaded = said(files, "Hi", f"/load x={other}", *typed[1:], where=files.run)
    assert loaded == answers.replace("(x answers)", "(x is there; /use x)\n(x answers)")
    turns.clear()
    assert said(files, "Hi", where=other) == said(files, "Hi", more=("--adapter", other)) == wanted("Hi", "js", "js")


def test_an_adapter_that_sees_no_turns_among_others_that_do(files, tmp_path):
    base = reopened(files)
    other = as_other_run(files, tmp_path / "js", "prompt")
    first = Wanted(files)
    alone = generate(base, [Request(prompter_of(base, kind="prompt").tokens("By itself"), "js")], Sampling(LENGTH))
    typed = ("Hi", "/use x", "By itself", "/use sql", "More")
    assert said(files, *typed, where=files.run, more=("--adapter", f"x={other}")) == (
        first("Hi", "sql")
        + "(x answers)\n(each line is continued by itself, and nothing is remembered: prompts are taken as prompt)\n"
        + f"{alone[0].text}\n(sql answers)\n(what was said is seen again)\n"
        + first("More", "sql")
    )


def test_adapters_are_mixed_as_generate_does_and_an_answer_ends_before_a_stop_text(files):
    adapters = ("--adapter", files.sql, "--adapter", files.js)
    mixed = Wanted(files)("Hi", {"sql": 0.7, "js": 0.3})
    for use in ("sql=0.7+js=0.3", "sql=0.7,js=0.3"):
        assert said(files, f"/use {use}", "Hi", more=adapters) == "(sql=0.7+js=0.3 answers)\n" + mixed
        assert said(files, "Hi", more=(*adapters, "--use", use)) == mixed
    stop = mixed[2:4]
    stopped = said(files, "Hi", more=(*adapters, "--use", "sql=0.7+js=0.3", "--stop", stop))
    assert stopped == mixed.partition(stop)[0] + "\n"


def test_windows_line_ends_a_byte_order_mark_and_unicode(files):
    wanted = Wanted(files)
    how = ("--device", "cpu", "--max-new-tokens", LENGTH)
    got = ran(app, "chat", files.base, *how, input="\ufeffhéllo 🙂\r\n/quit\r\n").stdout
    assert got == wanted("héllo 🙂")
    refused("no UTF-8", app, "chat", files.base, *how, input=b"\xff\xfe\n")


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_stdin_that_is_no_text_is_one_message(files, locale):
    process = subprocess.run(
        [sys.executable, "-m", "lorakit", "chat", str(files.run)],
        input=b"\xff\xfe\n",
        capture_output=True,
        env={**os.environ, "LC_ALL": locale, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said = process.stderr.decode()
    assert process.returncode != 0 and "stdin is no UTF-8" in said and "Traceback" not in said, said


SCRIPT = """
import sys
from language_runs import command
from lorakit.cli.chat import chat
command(chat, "chat")(sys.argv[1:])
"""


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path):
    files = made(tmp_path, chat=True, kind="messages", max_position_embeddings=100_000)
    path = files.base / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][[0, 1, 4]] = 0.0  # it never ends a text by itself
    save_file(tensors, path, {"format": "pt"})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-u", "-c", SCRIPT, "chat", str(files.run), "--max-new-tokens", "50000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(words, env=environment, **pipes)
    process.stdin.write(b"tell me all\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # it answers
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/adapters\n")
    process.stdin.close()
    rest = process.stdout.read().decode(errors="replace")
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert "\n(stopped)\n* sql" in rest
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    assert lk.adapters(reopened(files).model).keys() == {"sql", "js"}
