"""`hift-ds groups`: from a config alone, both outputs, and one line for every wrong input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model_zoo
from hift_ds.cli.main import main
from hift_ds.layers.grouping import partition_model


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    """A folder with nothing but a config."""
    model_zoo.tiny.config("llama").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    return tmp_path


def groups_json(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict]:
    assert main(["groups", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_the_partition_in_update_order(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = partition_model(model_zoo.tiny.build("llama"), group_size=2).groups
    described = [{"name": group.name, "numel": group.numel, "params": list(group.param_names)} for group in expected]
    assert groups_json(capsys, llama_dir, "--group-size", 2) == described
    assert groups_json(capsys, llama_dir, "--group-size", 2, "--order", "top2down") == described[::-1]


def test_random_order_follows_the_seed(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [groups_json(capsys, llama_dir, "--order", "random", "--seed", seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert any(order != drawn[0] for order in drawn[2:])
    by_name = sorted(group["name"] for group in drawn[0])
    assert by_name == sorted(group["name"] for group in groups_json(capsys, llama_dir))


@pytest.mark.parametrize("head", model_zoo.FAMILIES["bert"].heads)
def test_the_head_named_in_the_config_is_built(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_zoo.tiny.config("bert", head, num_labels=5).save_pretrained(tmp_path)
    expected = partition_model(model_zoo.tiny.build("bert", head, num_labels=5)).groups
    assert [tuple(group["params"]) for group in groups_json(capsys, tmp_path)] == [
        group.param_names for group in expected
    ]


@pytest.mark.parametrize(
    ("family", "last"), [("llama", "norm+lm_head"), ("t5", "final_layer_norm"), ("deberta_v2", "layer.2")]
)
def test_without_architectures_the_language_model_is_taken(
    family: str, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = model_zoo.tiny.config(family)
    config.architectures = None
    config.save_pretrained(tmp_path)
    assert groups_json(capsys, tmp_path)[-1]["name"] == last


def test_a_size_of_the_zoo_needs_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    groups = groups_json(capsys, "llama2_7b")
    assert len(groups) == 34
    assert sum(group["numel"] for group in groups) == 6_738_415_616


def test_table_shows_every_group_and_the_totals(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", str(llama_dir), "--order", "top2down"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert [row[1] for row in rows[:5]] == ["norm+lm_head", "layers.2", "layers.1", "layers.0", "embed"]
    assert rows[1][2:4] == ["9", "2,528"]
    assert "5 groups" in "\n".join(lines) and "9,744" in "\n".join(lines)


def test_the_config_file_itself_will_do(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = (llama_dir / "config.json").rename(llama_dir / "other.json")
    assert len(groups_json(capsys, renamed)) == 5


OWN_CODE = """
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own_thing"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2))
        self.table = nn.Embedding(11, 4)
        self.post_init()

    def forward(self, input_ids):
        hidden = self.table(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.norm(hidden)
"""


def test_code_that_comes_with_the_checkpoint_runs_only_when_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "own_code.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own_thing", "auto_map": auto_map}))
    assert_one_line(["groups", str(tmp_path)], "only with --trust-remote-code", capsys)
    groups = groups_json(capsys, tmp_path, "--trust-remote-code")
    assert [group["name"] for group in groups] == ["embed", "blocks.0", "blocks.1", "norm"]


def test_no_weights_are_made(llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """70 billion parameters on a small machine."""
    config = json.loads((llama_dir / "config.json").read_text())
    config |= {"hidden_size": 2**15, "intermediate_size": 2**17, "head_dim": 2**13}
    (llama_dir / "config.json").write_text(json.dumps(config))
    assert sum(group["numel"] for group in groups_json(capsys, llama_dir)) > 40e9
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no config.json in this folder"),
        ("{", "config.json: not JSON"),
        ("[]", 'config.json: has no "model_type"'),
        ('{"hidden_size": 8}', 'config.json: has no "model_type"'),
        ('{"model_type": "foo"}', "\"model_type\" 'foo' is unknown to transformers"),
        ('{"model_type": "foo", "auto_map": {"AutoModel": "x.Y"}}', "only with --trust-remote-code"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers cannot read its config: .*str"),
        ('{"model_type": "llama", "hidden_act": "no_such"}', "cannot build a llama of this config"),
    ],
)
def test_a_bad_folder_is_one_line_and_exit_code_2(
    config: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert_one_line(["groups", str(tmp_path)], message, capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/no/such/folder"], "/no/such/folder: no such folder"),
        (["./no/such"], "./no/such: no such folder"),
        (["tests/no_such_model"], "tests/no_such_model: no such folder"),  # owner/name, but tests/ is here
        (["lama2_7b"], "lama2_7b: no such folder; expected .* size of the zoo such as llama2_7b"),
        (["llama2_7b", "--group-size", "0"], "group_size: expected a whole number of at least 1, got 0"),
        (["llama2_7b", "--group-size", "two"], "--group-size: expected a whole number or all, got 'two'"),
        (["llama2_7b", "--order", "up"], "--order: invalid choice: 'up'"),
        (["llama2_7b", "--jsn"], "unrecognized arguments: --jsn"),
        ([], "required: MODEL"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line(["groups", *argv], message, capsys)


def test_an_unknown_command_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(["grops"], "unknown command 'grops'; did you mean 'groups'?", capsys)


def test_no_command_is_answered_by_the_list_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("usage: hift-ds") and "train" in out and err == ""


def assert_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hift-ds: error: ") and err.count("\n") == 1
    assert re.search(message, err), err


def test_help_costs_no_torch() -> None:
    """The list of commands appears at once: what a command needs is imported when it runs."""
    script = "import sys; from hift_ds.cli.main import main; print(main(['--help']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "groups" in done.stdout and done.stdout.endswith("0 False\n")


def test_as_a_program_with_a_reader_that_leaves(llama_dir: Path) -> None:
    command = f"{sys.executable} -m hift_ds groups {llama_dir} --json | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[", "")
