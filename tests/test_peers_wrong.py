"""Where PEFT's attention and encoder differ from W + s·BA, and ours do not."""

import copy
import warnings

import pytest
import torch
from helpers import assert_close, attached, dense
from torch import Tensor, nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def by_peft(base: nn.Module, targets: list[str], **more) -> nn.Module:
    """PEFT's model on a copy of the base, with noise in its factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=targets, r=2, lora_alpha=2, **more)
        model = peft.get_peft_model(copy.deepcopy(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
    return model


def updates_of(model: nn.Module) -> dict[str, Tensor]:
    """{the layer's name: B·A} of every adapted linear layer in PEFT's model."""
    tensors = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if "lora_" in name}
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[name.replace("_A.", "_B.")] @ A
        for name, A in tensors.items()
        if name.endswith(".lora_A.weight")
    }


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def our_own(base: nn.Module, updates: dict[str, Tensor], targets, **how) -> nn.Module:
    """The same updates here: rank 8 holds any 8×k matrix exactly, as B = 1 and A = the update."""
    model = copy.deepcopy(base)
    lk.attach(model, lk.LoRA(rank=8), targets, **how)
    with torch.no_grad():
        for name, update in updates.items():
            layer, _, parameter = name.rpartition(".")
            for tensor, value in zip("AB", split(update), strict=True):
                model.get_parameter(f"{layer}.lora.{parameter}.default.{tensor}").copy_(value)
    return model


def split(update: Tensor) -> tuple[Tensor, Tensor]:
    """A (8, k) and B (d, 8) with B·A = update, exactly if d or k is 8."""
    return (update, torch.eye(8)) if update.shape[0] == 8 else (torch.eye(8), update)


def test_attention_gets_its_output_update_once():
    torch.manual_seed(0)
    base, x = Attention().eval(), torch.randn(2, 3, 8)
    theirs = by_peft(base, ["attention"]).eval()
    updates = {}
    for name, update in updates_of(theirs).items():
        out = name.endswith("out_proj") or name.endswith("base_layer.out_proj")
        updates["attention.out_proj.weight" if out else "attention.in_proj_weight"] = update
    assert {update.shape for update in updates.values()} == {(24, 8), (8, 8)}
    wanted = dense(base, updates)(x)
    targets = ["in_proj_weight", "out_proj"]
    ours = our_own(base, updates, targets)
    for model in (ours, ours.train()):
        assert_close(model(x), wanted)
    twice = {name: update * (2 if "out" in name else 1) for name, update in updates.items()}
    assert (theirs(x) - wanted).abs().max() > 0.1
    assert_close(theirs(x), dense(base, twice)(x))  # this is what it computes instead


def test_dropout_in_a_config_keeps_the_layers_of_an_encoder_beside_their_calls(tmp_path):
    torch.manual_seed(0)
    base, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval(), torch.randn(2, 3, 8)
    theirs = by_peft(base, ["linear1", "linear2"], lora_dropout=0.1)
    wanted = dense(base, {f"{name}.weight": update for name, update in updates_of(theirs).items()})(x)
    theirs.save_pretrained(str(tmp_path / "a"))
    plan = lk.load(base, tmp_path / "a")
    assert {row.applied for row in plan.rows} == {"beside"}
    with torch.no_grad():
        assert_close(base(x), wanted)


@pytest.mark.parametrize("part", ["linear1", "linear2", "self_attn"])
def test_an_encoder_has_its_update_in_eval(part):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 3, 8)
    theirs = by_peft(base, [part]).eval()
    ours = attached(copy.deepcopy(base), targets=part)
    with torch.no_grad():
        plain = base(x)
        assert torch.equal(theirs(x), plain)  # nothing, and without a word
        y = ours(x)
        assert (y - plain).abs().max() > 1e-3
        assert_close(y, ours.train()(x))
    assert lk.probe(ours, x).ok
