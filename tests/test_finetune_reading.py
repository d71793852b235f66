"""Files of examples: every form to the same rows, their kind told by their columns, in little time."""

import bz2
import csv
import gzip
import json
import lzma
import re
import time

import pytest
from example_files import CHAT, PAIRS, contents, lines, said, written
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.finetune.data import read_rows
from lorakit.finetune.data.reading import form_of


def as_csv(rows, path, **more) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), **more)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


# The forms


def test_every_form_of_file_holds_the_same_rows(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    text = lines(PAIRS)
    files = [
        str(tmp_path / "a.parquet"),
        written(tmp_path / "a.jsonl", text),
        written(tmp_path / "crlf.jsonl", text.replace("\n", "\r\n")),
        written(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + text.encode()),
        written(tmp_path / "blank.jsonl", "\n \n" + text.replace("\n", "\n\n")),
        written(tmp_path / "open.jsonl", text[:-1]),
        written(tmp_path / "unescaped.jsonl", "\n".join(json.dumps(pair, ensure_ascii=False) for pair in PAIRS)),
        written(tmp_path / "lines.json", text),
        written(tmp_path / "list.json", json.dumps(PAIRS, indent=2)),
        written(tmp_path / "bom.json", b"\xef\xbb\xbf " + json.dumps(PAIRS).encode()),
        written(tmp_path / "one.json", json.dumps({"version": 2, "rows": PAIRS, "tags": ["a"]})),
        written(tmp_path / "a.jsonl.gz", gzip.compress(text.encode(), mtime=0)),
        written(tmp_path / "a.json.bz2", bz2.compress(json.dumps(PAIRS).encode())),
        written(tmp_path / "a.JSONL.xz", lzma.compress(text.encode())),
        as_csv(PAIRS, tmp_path / "a.csv"),
        as_csv(PAIRS, tmp_path / "unix.csv", lineterminator="\n", quoting=csv.QUOTE_ALL),
        as_csv(PAIRS, tmp_path / "half.csv", delimiter=";"),
        as_csv(PAIRS, tmp_path / "a.tsv", delimiter="\t"),
    ]
    for path in files:
        rows = read_rows(path)
        assert [dict(row.content) for row in rows] == PAIRS, path
        assert (rows.kind, rows.source, rows.ignored) == ("prompt", path, ())
    (tmp_path / "some").mkdir()
    for i, pair in enumerate(PAIRS):
        written(tmp_path / "some" / f"{i}.jsonl", lines([pair]))
    assert contents(tmp_path / "some") == PAIRS


def test_a_saved_data_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(PAIRS)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "more"))
    assert contents(tmp_path / "one") == contents(tmp_path / "more") == PAIRS
    assert contents(tmp_path / "more", split="test") == PAIRS[:1]
    assert "it has train, test" in said(tmp_path / "more", split="dev")
    assert "leave split away" in said(tmp_path / "one", split="train")


def test_a_data_set_of_the_hub_is_read_or_said_to_be_out_of_reach(monkeypatch):
    datasets = pytest.importorskip("datasets")
    called = []

    def load(*given):
        called.append(given)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(PAIRS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert contents("owner/name:main") == PAIRS and called == [("owner/name", "main")]
    assert "no split 'dev'; it has train" in said("owner/name", split="dev")

    def unreachable(*_):
        raise ConnectionError("Couldn't reach 'owner/name'\non the Hub\n")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert said("owner/name") == (
        "there is no file or directory owner/name, and the hub cannot be reached: Couldn't reach 'owner/name'"
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]))] * 2), min_size=1, max_size=5))
def test_any_text_is_read_as_it_was_written(tmp_path_factory, pairs):
    rows = [{"prompt": a, "completion": "x" + b} for a, b in pairs]
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    for escaped in (True, False):
        written(path, "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows))
        assert contents(path) == rows
    written(path.with_suffix(".json"), json.dumps(rows, ensure_ascii=False))
    assert contents(path.with_suffix(".json")) == rows


def test_a_hundred_thousand_lines_take_less_than_two_seconds(tmp_path):
    for name, row in (
        ("a", {"prompt": "How many states are there?", "completion": "SELECT 1"}),
        ("b", {"messages": CHAT}),
    ):
        path = written(tmp_path / f"{name}.jsonl", (json.dumps(row) + "\n") * 100_000)
        start = time.process_time()
        assert len(read_rows(path)) == 100_000
        assert time.process_time() - start < 2


# Columns


@pytest.mark.parametrize(
    ("record", "kind", "content"),
    [
        ({"messages": CHAT, "prompt": "x", "text": "y"}, "messages", {"messages": CHAT}),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
            "messages",
            {"messages": CHAT},
        ),
        ({"messages": json.dumps(CHAT)}, "messages", {"messages": CHAT}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, CHAT[1]]},
            "messages",
            {"messages": CHAT},
        ),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, "messages", {"messages": CHAT, "tools": [{"name": "f"}]}),
        ({"prompt": "a", "completion": "b", "text": "ab"}, "prompt", {"prompt": "a", "completion": "b"}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "messages", {"messages": CHAT, "first": 1}),
        (
            {"instruction": "a", "output": "b", "text": "c"},
            "instruction",
            {"instruction": "a", "input": "", "output": "b"},
        ),
        (
            {"instruction": "a", "input": "i", "output": "b"},
            "instruction",
            {"instruction": "a", "input": "i", "output": "b"},
        ),
        (
            {"instruction": "a", "context": "i", "response": "b"},
            "instruction",
            {"instruction": "a", "input": "i", "output": "b"},
        ),
        ({"question": "a", "answer": "b"}, "instruction", {"instruction": "a", "input": "", "output": "b"}),
        ({"text": "a", "label": 3}, "text", {"text": "a"}),
    ],
)
def test_columns_tell_the_kind(tmp_path, record, kind, content):
    (row,) = read_rows(written(tmp_path / "a.jsonl", lines([record])))
    assert (row.kind, row.content, row.where) == (kind, content, "a.jsonl:1")


def test_columns_may_be_named(tmp_path):
    path = written(tmp_path / "a.jsonl", lines([{"question": "a", "query": "b", "id": 1}]))
    rows = read_rows(path, columns={"prompt": "question", "completion": "query"})
    assert rows[0].content == {"prompt": "a", "completion": "b"} and rows.ignored == ("id",)
    assert str(rows).endswith("1 rows of prompt = question, completion = query; not read: id")
    rows = read_rows(path, columns={"instruction": "question", "input": "query", "output": "query"})
    assert rows[0].content == {"instruction": "a", "input": "b", "output": "b"}


@pytest.mark.parametrize(
    ("record", "more", "message"),
    [
        ({"promt": "a", "completion": "b"}, {}, "'promt' is near to 'prompt'"),
        (
            {"question": "a", "query": "b"},
            {},
            r"'question', 'query' are no layout .*\{prompt: question, completion: query\}",
        ),
        (
            {"prompt": "a", "completion": "b", "question": "a", "answer": "b"},
            {},
            "prompt and completion, or question and",
        ),
        ({"instruction": "a", "output": "b", "response": "c"}, {}, "output, or instruction and response"),
        ({"messages": CHAT, "conversations": CHAT}, {}, "messages, or conversations"),
        ({"prompt": "a", "completion": "b"}, {"form": "text"}, "no layout that is known of the form text"),
        ({"prompt": "a", "completion": "b"}, {"form": "promt"}, "form 'promt' is none of .*; prompt"),
        ({"a": "a", "b": "b"}, {"columns": {"promt": "a"}}, "did you mean 'prompt'"),
        ({"aa": "a", "b": "b"}, {"columns": {"prompt": "aaa"}}, "no column 'aaa' for the prompt: .*did you mean 'aa'"),
        ({"a": "a"}, {"split": "train"}, "has no split 'train'"),
        ({}, {}, r"its columns \(none\)"),
    ],
)
def test_columns_that_tell_no_kind_are_named_with_what_is_near(tmp_path, record, more, message):
    text = said(written(tmp_path / "a.jsonl", lines([record])), **more)
    assert re.search(message, text), text


def test_a_form_decides_between_layouts(tmp_path):
    path = written(tmp_path / "a.jsonl", lines([{"prompt": "a", "completion": "b", "question": "c", "answer": "d"}]))
    assert contents(path, form="instruction") == [{"instruction": "c", "input": "", "output": "d"}]


def test_fields_of_any_size_are_read(tmp_path):
    rows = [{"prompt": "a" * 3_000_000, "completion": "b"}]
    limit = csv.field_size_limit()
    assert contents(as_csv(rows, tmp_path / "a.csv")) == rows
    assert contents(written(tmp_path / "a.jsonl", lines(rows))) == rows
    assert csv.field_size_limit() == limit


def test_endings_tell_what_a_file_holds(tmp_path):
    assert form_of(tmp_path / "A.JSONL.GZ") == ".jsonl" and form_of(tmp_path / "a.gz") is None
