"""What single methods promise beyond the laws: starts, norms, memory, groups, budgets."""

import copy
import warnings

import pytest
import torch
from helpers import assert_close, assert_same, attached, picture, randomize, refused, run
from kinds import Block, mlp
from torch import nn

import lorakit as lk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def tensors(model: nn.Module, layer: str = "0", name: str = "default") -> dict[str, torch.Tensor]:
    return dict(model.get_submodule(layer).lora.weight[name].state_dict())


def test_pissa_begins_with_the_largest_singular_directions():
    torch.manual_seed(0)
    model = mlp()
    lk.attach(model, lk.LoRA(rank=2, alpha=6, init="pissa"), "0")
    U, S, Vh = torch.linalg.svd(model[0].weight)
    t = tensors(model)
    assert_close(3 * t["B"] @ t["A"], U[:, :2] * S[:2] @ Vh[:2])
    assert_close(t["A"].norm(dim=1), t["B"].norm(dim=0))


def test_olora_begins_with_the_first_columns_of_q_and_rows_of_r():
    torch.manual_seed(0)
    model = mlp()
    lk.attach(model, lk.LoRA(rank=2, init="olora"), "0")
    t = tensors(model)
    assert_close(t["B"].T @ t["B"], torch.eye(2))
    assert_close(t["B"].T @ model[0].weight, t["A"])


def test_orthogonal_rows():
    model = mlp()
    lk.attach(model, lk.LoRA(rank=3, init="orthogonal"), "0")
    t = tensors(model)
    assert_close(t["A"] @ t["A"].T, torch.eye(3))
    assert not t["B"].any()


@pytest.mark.parametrize("parts", [1, 3])
def test_eva_begins_with_the_principal_directions_of_the_inputs(parts):
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(60, 6) * torch.tensor([5, 1, 4, 1, 1, 3.0]) + 2
    before = picture(model)
    lk.attach(model, lk.LoRA(rank=2, init="eva"), "0", data=[(part,) for part in x.chunk(parts)])
    Vh = torch.linalg.svd(x - x.mean(0))[2]
    A = tensors(model)["A"]
    assert_close((A @ Vh[:2].T).abs(), torch.eye(2), factor=5)
    lk.detach(model)
    assert_same(picture(model), before)


def test_lora_ga_s_first_step_is_the_gradient_s_own_direction():
    torch.manual_seed(0)
    model, x, y = mlp(), torch.randn(20, 6), torch.randn(20, 4)

    def loss(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    plain = copy.deepcopy(model)
    loss(plain, (x, y)).backward()
    U, _, Vh = torch.linalg.svd(plain[0].weight.grad)
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    lk.attach(model, lk.LoRA(rank=2, init="lora-ga"), "0", data=batches, loss=loss)
    t = tensors(model)
    size = 5**0.25 / 4
    assert_close((t["A"] @ Vh[:2].T).abs(), size * torch.eye(2), factor=5)
    assert_close((U[:, 2:4].T @ t["B"]).abs(), size * torch.eye(2), factor=5)
    assert all(p.grad is None for p in model.parameters())


def test_loftq_brings_the_model_nearer_to_the_original_and_leaves_its_base():
    torch.manual_seed(0)
    original, x = mlp(), torch.randn(3, 6)
    rounded = copy.deepcopy(original)
    with torch.no_grad():
        for layer in (rounded[0], rounded[2]):
            layer.weight.copy_((layer.weight * 4).round() / 4)
    base, y = copy.deepcopy(rounded), rounded(x)
    lk.attach(rounded, lk.LoRA(rank=3, init="loftq"), original=original)
    for layer in "02":
        error = original.get_submodule(layer).weight - base.get_submodule(layer).weight
        t = tensors(rounded, layer)
        values = torch.linalg.svdvals(error)
        assert_close((error - t["B"] @ t["A"]).norm(), values[3:].norm())
    with lk.disabled(rounded):
        assert torch.equal(rounded(x), y)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_is_subtracted_is_saved_as_one_lora_that_peft_reads(init, tmp_path):
    torch.manual_seed(0)
    base, x = mlp(), torch.randn(3, 6)
    for scaling in ("standard", "rslora"):
        model = attached(copy.deepcopy(base), lk.LoRA(rank=2, alpha=3, init=init, scaling=scaling))
        lk.save(model, tmp_path / scaling)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / scaling))
        assert_close(theirs(x), model(x))
        assert theirs.peft_config["default"].r == 4


STARTS = {
    "eva-without-data": ({"init": "eva"}, {}, "data="),
    "eva-no-batch": ({"init": "eva"}, {"data": []}, "no batch"),
    "eva-few": ({"init": "eva", "rank": 3}, {"data": [torch.randn(2, 6)]}, "'0'.*spans 1 directions"),
    "eva-nan": ({"init": "eva"}, {"data": [torch.full((9, 6), torch.nan)]}, "'0'"),
    "ga-without-data": ({"init": "lora-ga"}, {"loss": lambda m, b: m(b).sum()}, "data="),
    "ga-without-loss": ({"init": "lora-ga"}, {"data": [torch.randn(2, 6)]}, "loss="),
    "ga-rank": ({"init": "lora-ga", "rank": 3}, {"data": [torch.randn(2, 6)]}, "rank 2, not 3"),
    "pissa-rank": ({"init": "pissa", "rank": 5}, {}, "5×6|4×5"),
    "loftq-without-original": ({"init": "loftq"}, {}, "original="),
    "loftq-other": ({"init": "loftq"}, {"original": nn.Linear(2, 2)}, "0.weight"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_without_what_it_needs_is_refused(case):
    spec, more, word = STARTS[case]
    model = mlp()
    before = picture(model)
    with pytest.raises(lk.LorakitError, match=word):
        lk.attach(model, lk.LoRA(**{"rank": 2, **spec}), **more)
    assert_same(picture(model), before)


def test_eva_where_the_layer_is_not_reached_or_takes_no_vectors_is_refused():
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "other": nn.Linear(3, 3)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(lk.LorakitError, match=r"'other'.*not called"):
        lk.attach(model, lk.LoRA(rank=1, init="eva"), data=[torch.randn(9, 3)])
    with refused(nn.Conv1d(2, 3, 1), "Conv", "principal directions"):
        lk.attach(nn.Conv1d(2, 3, 1), lk.LoRA(rank=1, init="eva"), nn.Conv1d, data=[torch.randn(1, 2, 5)])


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


class Saved:
    """Counts the numbers that autograd keeps and that are no parameter."""

    def __init__(self, model):
        self.own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.kept = {}

    def __enter__(self):
        def pack(t):
            if t.untyped_storage().data_ptr() not in self.own:
                self.kept[t.untyped_storage().data_ptr()] = t
            return t

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    @property
    def largest(self):
        return max((t.numel() for t in self.kept.values()), default=0)


def test_lora_fa_keeps_no_input_and_dora_no_dense_matrix():
    x = torch.randn(50, 40)
    kept = {}
    for variant in (lk.LoRA(rank=2), lk.LoRAFA(rank=2), lk.DoRA(rank=2)):
        model = nn.Linear(40, 60)
        lk.attach(model, variant, nn.Linear)
        with Saved(model) as saved:
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
