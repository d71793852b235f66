"""Rows of q and k in the two orders of rotary embeddings: each is the inverse of the other, and both compute alike."""

import warnings

import pytest
import torch
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import GROUPS, HEADS, SIZE, WIDTH, llama
from torch import Tensor

import lorakit as lk
from lorakit.formats.rope import to_halves, to_pairs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_each_order_of_rows_is_the_inverse_of_the_other(heads, half, width, dtype):
    rows = torch.randn(heads * half * 2, width).to(dtype)
    assert torch.equal(to_halves(to_pairs(rows, heads), heads), rows)
    assert torch.equal(to_pairs(to_halves(rows, heads), heads), rows)


@pytest.mark.parametrize("heads", [0, 3, 4])
def test_rows_that_are_no_heads(heads):
    with pytest.raises(lk.LorakitError, match="heads of an even number"):
        to_halves(torch.ones(4, 2), heads)


def test_both_orders_give_the_same_scores():
    model = llama()
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 5, WIDTH)
    cos, sin = model.model.rotary_emb(x, torch.arange(5)[None])  # (1, 5, SIZE), each angle twice
    q, k = ((x @ W.T).view(1, 5, -1, SIZE).transpose(1, 2) for W in (attention.q_proj.weight, attention.k_proj.weight))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    wanted = q @ k.repeat_interleave(HEADS // GROUPS, 1).mT
    turn = torch.complex(cos, sin)[..., : SIZE // 2]  # neighbours are one complex number

    def in_pairs(weight: Tensor, heads: int) -> Tensor:
        rows = (x @ to_pairs(weight, heads).T).view(1, 5, heads, SIZE // 2, 2).contiguous()
        turned = torch.view_as_complex(rows) * turn.unsqueeze(2)
        return torch.view_as_real(turned).flatten(3).transpose(1, 2)

    q, k = in_pairs(attention.q_proj.weight, HEADS), in_pairs(attention.k_proj.weight, GROUPS)
    assert_close(q @ k.repeat_interleave(HEADS // GROUPS, 1).mT, wanted, factor=10)
