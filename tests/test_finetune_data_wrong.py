"""Files of examples that cannot be used: whatever is wrong is named by file, line and reason, all at once."""

import gzip
import json

import pytest
from example_files import CHAT, PAIRS, lines, said, written

from lorakit.finetune.data import read_rows


def test_all_bad_rows_are_named_at_once(tmp_path):
    wrong = [
        ("{", "is no JSON: Expecting property name"),
        ("[1]", "is no object"),
        ('{"prompt": "a", "completion": ""}', "'completion' is empty"),
        ('{"prompt": "a", "completion": " \\n"}', "'completion' is nothing but white space"),
        ('{"prompt": "a", "completion": NaN}', "'completion' is NaN, not text"),
        ('{"prompt": "a", "completion": null}', "'completion' is null"),
        ('{"prompt": 4, "completion": "b"}', "'prompt' is the number 4"),
        ('{"prompt": true, "completion": "b"}', "'prompt' is true"),
        ('{"prompt": {}, "completion": "b"}', "'prompt' is an object"),
        ('{"prompt": "a"}', "has no 'completion'"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "has the key 'prompt' twice"),
        ('{"prompt": "a", "completion": "\\ud800 b"}', r"'completion' has half a character (\ud800) at position 0"),
        ('{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "is of the kind messages"),
        ("[" * 200_000, "is nested too deeply"),
        ('{"a": ' * 200_000, "is nested too deeply"),
        ("1" * 9999, "Exceeds the limit"),
    ]
    good = json.dumps(PAIRS[0])
    alone = [case for case in wrong if "of the kind" not in case[1]]
    text = said(written(tmp_path / "a.jsonl", "\n".join([good, *(line for line, _ in alone), good])))
    assert f"{len(alone)} rows cannot be used" in text
    for number, (_, reason) in enumerate(alone, 2):
        assert any(line.startswith(f"  a.jsonl:{number}: {reason}") for line in text.splitlines()), (reason, text)
    text = said(written(tmp_path / "b.jsonl", "\n".join([good, good, wrong[12][0]])))
    assert "b.jsonl:3: is of the kind messages, others are of prompt" in text


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "'messages' is of type str|not a list of messages"),
        ([], "'messages' is an empty list"),
        ([{"role": "user"}], "message 1 of 'messages' has no content"),
        ([{"content": "a"}], "message 1 of 'messages' has no role"),
        ([{"role": "robot", "content": "a"}], "has the role 'robot'; known are system,"),
        ([{"role": ["user"], "content": "a"}], "has the role"),
        (["a"], "message 1 of 'messages' is of type str"),
        (CHAT[:1], "ends with the user: the last message must be the assistant's"),
        (CHAT[1:], "begins with the assistant"),
        ([CHAT[0], {"role": "assistant", "content": ""}], "the content of message 2 of 'messages' is empty"),
        ([CHAT[0], {"role": "assistant", "content": 3}], "the content of message 2 of 'messages' is the number 3"),
        ([CHAT[0], {**CHAT[1], "weight": 0}], "has a weight"),
        ([{"role": "user", "content": [{"type": "image"}]}, CHAT[1]], "has a part that is no text (image)"),
        (None, "'messages' is null"),
    ],
)
def test_bad_messages_are_named(tmp_path, messages, reason):
    text = said(written(tmp_path / "a.jsonl", lines([{"messages": CHAT}, {"messages": messages}])))
    assert any(each in text for each in reason.split("|")) and "a.jsonl:2: " in text


def test_an_answer_may_be_a_call_of_a_tool(tmp_path):
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    chat += [{"role": "tool", "content": ""}, CHAT[1]]
    (row,) = read_rows(written(tmp_path / "a.jsonl", lines([{"messages": chat}])))
    assert row.content["messages"][1] == {"role": "assistant", "tool_calls": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \r\n\n", "holds no rows"),
        ("a.jsonl", b"\xef\xbb\xbf", "holds no rows"),
        ("a.json", b" ", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"3", "is one value alone"),
        ("a.json", b'{"a": ', "a.json:1 is no JSON"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "a.json:2: is no JSON: a comma or ] is missing"),
        ("a.json", b'[{"text": "a"},\n]', "a.json:2: is no JSON: Expecting value; what follows was not read"),
        ("a.json", b'[{"text": "a"},\n\n3]', "a.json:3: is no object"),
        ("a.json", b'[{"text": "a"}] x', "something follows the end"),
        ("a.json", b'[{"text": "a"},\n{"text": "a", "text": "b"}]', "a.json:2: has the key 'text' twice"),
        ("a.json", b"[" * 200_000, "nested too deeply"),
        ("a.json", b'\n{"text": "\xff"}', "a.json:2 is no UTF-8 (byte 0xff at 11)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl:2: is no UTF-8 (byte 0xe9 at 10)"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "is text in UTF-16"),
        ("a.jsonl", b"<!DOCTYPE html><p>", "is a web page"),
        ("a.jsonl", b"\x1f\x8b\x08 and more", "is packed with gzip"),
        ("a.jsonl.gz", b"no such thing", "cannot read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cannot read"),
        ("a.jsonl.xz", b"no such thing", "cannot read"),
        ("a.csv", b"text\n", "holds no rows"),
        ("a.csv", b"text,text\na,b\n", "has the column 'text' twice"),
        ("a.csv", b'prompt,completion\n"a\n\nb",c\n\nd\ne,f\ng,h,i\n', "a.csv:6: has 1 field; the first line names 2"),
        ("a.csv", b'prompt,completion\n"a\nb",c\na,"b\n', "a.csv:4: is no CSV"),
        ("a.csv", b"prompt,completion\na,b\nc,\xe9\n", "a.csv:3: is no UTF-8"),
        ("a.csv", b"prompt,completion\na,\n", "a.csv:2: 'completion' is empty"),
        ("a.parquet", b"PAR1 and nothing", "as Parquet"),
        ("a.txt", b"text", "no file of examples by its name"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(tmp_path, name, content, message):
    assert message in said(written(tmp_path / name, content))


def test_a_file_that_is_not_there_is_named_with_what_is_near(tmp_path):
    written(tmp_path / "train.jsonl", lines(PAIRS))
    assert f"did you mean {tmp_path / 'train.jsonl'}?" in said(str(tmp_path / "trian.jsonl"))
    assert "nor is there a directory" in said(str(tmp_path / "no" / "train.jsonl"))
    (tmp_path / "empty").mkdir()
    assert "holds no file of examples" in said(tmp_path / "empty")
    for odd in ("", "  ", "a\0b.jsonl", 5, None, "x" * 5000):
        said(odd)


def test_a_million_bad_rows_are_one_message_that_can_be_read(tmp_path):
    text = said(written(tmp_path / "a.jsonl", '{"text": "a"}\n' + '{"text": ""}\n' * 50_000))
    assert "50,000 rows cannot be used" in text and len(text) < 20_000 and "more" in text
