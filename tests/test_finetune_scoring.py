"""Perplexity and exact match: of trained tokens alone, every token alike, whatever the batch."""

import json
import math

import pytest
import torch
from helpers import randomize
from small_lms import ARCHITECTURES, STORIES, needs_stories, small_lm

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.finetune.base import open_base
from lorakit.finetune.data import collate, encode, read_rows
from lorakit.finetune.generation import scoring
from lorakit.finetune.generation.generate import acting
from lorakit.finetune.generation.prompts import prompter_of
from lorakit.finetune.generation.scoring import Score, ask, is_same, questions_of, score
from lorakit.finetune.generation.steps import Sampling

PAIRS = [("How many rivers?", " three"), ("Who?", " the king of Spain, they say"), ("a" * 40, " b"), ("x", " yes " * 6)]


def rows_of(folder, pairs=PAIRS):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    return read_rows(str(path))


@pytest.fixture
def base(tmp_path):
    base = open_base(small_lm(tmp_path / "model"), device="cpu")
    lk.attach(base.model, lk.LoRA(rank=2), name="sql")
    randomize(base.model, "sql")
    return base


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, pytest.param("stories", marks=needs_stories)])
def test_the_loss_is_that_of_transformers_and_depends_on_neither_batch_nor_padding(tmp_path, architecture):
    where = STORIES if architecture == "stories" else small_lm(tmp_path / "model", architecture)
    base = open_base(where, device="cpu")
    examples = encode(rows_of(tmp_path), base.tokenizer, max_length=128).examples
    wanted, counts = [], []
    for example in examples:
        batch = collate([example], base.tokenizer.pad_token_id)
        with torch.no_grad():
            wanted.append(float(base.model(**batch).loss))
        counts.append(sum(example.trained))
    for size in (1, 2, 4, 9):
        found = score(base, examples, batch_size=size)
        assert list(found.counts) == counts
        assert [nats / n for nats, n in zip(found.nats, counts, strict=True)] == pytest.approx(wanted, abs=1e-5)
        mean = sum(loss * n for loss, n in zip(wanted, counts, strict=True)) / sum(counts)
        assert found.loss == pytest.approx(mean, abs=1e-5) and found.tokens == sum(counts)
        assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-4)


def test_every_token_counts_alike_and_no_loss_is_too_large():
    assert Score((2.0, 12.0), (2, 1)).loss == pytest.approx(14 / 3)
    assert Score((1e6,), (1,)).perplexity == math.inf
    assert math.isnan(Score((), ()).loss) and math.isnan(Score((0.0,), (0,)).perplexity)
    assert Score((math.nan,), (3,)).perplexity != Score((math.nan,), (3,)).perplexity


def test_each_adapter_has_a_loss_of_its_own_and_the_model_is_as_it_was(base, tmp_path):
    examples = encode(rows_of(tmp_path), base.tokenizer, max_length=128).examples
    base.model.train()
    alone, adapted = score(base, examples), score(base, examples, "sql")
    half = score(base, examples, {"sql": 0.5})
    assert len({alone.loss, adapted.loss, half.loss}) == 3 and base.model.training
    with lk.disabled(base.model):
        assert score(base, examples).loss == alone.loss
    with acting(base.model, "sql"), torch.no_grad():
        batch = collate(examples[:1], 0)
        assert float(base.model.eval()(**batch).loss) * adapted.counts[0] == pytest.approx(adapted.nats[0], rel=1e-4)


def test_fewer_examples_at_once_where_logits_are_large(base, tmp_path, monkeypatch):
    examples = encode(rows_of(tmp_path), base.tokenizer, max_length=128).examples
    before = score(base, examples, batch_size=4)
    sizes = []
    base.model.register_forward_pre_hook(lambda _, a, named: sizes.append(len(named["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(scoring, "_LOGITS", 1)
    assert score(base, examples, batch_size=4).loss == pytest.approx(before.loss, abs=1e-6)
    assert sizes == [1] * len(examples)


def test_answers_are_compared_with_what_was_expected(base, tmp_path):
    prompter = prompter_of(base)
    questions, lost = questions_of(rows_of(tmp_path), prompter)
    assert lost == 0 and [q.expected for q in questions] == [c for _, c in PAIRS]
    assert questions[0].tokens == tuple(base.tokenizer("How many rivers?")["input_ids"]) and ":1" in questions[0].where
    results = ask(base, questions, sampling=Sampling(6))
    assert not any(result.matched for result in results)
    # Told what it answers, all of it matches; with another adapter none does.
    told = [(prompt, result.got + "  ") for (prompt, _), result in zip(PAIRS, results, strict=True)]
    rows = rows_of(tmp_path, told)
    again, _ = questions_of(rows, prompter)
    assert all(result.matched for result in ask(base, again, sampling=Sampling(6), batch_size=3))
    assert not any(result.matched for result in ask(base, again, "sql", sampling=Sampling(6)))


def test_answers_may_be_compared_otherwise(base, tmp_path):
    questions, _ = questions_of(rows_of(tmp_path), prompter_of(base))
    seen = []

    def match(expected: str, got: str) -> bool:
        seen.append((expected, got))
        return "three" in expected

    results = ask(base, questions, sampling=Sampling(3), match=match)
    assert [result.matched for result in results] == [True, False, False, False]
    assert seen == [(result.question.expected, result.got) for result in results]
    with pytest.raises(LorakitError, match=r"pairs.jsonl:1: comparing answers failed: ZeroDivisionError"):
        ask(base, questions, sampling=Sampling(3), match=lambda expected, got: bool(1 / 0))


def test_space_around_an_answer_does_not_count_and_any_other_does():
    assert is_same(" a b\n", "a b") and not is_same("a  b", "a b") and not is_same("A", "a")


def test_prompts_without_room_for_an_answer_are_counted_and_text_has_none(base, tmp_path):
    questions, lost = questions_of(rows_of(tmp_path, [("a" * 128, "b"), ("a", "b")]), prompter_of(base))
    assert lost == 1 and len(questions) == 1
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "abc"}\n')
    assert questions_of(read_rows(str(path)), prompter_of(base, kind="text")) == ([], 0)
