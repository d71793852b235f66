"""loralib's adapters: read, written, and computing what its own layers compute."""

import os
from pathlib import Path

import loralib
import pytest
import torch
from helpers import assert_bits, assert_close
from torch import Tensor, nn

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_value
from lorakit.formats import read_content

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared")) / "adapters"
ALPHA = 5.0


class Net(nn.Module):
    """An embedding, a linear layer, a fused projection and a convolution, with LoRA by loralib or bare."""

    def __init__(self, enabled=None, groups: int = 1, bare: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        more = {"r": 2, "lora_alpha": ALPHA}
        if bare:
            self.embed, self.fc, self.qkv = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 12)
            self.conv = nn.Conv2d(4, 6 if groups == 1 else 4, 3, groups=groups, padding=1)
        else:
            self.embed, self.fc = loralib.Embedding(11, 8, **more), loralib.Linear(8, 8, **more)
            self.qkv = loralib.MergedLinear(8, 12, enable_lora=list(enabled), **more)
            self.conv = loralib.Conv2d(4, 6 if groups == 1 else 4, 3, groups=groups, padding=1, **more)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.qkv(torch.tanh(self.fc(self.embed(ids))))  # (n, 12)
        return self.conv(x.reshape(-1, 4, 3, 1).expand(-1, -1, -1, 3))


def by_loralib(enabled=(True, False, True), groups: int = 1) -> tuple[Net, Net]:
    """A bare network, and loralib's with the same base and trained factors."""
    torch.manual_seed(1)
    bare, live = Net(groups=groups), Net(enabled, groups, bare=False)
    base = {key.replace("conv.", "conv.conv."): value for key, value in bare.state_dict().items()}
    live.load_state_dict(base, strict=False)
    with torch.no_grad():
        for key, parameter in live.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return bare, live


IDS = torch.tensor([1, 5, 10, 2])
ENABLED = [(True, False, True), (True, True, True), (False, True, False), (False, True, True, False)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_loralib_loads_to_what_its_layers_compute(enabled, groups, tmp_path):
    bare, live = by_loralib(enabled, groups)
    torch.save(loralib.lora_state_dict(live), tmp_path / "a.pt")
    lk.load(bare, tmp_path / "a.pt", alpha=ALPHA, enabled=enabled)
    assert_close(bare(IDS), live(IDS), factor=10)


@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_loralib_is_written_as_it_was_read(enabled, tmp_path):
    _, live = by_loralib(enabled)
    state = loralib.lora_state_dict(live)
    torch.save(state, tmp_path / "a.pt")
    value = read(tmp_path / "a.pt", alpha=ALPHA, enabled=enabled)
    lost = write(value, tmp_path / "b.pt", "loralib")
    assert_bits(torch.load(tmp_path / "b.pt"), state)
    assert any("alpha" in each and "5" in each for each in lost)
    write(value, tmp_path / "native")
    write(read(tmp_path / "native"), tmp_path / "c.bin", "loralib")
    assert_bits(torch.load(tmp_path / "c.bin"), state)


@pytest.mark.parametrize("enabled", ENABLED, ids=str)
def test_loralib_resolved_is_native_and_back_what_its_layers_compute(enabled, tmp_path):
    bare, live = by_loralib(enabled)
    torch.save(loralib.lora_state_dict(live), tmp_path / "a.pt")
    value = renamed_for(read(tmp_path / "a.pt", alpha=ALPHA, enabled=enabled), bare)
    write(value, tmp_path / "native")
    lk.load(bare, tmp_path / "native")
    assert_close(bare(IDS), live(IDS), factor=10)
    assert_bits(lk.adapter_state_dict(bare), read(tmp_path / "native").state_dict())


def test_loralib_layers_compute_what_is_written_for_them(tmp_path):
    bare, live = by_loralib()
    lk.attach(bare, lk.LoRA(rank=2, alpha=ALPHA), targets=["embed", "fc", "conv"])
    with torch.no_grad():
        for parameter in bare.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * 0.4)
    write(adapter_value(bare), tmp_path / "a.pt", "loralib")
    state = torch.load(tmp_path / "a.pt")
    assert state.keys() == {key for key in loralib.lora_state_dict(live) if not key.startswith("qkv")}
    with torch.no_grad():
        live.qkv.lora_B.zero_()
    live.load_state_dict(state, strict=False)
    assert_close(bare(IDS), live(IDS), factor=10)
    again = Net()
    lk.load(again, tmp_path / "a.pt", alpha=ALPHA)  # B of the convolution is found again, to the bit
    assert_bits(lk.adapter_state_dict(again), lk.adapter_state_dict(bare))


def test_loralib_biases_are_whole_parameters(tmp_path):
    bare, live = by_loralib()
    with torch.no_grad():
        live.fc.bias += 1
        live.conv.conv.bias += 1
    torch.save(loralib.lora_state_dict(live, bias="all"), tmp_path / "a.pt")
    lk.load(bare, tmp_path / "a.pt", alpha=ALPHA, enabled=(True, False, True))
    assert_close(bare(IDS), live(IDS), factor=10)


def test_loralib_asks_for_what_no_file_holds(tmp_path):
    bare, live = by_loralib()
    torch.save(loralib.lora_state_dict(live), tmp_path / "a.pt")
    value = read(tmp_path / "a.pt")
    assert value.missing == ("alpha", "enabled")
    with pytest.raises(lk.LorakitError, match=r"alpha=.*enabled="):
        write(value, tmp_path / "b.pt", "loralib")
    with pytest.raises(lk.LorakitError, match=r"2 parts are adapted.*says 1"):
        lk.load(bare, tmp_path / "a.pt", alpha=1, enabled=(True, False, False))
    with pytest.raises(lk.LorakitError, match="12 rows here, and 8"):
        lk.load(bare, tmp_path / "a.pt", alpha=1, enabled=(True, True))


def test_loralib_folds_scales_that_one_alpha_does_not_say(tmp_path):
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    lk.attach(layers, lk.LoRA(rank=2, alpha=4), "all-linear", alphas={"1": 3}, ranks={"2": 3})
    with torch.no_grad():
        for parameter in layers.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    write(adapter_value(layers), tmp_path / "a.pt", "loralib")
    wanted = layers(torch.ones(1, 6))
    lk.detach(layers)
    lk.load(layers, tmp_path / "a.pt", alpha=4)
    assert_close(layers(torch.ones(1, 6)), wanted, factor=4)


@pytest.mark.parametrize(
    ("method", "targets"), [(lk.DoRA(rank=2), ["fc"]), (lk.LoHa(rank=2), ["fc"])], ids=["dora", "loha"]
)
@pytest.mark.parametrize("form", ["loralib", "litgpt"])
def test_what_has_no_place_is_refused_by_name(form, method, targets, tmp_path):
    bare = Net()
    lk.attach(bare, method, targets)
    with pytest.raises(lk.LorakitError, match=r"fc\.weight"):
        write(adapter_value(bare), tmp_path / "a", form)
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real adapters in $LORAKIT_SHARED/adapters")
def test_the_paper_s_own_adapter(tmp_path):
    file = SHARED / "loralib-roberta-base-mnli" / "roberta_base_lora_mnli.bin"
    value = read(file, alpha=16)
    assert value.format == "loralib" and not value.missing
    low_rank = [weight for weight in value.weights if isinstance(weight.variant, lk.LoRA)]
    assert len(low_rank) == 24 and {weight.variant.scale for weight in low_rank} == {2.0}
    tensors = dict(read_content(file).tensors)
    assert len(tensors) == 48 + len(value.weights) - 24
    write(value, tmp_path / "again.bin", "loralib")
    written = torch.load(tmp_path / "again.bin")
    assert_bits({key: written[key] for key in tensors}, tensors)
    assert written.keys() == tensors.keys()


DAMAGED = {
    "one factor": {"fc.lora_A": torch.ones(2, 8)},
    "scalar": {"fc.lora_A": torch.tensor(1.0), "fc.lora_B": torch.ones(8, 2)},
    "dtype": {"fc.lora_A": torch.ones(2, 8).bool(), "fc.lora_B": torch.ones(8, 2)},
    "parts": {"fc.lora_A": torch.ones(5, 8), "fc.lora_B": torch.ones(8, 2)},
    "many parts": {"fc.lora_A": torch.ones(2**16, 1), "fc.lora_B": torch.ones(2**16, 1)},
    "empty": {"fc.lora_A": torch.ones(0, 8), "fc.lora_B": torch.ones(8, 0)},
    "nan": {"fc.lora_A": torch.full((2, 8), float("nan")), "fc.lora_B": torch.ones(8, 2)},
    "nan of a convolution": {"conv.lora_A": torch.full((6, 12), float("nan")), "conv.lora_B": torch.ones(18, 6)},
    "no convolution": {"conv.lora_A": torch.ones(6, 12), "conv.lora_B": torch.ones(6, 6)},
    "no layer": {"other.lora_A": torch.ones(2, 8), "other.lora_B": torch.ones(8, 2)},
    "nothing": {"x.lora_C": torch.ones(2)},
}


@pytest.mark.parametrize("alpha", [1.0, float("nan"), -1.0])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_loralib(case, alpha, tmp_path):
    torch.save(DAMAGED[case], tmp_path / "a.pt")
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(lk.LorakitError):
        lk.load(model, tmp_path / "a.pt", alpha=alpha)
    assert_bits(model.state_dict(), before)
