"""What single methods promise beyond the laws: norms, memory, groups, budgets."""

import copy
import warnings

import pytest
import torch
from helpers import KeptForBackward, assert_close, assert_same, attached, picture, randomize, refused, run
from models import Block, mlp
from torch import nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def test_two_dora_on_one_weight_cannot_act_together_and_one_with_a_lora_can():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(3, 6)
    for name, variant, targets in [
        ("a", lk.DoRA(rank=1), "0"),
        ("b", lk.DoRA(rank=2), ["0", "2"]),
        ("c", lk.LoRA(rank=1), "0"),
        ("d", lk.DoRA(rank=1), "2"),
    ]:
        attached(model, variant, targets=targets, name=name)
    y = model(x)
    for verb in (
        lk.activate,
        lambda m, c: lk.active(m, c).__enter__(),
        lk.merge,
        lambda m, c: lk.merged(m, c).__enter__(),
    ):
        with refused(model, "'a' and 'b'", "0.weight", "DoRA"):
            verb(model, ["c", "a", "b"])
    assert torch.equal(model(x), y)
    lk.activate(model, {"a": 0.5, "c": 1.0, "d": -0.3})
    y = model(x)
    with lk.merged(model, {"a": 0.5, "c": 1.0, "d": -0.3}):
        assert_close(model(x), y)


def test_dora_keeps_a_row_of_zeros_finite():
    model, x = mlp(), torch.randn(3, 6)
    with torch.no_grad():
        model[0].weight[1] = 0
    y = model(x)
    lk.attach(model, lk.DoRA(rank=2))
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in lk.adapter_parameters(model))


def test_lora_fa_keeps_no_input_and_dora_no_dense_matrix():
    x = torch.randn(50, 40)
    kept = {}
    for variant in (lk.LoRA(rank=2), lk.LoRAFA(rank=2), lk.DoRA(rank=2)):
        model = nn.Linear(40, 60)
        lk.attach(model, variant, nn.Linear)
        with KeptForBackward(model) as saved:
            model(x)
        kept[type(variant).__name__] = saved
    assert kept["LoRA"].largest == x.numel()
    assert kept["LoRAFA"].largest <= 50 * 2
    assert not any(t.shape == (60, 40) for t in kept["DoRA"].kept.values())


def test_vera_s_matrices_are_in_memory_once_and_the_same_after_every_move():
    torch.manual_seed(0)
    model = Block()
    attached(model, lk.VeRA(rank=4), targets=["up", "down"])
    x = torch.randn(2, 3, 6)
    y = model(x)

    def places(model):
        return {
            getattr(model.get_submodule(name).lora.weight.default, t).untyped_storage().data_ptr()
            for name in ("up", "down")
            for t in "AB"
        }

    assert len(places(model)) == 2
    double = copy.deepcopy(model).double()
    assert len(places(double)) == 2
    assert_close(double.float()(x), y)
    assert places(double.float()) == places(model)
    sketch = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert places(sketch) == places(model)
    assert not any(key.endswith((".A", ".B")) for key in model.state_dict())


def test_vera_loads_with_the_sizes_it_was_made_for(tmp_path):
    torch.manual_seed(0)
    base, x = mlp(), torch.randn(3, 6)
    model = attached(copy.deepcopy(base), lk.VeRA(rank=4, seed=3))
    lk.save(model, tmp_path / "a")
    assert lk.adapters(model)["default"].variant.sizes == (5, 6)
    lk.load(base, tmp_path / "a")
    assert torch.equal(base(x), model(x))
    with refused(base, "no room", "(2, 2)"):
        lk.attach(base, lk.VeRA(rank=2, sizes=(2, 2)), name="small")


def test_lora_plus_gives_b_its_own_learning_rate():
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4))
    lk.attach(model, lk.LoRA(rank=2), ["0", "1"])
    slow, fast = lk.adapter_parameter_groups(model, lr=1e-3, ratio=8, weight_decay=0.1)
    assert (slow["lr"], fast["lr"], fast["weight_decay"]) == (1e-3, 8e-3, 0.1)
    assert [p.shape for p in fast["params"]] == [(4, 2)]
    assert len(slow["params"]) == 3
    torch.optim.AdamW([slow, fast])
    lk.attach(model, lk.LoHa(rank=2), "1", name="h")
    with refused(model, "factor B"):
        lk.adapter_parameter_groups(model, lr=1e-3, name="h")
    with refused(model, "ratio"):
        lk.adapter_parameter_groups(model, lr=1e-3, ratio=0)


def test_ranks_and_alphas_by_pattern(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(mlp(), mlp()[:1]), torch.randn(3, 6)
    base.forward = lambda x: base[0](x).sum() + base[1](x).sum()
    how = {"ranks": {"0.*": 1, "0.2": 3}, "alphas": {"1.0": 8}}
    plan = lk.plan(base, lk.LoRA(rank=2, alpha=4), **how)
    assert [row.tensors["A"][0] for row in plan.rows] == [1, 3, 2]
    model = copy.deepcopy(base)
    lk.attach(model, lk.LoRA(rank=2, alpha=4), **how)
    scales = [layer.lora.weight.default.scale for layer in (model[0][0], model[0][2], model[1][0])]
    assert scales == [4, 4 / 3, 4]
    lk.attach(model, lk.LoRA(rank=2), ranks={"0.0": 1}, name="b")
    assert model[0][0].lora.weight.b.scale == 1
    randomize(model, "default")
    lk.activate(model, "default")
    lk.save(model, tmp_path / "a", name="default")
    fresh = copy.deepcopy(base)
    lk.load(fresh, tmp_path / "a")
    assert torch.equal(fresh[0](x), model[0](x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "a"))
    assert_close(theirs.base_model.model[0](x), model[0](x))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = copy.deepcopy(base)
    lk.load(again, tmp_path / "theirs")
    assert_close(again[0](x), model[0](x))
    for bad, word in [({"nope": 3}, "'nope'"), ({"0.*": 0}, "rank=0"), ([1], "must map")]:
        with refused(base, word):
            lk.attach(base, lk.LoRA(rank=2), ranks=bad)
    with refused(base, "VeRA has no alpha"):
        lk.attach(base, lk.VeRA(rank=2), alphas={"0.0": 3})


def test_an_example_that_an_update_does_not_reach_undoes_attaching():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other, self.read = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(self.used(x), self.read.weight)

    model, x = Half(), torch.randn(2, 3)
    before = picture(model)
    with refused(model, "'other.weight' is unreached", "'read.weight' is bypassed"):
        lk.attach(model, lk.LoRA(rank=1), example=x, name="second")
    assert_same(picture(model), before)
    for example in (x, (x,), {"x": x}):
        lk.attach(model, lk.LoRA(rank=1), ["used", "read.weight"], example=example, name="third")
        lk.remove(model, "third")


@pytest.mark.parametrize("every", [1, 2])
def test_the_rank_budget_prunes_as_peft_s_does(every):
    torch.manual_seed(0)
    base, x, y = mlp(), torch.randn(32, 6), torch.randn(32, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.AdaLoraConfig(
            target_modules=["0", "2"],
            init_r=4,
            target_r=2,
            lora_alpha=4,
            total_step=12,
            tinit=2,
            tfinal=4,
            deltaT=every,
        )
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
    lk.attach(base, lk.AdaLoRA(rank=4))
    for key, ours in lk.adapter_state_dict(base).items():
        with torch.no_grad():
            ours.copy_(theirs.get_parameter(key + ".default"))
    budget = lk.RankBudget(base, target=2, steps=12, warmup=2, final=4, every=every)
    mine = torch.optim.SGD(lk.adapter_parameters(base), lr=0.3)
    other = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.3)
    left = []
    for step in range(1, 13):
        for model, optimizer in ((base, mine), (theirs, other)):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        budget.step()
        theirs.base_model.update_and_allocate(step)
        for key, ours in lk.adapter_state_dict(base).items():
            if step < 8:  # there PEFT resizes its tensors
                assert_close(ours, theirs.get_parameter(key + ".default"), factor=10)
        left.append(sum(budget.ranks().values()))
    assert left[1] == 8 and left[-1] == 4
    assert left[-5:] == [4] * 5


def test_the_rank_budget_goes_on_from_a_checkpoint():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(16, 6)
    lk.attach(model, lk.AdaLoRA(rank=4))
    other = copy.deepcopy(model)

    def train(model, budget, steps):
        for _ in range(steps):
            model.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                for parameter in lk.adapter_parameters(model):
                    parameter -= 0.3 * parameter.grad
            budget.step()

    whole = lk.RankBudget(model, target=2, steps=10, final=3)
    train(model, whole, 10)
    for stop in (4, 8):
        resumed = copy.deepcopy(other)
        first = lk.RankBudget(resumed, target=2, steps=10, final=3)
        train(resumed, first, stop)
        second = lk.RankBudget(resumed, target=2, steps=10, final=3)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(resumed, second, 10 - stop)
        assert all(
            torch.equal(a, b) for a, b in zip(lk.adapter_parameters(model), lk.adapter_parameters(resumed), strict=True)
        )
    lk.attach(other, lk.AdaLoRA(rank=3), name="narrow")
    with refused(other, "another adapter"):
        lk.RankBudget(other, target=2, steps=10, name="narrow").load_state_dict(whole.state_dict())


def test_the_rank_budget_says_what_is_wrong():
    model = mlp()
    lk.attach(model, lk.LoRA(rank=2))
    with refused(model, "AdaLoRA"):
        lk.RankBudget(model, target=1, steps=10)
    lk.attach(model, lk.AdaLoRA(rank=2), name="ada")
    for arguments, word in [({"target": 3}, "target"), ({"steps": 0}, "steps"), ({"warmup": 10}, "warmup")]:
        with refused(model, word):
            lk.RankBudget(model, name="ada", **{"target": 1, "steps": 10, **arguments})
    budget = lk.RankBudget(model, target=1, steps=10, name="ada")
    with refused(model, "no gradient"):
        budget.step()
    assert budget.penalty().item() > 0
    run(model, (torch.randn(3, 6),)).sum().backward()


def test_the_plan_says_what_the_optimizer_keeps():
    plan = lk.plan(mlp(), lk.LoRA(rank=2))
    assert plan.optimizer_bytes == 2 * 4 * plan.parameters
    assert "Adam's state: 320 B; 472 B to train all of the base" in str(plan)
    assert lk.plan(mlp().to(torch.bfloat16), lk.LoRA(rank=2)).optimizer_bytes == plan.optimizer_bytes
    assert lk.plan(mlp(), lk.LoRAFA(rank=2)).parameters == 2 * (5 + 4)
