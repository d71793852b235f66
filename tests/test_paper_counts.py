"""The numbers of trainable parameters that the paper's tables state (Hu et al. 2021), from plans on `meta`."""

import pytest
import torch
from torch import nn

import lorakit as lk

with torch.device("meta"):
    import transformers


def on_meta(config):
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def numbers(model, rank, targets):
    return lk.plan(model, lk.LoRA(rank), targets).parameters


def test_roberta_base_and_large_with_query_and_value():
    """Table 2: 0.3M and 0.8M."""
    base = on_meta(transformers.RobertaConfig())
    assert numbers(base, 8, ["query", "value"]) == 294_912
    large = on_meta(transformers.RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
    assert numbers(large, 8, ["query", "value"]) == 786_432


def test_deberta_xxl_with_query_and_value():
    """Table 2: 4.7M with r = 16 in q and v of 48 layers of 1536."""
    config = transformers.DebertaV2Config(
        hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144, vocab_size=128100
    )
    assert numbers(on_meta(config), 16, ["query_proj", "value_proj"]) == 4_718_592


@pytest.fixture(scope="module")
def gpt3():
    """The attention of the 175B: 96 layers of four matrices of 12,288 × 12,288."""
    with torch.device("meta"):
        return nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(12_288, 12_288, bias=False) for name in ("q", "k", "v", "o")})
            for _ in range(96)
        )


@pytest.mark.parametrize(
    ("rank", "targets", "wanted"),
    [
        (8, ["q"], 18_874_368),
        (8, ["v"], 18_874_368),
        (4, ["q", "v"], 18_874_368),
        (4, ["q", "k"], 18_874_368),
        (2, ["q", "k", "v", "o"], 18_874_368),
        (1, ["v"], 2_359_296),
        (1, ["q", "v"], 4_718_592),
        (8, ["q", "v"], 37_748_736),
        (64, ["q", "k", "v", "o"], 603_979_776),
    ],
)
def test_gpt3(gpt3, rank, targets, wanted):
    """Tables 4 and 5: 4.7M, 18.9M, 37.7M; and 35 MB of 16-bit numbers for the checkpoint."""
    assert numbers(gpt3, rank, targets) == wanted
