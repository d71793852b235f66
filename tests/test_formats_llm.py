"""Adapters of loralib and mlx: read, written, and computing what their own tools compute."""

import json
import os
from pathlib import Path

import loralib
import pytest
import torch
from helpers import assert_bits, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
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


# mlx


def mlx_files(folder: Path, tensors: dict[str, Tensor], config: dict | None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def config_of(rank: int = 2, scale: float = 20.0, **more) -> dict:
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": ["fc"]}
    return {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": parameters, **more}


def mlx_tensors() -> dict[str, Tensor]:
    torch.manual_seed(3)
    shapes = {"fc.lora_a": (8, 2), "fc.lora_b": (2, 8), "embed.lora_a": (11, 2), "embed.lora_b": (2, 8)}
    return {key: torch.randn(shape) * 0.1 for key, shape in shapes.items()}


def by_mlx(tensors: dict[str, Tensor], scale: float, ids: Tensor) -> Tensor:
    """What the formulas of mlx-lm's layers give up to the fused projection."""
    bare = Net()
    x = bare.embed(ids) + scale * (tensors["embed.lora_a"][ids] @ tensors["embed.lora_b"])
    z = scale * (x @ tensors["fc.lora_a"] @ tensors["fc.lora_b"])
    y = bare.fc(x)
    if "fc.m" in tensors:
        adapted = bare.fc.weight + scale * tensors["fc.lora_b"].T @ tensors["fc.lora_a"].T
        y = (tensors["fc.m"] / adapted.norm(dim=1)) * (x @ bare.fc.weight.T + z) + bare.fc.bias
    else:
        y = y + z
    return bare.qkv(torch.tanh(y))


def up_to_qkv(model: Net, ids: Tensor) -> Tensor:
    return model.qkv(torch.tanh(model.fc(model.embed(ids))))


@pytest.mark.parametrize("scale", [20.0, 0.1, 2.5])
def test_mlx_loads_to_what_its_layers_compute(scale, tmp_path):
    tensors = mlx_tensors()
    bare = Net()
    lk.load(bare, mlx_files(tmp_path / "a", tensors, config_of(scale=scale)))
    assert_close(up_to_qkv(bare, IDS), by_mlx(tensors, scale, IDS), factor=10)


def test_mlx_dora(tmp_path):
    tensors = {key: value for key, value in mlx_tensors().items() if key.startswith("fc")}
    tensors["fc.m"] = torch.rand(8) + 0.5
    bare = Net()
    path = mlx_files(tmp_path / "a", tensors, config_of(fine_tune_type="dora"))
    lk.load(bare, path)
    still = {"embed.lora_a": torch.zeros(11, 2), "embed.lora_b": torch.zeros(2, 8)}
    assert_close(up_to_qkv(bare, IDS), by_mlx(tensors | still, 20.0, IDS), factor=10)
    write(read(path), tmp_path / "b", "mlx")
    assert_bits(dict(read_content(tmp_path / "b").tensors), dict(read_content(path).tensors))
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["fine_tune_type"] == "dora"


def test_mlx_magnitudes_of_an_embedding_are_others(tmp_path):
    tensors = mlx_tensors() | {"embed.m": torch.ones(11)}
    with pytest.raises(lk.LorakitError, match=r"magnitude of shape .11,. is of an embedding"):
        read(mlx_files(tmp_path / "a", tensors, config_of()))
    square = {"embed.lora_a": torch.ones(8, 2), "embed.lora_b": torch.ones(2, 8), "embed.m": torch.ones(8)}
    value = read(mlx_files(tmp_path / "b", square, config_of()))
    model = nn.ModuleDict({"embed": nn.Embedding(8, 8)})
    with pytest.raises(lk.LorakitError, match="magnitudes of an embedding"):
        lk.load(model, value)


@given(rank=st.integers(1, 6), scale=st.floats(0.01, 64), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=20, deadline=None)
def test_mlx_is_written_as_it_was_read(rank, scale, dtype, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx")
    tensors = {"model.layers.0.q.lora_a": torch.randn(8, rank), "model.layers.0.q.lora_b": torch.randn(rank, 7)}
    tensors |= {"model.layers.3.q.lora_a": torch.randn(8, rank), "model.layers.3.q.lora_b": torch.randn(rank, 7)}
    tensors |= {"e.switch_mlp.up.lora_a": torch.randn(3, rank, 8), "e.switch_mlp.up.lora_b": torch.randn(3, 5, rank)}
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    path = mlx_files(folder / "a", tensors, config_of(rank, scale))
    write(read(path), folder / "b", "mlx")
    write(read(folder / "b"), folder / "native")
    write(read(folder / "native"), folder / "c", "mlx")
    for written in ("b", "c"):
        assert_bits(dict(sorted(read_content(folder / written).tensors.items())), dict(sorted(tensors.items())))
        config = json.loads((folder / written / "adapter_config.json").read_text())["lora_parameters"]
        assert config["rank"] == rank and config["scale"] == scale
        assert config["keys"] == ["q", "e.switch_mlp.up"] or set(config["keys"]) == {"q", "e.switch_mlp.up"}


def test_mlx_experts_as_modules_of_their_own(tmp_path):
    tensors = {"switch_mlp.up.lora_a": torch.randn(3, 2, 8), "switch_mlp.up.lora_b": torch.randn(3, 5, 2)}
    tensors = {f"block.{key}": value for key, value in tensors.items()}
    experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 5)}) for _ in range(3))
    model = nn.ModuleDict({"block": nn.ModuleDict({"experts": experts})})
    old = [expert["up"].weight.clone() for expert in experts]
    lk.load(model, mlx_files(tmp_path / "a", tensors, config_of(scale=3)))
    lk.merge(model)
    for i, expert in enumerate(experts):
        delta = 3 * tensors["block.switch_mlp.up.lora_b"][i] @ tensors["block.switch_mlp.up.lora_a"][i]
        assert_close(expert["up"].weight, old[i] + delta, factor=4)


def test_mlx_without_a_config_asks_for_alpha(tmp_path):
    path = mlx_files(tmp_path / "a", mlx_tensors(), None)
    assert read(path).missing == ("alpha",)
    assert {weight.variant.scale for weight in read(path, alpha=40).weights} == {20.0}
    old = config_of()
    old["lora_parameters"]["alpha"] = 16.0  # what it means depends on the version that trained it
    del old["fine_tune_type"]  # which came when alpha had no meaning any more
    old["lora_layers"] = old.pop("num_layers")
    assert read(mlx_files(tmp_path / "b", mlx_tensors(), old)).missing == ("alpha",)
    top = {"lora_layers": 4, "rank": 2, "scale": 20.0}
    assert {weight.variant.scale for weight in read(mlx_files(tmp_path / "c", mlx_tensors(), top)).weights} == {20.0}


WRONG = {
    "turned": ({"fc.lora_a": torch.ones(2, 8), "fc.lora_b": torch.ones(8, 2)}, None, "the other way round"),
    "turned with a config": ({"fc.lora_a": torch.ones(2, 8), "fc.lora_b": torch.ones(8, 2)}, config_of(), "of rank 8"),
    "one factor": ({"fc.lora_a": torch.ones(8, 2)}, None, "lacks its factor B"),
    "ranks": ({"fc.lora_a": torch.ones(8, 2), "fc.lora_b": torch.ones(3, 8)}, None, "no rank in common"),
    "dtype": ({"fc.lora_a": torch.ones(8, 2).int(), "fc.lora_b": torch.ones(2, 8)}, None, "int32"),
    "scalar": ({"fc.lora_a": torch.tensor(1.0), "fc.lora_b": torch.ones(2, 8)}, None, "no matrix"),
    "empty": ({"fc.lora_a": torch.ones(8, 0), "fc.lora_b": torch.ones(0, 8)}, None, "empty"),
    "experts": ({"fc.lora_a": torch.ones(3, 2, 8), "fc.lora_b": torch.ones(2, 8, 2)}, None, "no rank in common"),
    "scale": ({"fc.lora_a": torch.ones(8, 2), "fc.lora_b": torch.ones(2, 8)}, config_of(scale="x"), "scale"),
    "rank": ({"fc.lora_a": torch.ones(8, 2), "fc.lora_b": torch.ones(2, 8)}, config_of(rank=[2]), "config says"),
    "dropout": (
        {"fc.lora_a": torch.ones(8, 2), "fc.lora_b": torch.ones(2, 8)},
        {"lora_parameters": {"scale": 1.0, "dropout": float("nan")}},
        "dropout",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_damaged_mlx(case, tmp_path):
    tensors, config, words = WRONG[case]
    with pytest.raises(lk.LorakitError, match=words):
        read(mlx_files(tmp_path / "a", tensors, config))


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


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs real adapters in $LORAKIT_SHARED/adapters")
def test_a_real_npz_of_mlx(tmp_path):
    file = SHARED / "mlx-npz-potterbot" / "adapters.npz"
    content = read_content(file)
    assert content.container == "npz"
    assert read(file).missing == ("alpha",)
    value = read(file, alpha=80)
    assert value.format == "mlx" and {weight.variant.scale for weight in value.weights} == {20.0}
    write(value, tmp_path / "b", "mlx")
    written = read_content(tmp_path / "b").tensors
    assert_bits({key: written[key] for key in content.tensors}, dict(content.tensors))
    assert written.keys() == content.tensors.keys()
    one = value.weights[0]
    A, B = (content.tensors[f"{one.entry.path}.lora_{letter}"] for letter in "ab")
    got_B, got_A = one.product()
    assert_close(got_B @ got_A, 20.0 * (A @ B).T, factor=100)
