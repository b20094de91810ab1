"""HiFT inside other programs: the real ones, at their own pins, started as their users start them.

``make test-hosts`` lays each program and what it pins over the test environment (``NAME.txt`` beside this file);
without that its tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hift_ds.ranks import free_port
from tests.parity.test_trl import folder_of, tokenizer, words

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "hift_ds" / "integrations" / "ms_swift.py"
PROGRAMS = Path(__file__).parent / "programs"
HOSTS = Path(os.environ.get("HIFT_HOSTS", ROOT / ".hosts"))


def needs(host: str) -> Any:
    return pytest.mark.skipif(not (HOSTS / host).is_dir(), reason="make test-hosts installs it")


def over(host: str, tmp_path: Path, *stubs: str) -> str:
    """For PYTHONPATH: the program before the environment's packages.

    Args:
        stubs: modules that it imports and nothing here needs, of which no wheel fits every torch.
    """
    for stub in stubs:
        (tmp_path / "stubs" / stub).mkdir(parents=True)
        (tmp_path / "stubs" / stub / "__init__.py").write_text("")
    return os.pathsep.join([str(HOSTS / host), str(tmp_path / "stubs")])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    folder_of("sft", folder / "model")
    tokenizer().save_pretrained(folder / "model")
    data = folder / "data"
    data.mkdir()
    completions = [{"prompt": words(i, 3) + " ", "completion": words(i + 20, 4)} for i in range(12)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in completions))
    factory = folder / "factory"
    factory.mkdir()
    rows = [{"instruction": words(i, 3), "input": "", "output": words(i + 20, 4)} for i in range(12)]
    pairs = [
        {"instruction": words(i, 3), "input": "", "chosen": words(i + 20, 4), "rejected": words(i + 50, 4)}
        for i in range(12)
    ]
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    (factory / "rows.json").write_text(json.dumps(rows))
    (factory / "pairs.json").write_text(json.dumps(pairs))
    (factory / "dataset_info.json").write_text(
        json.dumps(
            {
                "sft": {"file_name": "rows.json"},
                "dpo": {"file_name": "pairs.json", "ranking": True, "columns": columns},
            }
        )
    )
    ds: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_optimization": {"stage": 0}, "hift": {},
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(ds))
    return folder


def start(command: list[str], path: str = "", says: str = "HiFT is on, 5 layer groups", **variables: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*filter(None, [path]), str(ROOT)]), **variables}
    env |= {"HF_HUB_OFFLINE": "1", "DS_SKIP_CUDA_CHECK": "1"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    assert says in done.stdout + done.stderr
    return done.stdout + done.stderr


def launched() -> list[str]:
    """One rank of torchrun's."""
    return ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", str(free_port())]


def all_moved(before: Path, after: Path) -> bool:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    return all(not torch.equal(value, new[name]) for name, value in old.items())


def test_trl_command_line(inputs, tmp_path):
    options = {
        "model_name_or_path": inputs / "model", "dataset_name": inputs / "data", "output_dir": tmp_path,
        "max_steps": 5, "per_device_train_batch_size": 2, "deepspeed": inputs / "ds.json", "bf16": False,
        "report_to": "none", "save_strategy": "no", "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    }  # fmt: skip
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    start(["-m", "hift_ds.launch_with", "trl.scripts.sft", *arguments, "--use_cpu"])
    assert all_moved(inputs / "model", tmp_path)


@needs("llamafactory")
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_llamafactory(inputs, tmp_path, stage):
    run = {
        "model_name_or_path": str(inputs / "model"), "stage": stage, "do_train": True, "finetuning_type": "full",
        "dataset": stage, "dataset_dir": str(inputs / "factory"), "template": "empty", "cutoff_len": 64,
        "output_dir": str(tmp_path / "out"), "max_steps": 5, "per_device_train_batch_size": 2,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "deepspeed": str(inputs / "ds.json"),
        "use_cpu": True, "report_to": "none", "save_strategy": "no",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    start(
        [*launched(), "-m", "hift_ds.launch_with", "llamafactory.launcher", str(tmp_path / "run.yaml")],
        over("llamafactory", tmp_path, "torchaudio"), DISABLE_VERSION_CHECK="1",
    )  # fmt: skip
    assert all_moved(inputs / "model", tmp_path / "out")


@needs("ms_swift")
def test_ms_swift(inputs, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": words(i, 3)}, {"role": "assistant", "content": words(i + 20, 4)}]}
        for i in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": inputs / "model", "model_type": "llama", "template": "dummy", "tuner_type": "full",
        "dataset": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out", "add_version": False,
        "external_plugins": PLUGIN, "callbacks": "hift", "deepspeed": inputs / "ds.json", "torch_dtype": "float32",
        "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 5, "report_to": "none",
        "use_cpu": True, "bf16": False, "use_hf": True, "split_dataset_ratio": 0, "dataloader_num_workers": 0,
        "gradient_checkpointing": False, "check_model": False,
    }  # fmt: skip
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    start([*launched(), "-m", "swift.cli.sft", *arguments], over("ms_swift", tmp_path), says="'group'")
    assert all_moved(inputs / "model", tmp_path / "out" / "checkpoint-5")
    checkpoint = tmp_path / "out" / "checkpoint-5"
    assert (checkpoint / "model.safetensors").samefile(checkpoint / "global_step5" / "model.safetensors")


@needs("lightning")
def test_lightning(tmp_path):
    """One group of all weights is DeepSpeed's own engine under Lightning's own strategy, which deals out the rows."""
    for form in ("deepspeed", "one", "hift"):
        start([str(PROGRAMS / "lightning_loop.py"), form, str(tmp_path / form)], over("lightning", tmp_path / form),
              says="trained")  # fmt: skip
    theirs, one = (load_file(tmp_path / form / "model.safetensors") for form in ("deepspeed", "one"))
    for name, value in theirs.items():
        torch.testing.assert_close(one[name], value, atol=2e-6, rtol=0, msg=name)
