"""mlx's adapters: read, written, and computing what its own layers compute."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_bits, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_formats_loralib import IDS, SHARED, Net
from torch import Tensor, nn

import lorakit as lk
from lorakit.exchange import read, write
from lorakit.formats import read_content


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
