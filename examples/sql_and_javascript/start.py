"""A start for a small Llama that can copy: the two heads that make an induction head, put in place before training.

Names and numbers of a question get into its answer by induction (Olsson et al. 2022, arXiv:2209.11895): a head in one
layer notes at each place which token came before, and a head in the next looks for places whose note is the token at
hand, and gives the token there. Networks find this by themselves after some hundred million tokens; in three million
tokens of text, or of random tokens that repeat, this one did not. So it begins with it, as with any other
initialization (compare Trockman & Kolter 2023, arXiv:2305.09828), and training goes on from there.
"""

import math
from typing import Any

import torch
from torch import Tensor

SHARE = 0.7
"""Of an embedding's length, what is the same in all: what the first head's queries and keys are made of."""
SHARPNESS = 20.0
"""How far the score of the place before is above that of other places."""
MATCH = 14.0
"""The score of an equal token."""

LOUDER = 3.0
"""What the embedding is multiplied by: it is the head too, and a small one can say little for any token."""
COPIED = 4.0
"""How loud the second head says what it has found."""


@torch.no_grad()
def start_copying(model: Any, draw: torch.Generator) -> None:
    """Change the initialization of a Llama's embedding and of the attention of its first two layers, in place."""
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(size // 2) / (size // 2))  # radians for each place
    common = torch.randn(width, generator=draw)
    common = common / common.norm()
    embedding = model.model.embed_tokens.weight
    embedding -= (embedding @ common).outer(common)
    embedding *= LOUDER
    length = embedding.norm(dim=1).mean()
    embedding += SHARE / math.sqrt(1 - SHARE**2) * length * common

    # What slowly turning pairs of a head hold is compared by content, whatever the distance.
    slow = (theta * 64 < 1.0).nonzero().flatten()
    places = torch.cat([slow, slow + size // 2])
    token, note = (_orthonormal(heads * len(places), width, common, draw) for _ in range(2))
    # After the first layer a note is as long as what the embedding tells of a token.
    gain = math.sqrt(width / (heads * len(places))) / math.sqrt(width * (1 - SHARE**2)) * length
    # In the second layer's inputs, of length √width, each of the two is about 1/√3, as the common part is.
    scale = math.sqrt(MATCH * math.sqrt(size) / (width / 3 * math.sqrt(heads * len(places) / width) / heads))
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        mine = slice(head * len(places), (head + 1) * len(places))
        _look_back(first, rows, theta, common, width)
        value = torch.zeros(size, width)
        value[: len(places)] = token[mine]
        first.v_proj.weight[rows] = value
        out = torch.zeros(width, size)
        out[:, : len(places)] = gain * note[mine].T
        first.o_proj.weight[:, rows] = out
        query, key = torch.zeros(size, width), torch.zeros(size, width)
        query[places], key[places] = token[mine], note[mine]
        second.q_proj.weight[rows] = scale * query
        second.k_proj.weight[rows] = scale * key
    full = _orthonormal(width, width, common, draw)
    second.v_proj.weight[:] = full
    second.o_proj.weight[:] = COPIED * full.T


def _look_back(attention: Any, rows: slice, theta: Tensor, common: Tensor, width: int) -> None:
    """Queries and keys that are the same for all tokens, turned so that they meet one place apart."""
    fast = (theta > 0.1).float()
    strength = SHARPNESS / (fast * (1 - torch.cos(theta))).sum() * math.sqrt(2 * len(theta))
    each = torch.sqrt(strength * fast) / (SHARE * math.sqrt(width))
    query = torch.cat([each, torch.zeros_like(each)])
    # A key at place t - 1 is turned by one angle less than the query at t: it begins one angle ahead.
    key = torch.cat([each * torch.cos(theta), each * torch.sin(theta)])
    attention.q_proj.weight[rows] = query.outer(common)
    attention.k_proj.weight[rows] = key.outer(common)


def _orthonormal(rows: int, width: int, apart: Tensor, draw: torch.Generator) -> Tensor:
    """Rows of length 1 at right angles to each other, as far as there is room, and to a vector."""
    matrix = torch.randn(width, width, generator=draw)
    found: Tensor = torch.linalg.qr((matrix - (matrix @ apart).outer(apart)).T).Q.T
    return found[:rows]
