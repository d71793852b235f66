"""Packing: every example whole and once, the same loss and gradients as padded, and a model that leaks is refused."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.finetune.data import NO_LABEL, Example, check_packing, collate, pack
from lorakit.finetune.data.packing import Packed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as t

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GROUPS = {**SIZES, "num_key_value_heads": 2}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
OLD |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
KINDS = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig, GROUPS),
    "mistral": (t.MistralForCausalLM, t.MistralConfig, {**GROUPS, "sliding_window": 4}),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config, GROUPS),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {**GROUPS, "head_dim": 8}),
    "gemma": (t.GemmaForCausalLM, t.GemmaConfig, {**GROUPS, "head_dim": 8}),
    "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, {**GROUPS, "head_dim": 8, "sliding_window": 4}),
    "phi": (t.PhiForCausalLM, t.PhiConfig, SIZES),
    "phi3": (t.Phi3ForCausalLM, t.Phi3Config, {**SIZES, "pad_token_id": 0}),
    "gpt-neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, SIZES),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, OLD),
    "mixtral": (t.MixtralForCausalLM, t.MixtralConfig, {**GROUPS, "num_local_experts": 4}),
    "stablelm": (t.StableLmForCausalLM, t.StableLmConfig, GROUPS),
}
"""Those that keep examples apart by their positions."""

STATE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
HEADS = {"num_heads": 8, "head_dim": 8, "n_groups": 2}
LEAKY = {
    "mamba": (t.MambaForCausalLM, t.MambaConfig, STATE),
    "mamba2": (t.Mamba2ForCausalLM, t.Mamba2Config, {**STATE, **HEADS}),
    "bloom": (
        t.BloomForCausalLM,
        t.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "mpt": (t.MptForCausalLM, t.MptConfig, {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "opt": (
        t.OPTForCausalLM,
        t.OPTConfig,
        {key: SIZES[key] for key in SIZES if key not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "recurrentgemma": (
        t.RecurrentGemmaForCausalLM,
        t.RecurrentGemmaConfig,
        {**{key: SIZES[key] for key in SIZES if "position" not in key}, "num_hidden_layers": 3, "lru_width": 32},
    ),
}


def made(name: str, attention: str | None = None, **more) -> nn.Module:
    cls, config, sizes = {**KINDS, **LEAKY}[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = cls._from_config(
            config(**{**sizes, **more}), **({"attn_implementation": attention} if attention else {})
        )
    model.config.use_cache = False  # as transformers' Trainer does
    return model


def examples(lengths, seed=0) -> list[Example]:
    random = np.random.default_rng(seed)
    found = []
    for i, n in enumerate(lengths):
        mask = random.random(n) < 0.6
        mask[0] = False
        found.append(Example(random.integers(3, VOCABULARY, n), mask, f"a:{i}"))
    return found


# Rows


@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 40))
def test_every_example_is_whole_in_one_row_and_in_order(lengths, length):
    given_ones = examples(lengths)
    rows = pack(given_ones, length)
    assert sorted(int(e.where[2:]) for row in rows for e in row.examples) == list(range(len(lengths)))
    firsts = [int(row.examples[0].where[2:]) for row in rows]
    assert firsts == sorted(firsts)
    for row in rows:
        assert len(row) <= length
        order = [int(e.where[2:]) for e in row.examples]
        assert order == sorted(order)
        assert row.positions.tolist() == [i for e in row.examples for i in range(len(e))]
        assert row.ids.tolist() == [token for e in row.examples for token in e.tokens]
        starts = np.flatnonzero(row.positions == 0)
        assert not row.mask[starts].any()
    assert [row.where for row in rows] == [row.where for row in pack(given_ones, length)]
    # At most one row of the best fit is not more than half full.
    assert sum(2 * len(row) <= length for row in rows) <= 1


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(LorakitError, match="a:1 has 9 tokens, and rows to pack into 8: set max_length"):
        pack(examples([3, 9]), 8)
    for wrong in (1, True, 2.5):
        with pytest.raises(LorakitError, match="at least 2 tokens"):
            pack(examples([3]), wrong)
    with pytest.raises(LorakitError, match="not of both"):
        collate([*examples([3]), *pack(examples([3]), 8)], 0)


def test_a_packed_batch_has_positions_in_the_place_of_a_mask():
    rows = pack(examples([3, 4, 5]), 9)
    batch = collate(rows, pad_id=1, pad_to_multiple_of=4)
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert [len(row) for row in rows] == [9, 3] or sorted(len(row) for row in rows) == [3, 9]
    for i, row in enumerate(rows):
        n = len(row)
        assert batch["position_ids"][i].tolist() == [*row.positions.tolist(), *range(12 - n)]
        assert batch["labels"][i, n:].tolist() == [NO_LABEL] * (12 - n)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", KINDS)
def test_a_packed_batch_has_the_loss_and_gradients_of_a_padded_one(name, attention):
    model = made(name, attention)
    check_packing(model)
    given_ones = examples([7, 3, 9, 5, 8, 2])
    losses, gradients = [], []
    for batch in (collate(given_ones, 0), collate(pack(given_ones, 17), 0)):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(pack(given_ones, 17)) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][key], rtol=1e-5, atol=1e-5)


# The check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEAKY)
def test_a_model_that_leaks_is_refused(name, dtype):
    with pytest.raises(LorakitError, match=r"packing would let examples leak .* Train without packing"):
        check_packing(made(name).to(dtype))


@pytest.mark.parametrize("name", KINDS)
def test_a_model_in_bfloat16_with_dropout_and_adapters_is_no_reason_to_refuse(name):
    dropout = {
        key: 0.3 for key in ("attention_dropout", "resid_pdrop", "hidden_dropout") if hasattr(made(name).config, key)
    }
    model = made(name, **dropout).to(torch.bfloat16)
    lk.attach(model, lk.LoRA(rank=4, dropout=0.5), targets="all-linear", name="a")
    check_packing(model)


class Leaky(nn.Module):
    """A model that keeps examples apart but for a little: each token sees a part of the one before it."""

    def __init__(self, inner: nn.Module, share: float, only_in: bool | None) -> None:
        super().__init__()
        self.inner, self.share, self.only_in, self.config = inner, share, only_in, inner.config

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, position_ids, use_cache=False):
        found = self.inner.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state
        if self.only_in in (None, self.training):
            found = found + self.share * torch.nn.functional.pad(found, (0, 0, 1, 0))[:, :-1]
        return t.modeling_outputs.CausalLMOutput(logits=self.inner.lm_head(found))


@pytest.mark.parametrize("only_in", [None, True, False], ids=["always", "in train", "in eval"])
def test_a_little_leak_in_one_mode_is_found(only_in):
    check_packing(Leaky(made("llama"), 0.0, only_in))
    for share in (1e-3, 0.1):
        with pytest.raises(LorakitError, match="leak"):
            check_packing(Leaky(made("llama"), share, only_in))


class Unplaced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids):
        return self.embed(input_ids)


def test_a_model_without_positions_or_embeddings_or_that_fails_is_refused():
    with pytest.raises(LorakitError, match="takes no position_ids"):
        check_packing(Unplaced())
    model = made("llama")
    model.get_input_embeddings = lambda: None
    with pytest.raises(LorakitError, match="no embedding"):
        check_packing(model)
    model = made("llama")
    model.lm_head = nn.Linear(5, 5)
    with pytest.raises(LorakitError, match="cannot be run on a packed row"):
        check_packing(model)
    model = made("llama")
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(LorakitError, match="not finite"):
        check_packing(model)


def test_the_check_leaves_the_model_as_it_was():
    model = made("llama", attention_dropout=0.2)
    model.eval()
    model.model.layers[0].train()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: module.calls.add_(1) and None)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    check_packing(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("context", [2, 6, 17])
def test_a_model_of_a_short_context_is_checked_in_it(context):
    if context < 6:
        with pytest.raises(LorakitError):  # three examples of two tokens have no place in it
            check_packing(made("gpt2", n_positions=context))
    else:
        check_packing(made("gpt2", n_positions=context))


def test_a_packed_row_says_where_it_is_from():
    assert Packed(tuple(examples([2, 3]))).where == "a:0, a:1"
