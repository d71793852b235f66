"""All scenarios, in the order of the page."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.speed import gpu
from benchmarks.speed.compiled import compiled
from benchmarks.speed.growth import growth
from benchmarks.speed.inference import decode, merged
from benchmarks.speed.layer import bytes_kept, layer
from benchmarks.speed.rows import per_row
from benchmarks.speed.steps import digits, dora, llama_step
from benchmarks.speed.timing import Result
from benchmarks.speed.values import combining, merging, merging_for_good, optimizing
from benchmarks.speed.verbs import attach, load, switch

Run = Callable[..., Iterator[Result]]
"""Takes `quick`: sizes and counts of a test."""


@dataclass(frozen=True)
class Scenario:
    """The same work by several arms, the cheapest possible one among them as the floor."""

    run: Run
    aim: str

    @property
    def text(self) -> str:
        """What it is, in words."""
        return "\n".join(line.strip() for line in (self.run.__doc__ or "").strip().splitlines())


SCENARIOS: dict[str, Scenario] = {
    "layer": Scenario(layer, "at most 1.05 of the floor, 1.15 for 10 rows"),
    "digits": Scenario(digits, "at least 4 times as fast as the talk's parametrization, and faster than training all"),
    "llama": Scenario(llama_step, "at most 1.06 of the frozen forward and input gradient, faster than the others"),
    "decode": Scenario(decode, "at most 1.25 of the bare model, 1.5 of a layer's dispatch"),
    "merged": Scenario(merged, "the bare model's time, and nothing left in the module tree"),
    "switch": Scenario(switch, "constant, and at least 500 times as fast as PEFT"),
    "load": Scenario(load, "at most twice `load_file`, for the 64th too"),
    "merge": Scenario(merging, "at most 2.2 of a copy of the weights"),
    "merge_for_good": Scenario(merging_for_good, "at most 2.2 of a copy of the weights"),
    "combine": Scenario(combining, "at least 100 times as fast as PEFT"),
    "optimize": Scenario(optimizing, "at most 1.2 of one plain tensor of all the numbers"),
    "per_row": Scenario(per_row, "at most 1.2 of the base for up to 32 adapters, 1.6 for 64"),
    "bytes": Scenario(bytes_kept, "exactly the floor"),
    "attach": Scenario(attach, "at most 1.5 of making the tensors"),
    "dora": Scenario(dora, "at most 1.25 of a LoRA step"),
    "growth": Scenario(growth, "no term grows faster than the arithmetic"),
    "compiled": Scenario(compiled, "none was set"),
}

ON_GPU: dict[str, Scenario] = {
    "layer": Scenario(gpu.layer, SCENARIOS["layer"].aim),
    "llama": Scenario(gpu.llama_step, SCENARIOS["llama"].aim),
    "per_row": Scenario(gpu.per_row, SCENARIOS["per_row"].aim),
    "bytes": Scenario(gpu.bytes_kept, SCENARIOS["bytes"].aim),
}
"""Run with `--device cuda`, and stored as "layer on cuda"."""

ALL = SCENARIOS | {f"{name} on cuda": scenario for name, scenario in ON_GPU.items()}
