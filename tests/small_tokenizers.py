"""Small tokenizers of the kinds there are: byte-level or with ▁, some of which begin a text themselves, or end it."""

import warnings
from functools import cache
from typing import Any

from benchmarks.real.data import SHARED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

TEXTS = [
    "Question: how many states border Texas?\nAnswer: SELECT COUNT(*) FROM border WHERE name = 'texas'",
    "the quick brown fox jumps over the lazy dog; hello there, more of the same to merge, and some more",
] * 4
SHARED_ONES = ("stories260K", "gpt2")
NAMES = ("bytes", "bytes, a space before", "metaspace always", "metaspace first, both ends", "prepend after tokens")


@cache
def tokenizer(name: str) -> Any:
    """A tokenizer by its name, to be left as it is."""
    if name == "stories260K":
        return AutoTokenizer.from_pretrained(SHARED / "models" / "stories260K")
    if name == "gpt2":
        path = SHARED / "models" / "gpt2-tokenizer"
        return GPT2Tokenizer(str(path / "encoder.json"), str(path / "vocab.bpe"))
    return built(name)


def built(name: str, specials: tuple[str, ...] = (), template: str | None = None, **stripping: bool) -> Any:
    """A new tokenizer of one of `NAMES`, with more special tokens and a chat template."""
    names = ["<unk>", "<s>", "</s>", *specials]
    if name.startswith("bytes"):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space" in name)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if "prepend" in name:  # as Llama's first tokenizers: a space after each special token too
            core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            core.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        else:
            scheme = "always" if "always" in name else "first"
            core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
            core.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        alphabet = ["▁", *(chr(i) for i in range(32, 127))]
        names += [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(names) + 400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS, trainer)
    if not name.startswith("bytes"):  # the bytes are pieces like others: their names in a text are text
        state = core.to_str()
        core = Tokenizer.from_str(_without_bytes(state))
    if "both ends" in name:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))]
        )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )
    if specials:
        found.add_tokens([AddedToken(token, special=True, normalized=False, **stripping) for token in specials])
    return found


def _without_bytes(state: str) -> str:
    import json

    found = json.loads(state)
    found["added_tokens"] = [token for token in found["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(found)
