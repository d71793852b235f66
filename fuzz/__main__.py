"""Run the fuzzer: `python -m fuzz [options of libFuzzer]`; inputs that broke something are left in fuzz/found/."""

import random
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorakit"]):
    import lorakit
    import lorakit.formats  # noqa: F401
    from fuzz.mutate import mutate
    from fuzz.readers import try_one
    from fuzz.seeds import seeds

warnings.simplefilter("ignore")
HERE = Path(__file__).parent


def main() -> None:
    """Begin with the seeds and go on until told to stop."""
    corpus, found = HERE / "corpus", HERE / "found"
    corpus.mkdir(exist_ok=True)
    found.mkdir(exist_ok=True)
    for name, data in seeds().items():
        (corpus / name).write_bytes(data)
    options = [f"-artifact_prefix={found}/", "-timeout=20", "-rss_limit_mb=3000", "-max_len=65536"]
    arguments = [sys.argv[0], *options, *sys.argv[1:], str(corpus)]
    atheris.Setup(arguments, lambda data: void(try_one(data)), custom_mutator=damaged)
    atheris.Fuzz()


def damaged(data: bytes, most: int, seed: int) -> bytes:
    """Another input: damaged so that it is still a file of its kind, or byte by byte, as libFuzzer does it."""
    chosen = random.Random(seed)
    if chosen.random() < 0.3:
        return bytes(atheris.Mutate(data, most))
    return mutate(data, chosen)[:most]


def void(_: object) -> None:
    """LibFuzzer wants nothing back."""


if __name__ == "__main__":
    main()
