"""The steps of the story, one after the other."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lorakit as lk
from examples.sql_and_javascript import dialect, javascript, questions, report, together, training
from examples.sql_and_javascript.measures import Score, examples_of, loss_of, requests_of, score
from examples.sql_and_javascript.pairs import Pair, Task, write_pairs
from examples.sql_and_javascript.pretrain import pretrained
from examples.sql_and_javascript.settings import Plan
from lorakit.finetune.base import Base, open_base
from lorakit.finetune.generation.generate import context_of

NAMES = {"sql": "sql", "js": "javascript"}
"""What a task's folders and its configuration are called."""
_TUNED = 3
"""A try of a learning rate takes one in so many of the steps."""


class Teller:
    """Tells it into a folder.

    Args:
        plan: sizes, steps and learning rates.
        out: the folder.
        model: the base's directory, or None for the small one.
        shared: where the real questions may be.
        say: what is told of each line.
    """

    def __init__(self, plan: Plan, out: Path, model: str | None, shared: Path, say: Callable[[str], None]) -> None:
        self.plan, self.out, self.model, self.shared, self.say = plan, out, model, shared, say
        self.times: dict[str, float] = {}

    def tell(self, tune: bool) -> Mapping[str, Any]:
        """All of it; returns what `results.json` holds."""
        base = self._base()
        context = context_of(base.model)
        if context is not None and context < self.plan.length:
            self.plan = replace(self.plan, length=context)
        size_of_base = base.model.num_parameters()
        before = together.checksum(base.model), together.file_checksum(base.where)
        tasks = self._tasks(base)
        budget = self._budget()
        rates = {name: (budget.adapter_rate, budget.full_rate) for name in NAMES}
        sweep: list[dict[str, Any]] = []
        if tune:
            rates, sweep = self._tuned(base, budget)
        arms, texts, paths = [], {}, {}
        scores, texts["base"] = self._scores("base", base, None, tasks)
        # A model of the hub lies elsewhere: then what its weights take in memory.
        files = _bytes(Path(base.where)) or sum(tensor.nbytes for tensor in base.model.parameters())
        arms.append(report.Arm("base", 0, files, None, None, None, scores))
        for name in NAMES:
            mine = replace(budget, adapter_rate=rates[name][0])
            paths[name], seconds = self._adapter(base.where, name, mine)
            lk.load(base.model, paths[name], name)
            arm = f"{name} adapter"
            scores, texts[arm] = self._scores(arm, base, name, tasks)
            numbers = sum(parameter.numel() for parameter in lk.adapter_parameters(base.model, name))
            loss = loss_of(base, name, examples_of(self._data(name) / "validation.jsonl", base, budget.length))
            size = _bytes(paths[name])
            arms.append(report.Arm(arm, numbers, size, seconds, mine.adapter_rate, loss, scores))
        for name in NAMES:
            mine = replace(budget, full_rate=rates[name][1])
            self.say(f"\nfull fine-tuning on {name}, as many steps and pairs")
            full = training.fine_tune(base.where, self._data(name), self.out / f"full-{NAMES[name]}", mine, self.say)
            arm = f"full on {name}"
            scores, texts[arm] = self._scores(arm, open_base(full.path, device="cpu", dtype="float32"), None, tasks)
            size = _bytes(full.path)
            arms.append(report.Arm(arm, full.parameters, size, full.seconds, mine.full_rate, full.validation, scores))
        self.say("\nboth adapters on one base")
        laws = self._timed("laws", lambda: self._laws(base, paths, before))
        story = report.Story(
            base=str(base.where),
            parameters=size_of_base,
            arms=arms,
            laws=laws,
            samples=self._samples(tasks, texts),
            notes=[note for task in tasks.values() for note in task.notes],
            settings={"rank": budget.rank, "steps": budget.steps, "batch": budget.batch, "length": budget.length},
            seconds=self.times,
            sweep=sweep,
        )
        report.write(story, self.out)
        self.say(f"\n{report.page(story)}")
        return dict(json.loads((self.out / "results.json").read_text(encoding="utf-8")))

    def _base(self) -> Base:
        if self.model is not None:
            return open_base(self.model, device="cpu", dtype="float32")
        made = self._timed("base", lambda: pretrained(self.plan.base, self.say))
        how = "from the cache" if made.reused else f"in {made.seconds:.0f} s"
        self.say(f"base: {made.path} ({how}; {made.parameters:,} numbers, loss {made.loss:.2f} on text held out)")
        return open_base(made.path, device="cpu", dtype="float32")

    def _budget(self) -> training.Budget:
        plan = self.plan
        return training.Budget(
            plan.steps, plan.batch, plan.length, plan.rank, plan.adapter_rate, plan.full_rate, plan.seed
        )

    def _tasks(self, base: Base) -> dict[str, Task]:
        """Both, written as JSONL."""
        plan, tokenizer = self.plan, base.tokenizer

        def fits(pair: Pair) -> bool:
            prompt = tokenizer(pair.prompt, verbose=False)
            completion = tokenizer(pair.completion, add_special_tokens=False, verbose=False)
            return len(prompt["input_ids"]) + len(completion["input_ids"]) < plan.length

        folder = self.shared / "data" / "text2sql"
        if (folder / questions.DATABASE).exists():
            sql = questions.published(folder, fits)
        else:
            sql = dialect.staff(plan.staff, plan.seed, fits)
        tasks = {"sql": sql, "js": javascript.generated(plan.javascript, plan.seed, fits)}
        for name, task in tasks.items():
            if plan.test is not None:
                tasks[name] = replace(task, test=_first_of_each(task.test, plan.test))
            for part, pairs in tasks[name].parts().items():
                write_pairs(pairs, self._data(name) / f"{part}.jsonl")
            self.say(f"{task.title}: {len(task.train)} pairs to train on, {len(tasks[name].test)} to test")
            for note in task.notes:
                self.say(f"  {note}")
        return tasks

    def _data(self, name: str) -> Path:
        return self.out / "data" / NAMES[name]

    def _adapter(self, model: str, name: str, budget: training.Budget) -> tuple[Path, float]:
        """Write the configuration of a task's adapter and train it by `lorakit train`."""
        config, out = self.out / f"{NAMES[name]}.yaml", self.out / NAMES[name]
        text = training.config_of(model, self._data(name), out, name, budget)
        training.write_config(config, text, f"An adapter for {NAMES[name]}")
        self.say("")
        return out / "adapter", training.train_adapter(config, out, self.say)

    def _tuned(
        self, base: Base, budget: training.Budget
    ) -> tuple[dict[str, tuple[float, float]], list[dict[str, Any]]]:
        """The rates of the least validation loss after a third of the steps: of each task, for adapter and full."""
        short, tried = replace(budget, steps=max(1, budget.steps // _TUNED)), []
        best: dict[str, tuple[float, float]] = {}
        for name in NAMES:
            losses: dict[str, dict[float, float]] = {"adapter": {}, "full": {}}
            for rate in self.plan.adapter_rates:
                path, _ = self._adapter(base.where, name, replace(short, adapter_rate=rate))
                own = open_base(base.where, device="cpu", dtype="float32")
                lk.load(own.model, path, name)
                data = examples_of(self._data(name) / "validation.jsonl", own, budget.length)
                losses["adapter"][rate] = loss_of(own, name, data)
            for rate in self.plan.full_rates:
                own = open_base(base.where, device="cpu", dtype="float32")
                losses["full"][rate], _ = training.descend(
                    own, self._data(name), replace(short, full_rate=rate), self.say
                )
            for how, found in losses.items():
                tried += [
                    {"arm": f"{name}, {how}", "rate": rate, "steps": short.steps, "validation": loss}
                    for rate, loss in found.items()
                ]
            best[name] = tuple(min(found, key=found.__getitem__) for found in losses.values())  # type: ignore[assignment]
        self.say(f"\n{report.sweep_table(tried)}")
        return best, tried

    def _scores(
        self, arm: str, base: Base, chosen: str | None, tasks: Mapping[str, Task]
    ) -> tuple[dict[str, Score], dict[str, list[str]]]:
        scores: dict[str, Score] = {}
        texts = {}
        start = time.perf_counter()
        for name, task in tasks.items():
            found, texts[name] = score(base, chosen, task, self._data(name) / "test.jsonl", self.plan.length)
            scores.update(found)
        self.times[f"scores of {arm}"] = time.perf_counter() - start
        shown = ", ".join(f"{report.SETS[name]} {report.percent(found.exact)}" for name, found in scores.items())
        self.say(f"{arm}: exact matches {shown} ({self.times[f'scores of {arm}']:.0f} s)")
        return scores, texts

    def _laws(self, base: Base, paths: dict[str, Path], before: tuple[str, str]) -> together.Laws:
        requests = [requests_of(self._data(name) / "test.jsonl", base, None)[: 2 * self.plan.samples] for name in NAMES]
        mixed = [request for pair in zip_longest(*requests) for request in pair if request is not None]
        return together.laws_of(base, paths, mixed, before, 64)

    def _samples(self, tasks: Mapping[str, Task], texts: Mapping[str, Mapping[str, list[str]]]) -> list[dict[str, str]]:
        """The same prompts for all, spread over each task's."""
        samples = []
        for name, task in tasks.items():
            every = max(1, len(task.test) // self.plan.samples)
            for i in range(0, len(task.test), every)[: self.plan.samples]:
                pair = task.test[i]
                written = {arm: texts[arm][name][i] for arm in texts if not arm.startswith("full")}
                samples.append({"prompt": pair.prompt.strip(), "gold": pair.completion, **written})
        return samples

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        self.times[name] = time.perf_counter() - start
        return result


def _first_of_each(pairs: Any, count: int) -> list[Pair]:
    """The first so many pairs of each set."""
    seen: dict[str, int] = {}
    kept = []
    for pair in pairs:
        seen[pair.origin] = seen.get(pair.origin, 0) + 1
        if seen[pair.origin] <= count:
            kept.append(pair)
    return kept


def _bytes(path: Path) -> int:
    """Of the weights in a directory, and of an adapter's configuration."""
    return sum(file.stat().st_size for file in path.glob("*") if file.suffix == ".safetensors" or "config" in file.name)
