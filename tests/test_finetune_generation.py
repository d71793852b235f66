"""Generation: what a prompt becomes depends on its adapter and its seed, not on who else is in the batch."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import randomize
from small_lms import ARCHITECTURES, STORIES, needs_stories, small_lm
from transformers import RepetitionPenaltyLogitsProcessor

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.finetune.base import Base, open_base
from lorakit.finetune.generation.generate import Request, acting, context_of, ends_of, generate, unmixable
from lorakit.finetune.generation.steps import Choose, Row, Sampling
from lorakit.finetune.generation.text import TextStream

PROMPTS = ("Once upon a time", "a", "The rivers of Texas are three: ")
ADAPTERS = ("sql", "js")


def opened(folder: Path, architecture: str = "llama", mode: str | None = None, std: float = 0.3, **config) -> Base:
    where = STORIES if architecture == "stories" else small_lm(folder, architecture, **config)
    base = open_base(where, device="cpu")
    for seed, name in enumerate(ADAPTERS):
        how = {} if mode is None else {"mode": mode}
        lk.attach(base.model, lk.LoRA(rank=2 + seed), name=name, **how)
        randomize(base.model, name, seed=seed, std=std)
    return base


def requests(base: Base, adapters=(None, *ADAPTERS)) -> list[Request]:
    return [Request(tuple(base.tokenizer(p)["input_ids"]), name) for p in PROMPTS for name in adapters]


@torch.no_grad()
def gap(base: Base, request: Request, tokens: tuple[int, ...]) -> float:
    """How far the second best token is behind the best, after these."""
    with acting(base.model, request.adapter):
        logits = base.model(torch.tensor([[*request.tokens, *tokens]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second


def assert_same_tokens(base: Base, request: Request, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Up to where two tokens are equally probable but for rounding; whether all are the same."""
    if a != b:
        place = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        assert gap(base, request, a[:place]) < 1e-4, (request, a, b)
    return a == b


def assert_same(base: Base, wanted: list[Request], got, alone) -> None:
    for request, a, b in zip(wanted, got, alone, strict=True):
        if assert_same_tokens(base, request, a.tokens, b.tokens):
            assert (a.text, a.ended) == (b.text, b.ended)


cases = pytest.mark.parametrize("architecture", [*ARCHITECTURES, pytest.param("stories", marks=needs_stories)])


@cases
def test_a_batch_of_prompts_and_adapters_gives_what_each_gives_alone(tmp_path, architecture):
    base = opened(tmp_path, architecture, std=0.1 if architecture == "stories" else 0.3)
    wanted, how = requests(base), Sampling(24)
    got = generate(base, wanted, how)
    for request, answer in zip(wanted, got, strict=True):
        ids = torch.tensor([request.tokens])
        choice = lk.disabled(base.model) if request.adapter is None else lk.active(base.model, request.adapter)
        with choice:  # transformers by itself, without any of ours
            out = base.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0,
                eos_token_id=sorted(ends_of(base)),
            )  # fmt: skip
        alone = tuple(token for token in out[0, ids.shape[1] :].tolist() if token not in ends_of(base))
        assert_same_tokens(base, request, answer.tokens, alone)
    assert len({answer.tokens for answer in got}) > len(PROMPTS), "the adapters do something"


@cases
@torch.no_grad()
def test_padded_rows_of_several_adapters_have_the_logits_of_each_alone(tmp_path, architecture):
    base = opened(tmp_path, architecture, std=0.1)
    wanted = requests(base)
    longest = max(len(request.tokens) for request in wanted)
    ids = torch.tensor([[0] * (longest - len(r.tokens)) + list(r.tokens) for r in wanted])
    mask = torch.tensor([[0] * (longest - len(r.tokens)) + [1] * len(r.tokens) for r in wanted])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with lk.per_row(base.model, [request.adapter for request in wanted]):
        together = base.model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for request, row in zip(wanted, together, strict=True):
        with acting(base.model, request.adapter):
            alone = base.model(torch.tensor([request.tokens])).logits[0, -1]
        assert torch.allclose(row, alone, atol=1e-4, rtol=1e-4)


def test_all_adapters_share_each_step(tmp_path):
    base = opened(tmp_path)
    steps = []
    base.model.register_forward_hook(lambda *_: steps.append(1))
    generate(base, requests(base), Sampling(5))
    assert len(steps) <= 5 + 2, "two to see whether it pads"


def test_adapters_in_the_weight_come_one_after_the_other_and_give_the_same(tmp_path):
    beside, inside = opened(tmp_path / "a"), opened(tmp_path / "b", mode="weight")
    wanted = requests(beside)
    assert unmixable(beside.model, [r.adapter for r in wanted]) is None
    assert "sql" in unmixable(inside.model, [r.adapter for r in wanted])
    assert_same(beside, wanted, generate(beside, wanted, Sampling(12)), generate(inside, wanted, Sampling(12)))


def test_a_layer_that_hides_the_rows_is_no_error_but_takes_longer(tmp_path):
    base = opened(tmp_path)
    wanted = requests(base)
    before = generate(base, wanted, Sampling(8))
    mlp = base.model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)
    with pytest.raises(LorakitError, match="first axis must be the batch"), lk.per_row(base.model, ["sql", "js"]):
        base.model(torch.tensor([[5, 6], [7, 8]]))
    assert_same(base, wanted, before, generate(base, wanted, Sampling(8)))


def test_strengths_act_as_activate_says(tmp_path):
    base = opened(tmp_path)
    tokens = requests(base)[0].tokens
    mix = {"sql": 0.7, "js": 0.3}
    got = generate(base, [Request(tokens, mix), Request(tokens, "sql"), Request(tokens)], Sampling(8))
    with lk.active(base.model, mix):
        ids = torch.tensor([tokens])
        out = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert list(got[0].tokens) == out[0, len(tokens) :].tolist()[: len(got[0].tokens)]


def test_the_model_is_as_it_was_afterwards(tmp_path):
    base = opened(tmp_path)
    lk.activate(base.model, {"sql": 0.5})
    base.model.train()
    own = base.model.generation_config
    generate(base, requests(base), Sampling(3))
    assert base.model.training and base.model.generation_config is own
    assert {name: each.strength for name, each in lk.adapters(base.model).items()} == {"sql": 0.5, "js": 0.0}
    with pytest.raises(ZeroDivisionError):
        generate(base, requests(base), Sampling(3), heard=lambda i, piece: 1 / 0)
    assert base.model.training and base.model.generation_config is own
    assert lk.adapters(base.model)["sql"].strength == 0.5


def test_what_a_model_says_of_generation_does_not_act(tmp_path):
    base = opened(tmp_path)
    plain = generate(base, requests(base), Sampling(8))
    for name, value in {
        "do_sample": True, "temperature": 3.0, "top_k": 2, "num_beams": 3, "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1, "min_new_tokens": 6, "suppress_tokens": [plain[0].tokens[0]],
    }.items():  # fmt: skip
        setattr(base.model.generation_config, name, value)
    assert [a.tokens for a in generate(base, requests(base), Sampling(8))] == [a.tokens for a in plain]


def test_noise_depends_on_the_seed_and_the_prompt_and_not_on_the_batch(tmp_path):
    base = opened(tmp_path)
    wanted, how = requests(base), Sampling(12, temperature=1.0, top_p=0.9, top_k=50, seed=7)
    together = generate(base, wanted, how)
    assert [a.text for a in together] == [a.text for a in generate(base, wanted, how)]
    assert [a.text for a in together] == [generate(base, [r], how)[0].text for r in wanted]
    assert [a.text for a in together] == [a.text for a in generate(base, wanted, how, batch_size=2)]
    other = generate(base, wanted, replace(how, seed=8))
    assert sum(a.text != b.text for a, b in zip(together, other, strict=True)) > len(wanted) / 2
    twice = generate(base, [wanted[0], wanted[0]], how)
    assert twice[0].text == together[0].text != twice[1].text
    free = replace(how, seed=None)
    assert generate(base, wanted[:3], free) != generate(base, wanted[:3], free)


def row_of(tokens=(1, 2), seed: int = 0) -> Row:
    return Row(0, list(tokens), None, 10, seed)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    rows = [row_of(seed=i) for i in range(4000)]
    drawn = Choose(Sampling(temperature=temperature), rows, 2)(
        torch.tensor([[1, 2]] * len(rows)), logits.repeat(len(rows), 1)
    )
    share = torch.bincount(drawn.argmax(-1), minlength=5) / len(rows)
    wanted = (logits[0] / temperature).softmax(-1)
    assert ((share - wanted).abs() < 4 * (wanted * (1 - wanted) / len(rows)).sqrt() + 1e-9).all()


def test_top_k_and_top_p_keep_the_fewest_tokens_and_greedy_is_their_limit():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(**how) -> list[int]:
        scores = Choose(Sampling(temperature=1.0, **how), [row_of()], 2)(torch.tensor([[1, 2]]), logits)
        return [i for i, score in enumerate(scores[0].tolist()) if score > -torch.inf]

    assert kept() == [0, 1, 2, 3] and kept(top_k=2) == [0, 1] and kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=0.5) == [0] and kept(top_p=0.51) == [0, 1] and kept(top_p=0.94) == [0, 1, 2]
    assert kept(top_p=1e-9) == [0] and kept(top_k=3, top_p=0.8) == [0, 1]


def test_the_repetition_penalty_is_that_of_transformers_without_the_padding():
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[4, 2, 5, 2]])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone())
    padded = torch.tensor([[0, 0, 4, 2, 5, 2]])
    got = Choose(Sampling(repetition_penalty=1.7), [row_of((4, 2, 5, 2))], 6)(padded, logits)
    assert torch.allclose(got, wanted) and not torch.equal(got, logits)


def test_a_text_ends_before_a_stop_string_and_none_of_it_is_heard(tmp_path):
    base = opened(tmp_path)
    wanted = requests(base)
    free = generate(base, wanted, Sampling(24))
    stop = next(answer.text[3:6] for answer in free if len(answer.text) > 8)
    heard: dict[int, list[str]] = {}
    how = Sampling(24, stop=(stop, "never there"))
    got = generate(base, wanted, how, heard=lambda i, piece: heard.setdefault(i, []).append(piece))
    for i, (answer, long) in enumerate(zip(got, free, strict=True)):
        assert answer.text == long.text.partition(stop)[0] == "".join(heard.get(i, []))
        assert (answer.ended == "stop") == (stop in long.text)
    assert any(answer.ended == "stop" for answer in got)


TEXTS = ["héllo wörld", "日本語 🙂👩‍👩‍👧 ok", " leading", "a\n\n  b\t", "trailing ", "ﷺ🏳️‍🌈", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", ["", "Say: ", "é"])
@pytest.mark.parametrize("which", ["bytes", pytest.param("stories", marks=needs_stories)])
def test_pieces_are_whole_characters_and_together_the_text(tmp_path, which, prompt, text):
    tokenizer = open_base(STORIES if which == "stories" else small_lm(tmp_path), device="cpu").tokenizer
    before = tokenizer(prompt)["input_ids"]
    tokens = [*before, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    stream = TextStream(tokenizer, before)
    pieces = [stream.add(token) for token in tokens[len(before) :]]
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    assert "\ufffd" not in stream.text
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert whole == tokenizer.decode(before, skip_special_tokens=True) + stream.text


def test_bytes_that_are_no_character_are_shown_in_the_end(tmp_path):
    tokenizer = open_base(small_lm(tmp_path), device="cpu").tokenizer
    half = tokenizer("🙂")["input_ids"][:2]
    stream = TextStream(tokenizer, [])
    assert [stream.add(token) for token in half] == ["", ""] and stream.end() != ""
    endless = TextStream(tokenizer, [])
    assert sum(len(endless.add(half[0])) for _ in range(200)) > 100, "they are not held back forever"


def test_a_stop_string_may_lie_across_tokens_and_begin_falsely(tmp_path):
    tokenizer = open_base(small_lm(tmp_path), device="cpu").tokenizer
    stream = TextStream(tokenizer, [], ("END", "ENDE", "\n\n"))
    pieces = [stream.add(token) for token in tokenizer("E EN E\nENEND more")["input_ids"]]
    assert "".join(pieces) == stream.text == "E EN E\nEN" and stream.stopped and stream.end() == ""


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_go_on_to_the_end_of_the_context_and_no_further(tmp_path, architecture):
    base = opened(tmp_path, architecture)
    context = context_of(base.model)
    sizes = ((127, "sql"), (100, None), (3, "js"))
    wanted = [Request(tuple([5 + i % 90 for i in range(size)]), name) for size, name in sizes]
    got = generate(base, wanted, Sampling(1000))
    alone = [generate(base, [request], Sampling(1000))[0] for request in wanted]
    assert_same(base, wanted, got, alone)
    for request, answer in zip(wanted, got, strict=True):
        assert answer.ended == "end" or len(request.tokens) + len(answer.tokens) == context
    with pytest.raises(LorakitError, match="leaves no room in the context of 128"):
        generate(base, [Request(tuple([5] * 128))])


def test_a_model_that_minds_padding_gets_none(tmp_path, monkeypatch):
    base = opened(tmp_path)
    wanted = requests(base)
    prepare = base.model.prepare_inputs_for_generation

    def without_mask(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name not in ("attention_mask", "position_ids")}

    monkeypatch.setattr(base.model, "prepare_inputs_for_generation", without_mask)
    sizes = []
    base.model.register_forward_pre_hook(lambda _, a, named: sizes.append(named["input_ids"].shape), with_kwargs=True)
    got = generate(base, wanted, Sampling(8))
    assert_same(base, wanted, got, [generate(base, [request], Sampling(8))[0] for request in wanted])
    assert (len(ADAPTERS) + 1, len(wanted[0].tokens)) in sizes, "rows of one length are still together"


def test_what_cannot_be_continued_is_one_message(tmp_path):
    base = opened(tmp_path)
    good = requests(base)[0].tokens
    for request, message in (
        (Request(good, "sqll"), "no adapter 'sqll': there are sql, js"),
        (Request(good, {"sql": 1.0, "x": 1.0}), "no adapter 'x'"),
        (Request(()), "empty"),
        (Request((5, 10_000)), "do not belong together"),
    ):
        with pytest.raises(LorakitError, match=message):
            generate(base, [request])
    for how in (
        {"max_new_tokens": 0}, {"max_new_tokens": True}, {"temperature": -1}, {"temperature": float("nan")},
        {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0}, {"seed": 1.5}, {"stop": ("",)},
        {"stop": "END"},
    ):  # fmt: skip
        with pytest.raises(LorakitError, match=next(iter(how))):
            Sampling(**how)
    with pytest.raises(LorakitError, match="batch_size"):
        generate(base, [Request(good)], batch_size=0)
    assert generate(base, []) == []


def test_a_model_that_computes_nan_says_so(tmp_path):
    base = opened(tmp_path)
    with torch.no_grad():
        base.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(LorakitError, match="NaN"):
        generate(base, requests(base), Sampling(3))


def test_a_base_without_adapters_and_prompts_of_any_order_keep_their_answers(tmp_path):
    base = open_base(small_lm(tmp_path), device="cpu")
    tokens = [tuple(base.tokenizer("x" * size)["input_ids"]) for size in (3, 9, 1, 9, 5)]
    finished = []
    got = generate(
        base, [Request(t) for t in tokens], Sampling(6), batch_size=2, finished=lambda i, a: finished.append((i, a))
    )
    assert [answer.tokens for answer in got] == [generate(base, [Request(t)], Sampling(6))[0].tokens for t in tokens]
    assert sorted(finished) == list(enumerate(got))
    with acting(base.model, None) as nothing:
        assert nothing is None and isinstance(acting(base.model, None), nullcontext)
