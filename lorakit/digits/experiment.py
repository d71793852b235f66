"""The experiment of the talk, and beyond it: one base, its worst digit, and adapters that mend it.

Every phase draws from its own seed, so its numbers do not depend on whether the base was trained or read from disk.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import lorakit as lk
from lorakit.algebra import Spectrum, factored_singular_values
from lorakit.digits import base as base_file
from lorakit.digits.config import Config
from lorakit.digits.data import Dataset, Digits
from lorakit.digits.network import BATCH, DigitNet, Score, drawn, predict, score, train
from lorakit.digits.proofs import Logits, prove
from lorakit.plan import Plan

VARIANT = lk.LoRA(rank=1, alpha=1, init="gaussian", std=1.0)
# Twice the base's learning rate: at the same one, how far 100 batches get hangs on the draw of A.
LEARNING_RATE = 2e-3
STRENGTHS = [round(0.1 * i, 1) for i in range(16)]


class Listener(Protocol):
    """Whom the experiment tells how far it is."""

    def say(self, text: str) -> None:
        """A line to show."""

    def progress(self, text: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A bar for `total` steps; the function it gives is called after each."""


@dataclass(frozen=True)
class Run:
    """What a run found: `results` is what goes to results.json; the rest is for pictures."""

    results: dict[str, Any]
    spectra: dict[str, tuple[Tensor, Tensor]]
    """For each layer the singular values of its weight and of its update."""

    @property
    def ok(self) -> bool:
        """Whether every proof held."""
        return all(self.results["proofs"].values())


def run(config: Config, data: Dataset, listener: Listener, start: float) -> Run:
    """Pretrain or reuse the base, adapt it, prove, compare; writes the base and the adapters under `config.out`.

    `start` is the `time.perf_counter()` from which the total time is counted.
    """
    base = _base(config, data, listener)
    _clear(config.out)
    net = base.net
    untouched = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    before = predict(net, data.test)
    base_score = score(before, data.test)
    digit = base_score.wrong.index(max(base_score.wrong)) if config.digit is None else config.digit
    listener.say(f"base: {base_score.accuracy:.2%} right; the digit to improve is {digit}")

    name, rehearsed = f"digit-{digit}", f"digit-{digit}-rehearsed"
    adapting = time.perf_counter()
    plan = _adapt(net, name, _only(data.train, digit, config), config, listener)
    adapting = time.perf_counter() - adapting
    adapted = predict(net, data.test)
    with lk.disabled(net):
        disabled = predict(net, data.test)
    with lk.merged(net):
        merged = predict(net, data.test)
    adapter_path = config.out / "adapters" / name
    lk.save(net, adapter_path, name)
    logits = Logits(before, adapted, disabled, merged)
    proofs = prove(net, name, untouched, base.path, adapter_path, data.test, logits)

    _adapt(net, rehearsed, _mixed(data.train, digit, config), config, listener)
    lk.save(net, config.out / "adapters" / rehearsed, rehearsed)
    rehearsed_score = score(predict(net, data.test), data.test)
    each = _one_for_each(net, digit, base_score, data, config, listener)
    sweep, best = _sweep(net, name, digit, data, listener)
    spectra = _spectra(net, name)
    results = {
        "data": data.source,
        "why": data.why,
        "seed": config.seed,
        "recipe": {
            "base": "one epoch of Adam, learning rate 1e-3, batches of 10; the best of 12 looks at held-out images",
            "adapter": f"{config.batches} batches of 10 with Adam, learning rate {LEARNING_RATE:g}",
        },
        "batches": config.batches,
        "digit": digit,
        "parameters": {
            "base": plan.base_parameters,
            "lora": plan.parameters,
            "total": plan.base_parameters + plan.parameters,
            "percent": plan.percent,
        },
        "layers": [
            {"name": row.layer, "weight": list(row.weight), **{n: list(s) for n, s in row.tensors.items()}}
            for row in plan.rows
        ],
        "images": {"train": len(data.train), "heldout": len(data.heldout), "test": len(data.test)},
        "base": asdict(base_score),
        "adapted": asdict(score(adapted, data.test)),
        "disabled": asdict(score(disabled, data.test)),
        "merged": asdict(score(merged, data.test)),
        "rehearsed": {**asdict(rehearsed_score), "share": config.rehearse},
        "proofs": proofs,
        "files": _bytes(base.path, adapter_path, plan),
        "switch": _switching(net, base.path, each),
        "one_for_each": each,
        "sweep": sweep,
        "best_strength": best,
        "seconds": {
            "pretrain": base.seconds,
            "pretrained_in_this_run": not base.reused,
            "adapt": adapting,
            "total": time.perf_counter() - start,
        },
    }
    return Run(results, spectra)


def _base(config: Config, data: Dataset, listener: Listener) -> base_file.Base:
    path = config.out / "base.safetensors"
    base = None if config.fresh else base_file.find(path, data, config.seed)
    if base is not None:
        listener.say(f"the base in {path} is used again (--fresh trains it anew)")
        return base
    with listener.progress("pretraining, one epoch", base_file.steps(data)) as step:
        return base_file.pretrain(path, data, config.seed, step)


def _clear(out: Path) -> None:
    """Remove what an earlier run left, which may belong to another base or digit."""
    for name in ("results.json", "report.html"):
        (out / name).unlink(missing_ok=True)
    for digit in range(10):
        for name in (f"digit-{digit}", f"digit-{digit}-rehearsed"):
            shutil.rmtree(out / "adapters" / name, ignore_errors=True)


def _only(split: Digits, digit: int, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one digit alone, as in the talk."""
    return drawn(split.only(digit), BATCH, torch.Generator().manual_seed(config.seed + 1 + digit))


def _mixed(split: Digits, digit: int, config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in which a share of the images are other digits, so that they are not forgotten."""
    others = round(BATCH * config.rehearse)
    generator = torch.Generator().manual_seed(config.seed + 1 + digit)
    pair = zip(
        drawn(split.only(digit), BATCH - others, generator),
        drawn(split.without(digit), others, generator),
        strict=True,
    )
    for (images, labels), (other_images, other_labels) in pair:
        yield torch.cat([images, other_images]), torch.cat([labels, other_labels])


def _adapt(
    net: DigitNet, name: str, batches: Iterator[tuple[Tensor, Tensor]], config: Config, listener: Listener
) -> Plan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        plan = lk.attach(net, VARIANT, name=name)
    with listener.progress(f"training adapter {name}", config.batches) as step:
        train(net, lk.adapter_parameters(net, name), islice(batches, config.batches), step, lr=LEARNING_RATE)
    return plan


def _one_for_each(
    net: DigitNet, first: int, base: Score, data: Dataset, config: Config, listener: Listener
) -> list[dict[str, Any]]:
    """An adapter for each of the ten digits, all on one base in one process."""
    rows = []
    for digit in range(10):
        name = f"digit-{digit}"
        if digit != first:
            _adapt(net, name, _only(data.train, digit, config), config, listener)
            lk.save(net, config.out / "adapters" / name, name)
        lk.activate(net, name)
        result = score(predict(net, data.test), data.test)
        rows.append(
            {
                "digit": digit,
                "adapter": name,
                "wrong_before": base.wrong[digit],
                "wrong_after": result.wrong[digit],
                "accuracy": result.accuracy,
            }
        )
    return rows


def _sweep(
    net: DigitNet, name: str, digit: int, data: Dataset, listener: Listener
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The adapter at strengths from 0 to 1.5; the best one is chosen on images that nothing was trained on."""
    rows = []
    with listener.progress("sweeping the strength", len(STRENGTHS)) as step:
        for strength in STRENGTHS:
            with lk.active(net, {name: strength}):
                test = score(predict(net, data.test), data.test)
                heldout = score(predict(net, data.heldout), data.heldout)
            rows.append(
                {
                    "strength": strength,
                    "accuracy": test.accuracy,
                    "wrong": test.wrong[digit],
                    "heldout_accuracy": heldout.accuracy,
                    "heldout_wrong": heldout.wrong[digit],
                }
            )
            step()
    best = max(rows, key=lambda row: (row["heldout_accuracy"], -row["heldout_wrong"]))
    return rows, {**best, "chosen_on": f"{len(data.heldout)} held-out images, by accuracy over all digits"}


def _switching(net: DigitNet, path: Path, each: list[dict[str, Any]]) -> dict[str, Any]:
    """The time to switch between resident adapters, beside reading the base from disk again."""
    names = [row["adapter"] for row in each]
    rounds = 1000
    start = time.perf_counter()
    for _ in range(rounds):
        for name in names:
            lk.activate(net, name)
    switch = (time.perf_counter() - start) / (rounds * len(names))
    reloads = []
    for _ in range(5):
        start = time.perf_counter()
        base_file.restore(path)
        reloads.append(time.perf_counter() - start)
    return {"adapters": len(names), "seconds_per_switch": switch, "seconds_reload_base": sorted(reloads)[2]}


def _bytes(base: Path, adapter: Path, plan: Plan) -> dict[str, int]:
    """Sizes on disk, and of what Adam keeps: two float32 numbers for each one trained."""
    return {
        "base_bytes": base.stat().st_size,
        "adapter_bytes": sum(file.stat().st_size for file in adapter.iterdir()),
        "optimizer_bytes_full": 2 * 4 * plan.base_parameters,
        "optimizer_bytes_lora": 2 * 4 * plan.parameters,
    }


def _spectra(net: DigitNet, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = lk.adapter_state_dict(net, name)
    spectra = {}
    for layer in ("linear1", "linear2", "linear3"):
        A, B = (tensors[f"base_model.model.{layer}.lora_{factor}.weight"] for factor in "AB")
        weight = net.get_submodule(layer).get_parameter("weight")
        spectra[layer] = Spectrum.of(weight.detach()).values, factored_singular_values(B, A, VARIANT.scale)
    return spectra
