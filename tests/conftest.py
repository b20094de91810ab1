"""Settings that every test needs before torch is imported."""

import os
import pathlib
import re
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores are ten times slower
ROOT = pathlib.Path(__file__).resolve().parent.parent
# A shared cache breaks.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv" / "torch_extensions"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def asks_for_gpu_tests(arguments):
    """Does a pytest command line select tests that need an accelerator?"""
    marks = [after for option, after in zip(arguments, arguments[1:], strict=False) if option == "-m"]
    marks += [argument[2:].lstrip("=") for argument in arguments if argument.startswith("-m")]
    return any(re.search(r"(?<!not )\bgpu\b", mark) for mark in marks)


if asks_for_gpu_tests(sys.argv[1:]):
    os.environ["HIFT_TEST_GPU"] = "1"  # the workers of pytest-xdist do not see the command line
if os.environ.get("HIFT_TEST_GPU") != "1":
    # All others are for the CPU, engines in this process too, and must not meet a GPU that happens to be there.
    os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True, scope="module")
def _no_deepspeed_config_left_behind():
    """accelerate keeps the last Trainer's config, and under one of stage 3 transformers makes every model in shards,
    those of the next file too."""
    yield
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if integration := sys.modules.get("transformers.integrations.deepspeed"):
        integration.unset_hf_deepspeed_config()


LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launch_variables_left_behind():
    """An engine in this process makes it a job of one rank; programs that a later test starts must not inherit that."""
    yield
    for name in LAUNCH_VARIABLES:
        os.environ.pop(name, None)
