"""The page of results, from what is stored."""

import datetime
import importlib.metadata
import os
import platform
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.reasons import REASONS
from benchmarks.speed.registry import ALL, ON_GPU
from benchmarks.speed.timing import Result

OWN = ("lorakit", "floor", "frozen")
"""Not peers."""


def machine(device: str) -> dict[str, str]:
    """What the times depend on."""
    found = {"cpu": _cpu(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    if device != "cpu":
        import torch

        found["gpu"] = torch.cuda.get_device_name()
    return found | {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers", "loralib")}


def _cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def stored(results: list[Result], device: str, command: str, seconds: float) -> dict[str, Any]:
    """One scenario as it is kept, with the ratios that follow from the times."""
    cases = []
    for result in results:
        ratios = {arm: result.ratio(arm) for arm in result.values if arm != result.floor}
        peers = {arm: result.ratio("lorakit", arm) for arm in result.values if arm not in (*OWN, result.floor)}
        cases.append({**vars(result), "ratio_to_floor": ratios, "lorakit_to_peer": peers})
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "cpu_seconds": round(seconds, 1),
        "machine": machine(device),
        "cases": cases,
    }


def result_of(case: dict[str, Any]) -> Result:
    """A case as it was run."""
    return Result(**{key: value for key, value in case.items() if key not in ("ratio_to_floor", "lorakit_to_peer")})


def line(result: Result) -> str:
    """One case in one line."""
    cells = [f"{arm} {cell(result, arm)}" for arm in result.values]
    return f"{result.case}: {'; '.join(cells)}; {verdict(result)}".rstrip("; ")


def amount(value: float, unit: str) -> str:
    """A value with its unit, in three digits."""
    if unit == "s":
        for size, name in ((1.0, "s"), (1e-3, "ms")):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{value * 1e6:.3g} µs"
    if unit == "bytes":
        return f"{value:,.0f} B"
    return f"{value:.3g} {unit}"


def cell(result: Result, arm: str) -> str:
    """The floor's own value; of the others the ratio to it, and in brackets what lorakit takes of a peer's."""
    if arm == result.floor:
        return amount(result.values[arm], result.unit)
    if arm in OWN:
        return f"{result.ratio(arm):.3g}"
    return f"{result.ratio(arm):.3g} ({result.ratio('lorakit', arm):.3g})"


def verdict(result: Result) -> str:
    """The aims, and whether they are reached."""
    aims = [f"≤ {aim:.3g}" if arm == result.floor else f"≤ {aim:.3g} of {arm}" for arm, aim in result.aims().items()]
    return "" if not aims else ", ".join(aims) + (" **✗**" if result.short() else " ✓")


def table(results: list[Result]) -> str:
    """The cases of a scenario: an arm in each column."""
    arms = list(dict.fromkeys(arm for result in results for arm in result.values))
    lines = [["case", *arms, "aim"], ["---"] * (len(arms) + 2)]
    for result in results:
        cells = [cell(result, arm) if arm in result.values else "–" for arm in arms]
        lines.append([result.case, *cells, verdict(result)])
    return "".join(f"| {' | '.join(each)} |\n" for each in lines)


def reason(scenario: str, case: str) -> str:
    """Why a case falls short, if somebody has said so."""
    found = [text for pattern, text in REASONS.get(scenario, {}).items() if fnmatchcase(case, pattern)]
    return found[-1] if found else "no reason is given yet"


def shortfalls(name: str, results: list[Result]) -> str:
    """The cases that are short of their aim, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for result in results:
        ratios = [
            f"{ratio:.4g}" if arm == result.floor else f"{ratio:.4g} of {arm}" for arm, ratio in result.short().items()
        ]
        if ratios:
            by_reason.setdefault(reason(name, result.case), []).append(f"{result.case} ({', '.join(ratios)})")
    if not by_reason:
        return ""
    return "\nShort of the aim:\n\n" + "".join(f"- {'; '.join(cases)}: {text}.\n" for text, cases in by_reason.items())


def notes(results: list[Result]) -> str:
    """Further numbers of the cases."""
    lines = [
        f"- {result.case}: " + ", ".join(f"{name} {value:,.4g}" for name, value in result.notes.items()) + "\n"
        for result in results
        if result.notes
    ]
    return "\n" + "".join(lines) if lines else ""


HEAD = """# What adapters cost

CPU time of one thread (`time.process_time`; on a GPU real time), arms interleaved in one process, least of several
rounds. The floor, or the arm that stands for it, is given as it is; every other arm as its ratio to the floor, and in
brackets what lorakit takes of that arm: (0.9) is a tenth less. Before they are timed, the arms are checked to compute
the same. Times of two runs cannot be compared, ratios can. The page is written by `make bench` from
[results.json](results.json); reasons are in [reasons.py](reasons.py), and what was tried in vain in
[NOTES.md](NOTES.md).
"""


def page(scenarios: dict[str, Any]) -> str:
    """All that is stored, and what was not run."""
    text = HEAD
    machines: list[dict[str, str]] = []
    for kept in scenarios.values():
        if kept["machine"] not in machines:
            machines.append(kept["machine"])
    for number, found in enumerate(machines, 1):
        text += f"\nMachine {number}: " + ", ".join(f"{key} {value}" for key, value in found.items()) + ".\n"
    absent = [name for name in ALL if name not in scenarios]
    on_gpu = [name for name in absent if name.removesuffix(" on cuda") in ON_GPU and name.endswith(" on cuda")]
    others = [name for name in absent if name not in on_gpu]
    if on_gpu:
        text += (
            f"\nNot run, for no GPU was at hand: {', '.join(on_gpu)} (bfloat16, d of 4096 and 8192, a Llama of 1B "
            "parameters). The code is\nthere and tested with small sizes: `python -m benchmarks.speed --device cuda`.\n"
        )
    if others:
        text += f"\nNot run yet: {', '.join(others)}.\n"
    for name, kept in scenarios.items():
        results = [result_of(case) for case in kept["cases"]]
        text += f"\n## {name}\n\n{ALL[name].text}\nAim: {ALL[name].aim}.\n\n"
        text += table(results) + notes(results) + shortfalls(name, results)
        which = f", machine {machines.index(kept['machine']) + 1}" if len(machines) > 1 else ""
        text += f"\nRun on {kept['date']}{which} in {kept['cpu_seconds']} s by `{kept['command']}`.\n"
    return text
