"""Adapters as values: merging them, combining them, and an optimizer's step over their tensors."""

import copy
import warnings
from collections.abc import Iterator
from time import process_time

import torch
from torch import Tensor, nn

import lorakit as lk
from benchmarks.speed.models import check_equal, llama, ours, theirs
from benchmarks.speed.timing import Arm, Result, interleaved

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def merging() -> Iterator[Result]:
    """Entering and leaving a merged block. The floor is one copy of the adapted weights, all held at once.

    "clones, each dropped" is the same copies into memory that is in the cache already, which no merged model is;
    "addmm" is the sum itself, W + B·A into new tensors, with no check and nothing around it.
    """
    for hidden, layers, dtype in ((512, 4, torch.float32), (1024, 2, torch.float32), (512, 4, torch.bfloat16)):
        base = llama(hidden, layers=layers).to(dtype)
        mine = ours(base, 8)
        weights = [mine.get_parameter(name).detach() for name in lk.adapters(mine)["default"].weights]
        wide = [weight.float() for weight in weights]
        factors = list(lk.adapter_state_dict(mine).values())
        pairs = list(zip(wide, factors[1::2], factors[::2], strict=True))

        def held(weights: list[Tensor] = weights) -> list[Tensor]:
            return [weight.clone() for weight in weights]

        def dropped(weights: list[Tensor] = weights) -> None:
            for weight in weights:
                weight.clone()

        def addmm(pairs: list[tuple[Tensor, Tensor, Tensor]] = pairs) -> list[Tensor]:
            return [torch.addmm(W, B, A) for W, B, A in pairs]

        def with_ours(mine: nn.Module = mine) -> None:
            with lk.merged(mine):
                pass

        arms: dict[str, Arm] = {"floor": held, "clones, each dropped": dropped, "lorakit": with_ours}
        if dtype == torch.float32:
            peer = theirs(base, mine, 8)

            def with_theirs(peer: nn.Module = peer) -> None:
                peer.merge_adapter()
                peer.unmerge_adapter()

            arms |= {"addmm": addmm, "peft": with_theirs}
        values = interleaved(arms, rounds=7)
        yield Result(f"{len(weights)} targets, d={hidden}, {str(dtype)[6:]}", values, "floor", 2.2)


def merging_for_good() -> Iterator[Result]:
    """Merging for good, with the report; each time into a fresh copy of the model, which is not timed."""
    for hidden, layers in ((512, 4), (1024, 2)):
        base = llama(hidden, layers=layers)
        mine = ours(base, 8)
        peer = theirs(base, mine, 8)
        weights = [mine.get_parameter(name).detach() for name in lk.adapters(mine)["default"].weights]
        values = interleaved({"floor": lambda weights=weights: [weight.clone() for weight in weights]}, rounds=7)
        for name, model, verb in (("lorakit", mine, lk.merge), ("peft", peer, lambda m: m.merge_and_unload())):
            least = float("inf")
            for _ in range(5):
                fresh = copy.deepcopy(model)
                begin = process_time()
                verb(fresh)
                least = min(least, process_time() - begin)
            values[name] = least
        yield Result(f"for good, {len(weights)} targets, d={hidden}", values, "floor", 2.2)


def combining() -> Iterator[Result]:
    """Two adapters of rank 16 as one, exact or of rank 16. PEFT forms each B·A and takes its SVD; the aim is 1/100."""
    rank = 16
    for d, layers in ((512, 8), (1024, 2)):
        torch.manual_seed(0)
        base = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(layers))).requires_grad_(False)
        names = [str(i) for i in range(layers)]
        mine = copy.deepcopy(base)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        peer = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a").eval()
        peer.add_adapter("b", config)
        for name in "ab":
            lk.attach(mine, lk.LoRA(rank=rank), name=name)
            with torch.no_grad():
                for parameter in lk.adapter_parameters(mine, name):
                    parameter.normal_(std=0.05)
                for key, factor in lk.adapter_state_dict(mine, name).items():
                    peer.get_parameter(key.replace(".weight", f".{name}.weight")).copy_(factor)

        def combine(mine: nn.Module = mine, bound: int | None = None) -> None:
            lk.combine(mine, {"a": 0.7, "b": 0.3}, name="c", rank=bound)
            lk.remove(mine, "c")

        def with_theirs(peer: nn.Module = peer) -> None:
            peer.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="svd", svd_rank=rank)
            peer.delete_adapter("c")

        x = torch.randn(3, d)
        lk.combine(mine, {"a": 0.7, "b": 0.3}, name="c", rank=rank)
        peer.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="svd", svd_rank=rank)
        peer.set_adapter("c")
        check_equal(mine(x), peer(x))
        lk.remove(mine, "c")
        peer.set_adapter("a")
        peer.delete_adapter("c")
        exact: Arm = combine
        arms: dict[str, Arm] = {"lorakit": lambda: combine(bound=rank), "lorakit, exact": exact, "peft": with_theirs}
        yield Result(f"{layers} targets, d={d}, 16 + 16 to 16", interleaved(arms, rounds=3), "peft", 1 / 100)


def optimizing() -> Iterator[Result]:
    """Clipping, AdamW's step and zero_grad over 448 tensors. The floor is one plain tensor of all the numbers."""
    for d in (64, 384, 1536):
        torch.manual_seed(0)
        mine = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(224)))
        lk.attach(mine, lk.LoRA(rank=8))
        tensors = [nn.Parameter(p.detach().clone()) for p in lk.adapter_parameters(mine)]
        flat = lk.flat_parameter(mine)
        plain = nn.Parameter(torch.zeros(flat.numel()))
        reached = lk.adapter_parameters(mine)[0]
        gradients = [torch.randn_like(p) for p in tensors]
        one, first = torch.randn_like(plain), reached.grad
        assert first is not None

        def arm(parameters: list[nn.Parameter], before: Arm, fused: bool) -> Arm:
            optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)

            def run() -> None:
                before()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            return run

        def give(plain: nn.Parameter = plain, one: Tensor = one) -> None:
            plain.grad = one

        def give_each(tensors: list[nn.Parameter] = tensors, gradients: list[Tensor] = gradients) -> None:
            for parameter, gradient in zip(tensors, gradients, strict=True):
                parameter.grad = gradient

        def reach(first: Tensor = first) -> None:
            first.add_(1.0)  # as backward does, and shows that there is a gradient

        arms: dict[str, Arm] = {
            "floor": arm([plain], give, True),
            "lorakit": arm([flat], reach, True),
            "448 tensors, fused": arm(tensors, give_each, True),
            "448 tensors, for-loop": arm(tensors, give_each, False),
        }
        yield Result(f"448 tensors, {flat.numel():,} numbers", interleaved(arms, rounds=5), "floor", 1.2)
