"""Run the fuzzer: `python -m fuzz [options of libFuzzer]`; inputs that broke something are left in fuzz/found/."""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorakit"]):
    import lorakit
    import lorakit.formats  # noqa: F401
    from fuzz.readers import try_one
    from fuzz.seeds import seeds

HERE = Path(__file__).parent


def main() -> None:
    """Begin with the seeds and go on until told to stop."""
    corpus, found = HERE / "corpus", HERE / "found"
    corpus.mkdir(exist_ok=True)
    found.mkdir(exist_ok=True)
    for name, data in seeds().items():
        (corpus / name).write_bytes(data)
    options = [f"-artifact_prefix={found}/", "-timeout=20", "-rss_limit_mb=3000", "-max_len=16384"]
    atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(corpus)], lambda data: void(try_one(data)))
    atheris.Fuzz()


def void(_: object) -> None:
    """LibFuzzer wants nothing back."""


if __name__ == "__main__":
    main()
