"""Turn down what the libraries underneath print, so that a run's own few lines can be read."""

from __future__ import annotations

import logging
import os
import sys
import warnings

# Said at every start, at warning level, of which nothing follows: our own first line names the device.
_BOILERPLATE = (
    "Setting accelerator to CPU",
    "Setting ds_accelerator",
    "Async IO",
    "async_io",
    "NVCC",
    "torch_adam",
)


def escape_what_cannot_be_shown() -> None:
    """Print an escape for a character that the terminal's encoding lacks (Latin-1), instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Threshold(logging.Filter):
    """A filter and not a level: DeepSpeed sets its logger's level when imported, which may be after us."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < self.level:
            return False
        return record.levelno >= logging.ERROR or not any(text in record.getMessage() for text in _BOILERPLATE)


def quiet_libraries(is_main: bool = True) -> None:
    """Let DeepSpeed, transformers, datasets and torch log warnings only on rank 0, errors only elsewhere.

    Call it first in a program: before the libraries are imported it needs to import none of them, and
    afterwards it works as well. What the user set through the libraries' own environment variables wins.

    Args:
        is_main: this is the one process that talks to the user.
    """
    level = logging.WARNING if is_main else logging.ERROR
    logger = logging.getLogger("DeepSpeed")
    for old in [f for f in logger.filters if isinstance(f, _Threshold)]:
        logger.removeFilter(old)
    logger.addFilter(_Threshold(level))

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_transformers(level)
    if not is_main:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        if "datasets" in sys.modules:
            sys.modules["datasets"].disable_progress_bars()
    for module in ("torch", "deepspeed", "transformers", "accelerate"):
        # Meant for those who develop these libraries' callers, which is us and not the user.
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{module}\b")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=rf"{module}\b")
        if not is_main:
            warnings.filterwarnings("ignore", module=rf"{module}\b")


def _quiet_transformers(level: int) -> None:
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(level)
        transformers_logging.disable_progress_bar()
    else:
        os.environ["TRANSFORMERS_VERBOSITY"] = "warning" if level == logging.WARNING else "error"
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
