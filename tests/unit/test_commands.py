"""What every command shares: help with examples, completion, the schema; and ``hift-ds train --dry-run``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import torch
import yaml

from hift_ds.cli import train as train_command
from hift_ds.cli.main import COMMANDS, main, make_parser
from hift_ds.cli.schema import run_file_schema
from hift_ds.shipped import presets
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from tests.unit.test_launch import ROOT, inputs, own_cache, write_run  # noqa: F401  (fixtures)


def commands_in(text: str) -> list[list[str]]:
    """The hift-ds command lines of a text, as words; comments and what follows a pipe are left out."""
    import shlex

    found = []
    for line in text.replace(" \\\n", " ").splitlines():
        words = shlex.split(line.strip(), comments=True)
        if "hift-ds" in words and not line.lstrip().startswith(("#", "...")):
            words = words[words.index("hift-ds") + 1 :]
            end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
            found.append(words[:end])
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_the_parser_takes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    examples = commands_in(text.partition("examples:")[2])
    assert examples and all(words[0] in COMMANDS for words in examples)
    for words in examples:
        args = make_parser({words[0]}).parse_args(words)
        assert args.command == words[0]
    assert all(len(line) <= 80 for line in text.splitlines())


def test_the_first_help_shows_the_way(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    listed, _, examples = text.partition("examples:")
    assert all(re.search(rf"^    {name}\b", listed, re.M) for name in COMMANDS)
    assert [words[0] for words in commands_in(examples)] == ["train", "init", "preview", "train", "chat", "COMMAND"]


def test_the_help_of_train_names_the_run_files_of_the_package(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert set(presets()) <= set(re.split(r"[\s,]+", text.partition("Run files in the package:")[2]))


@pytest.mark.parametrize("name", ["train", "preview"])
def test_only_the_run_file_is_required(name, capsys):
    assert main([name]) == 2
    assert "the following arguments are required: RUN.yaml (try:" in capsys.readouterr().err


# -- completion and schema -----------------------------------------------------------------------------------


def test_completion_without_its_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 2
    assert "completion needs the package shtab, not installed here; pip install shtab" in capsys.readouterr().err


def test_a_shell_completes_commands_and_options(capsys, tmp_path):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    for words, expected in ((["hift-ds", "tr"], "train"), (["hift-ds", "export", "--gg"], "--gguf")):
        line = " ".join(words)
        ask = (
            f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
            f"COMP_POINT={len(line)}; $(complete -p hift-ds | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run([shutil.which("bash"), "-c", ask], capture_output=True, text=True, timeout=20)
        assert expected in done.stdout.split(), done.stderr


def test_the_schema_has_every_key_and_is_true_of_run_files(tmp_path):
    schema = json.loads(json.dumps(run_file_schema()))
    parts = {"train": "TrainConfig", "data": "DataConfig", "hift": "HiFTConfig"}
    keys = {name: set(schema["$defs"][model]["properties"]) for name, model in parts.items()}
    assert {"model", "data", "train", "hift", "deepspeed", "export"} <= set(schema["properties"])
    assert "learning_rate" in keys["train"] and "max_length" in keys["data"] and "steps_per_group" in keys["hift"]
    assert all(schema["$defs"][model].get("additionalProperties") is False for model in ("TrainConfig", "HiFTConfig"))
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(schema)
    for file in sorted((ROOT / "model_zoo" / "presets").glob("*.yaml")):
        content = yaml.safe_load(file.read_text())
        assert not list(check.iter_errors(content)), file.name
    assert list(check.iter_errors({**content, "trian": {}}))
    assert list(check.iter_errors({**content, "hift": {"group_sise": 1}})) and not list(
        check.iter_errors({**content, "hift": False})
    )


# -- dry run -------------------------------------------------------------------------------------------------


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def test_a_dry_run_does_everything_before_the_first_step_and_nothing_after(inputs, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    file = write_run(inputs, out)
    assert finetune(load_run_config(file), dry_run=True) == {"steps": 12}
    said = capsys.readouterr().out
    for expected in (
        "40 samples of 40 rows",
        "disk: ",
        "groups, bottom to top: embed",
        "first of 12 steps is in order",
    ):
        assert expected in said
    assert not out.exists()  # neither made nor left behind

    finetune(load_run_config(file, ["train.max_steps=6"]))
    before = files_below(out)
    capsys.readouterr()
    finetune(load_run_config(file), dry_run=True)
    assert f"would go on from {out / 'checkpoint-6'}, step 6" in capsys.readouterr().out
    assert files_below(out) == before  # results, metrics and settings of the run that was


def test_a_dry_run_finds_what_a_run_would_stop_at(inputs, tmp_path, monkeypatch):  # noqa: F811
    import shutil as files

    from hift_ds.errors import CheckpointError

    usage = files.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr("hift_ds.integrations.disk_room.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="are free"):
        finetune(load_run_config(write_run(inputs, tmp_path / "run")), dry_run=True)


@pytest.mark.slow
def test_the_command_adds_the_memory(inputs, tmp_path, capsys, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(train_command, "_run_here", lambda arguments: seen.append(arguments) or 0)
    file = write_run(inputs, tmp_path / "run", hift={"group_size": 1})
    assert main(["train", str(file), "--dry-run", "train.max_steps=3"]) == 0
    assert seen == [["--dry-run", str(file), "train.max_steps=3"]]
    line = capsys.readouterr().out.strip()
    assert line.startswith("memory: ") and "GiB at most on each device, with 2 x 128 tokens" in line
    assert main(["train", str(file), "--dry-run", "train.micro_batch_size=null"]) == 0
    assert ("memory: " in capsys.readouterr().out) is torch.accelerator.is_available()  # else fitted to the host
    assert main(["train", str(file), "hift=false", "--dry-run"]) == 0
    assert "memory: not counted" in capsys.readouterr().out
