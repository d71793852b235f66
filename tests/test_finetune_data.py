"""From rows to tokens: prompt and completion apart, ends where they belong, nothing lost unsaid, batches."""

import ast
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import NAMES, SHARED_ONES, built, tokenizer

from benchmarks.real.data import SHARED
from lorakit.errors import LorakitError
from lorakit.finetune import data
from lorakit.finetune.data import NO_LABEL, Row, collate, encode, prompt_of, shown, split_off, stops_of
from lorakit.finetune.data.rows import Rows

needs_shared = pytest.mark.skipif(
    not (SHARED / "models" / "stories260K").is_dir(),
    reason=f"no tokenizers in {SHARED}; set LORAKIT_SHARED to where they lie",
)
TOKENIZERS = [*NAMES, *(pytest.param(name, marks=needs_shared) for name in SHARED_ONES)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.text("ab \n\t.é—", max_size=8)
SAID = TEXT.filter(lambda text: text.strip() != "")


def prompted(prompt: str, completion: str, where: str = "x:1") -> Row:
    return Row(where, "prompt", {"prompt": prompt, "completion": completion})


def instructed(instruction: str, more: str, output: str) -> Row:
    return Row("x:1", "instruction", {"instruction": instruction, "input": more, "output": output})


def one(row: Row, tok, **more):
    (example,) = encode([row], tok, **{"max_length": 4000, **more}).examples
    return example


def decoded(tok, ids) -> str:
    return tok.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


# The laws of an example


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=SAID)
def test_a_prompt_is_the_beginning_of_what_is_trained_and_all_the_rest_is_trained_on(name, prompt, completion):
    tok = tokenizer(name)
    example = one(prompted(prompt, completion), tok)
    ids, expected = prompt_of(prompted(prompt, completion), tok)
    assert example.tokens[: len(ids)] == ids and expected == completion
    assert example.trained[1:] == ([False] * len(ids) + [True] * (len(example) - len(ids)))[1:]
    assert example.tokens[-1] == tok.eos_token_id and example.tokens.count(tok.eos_token_id) == 1
    assert not example.trained[0]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=SAID)
def test_the_tokens_are_the_text(name, prompt, completion):
    tok = tokenizer(name)
    text = decoded(tok, one(prompted(prompt, completion), tok).tokens)
    whole = decoded(tok, tok(prompt + completion, add_special_tokens=False)["input_ids"])
    if "▁" not in prompt + completion:
        assert text == whole
    if name in ("bytes", *SHARED_ONES):
        assert text == prompt + completion


@pytest.mark.parametrize("name", TOKENIZERS)
def test_instructions_without_a_chat_template_stand_under_headings(name):
    tok = tokenizer(name)
    for more in ("", "the data"):
        row = instructed("Do it.", more, "Done.")
        example, (ids, expected) = one(row, tok), prompt_of(row, tok)
        heading = f"### Input:\n{more}\n\n" if more else ""
        assert decoded(tok, ids).lstrip() == f"### Instruction:\nDo it.\n\n{heading}### Response:\n"
        assert example.tokens[: len(ids)] == ids and expected == "Done."
        assert [text.replace(tok.eos_token, "").strip() for text, trained in shown(example, tok) if trained] == [
            "Done."
        ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_trained_on_but_for_what_nothing_predicts(name):
    tok = tokenizer(name)
    row = Row("x:1", "text", {"text": "Hello there"})
    example, (ids, expected) = one(row, tok), prompt_of(row, tok)
    assert example.tokens == [*ids, tok.eos_token_id] and expected is None
    assert example.trained == [False] + [True] * (len(example) - 1)


def test_a_tokenizer_that_begins_and_ends_texts_itself_does_so_once():
    tok = tokenizer("metaspace first, both ends")
    for row in (prompted("Hello", " there"), Row("x:1", "text", {"text": "Hello there"}), instructed("a", "b", "c")):
        tokens = one(row, tok).tokens
        assert tokens[0] == tok.bos_token_id and tokens.count(tok.bos_token_id) == 1
        assert tokens[-1] == tok.eos_token_id and tokens.count(tok.eos_token_id) == 1
    for row in (prompted("<s>Hello", " there</s>"), prompted("<s>Hello", " there")):
        assert one(row, tok).tokens.count(tok.bos_token_id) == 1
        assert one(row, tok).tokens.count(tok.eos_token_id) == 1
    assert prompt_of(prompted("", "x"), tok)[0] == [tok.bos_token_id]


def test_a_prompt_may_be_asked_without_an_answer():
    tok = tokenizer("bytes")
    for asked, answered in (
        (Row("x", "prompt", {"prompt": "Hello"}), prompted("Hello", "there")),
        (Row("x", "instruction", {"instruction": "Do it."}), instructed("Do it.", "", "Done.")),
    ):
        assert prompt_of(asked, tok) == (prompt_of(answered, tok)[0], None)
        with pytest.raises(LorakitError, match="nothing is left to train on"):
            one(asked, tok)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_shown_are_the_whole_text(name):
    tok = tokenizer(name)
    example = one(prompted("Hello there", " é of the — same"), tok)
    pieces = shown(example, tok)
    assert "".join(text for text, _ in pieces) == tok.decode(example.tokens, clean_up_tokenization_spaces=False)
    assert [trained for _, trained in pieces] == [False, True]
    assert pieces[1][0].startswith(" é of the — same")


def test_all_may_be_trained_on():
    example = one(prompted("Hello", "there"), tokenizer("bytes"), train_on="all")
    assert example.trained == [False] + [True] * (len(example) - 1)


def test_a_tokenizer_without_an_end_is_reported():
    tok = built("bytes")
    tok.eos_token = None
    encoded = encode([prompted("Hello", " there")], tok, max_length=99)
    assert decoded(tok, encoded[0].tokens) == "Hello there" and "without an end" in str(encoded.report)


# Templates


def test_a_plain_template_is_filled_in():
    tok = tokenizer("bytes")
    row = instructed("Sum {input}.", "1 {prompt}", "2")
    for template, text in (
        ("Q: {prompt}\nA: ", "Q: Sum {input}.\n\n1 {prompt}\nA: 2"),
        ("{instruction}|{input}|", "Sum {input}.|1 {prompt}|2"),
        ('{"q": {prompt}, "a": {completion}}', '{"q": Sum {input}.\n\n1 {prompt}, "a": 2}'),
    ):
        example = one(row, tok, template=template)
        assert decoded(tok, example.tokens) == text
        ids, expected = prompt_of(row, tok, template)
        assert example.tokens[: len(ids)] == ids and expected == "2"
    alpaca = decoded(tok, one(instructed("Do.", "", "x"), tok, template="alpaca").tokens)
    assert alpaca.startswith("Below is") and "Input" not in alpaca


def test_a_template_may_be_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Q: {prompt} A:", encoding="utf-8")
    tok = tokenizer("bytes")
    assert decoded(tok, one(prompted("b", " c"), tok, template=str(path)).tokens) == "Q: b A: c"


@pytest.mark.parametrize(
    ("kind", "template", "message"),
    [
        ("messages", None, "no chat template: name one with template, such as 'chatml'"),
        ("messages", "alpaca", "no chat template"),
        ("messages", "Q: {prompt}", "no chat template"),
        ("text", "chatml", "leave the template away"),
        ("prompt", "chatlm", "did you mean 'chatml'"),
        ("prompt", "", "must be text"),
        ("prompt", "{promt} x", r"did you mean \{prompt\}"),
        ("prompt", "{input} x", "no place for the prompt"),
        ("prompt", "{completion} {prompt}", "after all else"),
        ("instruction", "{instruction} x", "no place for the input"),
        ("prompt", "{% if x %}{{ x }}", "no Jinja"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(kind, template, message):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    content = {"messages": chat, "prompt": "a", "completion": "b", "instruction": "a", "input": "i", "output": "b"}
    with pytest.raises(LorakitError, match=message):
        one(Row("x:1", kind, {**content, "text": "a"}), tokenizer("bytes"), template=template)


def test_stops_are_the_tokens_that_end_answers():
    tok = built("bytes", ("<|im_start|>", "<|im_end|>"), CHATML)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert set(stops_of("messages", tok)) == {end, tok.eos_token_id} == set(stops_of("instruction", tok))
    assert stops_of("prompt", tok) == stops_of("text", tok) == (tok.eos_token_id,)


def test_prompts_and_completions_that_meet_without_a_space_are_reported():
    tok = tokenizer("bytes")
    rows = [prompted("Hello", "there"), prompted("a", "b"), prompted("a", " b")]
    report = encode(rows, tok, max_length=99).report
    assert report.touching == 2 and "2 prompts and completions meet without white space" in str(report)
    assert "meet" not in str(encode(rows[1:], tok, max_length=99).report)
    assert encode(rows, tok, max_length=99, template="{prompt}: ").report.touching == 0


# Too long


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(2, 40))
def test_what_is_too_long_is_cut_to_the_end_of_the_prompt_and_the_beginning_of_the_completion(asked, said, length):
    tok = tokenizer("metaspace first, both ends")
    row = prompted("0123456789" * (asked // 10) + "0123456789"[: asked % 10], "xyz" * said)
    whole, cut = one(row, tok), one(row, tok, max_length=length)
    lead = len(prompt_of(row, tok)[0])
    kept = cut.trained.count(True)
    assert len(cut) == min(length, len(whole)) and kept >= 1
    assert cut.tokens[0] == tok.bos_token_id
    assert cut.tokens[len(cut) - kept :] == whole.tokens[lead : lead + kept]
    assert cut.tokens[1 : len(cut) - kept] == whole.tokens[lead - (len(cut) - kept - 1) : lead]
    assert kept == len(whole) - lead or len(cut) - kept <= max(1, length // 2)


def test_what_is_cut_or_left_out_is_reported():
    tok = tokenizer("bytes")
    rows = [prompted("Hello", " there", "a:1"), prompted("q" * 50, "x", "a:2"), prompted("q", "x" * 50, "a:3")]
    report = encode(rows, tok, max_length=20).report
    assert (report.rows, report.examples, report.truncated) == (3, 3, 2) and report.lost_tokens > 0
    assert "cut to 20 tokens: 2 examples" in str(report)
    dropped = encode(rows, tok, max_length=20, truncation="drop")
    assert [example.where for example in dropped] == ["a:1"]
    assert dropped.report.dropped == {"longer than 20 tokens": ("a:2", "a:3")}
    assert "left out, longer than 20 tokens: 2 (a:2, a:3)" in str(dropped.report)
    with pytest.raises(LorakitError, match=r"(?s)2 rows cannot.*a:2: has 5\d tokens; max_length is 20.*a:3"):
        encode(rows, tok, max_length=20, truncation="error")
    with pytest.raises(LorakitError, match="nothing is left to train on"):
        encode(rows[1:], tok, max_length=20, truncation="drop")


@pytest.mark.parametrize(
    "wrong", [{"max_length": 1}, {"max_length": True}, {"truncation": "cutt"}, {"train_on": "prompt"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(LorakitError, match=str(next(iter(wrong)))):
        one(prompted("a", "b"), tokenizer("bytes"), **wrong)


def test_encoding_twice_gives_the_same_and_takes_little_time():
    tok = tokenizer("bytes")
    rows = [prompted(f"how many states border number {i}?", f"SELECT {i}") for i in range(20_000)]
    start = time.process_time()
    encoded = encode(rows, tok, max_length=64)
    assert time.process_time() - start < 8
    assert (
        encode(rows, tok, max_length=64).digest() == encoded.digest() != encode(rows[1:], tok, max_length=64).digest()
    )


# Apart, and batches


def rows_of(n: int) -> Rows:
    items = [prompted(f"p{i}", f"c{i}", f"a:{i}") for i in range(n)]
    return Rows("a", "prompt", {"prompt": "prompt", "completion": "completion"}, (), items)


@given(st.integers(2, 60), st.floats(0.01, 0.4) | st.integers(0, 20), st.integers(0, 3))
def test_rows_apart_are_the_same_each_time_and_none_is_in_both(n, asked, seed):
    rows = rows_of(n)
    if isinstance(asked, int) and asked >= n:
        with pytest.raises(LorakitError, match="leaves none"):
            split_off(rows, asked, seed)
        return
    train, held = split_off(rows, asked, seed)
    assert (train, held) == split_off(rows, asked, seed)
    assert sorted([*train, *held], key=rows.items.index) == list(rows)
    assert len(held) == (asked if isinstance(asked, int) else max(1, round(asked * n)))
    assert [*train] == sorted(train, key=rows.items.index)


@pytest.mark.parametrize("asked", [-1, True, float("nan"), float("inf"), 1.5, "5"])
def test_no_share_is_refused(asked):
    with pytest.raises(LorakitError, match="apart"):
        split_off(rows_of(9), asked, 0)


def test_a_batch_is_filled_up_on_the_right():
    tok = tokenizer("bytes")
    examples = encode([prompted("Hello", " there"), prompted("a", "b" * 20)], tok, max_length=99).examples
    batch = collate(examples, pad_id=7, pad_to_multiple_of=8)
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    width = batch["input_ids"].shape[1]
    assert width % 8 == 0 and 0 <= width - max(map(len, examples)) < 8
    for i, example in enumerate(examples):
        n = len(example)
        assert batch["input_ids"][i].tolist() == example.tokens + [7] * (width - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
        labels = [t if m else NO_LABEL for t, m in zip(example.tokens, example.trained, strict=True)]
        assert batch["labels"][i].tolist() == labels + [NO_LABEL] * (width - n)
    assert collate(examples[:1], 7)["attention_mask"].all()
    with pytest.raises(LorakitError, match="no examples"):
        collate([], 0)


def test_nothing_heavy_is_loaded_with_the_package():
    light = {"torch", "numpy", "lorakit"}
    for path in Path(data.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= light | sys.stdlib_module_names
