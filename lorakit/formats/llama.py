"""Names of Llama-like models in transformers, which tools with names of their own are translated to and from."""

import re
from collections.abc import Iterable, Mapping

from lorakit.formats.names import Names

_OWN = re.compile(r"^(?:(?:.*\.)?layers\.(\d+)\.(.+)|(?:.*\.)?(lm_head|embed_tokens))$")
_QK = re.compile(r"^(.*layers\.\d+\.self_attn)\.([qk])_proj$")


def part_of(path: str) -> tuple[str, str] | None:
    """Of the projections of queries and keys: the attention's name, and "q" or "k"."""
    found = _QK.match(path)
    return None if found is None else (found[1], found[2])


def split(path: str) -> tuple[str | None, str] | None:
    """A name in transformers as the number of its block and the rest: ("3", "self_attn.q_proj"), (None, "lm_head")."""
    found = _OWN.match(path)
    if found is None:
        return None
    return (None, found[3]) if found[1] is None else (found[1], found[2])


def joined(block: str | None, rest: str) -> str:
    """The name of a model with a head, LlamaForCausalLM."""
    if block is None:
        return rest if rest == "lm_head" else f"model.{rest}"
    return f"model.layers.{block}.{rest}"


def placed(wanted: Iterable[str], names: Names, problems: list[str]) -> Mapping[str, str]:
    """The layers that a model has for these names of LlamaForCausalLM, which may be a part of it or be in another."""
    layers = names.layers
    ends: dict[str, list[str]] = {}
    for layer in layers:
        found = split(layer)
        if found is not None:
            ends.setdefault(joined(*found), []).append(layer)
    known, result = set(layers), {}
    for name in wanted:
        here = [name] if name in known else ends.get(name, [])
        if len(here) == 1:
            result[name] = here[0]
        else:
            problems.append(
                f"the model has {'no' if not here else 'several'} {name!r}: {', '.join(here[:3])}".rstrip(": ")
            )
    return result


def sizes_of_q(names: Names) -> dict[str, int]:
    """Rows of the queries' projection by the attention's name, where shapes are known."""
    found = {}
    for name, shape in names.shapes.items():
        part = part_of(name.removesuffix(".weight"))
        if part is not None and part[1] == "q" and shape is not None and len(shape) == 2:
            found[part[0]] = shape[0]
    return found
