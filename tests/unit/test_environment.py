"""``hift-ds env``."""

import json

import torch

from hift_ds.cli import main as cli
from hift_ds.version import __version__


def test_env_says_what_runs_here(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SECRET_TOKEN", "not this")
    assert cli.main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["hift_ds"] == __version__
    assert torch.__version__.startswith(found["packages"]["torch"])
    assert found["host_memory_gb"]["total"] >= found["host_memory_gb"]["available"] > 0
    assert found["variables"]["NCCL_DEBUG"] == "INFO" and "not this" not in text


def test_env_as_text_has_a_line_for_each_topic(capsys):
    cli.main(["env", "--json"])
    topics = json.loads(capsys.readouterr().out)
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(topics)
