"""Prompts from files: what training takes is a prompt too, with its answer or without."""

import gzip
import json

import pytest

from lorakit.errors import LorakitError
from lorakit.finetune.data import prompt_of, read_rows
from lorakit.finetune.generation.files import prompts_at
from lorakit.finetune.generation.prompts import Prompter


def test_prompts_are_read_from_lines_and_from_json_lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffHow many?\r\n\r\nWho is é?\r\n".encode())
    assert [prompt.text for prompt in prompts_at(path)] == ["How many?", "Who is é?"]
    path = tmp_path / "p.jsonl"
    path.write_text(
        '"plain"\n{"prompt": "a", "completion": "b"}\n{"instruction": "do", "input": "this"}\n'
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n{"text": "t\\nu"}\n'
    )
    found = prompts_at(path)
    assert [prompt.text for prompt in found] == ["plain", "a", "do\nthis", "hi", "t\nu"]
    assert found[3].content == {"messages": [{"role": "user", "content": "hi"}]} and found[3].where.endswith(":4")
    path.write_text('{"prompt": 1}\n[1]\n{bad\n{"prompt": "fine"}\n{"messages": []}\n')
    with pytest.raises(LorakitError) as said:
        prompts_at(path)
    assert [f"p.jsonl:{line}:" in str(said.value) for line in (1, 2, 3, 4, 5)] == [True, True, True, False, True]
    for content, message in ((b"", "holds no prompt"), (b"\n \n", "holds no prompt"), (b"\xff\xfe", "no UTF-8")):
        path.write_bytes(content)
        with pytest.raises(LorakitError, match=message):
            prompts_at(path)
    with pytest.raises(LorakitError, match="No such file"):
        prompts_at(tmp_path / "nowhere.txt")


USER, MORE = {"role": "user", "content": "hi"}, {"role": "user", "content": "and?"}
ANSWER = {"role": "assistant", "content": "ho"}
TURNS = [USER, ANSWER, MORE]
FORMS = {
    "messages": ({"messages": [*TURNS, ANSWER]}, "messages"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        "conversations",
    ),
    "tools": ({"messages": [USER, ANSWER], "tools": [{"type": "function", "function": {"name": "f"}}]}, "messages"),
    "conversational": ({"prompt": TURNS, "completion": [ANSWER]}, "completion"),
    "prompt": ({"prompt": "hi ", "completion": "ho"}, "completion"),
    "instruction": ({"instruction": "hi", "input": "this", "output": "ho"}, "output"),
    "context": ({"instruction": "hi", "context": "this", "response": "ho"}, "response"),
    "question": ({"question": "hi", "answer": "ho"}, "answer"),
    "text": ({"text": "hi"}, None),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_asked_as_training_has_them_with_or_without_their_answer(tmp_path, form):
    from small_lms import small_lm

    from lorakit.finetune.base import open_base

    record, answer = FORMS[form]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record) + "\n")
    base = open_base(small_lm(tmp_path / "base", chat=True), device="cpu")
    row = read_rows(str(path))[0]
    prompter = Prompter(base, row.kind)
    wanted = tuple(prompt_of(row, base.tokenizer)[0])
    (found,) = prompts_at(path)
    assert prompter.tokens(found.content) == wanted
    if answer in ("messages", "conversations"):
        record = {**record, answer: record[answer][:-1]}
    else:
        record = {name: value for name, value in record.items() if name != answer}
    path.write_text(json.dumps(record) + "\n")
    (found,) = prompts_at(path)
    assert prompter.tokens(found.content) == wanted and found.text.split("\n")[0].strip() in ("hi", "and?")


def test_columns_of_the_run_are_known_and_so_are_those_of_any_file(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"ask": "a"}\n{"prompt": "b"}\n{"ask": "c", "say": "x", "text": "no"}\n')
    assert [each.text for each in prompts_at(path, {"prompt": "ask", "completion": "say"})] == ["a", "b", "c"]
    with pytest.raises(LorakitError, match=r"d\.jsonl:1: it has no .prompt."):
        prompts_at(path)


def test_tables_and_packed_files_and_lists_are_read_too(tmp_path):
    (tmp_path / "d.csv").write_text('prompt,completion\na,x\n"b,\nc",y\n')
    assert [each.text for each in prompts_at(tmp_path / "d.csv")] == ["a", "b,\nc"]
    (tmp_path / "d.json").write_text(json.dumps([{"prompt": "a"}, {"instruction": "b", "input": None}]))
    assert [each.text for each in prompts_at(tmp_path / "d.json")] == ["a", "b"]
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n'))
    assert [each.text for each in prompts_at(tmp_path / "d.jsonl.gz")] == ["a"]
    messages = json.dumps([USER]).replace('"', '""')
    (tmp_path / "m.csv").write_text(f'messages\n"{messages}"\n')
    assert prompts_at(tmp_path / "m.csv")[0].content == {"messages": [USER]}
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"prompt": ["a", "b"]}), tmp_path / "d.parquet")
    assert [each.text for each in prompts_at(tmp_path / "d.parquet")] == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hi"}, "not a list of messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "the role 'king'"),
        ({"messages": [ANSWER]}, "begins with the assistant"),
        ({"messages": [1]}, "not an object"),
        ({"prompt": []}, "empty list"),
        ({"instruction": 3}, "the number 3"),
        ({"text": " "}, "white space"),
        ({"prompt": "\ud800"}, "half a character"),
        ({}, "it has no"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, record, message):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(LorakitError, match=message) as said:
        prompts_at(path)
    assert "d.jsonl:2:" in str(said.value) and "d.jsonl:1:" not in str(said.value)
