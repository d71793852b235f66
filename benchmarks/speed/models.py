"""The models that are timed, bare and adapted by each library with the same factors."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import loralib
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers


def linear(d: int, k: int | None = None, layers: int = 1) -> nn.Sequential:
    """Linear layers, frozen: d outputs, and k inputs or as many."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(k or d, d) for _ in range(layers))).requires_grad_(False)


def llama(hidden: int = 512, layers: int = 4, vocabulary: int = 1024, heads: int = 8, tokens: int = 1024) -> nn.Module:
    """A Llama of seven linear layers in each of its layers, frozen."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=int(2.75 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=tokens,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


def like_llama(layers: int, hidden: int, intermediate: int, device: str) -> nn.Module:
    """The linear layers of a Llama under their names, and nothing else."""

    def one(d: int, k: int) -> nn.Linear:
        return nn.Linear(k, d, bias=False, device=device)

    def layer() -> nn.ModuleDict:
        attention = {name: one(hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        mlp = {
            "gate_proj": one(intermediate, hidden),
            "up_proj": one(intermediate, hidden),
            "down_proj": one(hidden, intermediate),
        }
        return nn.ModuleDict({"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)})

    return nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(layers))}).requires_grad_(False)


def without_head(model: nn.Module) -> str | None:
    """What `exclude` is given: a Llama's head is not adapted."""
    return "lm_head" if hasattr(model, "lm_head") else None


def noise(model: nn.Module) -> None:
    """Values for what is trained, so that every update does something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.normal_(std=0.02)


def ours(
    base: nn.Module,
    rank: int,
    targets: Any = "all-linear",
    variant: lk.LoRA | lk.DoRA | lk.LoRAFA | None = None,
    names: Sequence[str] = ("default",),
) -> nn.Module:
    """A copy with an adapter of lorakit that does something, or with several of these names."""
    model = copy.deepcopy(base)
    for name in names:
        lk.attach(model, variant or lk.LoRA(rank=rank), targets, exclude=without_head(base), name=name)
        noise(model)
    return model


def targets_of(model: nn.Module) -> list[str]:
    """The names of the layers that lorakit adapted."""
    name = next(iter(lk.adapters(model)))
    return [weight.removesuffix(".weight") for weight in lk.adapters(model)[name].weights]


def theirs(base: nn.Module, model: nn.Module, rank: int, **options: Any) -> nn.Module:
    """PEFT's model on another copy, with the adapters of ours and their factors."""
    names = list(lk.adapters(model))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets_of(model), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0]).train(base.training)
        for name in names[1:]:
            other.add_adapter(name, config)
    with torch.no_grad():
        for name in names:
            for key, factor in lk.adapter_state_dict(model, name).items():
                live = f"{key.removesuffix('.weight')}.{name}.weight"
                other.get_parameter(live).copy_(factor)
    other.set_adapter(names[-1])
    return other


class Talk(nn.Module):
    """The talk's LoRA: a parametrization that adds the product of the two factors to the weight at every read."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A.clone())
        self.B = nn.Parameter(B.clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A).to(weight.dtype)  # alpha = r: the scale is 1


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (A, B)} of lorakit's only adapter."""
    tensors = lk.adapter_state_dict(model)
    layers = targets_of(model)
    prefix = "base_model.model."
    return {at: (tensors[f"{prefix}{at}.lora_A.weight"], tensors[f"{prefix}{at}.lora_B.weight"]) for at in layers}


def by_talk(base: nn.Module, model: nn.Module) -> nn.Module:
    """The talk's form on a copy, with the factors of ours."""
    other = copy.deepcopy(base)
    for at, (A, B) in factors(model).items():
        parametrize.register_parametrization(other.get_submodule(at), "weight", Talk(A, B))
    return other


def by_loralib(base: nn.Module, model: nn.Module) -> nn.Module:
    """A copy with loralib's layers, with the factors of ours."""
    other = copy.deepcopy(base)
    for at, (A, B) in factors(model).items():
        layer = other.get_submodule(at)
        d, k = layer.weight.shape
        new = loralib.Linear(k, d, r=len(A), lora_alpha=len(A), bias=layer.bias is not None)
        new.load_state_dict({**layer.state_dict(), "lora_A": A, "lora_B": B})
        other.set_submodule(at, new)
    loralib.mark_only_lora_as_trainable(other)
    return other.train()  # in eval() loralib merges


def full(base: nn.Module) -> nn.Module:
    """A copy of which every weight is trained."""
    return copy.deepcopy(base).requires_grad_(True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def output_of(model: nn.Module, *args: Any, **named: Any) -> Tensor:
    """What a model returns, as a tensor."""
    out = model(*args, **named)
    return out if isinstance(out, Tensor) else out.logits


def check_equal(*outputs: Tensor, limit: float = 1e-4) -> None:
    """The arms must compute the same before they are timed."""
    first = outputs[0]
    for other in outputs[1:]:
        error = (other - first).abs().max().item()
        if error > limit * max(1.0, first.abs().max().item()):
            raise AssertionError(f"the arms do not agree: {error}")


def check_steps(models: Mapping[str, nn.Module], x: Tensor, *, limit: float = 1e-4, **named: Any) -> None:
    """The arms give the same outputs, and the same gradients of the input and of the factors."""
    first: list[Tensor] = []
    for name, model in models.items():
        x.grad = None
        y = output_of(model, **named) if named else model(x)
        y.float().square().mean().backward()
        parameters = trained(model)
        missing = [at for at, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if missing:
            raise AssertionError(f"{name} gives no gradient to {missing[:3]}")
        found = [y.detach(), *([x.grad] if x.requires_grad else []), *(p.grad for p in parameters)]
        first = first or found
        if len(found) != len(first):
            raise AssertionError(f"{name} trains {len(parameters)} tensors")
        for one, other in zip(first, found, strict=True):
            error = (other.float() - one.float()).norm().item()
            if error > limit * max(1e-6, one.float().norm().item()):
                raise AssertionError(f"{name} does not agree: {error} of {one.float().norm().item()}")
        model.zero_grad()
    x.grad = None
