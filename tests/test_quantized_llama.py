"""QLoRA from end to end (Dettmers et al. 2023, arXiv:2305.14314): a small Llama in NF4, trained, saved and loaded."""

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
from helpers import anatomy, assert_bits
from quantized import assert_same_bits, bits, bnb, dense_of, each_linear, four_bits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260K"


def in_nf4(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every linear layer of the decoder in NF4 with double quantization; embedding and head stay as they are."""
    make = four_bits("nf4", compress_statistics=True)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))
    return model


def small_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return in_nf4(LlamaForCausalLM(config))


def sentences(count: int = 8, length: int = 24) -> Tensor:
    """Something to learn: each token follows from the one before."""
    start = torch.randint(0, 96, (count, 1))
    steps = [start]
    for _ in range(length - 1):
        steps.append((steps[-1] * 5 + 7) % 96)
    return torch.cat(steps, 1)


def loss_of(model, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(model, tokens: Tensor, steps: int, rate: float = 1e-2) -> list[float]:
    optimizer = torch.optim.AdamW(lk.adapter_parameters(model), lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model.train(), tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_qlora_trains_saves_and_leaves_the_base_alone(tmp_path):
    model, tokens = small_llama(), sentences()
    model.eval()
    fresh = copy.deepcopy(model)
    base, before, stored = model(tokens).logits, anatomy(model), bits(model)
    plan = lk.attach(model, lk.LoRA(rank=8), targets="all-linear", exclude="lm_head")
    assert len(plan.rows) == 14
    assert all(row.note == "frozen by quantization: nf4" and row.applied == "beside" for row in plan.rows)
    assert torch.equal(model(tokens).logits, base)
    losses = train(model, tokens, 60)
    assert losses[-1] < 0.5 * losses[0]
    assert_same_bits(bits(model), stored)
    model.eval()
    y = model(tokens).logits
    assert not torch.equal(y, base)
    with lk.disabled(model):
        assert torch.equal(model(tokens).logits, base)
    lk.save(model, tmp_path / "a")
    lk.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(tokens).logits, y)
    assert_bits(lk.adapter_state_dict(fresh), lk.adapter_state_dict(model))
    with pytest.raises(lk.LorakitError, match="other values"):
        lk.load(small_llama(seed=1), tmp_path / "a")
    lk.detach(model)
    assert anatomy(model) == before
    assert_same_bits(bits(model), stored)


def test_outputs_and_gradients_are_those_of_the_dequantized_model():
    model, tokens = small_llama(), sentences()
    lk.attach(model, lk.LoRA(rank=4), targets="all-linear", exclude="lm_head")
    train(model, tokens, 3)
    dense = copy.deepcopy(model)
    factors = lk.adapter_state_dict(model)
    lk.detach(dense)
    for parent in list(dense.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, bnb.nn.Linear4bit):
                plain = nn.Linear(child.in_features, child.out_features, bias=False)
                plain.weight = nn.Parameter(dense_of(child), requires_grad=False)
                setattr(parent, name, plain)
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in dense.modules())
    leaves = {key: value.clone().requires_grad_() for key, value in factors.items()}
    for key in [key for key in leaves if key.endswith("lora_A.weight")]:
        layer = dense.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        W = layer._parameters.pop("weight")
        layer.weight = W.detach() + leaves[key.replace("lora_A", "lora_B")] @ leaves[key]
    model.zero_grad()
    got, wanted = loss_of(model, tokens), loss_of(dense, tokens)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    got.backward()
    wanted.backward()
    for mine, theirs in zip(lk.adapter_parameters(model), leaves.values(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_nothing_as_large_as_a_weight_is_kept_for_backward():
    model, tokens = small_llama(), sentences(1, 8)
    lk.attach(model, lk.LoRA(rank=4), targets="all-linear", exclude="lm_head")
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, tokens).backward()
    assert kept
    assert max(kept) < 64 * 32  # the smallest weight; the largest thing that is kept is (1, 8, 128)


def test_merging_into_plain_layers_gives_a_model_of_floats_that_says_the_same():
    model, tokens = small_llama(), sentences()
    lk.attach(model, lk.LoRA(rank=4), targets="all-linear", exclude="lm_head")
    train(model, tokens, 10)
    y = model.eval()(tokens).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lk.merged(model):
            requantized = model(tokens).logits
    assert torch.equal(model(tokens).logits, y)
    report = lk.merge(model, dequantize=True)
    assert len(report.weights) == 14
    assert max(row.lost for row in report.weights) < 1e-4
    torch.testing.assert_close(model(tokens).logits, y, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules())
    assert (requantized - y).norm() > 100 * (model(tokens).logits - y).norm()  # what the grid costs


@pytest.mark.filterwarnings("ignore::FutureWarning")  # what it calls is deprecated in transformers
def test_an_adapter_that_peft_trained_on_the_same_base_says_the_same_here(tmp_path):
    model, tokens = small_llama(), sentences()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    lk.load(model, tmp_path / "theirs", trainable=True)
    y, wanted = model(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
    y.square().mean().backward()
    wanted.square().mean().backward()
    grads = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    mine = zip(lk.adapter_state_dict(model), lk.adapter_parameters(model), strict=True)
    for key, parameter in mine:
        torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs stories260K in $LORAKIT_SHARED/models")
def test_a_pretrained_model_in_nf4_learns_and_generates():
    model = in_nf4(LlamaForCausalLM.from_pretrained(STORIES)).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    story = tokenizer("Once upon a time, there was a robot named Max. Max liked to count stars.", return_tensors="pt")
    tokens = story["input_ids"]
    stored = bits(model)
    base = loss_of(model, tokens).item()
    lk.attach(model, lk.LoRA(rank=8), targets="all-linear", exclude="lm_head")
    losses = train(model, tokens, 60)
    assert losses[0] == pytest.approx(base, rel=1e-4)
    assert losses[-1] < 0.1 * losses[0]
    assert_same_bits(bits(model), stored)
    said = model.eval().generate(tokens[:, :8], max_new_tokens=8, do_sample=False)
    assert torch.equal(said, tokens[:, :16])  # it knows the story now


REORDERS = bool(bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu)


@pytest.mark.skipif(not REORDERS, reason="bitsandbytes reorders 4-bit weights on CPUs with AVX512-BF16 alone")
@pytest.mark.parametrize("double", [False, True])
def test_a_weight_that_bitsandbytes_has_reordered_is_the_same_base(double, tmp_path):
    torch.manual_seed(0)
    make = each_linear(four_bits("nf4", double))
    model = make(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64, bias=False)))
    x = torch.randn(2, 3, 64)
    W = dense_of(model[0])
    reordered = copy.deepcopy(model).eval()
    for layer in (reordered[0], reordered[2]):
        layer.support_avx512bf16_for_cpu = True
    lk.save(lk_attached(copy.deepcopy(model)), tmp_path / "a")
    with torch.no_grad():
        reordered(x)
    assert reordered[0].weight.quant_state.packing_format_for_cpu
    seen, codes = anatomy(reordered), reordered[0].weight.data.clone()
    assert (dense_of(reordered[0]) - W).norm() < 0.01 * W.norm()
    lk.load(reordered, tmp_path / "a", trainable=True)
    with torch.no_grad():
        y = reordered(x)
    with lk.merged(reordered):
        pass
    with torch.no_grad():
        assert torch.equal(reordered(x), y)
    with pytest.raises(lk.LorakitError, match="support_avx512bf16_for_cpu"):
        reordered.train()(x).sum().backward()
    lk.detach(reordered)
    assert torch.equal(reordered[0].weight.data, codes)
    assert anatomy(reordered.eval()) == seen


def lk_attached(model: nn.Module) -> nn.Module:
    lk.attach(model, lk.LoRA(rank=2))
    return model
