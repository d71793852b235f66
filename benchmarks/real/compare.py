"""The same for every experiment: arms that adapt one pretrained network, each with the same CPU time, and a table."""

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

import lorakit as lk
from benchmarks.real.training import Loss, Recipe, Run, classification, train
from lorakit.targets import RequestedMode, Targets

Choose = Callable[[nn.Module], list[nn.Parameter]]
"""Makes a network ready for training and says which parameters train."""
Measure = Callable[[nn.Module], float]
"""One number that a network is judged by."""
Stream = Callable[[int], Iterable[Any]]
"""A seed → batches without end."""

_NAME, _WIDTH = 40, 15
TUNING_SEED = 100
"""None of the seeds that are reported."""


@dataclass(frozen=True)
class Arm:
    """One way to adapt."""

    name: str
    choose: Choose
    recipe: Recipe
    stream: Stream | None = None
    """Other batches than the experiment's: without augmentation, say."""


@dataclass(frozen=True)
class Experiment:
    """A pretrained network, what it is adapted to, and how the result is judged."""

    make: Callable[[], nn.Module]
    stream: Stream
    validation: Measure
    """What hyper-parameters are chosen by."""
    judge: Callable[[nn.Module], dict[str, float]]
    """What is reported, by title; measured only once the hyper-parameters stand."""
    higher_is_better: bool = True
    loss: Loss = field(default=classification)


def everything(model: nn.Module) -> list[nn.Parameter]:
    """Full fine-tuning."""
    return list(model.requires_grad_(True).parameters())


def low_rank(variant: lk.LoRA, targets: Targets, mode: RequestedMode = "auto") -> Choose:
    """An adapter on a frozen network."""

    def choose(model: nn.Module) -> list[nn.Parameter]:
        lk.attach(model, variant, targets, mode=mode)
        return lk.adapter_parameters(model)

    return choose


def adapt(experiment: Experiment, arm: Arm, seed: int) -> tuple[nn.Module, Run, int]:
    """The adapted network, what it took, and how many numbers were trained."""
    torch.manual_seed(seed)
    model = experiment.make()
    parameters = arm.choose(model)
    run = train(model, parameters, (arm.stream or experiment.stream)(seed), arm.recipe, experiment.loss)
    return model, run, sum(p.numel() for p in parameters)


def check_base(model: nn.Module, base: nn.Module) -> None:
    """The adapted network still holds every tensor of its base to the bit, running statistics included."""
    state = model.state_dict()
    for key, wanted in base.state_dict().items():
        if not torch.equal(state[key], wanted):
            raise SystemExit(f"{key} of the frozen base was changed by training the adapter")


def report(experiment: Experiment, arms: list[Arm], seeds: int) -> None:
    """Print a line for the base, for each arm, and for the base inside each adapted network."""
    base = experiment.make()
    before = experiment.judge(base)
    print(f"{'':{_NAME}} | {'trained':>8} | steps | CPU s | {' | '.join(f'{title:>{_WIDTH}}' for title in before)}")
    print(_line("base", 0, [], [before]), flush=True)
    for arm in arms:
        runs, got, count = [], [], 0
        for seed in range(seeds):
            model, run, count = adapt(experiment, arm, seed)
            runs.append(run)
            got.append(experiment.judge(model))
        print(_line(arm.name, count, runs, got), flush=True)
        if lk.adapters(model):  # once for each arm: the last seed's
            check_base(model, base)
            with lk.disabled(model):
                off = experiment.judge(model)
            if off != before:
                raise SystemExit(f"with the adapter off: {off}, the base: {before}")
            print(_line("  the adapter off", 0, [], [off]), flush=True)


def tune(experiments: Mapping[str, Callable[[], Experiment]], candidates: list[Arm]) -> None:
    """Print the mean validation mark of each candidate, the best first; nothing else is measured."""
    ready = {name: make() for name, make in experiments.items()}
    scored: list[tuple[float, str]] = []
    for arm in candidates:
        got = {}
        for name, experiment in ready.items():
            model, run, _ = adapt(experiment, arm, seed=TUNING_SEED)
            got[name] = experiment.validation(model)
        scored.append((statistics.fmean(got.values()), arm.name))
        each = " ".join(f"{value:.3f}" for value in got.values()) if len(got) > 1 else ""
        print(f"  {scored[-1][0]:8.3f}  {arm.name} ({run.steps} steps) {each}", flush=True)
    better = all(experiment.higher_is_better for experiment in ready.values())
    scored.sort(key=lambda row: row[0], reverse=better)
    print("\n".join(["the best first:", *(f"{score:8.3f}  {name}" for score, name in scored)]))


def command_line(
    about: str, experiments: Mapping[str, Callable[[], Experiment]], arms: list[Arm], candidates: list[Arm]
) -> None:
    """`python -m benchmarks.real.<name> [--seconds S] [--seeds N] [--only NAME] [--tune [REGEX]]`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="CPU time for each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=list(experiments), help="one of the experiments")
    parser.add_argument(
        "--tune", nargs="?", const="", metavar="REGEX", help="score the candidates whose name it matches"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        experiments = {options.only: experiments[options.only]}
    if options.seconds is not None:
        arms, candidates = (
            [replace(arm, recipe=replace(arm.recipe, seconds=options.seconds)) for arm in some]
            for some in (arms, candidates)
        )
    if options.tune is not None:
        return tune(experiments, [arm for arm in candidates if re.search(options.tune, arm.name)])
    cpu, wall = time.process_time(), time.perf_counter()
    for name, make in experiments.items():
        print(f"\n{name}")
        report(make(), arms, options.seeds)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"\n{options.seeds} seeds, mean ± standard deviation; {cpu:.0f} s of CPU time, {wall:.0f} s in all")


def _line(name: str, count: int, runs: list[Run], got: list[dict[str, float]]) -> str:
    """A row: means over the seeds, with the standard deviation between them."""
    steps = f"{statistics.fmean(run.steps for run in runs):.0f}" if runs else "-"
    cpu = f"{statistics.fmean(run.cpu for run in runs):.1f}" if runs else "-"
    cells = []
    for title in got[0]:
        values = [one[title] for one in got]
        spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells.append(f"{f'{statistics.fmean(values):.2f}{spread}':>{_WIDTH}}")
    return f"{name:{_NAME}} | {f'{count:,}' if count else '-':>8} | {steps:>5} | {cpu:>5} | {' | '.join(cells)}"


def judged_by(measures: Mapping[str, Measure]) -> Callable[[nn.Module], dict[str, float]]:
    """For an experiment: each of these."""
    return lambda model: {title: measure(model) for title, measure in measures.items()}


def percent(share: Callable[..., float], *args: Any) -> Measure:
    """A measure in per cent."""
    return lambda model: 100 * share(model, *args)
