"""What ``pip install`` gives: a wheel that has the DeepSpeed configs, run files and data that it finds by name, and
whose commands work from an empty folder, far from any checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import model_zoo
from hift_ds import deepspeed_config, shipped
from hift_ds.cli.main import COMMANDS
from hift_ds.data.prepare import prepare_data
from hift_ds.data.sources import parse_sources
from hift_ds.errors import ConfigError
from hift_ds.train.run_config import load_run_config
from hift_ds.train.settings import read_deepspeed
from tests.helpers.distributed import deepspeed_launcher
from tests.helpers.tiny_tokenizers import byte_level

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model_zoo.tiny.build("llama", vocab_size=280, max_position_embeddings=1024).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


def test_the_wheel_has_what_is_found_by_name(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for file in (ROOT / "ds_configs").glob("*.json"):
        assert f"hift_ds/ds_configs/{file.name}" in inside
    for folder in ("model_zoo/presets", "hift_ds/data/bundled"):
        files = [file for file in (ROOT / folder).iterdir() if file.suffix in (".yaml", ".jsonl")]
        assert files and {f"{folder}/{file.name}" for file in files} <= inside
    assert not [name for name in inside if name.startswith(("tests", "benchmarks", "examples"))]


def test_names_are_found_from_any_folder_and_files_go_before_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = load_run_config("smollm2_135m", ["train.seed=7"])
    assert run.model.path == "HuggingFaceTB/SmolLM2-135M-Instruct" and run.train.seed == 7
    assert read_deepspeed(run) == deepspeed_config("fp32_host")
    assert deepspeed_config("bf16_host")["bf16"] == {"enabled": True}
    Path("smollm2_135m").write_text("model: {path: mine}\ndata: {train: a.jsonl}\ntrain: {output_dir: out}\n")
    assert load_run_config("smollm2_135m").model.path == "mine"


def test_a_name_that_does_not_exist_is_one_line_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no run file named 'llama3_8' .*'llama3_8b'"):
        load_run_config("llama3_8")
    Path("mine.yaml").write_text("")
    with pytest.raises(ConfigError, match="no such run file: 'mine.yml'; did you mean 'mine.yaml'"):
        load_run_config("mine.yml")
    run = load_run_config("llama3_8b", ["deepspeed=bf16_hots"])
    with pytest.raises(ConfigError, match="deepspeed: no DeepSpeed config named 'bf16_hots' .*'bf16_host'"):
        read_deepspeed(run)
    with pytest.raises(ConfigError, match="'bundled:hift_questions'"):
        load_run_config("llama3_8b", ["data.train=bundled:hift_question"])


def test_the_bundled_data_can_be_learned_from(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    (source,) = parse_sources("bundled:hift_questions", "data.train")
    assert Path(source.path) == shipped.find("bundled:hift_questions", "data")
    run = load_run_config("smollm2_135m")
    prepared = prepare_data(run.data, byte_level(), max_length=1024)
    assert 300 < len(prepared.train) < 1000 and len(prepared.eval) >= 3


def test_the_bundled_questions_are_about_modules_that_exist():
    """Written anew when modules move: ``python -m examples.hift_questions``."""
    text = shipped.find("bundled:hift_questions", "data").read_text(encoding="utf-8")
    named = set(re.findall(r"in `(hift_ds[\w.]*)` for", text))
    assert len(named) > 50 and not [module for module in named if importlib.util.find_spec(module) is None]


@pytest.mark.slow
def test_an_installed_wheel_runs_every_command_from_an_empty_folder(wheel, tiny_model, tmp_path):
    site, home = tmp_path / "site", tmp_path / "empty"
    home.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    env = {
        **os.environ,
        "PYTHONPATH": str(site),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    model, called = f"model.path={tiny_model}", set()

    def run(*command: str, said: str = "") -> str:
        done = subprocess.run(
            command, cwd=home, env=env, capture_output=True, text=True, timeout=600, input=said,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def hift_ds(verb: str, *words: str, said: str = "") -> str:
        called.add(verb)
        return run(sys.executable, str(site / "bin" / "hift-ds"), verb, *words, said=said)

    assert str(site) in run(sys.executable, "-c", "import hift_ds; print(hift_ds.__file__)")
    steps = ["data.max_samples=80", "data.max_length=1024", "train.global_batch_size=4"]
    dry = hift_ds("train", "smollm2_135m", model, *steps, "train.max_steps=6", "--dry-run")
    assert "fit: " in dry and not (home / "runs" / "smollm2_135m" / "model").exists()
    said = hift_ds("train", "smollm2_135m", model, *steps, "train.max_steps=6")
    assert "next: hift-ds chat runs/smollm2_135m" in said
    run_folder = home / "runs" / "smollm2_135m"
    assert (run_folder / "model" / "model.safetensors").is_file() and (run_folder / "loss.png").is_file()
    more = ["train.max_steps=8", "train.output_dir=runs/two", "deepspeed=bf16_host"]
    run(
        *deepspeed_launcher(2), "--module", "hift_ds.launch", "llama3_8b", model, "data.train=bundled:hift_questions",
        *steps, *more,
    )  # fmt: skip
    assert (home / "runs" / "two" / "model" / "model.safetensors").is_file()
    assert "learned" in hift_ds("preview", "smollm2_135m", model)
    assert "layers.31" in hift_ds("groups", "llama2_7b")
    assert "GiB" in hift_ds("estimate", "smollm2_135m", model)
    assert "checked:" in hift_ds("export", "runs/smollm2_135m", "exported", "--check")
    assert "loss.png" in hift_ds("plot", "runs/smollm2_135m")
    assert "report.html" in hift_ds("report", "runs/smollm2_135m")
    assert hift_ds("chat", "runs/smollm2_135m", "--max-new-tokens", "4", said="Hello\n")
    assert "held-out samples" in hift_ds("eval", "runs/smollm2_135m")
    (home / "in.jsonl").write_text('{"instruction": "What is a group?", "output": ""}\n')
    hift_ds("predict", "runs/smollm2_135m", "--data", "in.jsonl", "-o", "out.jsonl", "--max-new-tokens", "4")
    assert "prediction" in (home / "out.jsonl").read_text()
    hift_ds("init", str(tiny_model), "--card", "24", "-o", "mine.yaml")
    assert load_run_config(home / "mine.yaml").model.path == str(tiny_model)
    assert "global_batch_size" in hift_ds("schema")
    if spec := importlib.util.find_spec("shtab"):  # of the extra "completion"
        shutil.copytree(Path(spec.origin).parent, site / "shtab")
        assert "--dry-run" in hift_ds("completion", "bash")
    assert "deepspeed" in hift_ds("env")
    assert called | {"completion"} == set(COMMANDS)
