"""Adapters of image models: what kohya's files mean, found again under a model's names, and written as they were."""

import copy
import json

import pytest
import torch
from helpers import assert_bits, assert_close, dense, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import INPUT, KEPT, METHODS, OF_KERNELS, Net, content, kohya, lora, made, rand, weights_of, write_file
from torch import nn

import lorakit as lk
from lorakit.exchange import read, renamed_for, write
from lorakit.files import adapter_value
from lorakit.formats import Names
from lorakit.formats.flattened import fitting_names, flatten
from lorakit.formats.kohya import PREFIXES
from lorakit.formats.lycoris import factors_of_diff
from lorakit.header import WeightEntry
from lorakit.values.weight import AdapterWeight


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("method", [*METHODS.values(), *OF_KERNELS.values()])
def test_a_loaded_file_is_the_formula(net, tmp_path, method):
    tensors, deltas = made(net, method)
    path = write_file(tmp_path / "a.safetensors", kohya(tensors))
    wanted = dense(net, deltas)(INPUT)
    lk.load(net, path)
    assert set(lk.adapters(net)["a"].weights) == set(deltas)
    assert_close(net(INPUT), wanted, factor=5)
    with lk.merged(net):
        assert_close(net(INPUT), wanted, factor=5)


@pytest.mark.parametrize("method", [METHODS[name] for name in KEPT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_written_as_it_was(net, tmp_path, method, dtype):
    tensors, _ = made(net, method)
    given = {key: tensor.to(dtype) for key, tensor in kohya(tensors).items()}
    path = write_file(tmp_path / "a.safetensors", given, ss_network_dim="2", ss_network_alpha="1")
    value = read(path)
    assert value.format == value.naming == "kohya" and not value.missing
    assert value.facts["kohya"]["metadata"]["ss_network_dim"] == "2"
    write(value, tmp_path / "raw.safetensors", "kohya")
    assert_bits(content(tmp_path / "raw.safetensors"), content(path))
    named = renamed_for(value, net)
    write(named, tmp_path / "named.safetensors", "kohya")
    assert_bits(content(tmp_path / "named.safetensors"), content(path))
    write(named, tmp_path / "native.safetensors")
    native = read(tmp_path / "native.safetensors")
    assert native.naming == "" and native.weights[0].variant == named.weights[0].variant
    write(native, tmp_path / "back.safetensors", "kohya", part="unet")
    assert_bits(content(tmp_path / "back.safetensors"), content(path))


TRAINED = [
    lk.LoRA(rank=3, alpha=5, scaling="rslora"),
    lk.LoRA(2, init="pissa"),
    lk.LoRAFA(2, alpha=3),
    lk.DoRA(rank=2),
    lk.LoHa(2, alpha=3),
    lk.LoKr(8, alpha=3),
    lk.LoKr(1, alpha=3),
    lk.LoKr(1, alpha=3, factor=(2, 1)),
    lk.AdaLoRA(rank=2, alpha=3),
]


@pytest.mark.parametrize("variant", TRAINED, ids=repr)
@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_what_was_trained_here_means_the_same_there(net, tmp_path, variant, form):
    plain = copy.deepcopy(net)
    lk.attach(net, variant, targets=list(weights_of(net)))
    with torch.no_grad():
        for parameter in lk.adapter_parameters(net):
            parameter.add_(rand(*parameter.shape))
    assert (net(INPUT) - plain(INPUT)).abs().max() > 0.01
    write(adapter_value(net), tmp_path / "a.safetensors", form, part="unet")
    lk.load(plain, tmp_path / "a.safetensors")
    assert_close(plain(INPUT), net(INPUT), factor=5)


def test_a_split_for_each_side_of_its_own(net, tmp_path):
    with refused(net, "does not divide"):
        lk.attach(net, lk.LoKr(1, factor=(3, 1)), targets=["down_blocks.0.to_q"])
    with pytest.raises(lk.LorakitError, match="factor"):
        lk.LoKr(1, factor=(3, 1, 2))
    with pytest.raises(lk.LorakitError, match="factor"):
        lk.LoKr(1, factor=(0, 1))
    lk.attach(net, lk.LoKr(1, factor=(2, 1)), targets=["down_blocks.0.to_q"])
    lk.save(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORAKIT" and "factor=(2, 1)" in config["reasons"][0]


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (7, 2, 1, 1), (40, 2, 3, 3), (3, 2, 3, 3)])
def test_a_whole_difference_is_exact(shape):
    delta = rand(*shape)
    A, B = factors_of_diff(delta)
    assert A.shape[0] == B.shape[1] == min(shape[0], delta[0].numel()) and A.shape[1:] == shape[1:]
    assert torch.equal((B.flatten(1) @ A.flatten(1)).reshape(shape), delta)


def test_without_alpha_one_is_written(net, tmp_path):
    tensors, _ = made(net, METHODS["without_alpha"])
    value = read(write_file(tmp_path / "a.safetensors", kohya(tensors)))
    write(value, tmp_path / "b.safetensors", "kohya")
    wanted, _ = made(net, lambda W: lora(W, alpha=2.0))
    assert_bits(content(tmp_path / "b.safetensors"), dict(sorted(kohya(wanted).items())))


def test_one_model_of_several(net, tmp_path):
    mine, deltas = made(net, lora)
    other = {"layers.0.fc": {"lora_down.weight": rand(1, 3), "lora_up.weight": rand(3, 1)}}
    path = write_file(tmp_path / "a.safetensors", {**kohya(mine), **kohya(other, "lora_te_")})
    plain, encoder = (
        copy.deepcopy(net),
        nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(3, 3)})])}),
    )
    with pytest.warns(UserWarning, match="1 weights of lora_te_"):
        lk.load(net, path)
    assert_close(net(INPUT), dense(plain, deltas)(INPUT))
    with pytest.warns(UserWarning, match="6 weights of lora_unet_"):
        lk.load(encoder, path, part="text_encoder")
    with refused(plain, "no part 'text_encoder_2'", "lora_te_"):
        lk.load(plain, path, part="text_encoder_2")
    with refused(plain, "lora_te_layers_0_fc", "fits no layer"):
        lk.load(plain, path, part="text_encoder")


def test_pickled_files_and_prefixes_as_parts(net, tmp_path):
    tensors, deltas = made(net, lora)
    two = {**kohya(tensors, "lora_te_"), **kohya(tensors, "lora_te1_")}
    torch.save(two, tmp_path / "a.pt")
    value = read(tmp_path / "a.pt")
    assert value.format == "kohya" and len(value.weights) == 2 * len(deltas)
    for part in (None, "text_encoder"):
        with pytest.raises(lk.LorakitError, match="say which is meant"):
            renamed_for(value, net, part=part)
    named = renamed_for(value, net, part="lora_te1")
    assert {weight.name for weight in named.weights} == set(deltas)
    write(named, tmp_path / "b.safetensors", "kohya", part="text_encoder_2")
    assert all(key.startswith("lora_te2_") for key in content(tmp_path / "b.safetensors"))


def test_a_name_of_any_length_is_refused_at_once(net, tmp_path):
    tensors, _ = made(net, lora)
    tensors["x" * 200_000] = tensors["down_blocks.0.to_q"]
    with refused(net, "fits no layer"):
        lk.load(net, write_file(tmp_path / "a.safetensors", kohya(tensors)))


def test_the_root_of_text_encoders_may_be_there_or_not():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    for stem in ("layers_0_q_proj", "text_model_layers_0_q_proj"):
        for names in (["layers.0.q_proj"], ["text_model.layers.0.q_proj"]):
            weight = _weight(stem)
            assert fitting_names({stem: weight}, Names.of_list(names), []) == {stem: names[0]}


def _weight(stem: str, d: int = 4, k: int = 4) -> AdapterWeight:
    return AdapterWeight(
        WeightEntry(stem, "weight", None, None, None, None), lk.LoRA(1), {"A": torch.ones(1, k), "B": torch.ones(d, 1)}
    )


WORDS = st.lists(st.sampled_from(["to", "q", "to_q", "0", "net", "net_0", "1"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=8, unique=True))
def test_flattened_names_are_found_or_said_to_be_several(names):
    problems: list[str] = []
    mine = {flatten(name): _weight("lora_unet_" + flatten(name)) for name in names}
    found = fitting_names(mine, Names.of_list(names), problems)
    flat = [flatten(name) for name in names]
    for name in names:
        if flat.count(flatten(name)) == 1:
            assert found[flatten(name)] == name
        else:
            assert flatten(name) not in found
    assert len(found) + len(problems) == len(set(flat))


@settings(max_examples=30, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=6, unique=True), st.data())
def test_shapes_tell_names_apart(names, data):
    shapes = {f"{name}.weight": (i + 2, 3) for i, name in enumerate(names)}
    target = Names(shapes)
    chosen = data.draw(st.sampled_from(names))
    weight = _weight(flatten(chosen), shapes[f"{chosen}.weight"][0], 3)
    assert fitting_names({flatten(chosen): weight}, target, []) == {flatten(chosen): chosen}


def test_names_that_fit_none_are_listed_with_the_nearest(net, tmp_path):
    tensors, _ = made(net, lora)
    tensors["down_blocks.0.to_k"] = tensors["down_blocks.0.to_q"]
    tensors["elsewhere"] = tensors["down_blocks.0.to_q"]
    path = write_file(tmp_path / "a.safetensors", kohya(tensors))
    with refused(net, "lora_unet_down_blocks_0_to_k", "nearest are", "'down_blocks.0.to_q'", "lora_unet_elsewhere"):
        lk.load(net, path)


def test_several_that_flatten_alike_are_an_error_when_written(net, tmp_path):
    value = renamed_for(read(write_file(tmp_path / "a.safetensors", kohya(made(net, lora)[0]))), net)
    first, second = value.weights[:2]
    moved = [first._replace(entry=first.entry._replace(path=p)) for p in ("a.b_c", "a_b.c")]
    with pytest.raises(lk.LorakitError, match=r"'a\.b_c\.weight' and 'a_b\.c\.weight' are both 'lora_unet_a_b_c'"):
        write(value.with_weights(moved), tmp_path / "b.safetensors", "kohya")
    with pytest.raises(lk.LorakitError, match="needs part="):
        write(value.with_weights([second], facts={}), tmp_path / "b.safetensors", "kohya")


def test_what_it_cannot_hold_is_listed(net, tmp_path):
    lk.attach(net, lk.LoRA(2), targets=["mid"], train_also=["down_blocks.0.to_q.bias"])
    with pytest.raises(lk.LorakitError, match=r"down_blocks.0.to_q.bias.*no layer's whole weight"):
        write(adapter_value(net), tmp_path / "a.safetensors", "kohya", part="unet")


STEM = "lora_unet_down_blocks_0_to_q"


def _drop(end):
    return lambda t: t.pop(f"{STEM}.{end}")


def _put(end, value):
    return lambda t: t.update({f"{STEM}.{end}": value})


DAMAGES = {
    "only up": (_drop("lora_down.weight"), "lacks the factor A (down)"),
    "only down": (_drop("lora_up.weight"), "lacks the factor B (up)"),
    "NaN alpha": (_put("alpha", torch.tensor(torch.nan)), "alpha is nan"),
    "infinite alpha": (_put("alpha", torch.tensor(torch.inf)), "alpha is inf"),
    "negative alpha": (_put("alpha", torch.tensor(-1.0)), "alpha is -1.0"),
    "two alphas": (_put("alpha", torch.ones(2)), "shape (2,)"),
    "no alpha": (_put("alpha", torch.ones(0)), "shape (0,)"),
    "true": (_put("alpha", torch.tensor(True)), "torch.bool"),
    "complex": (_put("alpha", torch.tensor(1j)), "complex"),
    "ranks": (_put("lora_down.weight", rand(3, 6)), "different ranks"),
    "scalar": (_put("lora_up.weight", torch.tensor(1.0)), "no two factors"),
    "vector": (_put("lora_down.weight", torch.ones(6)), "no two factors"),
    "four axes": (_put("lora_down.weight", rand(2, 6, 1, 1)), "no two factors"),
    "integers": (_put("lora_down.weight", torch.ones(2, 6, dtype=torch.int32)), "int32"),
    "empty": (_put("lora_down.weight", torch.ones(0, 6)), "is empty"),
    "inputs' magnitude": (_put("dora_scale", torch.ones(1, 6)), "of each input"),
    "strange magnitude": (_put("dora_scale", torch.ones(3)), "does not say"),
    "bias": (_put("diff_b", torch.ones(8)), "cannot be held"),
    "norm": (_put("w_norm", torch.ones(8)), "cannot be held"),
    "oft": (_put("oft_blocks", torch.ones(2, 4, 4)), "cannot be held"),
    "two methods": (_put("hada_w1_a", torch.ones(8, 2)), "several methods"),
    "core alone": (_put("lora_mid.weight", torch.ones(2, 3, 3, 3)), "do not fit together"),
    "no prefix": (lambda t: t.update({"lora_other.alpha": torch.tensor(1.0)}), "none of the prefixes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(net, tmp_path, damage):
    tensors = kohya(made(net, lora)[0])
    change, word = DAMAGES[damage]
    change(tensors)
    path = write_file(tmp_path / "a.safetensors", tensors)
    for run in (lambda: read(path), lambda: lk.load(net, path)):
        with refused(net, word, "lora_"):
            run()


BROKEN = {
    "half": ({"lokr_w1": rand(2, 2)}, "lokr_w2"),
    "mixed": (
        {"lokr_w1": rand(2, 2), "lokr_w1_a": rand(2, 1), "lokr_w1_b": rand(1, 2), "lokr_w2": rand(4, 3)},
        "lokr_w1",
    ),
    "w1": ({"lokr_w1": rand(2, 2, 1), "lokr_w2": rand(4, 3)}, "no matrix"),
    "ranks": ({"lokr_w1": rand(2, 2), "lokr_w2_a": rand(4, 1), "lokr_w2_b": rand(2, 3)}, "one rank"),
    "two ranks": (
        {"lokr_w1_a": rand(2, 1), "lokr_w1_b": rand(1, 2), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 3)},
        "different ranks",
    ),
    "dora": ({"lokr_w1": rand(2, 2), "lokr_w2": rand(4, 3), "dora_scale": rand(8, 1)}, "LoRA only"),
    "three": ({f"hada_w{i}_{e}": rand(2, 2) for i, e in ((1, "a"), (1, "b"), (2, "a"))}, "hada_w2_b"),
    "hada ranks": ({f"hada_w{i}_{e}": rand(8, 2 + i) for i in (1, 2) for e in "ab"}, "no four factors"),
    "one core": (
        {**{f"hada_w{i}_{e}": rand(2, 8) for i in (1, 2) for e in "ab"}, "hada_t1": rand(2, 2, 3, 3)},
        "one of hada_t1",
    ),
    "norm": ({"diff": rand(8)}, "changes no matrix"),
    "diff and alpha": ({"diff": rand(8, 6), "alpha": torch.tensor(1.0)}, "no meaning"),
    "alpha alone": ({"alpha": torch.tensor(1.0)}, "no factors"),
    "bomb": (
        {"lora_down.weight": rand(1, 9000), "lora_mid.weight": rand(1, 1, 300, 300), "lora_up.weight": rand(1, 1)},
        "",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_factors_are_refused(net, tmp_path, case):
    tensors, word = BROKEN[case]
    path = write_file(tmp_path / "a.safetensors", {f"{STEM}.{end}": t for end, t in tensors.items()})
    with refused(net, word, STEM):
        lk.load(net, path)


def test_sizes_are_checked_against_the_model(net, tmp_path):
    tensors, _ = lora(torch.zeros(8, 7))
    path = write_file(tmp_path / "a.safetensors", {f"{STEM}.{end}": t for end, t in tensors.items()})
    with refused(net, "down_blocks.0.to_q", "(2, 7)", "(2, 6)"):
        lk.load(net, path)


def test_prefixes_are_told_apart():
    assert all(not a.startswith(b) for a in PREFIXES for b in PREFIXES if a != b)
