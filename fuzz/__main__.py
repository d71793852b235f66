"""Run the fuzzer: `python -m fuzz [options of libFuzzer]`; inputs that broke something are left in fuzz/found/.

Most inputs are damaged by what knows their format, the others byte by byte, and what reaches new code is kept.
"""

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorakit"]):
    import lorakit
    import lorakit.formats  # noqa: F401
    from fuzz.mutate import mutate
    from fuzz.readers import try_one
    from fuzz.seeds import seeds

HERE = Path(__file__).parent
_BY_BYTES = 0.2


def main() -> None:
    """Begin with the seeds and go on until told to stop."""
    corpus, found = HERE / "corpus", HERE / "found"
    corpus.mkdir(exist_ok=True)
    found.mkdir(exist_ok=True)
    for name, data in seeds().items():
        (corpus / name).write_bytes(data)
    options = [f"-artifact_prefix={found}/", "-timeout=20", "-rss_limit_mb=3000", "-max_len=32768"]
    arguments = [sys.argv[0], *options, *sys.argv[1:], str(corpus)]
    atheris.Setup(arguments, run, custom_mutator=damaged)
    atheris.Fuzz()


def run(data: bytes) -> None:
    """LibFuzzer wants nothing back."""
    try_one(data)


def damaged(data: bytes, most: int, seed: int) -> bytes:
    """Another input from this one, of at most so many bytes."""
    chosen = random.Random(seed)
    found = data if chosen.random() < _BY_BYTES else mutate(data, chosen)
    return bytes(atheris.Mutate(data, most)) if found == data or len(found) > most else found


if __name__ == "__main__":
    main()
