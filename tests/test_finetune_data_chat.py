"""Chats as tokens: what the assistant says is trained on, with its end, and nothing else, whatever the template."""

import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import NAMES, built, tokenizer

from lorakit.errors import LorakitError
from lorakit.finetune.data import Row, encode, prompt_of, shown

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
TAIL = (
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = HEAD + "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}" + TAIL
SHORT = HEAD + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}" + TAIL
LONG = HEAD + "{%- generation -%}{{ m['content'] + '<|im_end|>\n' }}{%- endgeneration -%}" + TAIL
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
ENDED = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
IMAGES = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<|im_end|>{% endfor %}"
BARE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIALS = ("<|im_start|>", "<|im_end|>")


def chat(*said: str, system: str | None = None, **more) -> Row:
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
    return Row("x:1", "messages", {"messages": messages, **more})


def trained(row: Row, tok, **more) -> list[list[str]]:
    """What is trained on of each example of a row."""
    found = encode([row], tok, **{"max_length": 9999, **more})
    return [[text for text, is_trained in shown(example, tok) if is_trained] for example in found]


TURNS = ("hi there", "hello", "more", " some more")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (SHORT, "<|im_end|>"), (LONG, "<|im_end|>")],
    ids=["plain", "marked", "marked without the end", "marked beyond the end"],
)
def test_answers_and_their_ends_are_trained_on_and_no_more(name, template, end):
    tok = built(name, SPECIALS, template)
    (found,) = trained(chat(*TURNS, system="Be brief."), tok)
    assert [text.removesuffix(end).strip() for text in found] == ["hello", "some more"]
    assert all(text.endswith(end) for text in found)
    (example,) = encode([chat(*TURNS)], tok, max_length=999).examples
    assert example.tokens[-1] == tok.convert_tokens_to_ids(end)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("ab \n.é", min_size=1, max_size=6).filter(lambda t: t.strip() != ""), min_size=2, max_size=6))
def test_a_chat_with_marks_and_without_is_the_same_and_begins_with_its_prompt(name, said):
    said = said[: len(said) // 2 * 2]
    plain, marked = (built_once(name, template) for template in (CHATML, MARKED))
    one, two = (encode([chat(*said)], tok, max_length=999) for tok in (plain, marked))
    assert one[0].tokens == two[0].tokens and one[0].trained == two[0].trained
    for tok in (plain, marked):
        ids, expected = prompt_of(chat(*said), tok)
        assert one[0].tokens[: len(ids)] == ids and all(one[0].trained[len(ids) :])
        assert expected == said[-1]
        assert prompt_of(chat(*said[:-1]), tok) == (ids, None)


CACHE: dict = {}


def built_once(name, template):
    if (name, template) not in CACHE:
        CACHE[name, template] = built(name, SPECIALS, template)
    return CACHE[name, template]


def test_tokens_are_those_of_the_whole_text_where_no_token_reaches_over_an_edge():
    for name in NAMES:
        tok = built_once(name, CHATML)
        whole = tok.apply_chat_template(chat(*TURNS).content["messages"], return_dict=False)
        (example,) = encode([chat(*TURNS)], tok, max_length=999).examples
        assert example.tokens == whole[: len(example)], name
        assert tok.decode(whole[len(example) :]).strip() == ""


def test_an_end_of_the_text_after_that_of_the_turn_parts_no_chat():
    tok = built("bytes", SPECIALS, ENDED)
    assert trained(chat(*TURNS), tok) == [["hello<|im_end|>", " some more<|im_end|>\n</s>"]]


def test_what_goes_without_an_end_gets_the_tokenizers_own():
    assert trained(chat(*TURNS), built("bytes", (), BARE)) == [["hello\n", " some more\n</s>"]]
    assert trained(chat(*TURNS), built("bytes", (), LLAMA2)) == [[" hello </s>", "  some more </s>"]]


def test_a_template_that_forgets_thoughts_gives_an_example_for_each_answer_as_it_is_generated():
    tok = built("bytes", SPECIALS, FORGETFUL)
    row = chat("a", "<think>x</think>b", "c", "<think>y</think>d")
    encoded = encode([row], tok, max_length=999)
    assert trained(row, tok) == [["<think>x</think>b<|im_end|>"], ["<think>y</think>d<|im_end|>"]]
    assert "<think>x" not in tok.decode(encoded[1].tokens)
    ids, _ = prompt_of(row, tok)
    assert encoded[1].tokens[: len(ids)] == ids
    assert encoded.report.parted == 1 and "1 chat became one example for each answer" in str(encoded.report)
    assert len(encode([chat("a", "b", "c", "d")], tok, max_length=999)) == 1  # nothing to forget


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (THINKING, chat("a", "b"), r"asks for an answer with .*<think>\\n', and writes one .*\{% generation %\}"),
        (LLAMA2, chat("a", "b", system="c"), "x:1: the chat template refuses it: no system here"),
        (IMAGES, chat("a long question", "b"), "x:1: the chat template (leaves out what message 1 says|refuses it)"),
        ("{% for m in messages %}{{ m['contents'] }}{% endfor %}", chat("a", "b"), "x:1: the chat template leaves out"),
        ("{{ messages[7]['content'] }}", chat("a", "b"), "x:1: the chat template refuses it"),
        ("{% for %}", chat("a", "b"), "no Jinja"),
        ("{{ 1 + 'a' }}", chat("a", "b"), "refuses it"),
    ],
)
def test_a_template_that_cannot_tell_what_is_said_is_refused(template, row, message):
    tok = built("bytes", SPECIALS, template)
    with pytest.raises(LorakitError, match=message):
        encode([row], tok, max_length=999)


def test_only_answers_of_the_completion_are_trained_on_where_prompt_and_completion_are_messages():
    for template in (CHATML, MARKED):
        tok = built("bytes", SPECIALS, template)
        assert trained(chat(*TURNS, first=3), tok) == [[" some more<|im_end|>"]]
        assert trained(chat(*TURNS, first=1), tok) == [["hello<|im_end|>", " some more<|im_end|>"]]
        ids, _ = prompt_of(chat(*TURNS, first=3), tok)
        (example,) = encode([chat(*TURNS, first=3)], tok, max_length=999).examples
        assert example.tokens[: len(ids)] == ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("template", ["chatml", "simple"])
def test_a_built_in_template_begins_and_ends_as_the_tokenizer_does(name, template):
    tok = tokenizer(name)
    (example,) = encode([chat(*TURNS)], tok, max_length=999, template=template).examples
    found = [text for text, is_trained in shown(example, tok) if is_trained]
    assert [text.strip() for text in found] == ["hello</s>", "some more</s>"]
    bos = tok("a")["input_ids"][0] == tok.bos_token_id
    assert example.tokens.count(tok.bos_token_id) == bos and (example.tokens[0] == tok.bos_token_id) == bos
    ids, expected = prompt_of(chat(*TURNS), tok, template)
    assert example.tokens[: len(ids)] == ids and expected == " some more"
    with_token = built(name, SPECIALS)
    (found,) = trained(chat("a", "b"), with_token, template="chatml")
    assert found == ["b<|im_end|>"]


def test_instructions_are_turns_where_there_is_a_chat_template_and_prompts_where_it_is_asked_for():
    tok = built("bytes", SPECIALS, CHATML)
    row = Row("x:1", "instruction", {"instruction": "a", "input": "b", "output": "c"})
    (example,) = encode([row], tok, max_length=999).examples
    assert tok.decode(example.tokens) == "<|im_start|>user\na\n\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>"
    row = Row("x:1", "prompt", {"prompt": "a", "completion": "b"})
    assert tok.decode(encode([row], tok, max_length=999)[0].tokens) == "ab</s>"
    turns = encode([row], tok, max_length=999, template=CHATML)[0]
    assert tok.decode(turns.tokens) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    ids, expected = prompt_of(row, tok, CHATML)
    assert turns.tokens[: len(ids)] == ids and expected == "b"


def test_a_chat_cut_short_keeps_the_first_answer_and_loses_later_turns():
    tok = built("bytes", SPECIALS, CHATML)
    whole = encode([chat(*TURNS)], tok, max_length=999)[0]
    for length in range(4, len(whole)):
        cut = encode([chat(*TURNS)], tok, max_length=length)[0]
        assert len(cut) <= length and any(cut.trained) and cut.trained[-1]


def test_tokens_that_take_white_space_with_them_do_so_in_pieces_as_in_the_whole():
    tok = built("bytes", SPECIALS, CHATML, rstrip=True)
    whole = tok.apply_chat_template(chat(*TURNS).content["messages"], return_dict=False)
    (example,) = encode([chat(*TURNS)], tok, max_length=999).examples
    assert example.tokens == whole[: len(example)]


# The templates that TRL comes with, those of many models


def trl_templates() -> list[Path]:
    found = importlib.util.find_spec("trl")
    places = list(found.submodule_search_locations or []) if found else []
    return sorted(path for place in places for path in Path(place, "chat_templates").glob("*.jinja"))


@pytest.mark.skipif(not trl_templates(), reason="no TRL here, whose templates these are")
def test_templates_of_many_models_train_answers_alone_or_are_refused():
    passed = 0
    user, answers = ("question one", "question two"), ("answer ONE", "answer TWO")
    row = chat(user[0], answers[0], user[1], answers[1])
    for path in trl_templates():
        template = path.read_text(encoding="utf-8")
        names = dict.fromkeys(
            re.findall(r"<[|｜][^<>\s'\"]{1,40}[|｜]>|<[a-z]+_of_[a-z]+>|<end_of_utterance>", template)
        )
        tok = built_once("bytes", template) if not names else built("bytes", tuple(names), template)
        try:
            encoded = encode([row], tok, max_length=9999)
        except LorakitError as error:
            assert re.search("asks for an answer|leaves out|refuses it", str(error)), path.name
            continue
        passed += 1
        pieces = [piece for example in encoded for piece in shown(example, tok)]
        said = "".join(text for text, is_trained in pieces if is_trained)
        heard = "".join(text for text, is_trained in shown(encoded[-1], tok) if not is_trained)
        assert all(said.count(answer) == 1 for answer in answers), path.name
        assert not any(text in said for text in user) and all(text in heard for text in user), path.name
        assert answers[1] not in heard, path.name
        ids, expected = prompt_of(row, tok)
        assert encoded[-1].tokens[: len(ids)] == ids and answers[1] in (expected or ""), path.name
        assert any(encoded[-1].trained[len(ids) :]), path.name
    assert passed > 50
