"""What other libraries say when they are imported or load something, kept off the terminal."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorakit.finetune.pause import uncollected

_NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes", "huggingface_hub")
"""Loggers that speak when they are imported, of kernels that are not needed here, or at each try to reach the hub."""


def quiet_imports() -> None:
    """Import transformers without what its optional packages say of kernels that they did not find.

    Levels of loggers that somebody has set stay as they are.
    """
    for name in _NOISY:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), uncollected():
        warnings.simplefilter("ignore")
        import transformers.modeling_utils  # noqa: F401  # which imports torchao and others


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside a `with` block transformers shows no bars and logs errors only."""
    quiet_imports()
    from transformers.utils import logging as transformers_logging

    its: Any = transformers_logging
    level, bars = its.get_verbosity(), its.is_progress_bar_enabled()
    its.set_verbosity_error()
    its.disable_progress_bar()
    try:
        yield
    finally:
        its.set_verbosity(level)
        if bars:
            its.enable_progress_bar()
