"""A base: a causal language model of transformers and its tokenizer, from a directory or the hub."""

import os
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import LorakitError
from lorakit.finetune.devices import DTYPES as DTYPES
from lorakit.finetune.devices import device_named as device_named
from lorakit.finetune.devices import dtype_on as dtype_on
from lorakit.finetune.hub import hub_is_near, is_local, offline
from lorakit.finetune.quiet import quiet_imports as quiet_imports
from lorakit.finetune.quiet import quiet_transformers as quiet_transformers
from lorakit.finetune.special_tokens import complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAMED = 8
"""Weights that a message names at most."""


@dataclass(frozen=True)
class Base:
    """A language model and its tokenizer."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    where: str
    """The directory or hub id, as given."""
    notes: tuple[str, ...] = ()
    """What is to be said of it: weights that were left out, an end of text that was never trained."""


def open_base(
    where: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> Base:
    """Load a causal language model and its tokenizer, in `eval()`.

    The tokenizer has a pad token afterwards, one that it knows already: the embedding never grows. If it names no end
    of text, it is given that of the model's config; if that is a token which was never trained, so that the model
    cannot tell it from others, texts end with the token that they begin with, if that was trained.

    Args:
        where: a directory that transformers' `save_pretrained` wrote, or a hub id.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" is the first of cuda, mps and cpu that there is, and of several
            GPUs that of `LOCAL_RANK`.
        dtype: "float32", "bfloat16" or "float16"; "auto" is bfloat16 on a GPU that computes in it, else float32. Of a
            quantized base it is the dtype it computes in.
        quantize: "4bit" (NF4 with double quantization, as in QLoRA, arXiv:2305.14314) or "8bit" (LLM.int8(),
            arXiv:2208.07339), by bitsandbytes.
        revision: of a hub id: a branch, a tag or a commit.
        trust_remote_code: whether code that comes with the model may run.
        attention: the attention implementation, by transformers' name: "sdpa", "eager", "flash_attention_2", ...

    Raises:
        LorakitError: there is no such model, it is damaged, it lacks weights, it is no causal language model, or it
            cannot be on that device or in that form.
    """
    where = os.path.expanduser(os.fspath(where))
    if dtype not in ("auto", *DTYPES):
        raise LorakitError(f"dtype={dtype!r} must be auto, {', '.join(DTYPES)}")
    if quantize not in (None, "4bit", "8bit"):
        raise LorakitError(f"quantize={quantize!r} must be 4bit or 8bit, or left away")
    place = device_named(device)
    kind = dtype_on(place) if dtype == "auto" else DTYPES[dtype]
    local, source = _source(where, revision, trust_remote_code)
    with quiet_transformers(), offline(not local and "local_files_only" in source), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _config(where, local, source)
        tokenizer = _tokenizer(where, source)
        model, unused = _model(where, config, source, place, kind, quantize, attention)
        _check_causal(where, model)
    notes = [f"{where} holds what no {type(model).__name__} has: {_some(unused)}"] if unused else []
    notes += [f"{where}: {said}"] if (said := complete(tokenizer, model)) else []
    return Base(model.eval(), tokenizer, where, tuple(notes))


def open_outline(where: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """The same without its weights, which are not read: a model of shapes on `meta`, and the tokenizer.

    Raises:
        LorakitError: there is no such model, or it is no causal language model.
    """
    where = os.path.expanduser(os.fspath(where))
    local, source = _source(where, revision, trust_remote_code)
    with quiet_transformers(), offline(not local and "local_files_only" in source), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM, GenerationConfig

        config = _config(where, local, source)
        tokenizer = _tokenizer(where, source)
        try:
            with torch.device("meta"):
                build: Any = AutoModelForCausalLM.from_config
                model = build(config, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise _unusable(f"{where} is a {config.model_type}, which is no causal language model", error) from None
        with suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(where, **_of_hub(source))
    said = complete(tokenizer, model, Path(where) if local else None)
    return Base(model.eval(), tokenizer, where, (f"{where}: {said}",) if said else ())


def _source(where: str, revision: str | None, trust_remote_code: bool) -> tuple[bool, dict[str, Any]]:
    """Whether it is a directory, and the arguments that say where from."""
    if not where:
        raise LorakitError("which model? Give a directory or a hub id")
    local = is_local(where)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if local or not hub_is_near():
        source["local_files_only"] = True
    return local, source


def _of_hub(source: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in source.items() if name != "trust_remote_code" and value is not None}


def _config(where: str, local: bool, source: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(where, **source)
    except Exception as error:
        if local:
            raise _unusable(f"the config of {where} cannot be used", error) from None
        near = (
            "" if "local_files_only" not in source else "; the hub cannot be reached from here, nor is it in the cache"
        )
        raise _unusable(f"there is no directory {where}, and as a hub id it cannot be loaded{near}", error) from None


def _tokenizer(where: str, source: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, **source)
    except Exception as error:
        hint = "its files (tokenizer.json, tokenizer_config.json, ...) belong beside the model's"
        raise _unusable(f"{where} has no tokenizer that can be loaded: {hint}", error) from None


def _model(
    where: str,
    config: Any,
    source: dict[str, Any],
    place: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
    attention: str | None,
) -> tuple[Any, list[str]]:
    """The model, and names of weights in its files that it does not have."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    how = _how(where, config, place, dtype, quantize)
    if attention is not None:
        how["attn_implementation"] = attention
    try:
        model, found = loader.from_pretrained(where, config=config, output_loading_info=True, **how, **source)
        if "device_map" not in how:
            model = model.to(place)
    except Exception as error:
        if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
            raise LorakitError(f"{where} is a {config.model_type}, which is no causal language model") from None
        how_much = "; give a smaller model, or quantize: 4bit" if isinstance(error, torch.OutOfMemoryError) else ""
        raise _unusable(f"the model of {where} cannot be loaded{how_much}", error) from None
    missing = sorted({*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
    if missing:
        raise LorakitError(
            f"{where} lacks weights of a {type(model).__name__}, which would be random: {_some(missing)}; it is "
            "incomplete, or a model for another task"
        )
    _keep_trainable(model)
    return model, sorted(found["unexpected_keys"])


def _how(where: str, config: Any, place: torch.device, dtype: torch.dtype, quantize: str | None) -> dict[str, Any]:
    """Arguments for transformers: dtype, quantization, and where a quantized model is made."""
    if getattr(config, "is_encoder_decoder", False):
        raise LorakitError(f"{where} is an encoder with a decoder ({config.model_type}), and no causal language model")
    how: dict[str, Any] = {"dtype": dtype}
    stored = getattr(config, "quantization_config", None)
    if quantize is not None:
        if stored is not None:
            raise LorakitError(f"{where} is stored quantized already: leave quantize away")
        how["quantization_config"] = _quantization(quantize, dtype)
    if quantize is not None or stored is not None:
        how["device_map"] = {"": place}
    return how


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:
        raise _unusable(f"{quantize} needs bitsandbytes: pip install 'lorakit[quant]'", error) from None
    from transformers import BitsAndBytesConfig

    made: Any = BitsAndBytesConfig
    if quantize == "8bit":
        return made(load_in_8bit=True)
    return made(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _keep_trainable(model: torch.nn.Module) -> None:
    """On some CPUs a layer would repack its weight at the first call in `eval()`, with loss, and never train again."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.no_grad()
def _check_causal(where: str, model: Any) -> None:
    """Encoders load as decoders too, with an attention that sees what comes next: two inputs tell."""
    if getattr(model.config, "is_decoder", True):
        return
    model.eval()
    ids = torch.tensor([[0, 0], [0, 1]], device=model.device)
    first = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, 0].float()
    if not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-3):
        raise LorakitError(
            f"{where} is no causal language model: in this {model.config.model_type} a token sees those after it"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _unusable(what: str, error: Exception) -> LorakitError:
    """One message of an error of transformers', whose own may have a hundred lines: its first paragraph."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    said = " ".join(text.split("\n\n")[0].split())
    return LorakitError(f"{what} ({said[:400]}{'…' if len(said) > 400 else ''})")
