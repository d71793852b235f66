"""AdaLoRA's budget: ranks are pruned in training by their importance (Zhang et al. 2023, arXiv:2303.10512, §3.2)."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.state import Site, one_name, require, sites
from lorakit.variants import TripletUpdate
from lorakit.variants.checks import checked_integer, checked_number


class RankBudget:
    """Spends a shrinking number of ranks where they matter most; for an adapter that was attached with `AdaLoRA`.

        budget = RankBudget(model, target=8, steps=1000)
        for batch in batches:
            (loss(model, batch) + budget.penalty()).backward()
            optimizer.step()
            budget.step()  # while the gradients are there
            optimizer.zero_grad()

    The importance of a number is its smoothed sensitivity |w·∂loss/∂w| times how uncertain that is (equations 9 to 11);
    of a rank, that of its λ plus the means over its row and its column. The ranks of least importance have their λ
    set to zero; one that recovers may come back.

    Args:
        model: the model that was given to `attach`.
        target: ranks per weight at the end, in the mean.
        steps: optimizer steps in all.
        warmup: steps before the budget begins to shrink.
        final: steps at the end in which it stays at `target`, and which ranks are left no longer changes.
        every: prune at every so many steps.
        smoothing: β₁ of sensitivity and β₂ of uncertainty.
        name: the adapter; by default the only one.

    Raises:
        LorakitError: no such adapter, another variant, or a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        target: float,
        steps: int,
        *,
        warmup: int = 0,
        final: int = 0,
        every: int = 1,
        smoothing: tuple[float, float] = (0.85, 0.85),
        name: str | None = None,
    ) -> None:
        root, state = require(model, None if name is None else [name])
        self.name = one_name(state, name)
        self.sites: list[Site] = [
            site for site in sites(root, self.name) if isinstance(site.adapted[self.name], TripletUpdate)
        ]
        if not self.sites:
            raise LorakitError(f"adapter {self.name!r} has no ranks to prune: attach it with AdaLoRA(rank=...)")
        self.steps = checked_integer("steps", steps, at_least=2, at_most=2**62)
        self.warmup = checked_integer("warmup", warmup, at_least=0, at_most=self.steps - 2)
        self.final = checked_integer("final", final, at_least=0, at_most=self.steps - 2 - self.warmup)
        self.every = checked_integer("every", every, at_least=1, at_most=self.steps)
        first, second = (checked_number("smoothing", beta, at_least=0, below=1) for beta in smoothing)
        self.smoothing = (first, second)
        matrices = sum(update.E[..., 0, 0].numel() for update in self._updates)
        self.begin = sum(update.E.numel() for update in self._updates)
        self.end = round(checked_number("target", target, above=0) * matrices)
        if self.end > self.begin:
            raise LorakitError(f"target={target!r} is above the rank that AdaLoRA began with")
        if self.end == 0:
            raise LorakitError(f"target={target!r} leaves no rank at all in {matrices} matrices; use a larger one")
        self.count = 0
        self._sensitivity: dict[tuple[int, str], Tensor] = {}
        self._uncertainty: dict[tuple[int, str], Tensor] = {}
        self._final: list[Tensor] = []

    @property
    def _updates(self) -> list[TripletUpdate]:
        return [cast(TripletUpdate, site.adapted[self.name]) for site in self.sites]

    def penalty(self, weight: float = 0.5) -> Tensor:
        """Weight times how far all P and Q are from orthonormal, in the mean; to be added to the loss (equation 4)."""
        updates = self._updates
        return weight * torch.stack([update.penalty() for update in updates]).sum() / (2 * len(updates))

    def budget(self, step: int) -> int:
        """How many ranks in all there may be after this step (equation 12)."""
        if step <= self.warmup:
            return self.begin
        last = self.steps - self.final
        if step >= last:
            return self.end
        left = 1 - (step - self.warmup) / (last - self.warmup)
        return int((self.begin - self.end) * left**3 + self.end)

    @torch.no_grad()
    def step(self) -> None:
        """Note the gradients of this step, and prune if it is time."""
        self.count += 1
        last = self.steps - self.final
        if self.count < last:
            self._note()
        if not self._sensitivity:  # no gradient was finite yet
            return
        if self.count >= last:
            self._final = self._final or self._most_important(self.end)
            self._prune(self._final)
        elif self.count > self.warmup and self.count % self.every == 0:
            self._prune(self._most_important(self.budget(self.count)))

    def ranks(self) -> dict[str, int]:
        """How many ranks each weight has left."""
        updates = zip(self.sites, self._updates, strict=True)
        return {site.name: int(update.E.count_nonzero()) for site, update in updates}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to go on: the step, the running means, and which ranks are left at the end."""
        means = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        return {"count": self.count, "final": list(self._final), **{name: dict(mean) for name, mean in means.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; the arguments must be the same."""
        like = {(i, name): p for i, update in enumerate(self._updates) for name, p in update.named_parameters()}
        means = [state["sensitivity"], state["uncertainty"]]
        if any(
            mean and {key: t.shape for key, t in mean.items()} != {k: p.shape for k, p in like.items()}
            for mean in means
        ):
            raise LorakitError(f"the state is of another adapter than {self.name!r}: its tensors have other shapes")
        self.count = checked_integer("count", state["count"], at_least=0, at_most=2**62)
        self._sensitivity, self._uncertainty = ({key: t.to(like[key]) for key, t in mean.items()} for mean in means)
        self._final = [mask.to(self._updates[0].E.device) for mask in state["final"]]

    def _note(self) -> None:
        first, second = self.smoothing
        trained = {(i, name): p for i, update in enumerate(self._updates) for name, p in update.named_parameters()}
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        if not gradients:
            raise LorakitError(f"adapter {self.name!r} has no gradient: call step() after backward()")
        if not all(gradient.isfinite().all() for gradient in gradients):
            return  # an overflow, for which a GradScaler skips the step; noted, it would stay for ever
        for key, parameter in trained.items():
            # An expert that no input of this batch chose has no gradient.
            seen = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            smooth = self._sensitivity.get(key, torch.zeros_like(seen))
            smooth = first * smooth + (1 - first) * seen
            unsure = self._uncertainty.get(key, torch.zeros_like(seen))
            self._uncertainty[key] = second * unsure + (1 - second) * (seen - smooth).abs()
            self._sensitivity[key] = smooth

    def _most_important(self, count: int) -> list[Tensor]:
        """For each weight, which of its ranks are among the so many most important of all; shaped as E."""
        scores = []
        for i, update in enumerate(self._updates):
            names = [name for name, _ in update.named_parameters()]
            parts = {name: self._sensitivity[i, name] * self._uncertainty[i, name] for name in names}
            scores.append(update.triplet_scores(parts))
        kept = torch.zeros(self.begin, dtype=torch.bool, device=scores[0].device)
        kept[torch.cat([score.flatten() for score in scores]).topk(count).indices] = True
        parts_kept = kept.split([score.numel() for score in scores])
        return [part.view(score.shape) for part, score in zip(parts_kept, scores, strict=True)]

    def _prune(self, kept: list[Tensor]) -> None:
        for update, mask in zip(self._updates, kept, strict=True):
            update.E.mul_(mask)
