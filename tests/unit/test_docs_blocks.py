"""Every block of README and the docs is true: commands parse, run files and JSON are accepted, Python compiles and,
unless a comment above it says why not, runs on a tiny model; the site, the notebook and the Dockerfile hold too.

``<!-- not run: REASON -->`` above a fenced block exempts it from being run; what can be checked without, is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from hift_ds.cli.main import COMMANDS, make_parser
from hift_ds.config import parse_block
from hift_ds.errors import PROG
from hift_ds.train.run_config import RunConfig, load_run_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "ds_configs" / "README.md"]
_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n)+)")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    kind: str  # of the fence; "" for none, "indented" for an indented block
    text: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text, name = page.read_text(), str(page.relative_to(ROOT))
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start("text"))
            found.append(Block(name, line, match["kind"], match["text"], match["reason"]))
        without = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
        for match in _INDENTED.finditer(without):
            found.append(Block(name, without.count("\n", 0, match.start()) + 1, "indented", match[1], None))
    return found


BLOCKS = blocks()
PYTHON = [block for block in BLOCKS if block.kind == "python"]


def of(*kinds: str):
    chosen = [block for block in BLOCKS if block.kind in kinds]
    return pytest.mark.parametrize("block", chosen, ids=str)


def test_blocks_are_found_and_of_known_kinds():
    assert len(BLOCKS) > 40 and {block.kind for block in BLOCKS} <= {"python", "yaml", "json", "", "indented"}
    page = "a\n\n<!-- not run: why -->\n```python\nx\n```\n\n    hift-ds env\n\n```yaml\ny: 1\n```\n"
    assert [(m["reason"], m["kind"], m["text"]) for m in _FENCE.finditer(page)] == [
        ("why", "python", "x\n"), (None, "yaml", "y: 1\n"),
    ]  # fmt: skip


# -- shell ---------------------------------------------------------------------------------------------------


def command_lines(text: str) -> list[list[str]]:
    """Words of the lines that call hift-ds, which may stand behind a pipe."""
    found = []
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a line of output with a quote in it
            continue
        if PROG in words:
            words = words[words.index(PROG) + 1 :]
            end = next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
            found.append([word for word in words[:end] if word != "..."])
    return found


@of("", "indented")
def test_commands_and_their_options_exist(block):
    for words in command_lines(block.text):
        assert words and (words[0] in COMMANDS or words[0].startswith("-")), words
        args, rest = make_parser({words[0]}).parse_known_args(words)
        assert not [word for word in rest if word.startswith("-")], rest
    for word in re.findall(r"^ *make ([\w-]+)", block.text, re.M):
        assert re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.M), word
    for word in re.findall(r"python3? ((?:docs|benchmarks|examples)/\S+\.py)", block.text):
        assert (ROOT / word).is_file(), word
    for word in re.findall(r"-m (hift_ds[\w.]*|benchmarks[\w.]*|examples[\w.]*)", block.text):
        assert importlib.util.find_spec(word) is not None, word


# -- YAML and JSON -------------------------------------------------------------------------------------------


@of("yaml")
def test_yaml_is_a_run_file_or_says_whose_it_is(block, tmp_path):
    if block.reason is not None:
        yaml.safe_load(block.text)
        return
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    content = yaml.safe_load(block.text)
    required = {"model": "path", "data": "train", "train": "output_dir"}
    missing = [f"{section}.{key}=x" for section, key in required.items() if key not in content.get(section, {})]
    load_run_config(file, missing)


@of("json")
def test_json_is_a_deepspeed_config_or_part_of_a_hift_block(block):
    text = block.text.strip()
    content = json.loads(text if text.startswith("{") else f"{{{text}}}")
    parse_block(content.get("hift", content))


# -- Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles(block):
    compile(block.text, str(block), "exec")


RUN = [block for block in PYTHON if block.reason is None]


@pytest.mark.parametrize("block", RUN, ids=str)
def test_python_runs_on_a_tiny_model(block, tmp_path, monkeypatch):
    """As printed, but for the folder of the model, and use_cpu=True, which the pages say a CPU needs."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer

    import model_zoo
    from hift_ds.report.metrics import FILE_NAME
    from tests.helpers.tiny_tokenizers import byte_level

    monkeypatch.chdir(tmp_path)
    model = model_zoo.tiny.build("llama", vocab_size=280)
    (tmp_path / "path" / "to").mkdir(parents=True)
    model.save_pretrained("path/to/model")
    byte_level().save_pretrained("path/to/model")
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)} for _ in range(16)]
    batch = {name: torch.stack([row[name] for row in rows[:4]]) for name in rows[0]}
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    records = [
        {"step": 1, "loss": 2.0, "group_name": "embed", "peak_memory_gib": 1.0, "forecast_memory_gib": 1.1},
        {"step": 1, "eval_loss": 2.0},
    ]
    (tmp_path / "runs" / "mine" / FILE_NAME).write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {
        "model": model, "tokenizer": AutoTokenizer.from_pretrained("path/to/model"), "loader": [batch] * 4,
        "dataset": rows, "train": rows, "held_out": rows[:4],
        "texts": Dataset.from_dict({"text": [f"{i} and {i + 1}" for i in range(16)]}),
    }  # fmt: skip
    text = block.text.replace("bf16=True,", "bf16=True, use_cpu=True, report_to=[],")
    with contextlib.redirect_stdout(None):
        exec(compile(text, str(block), "exec"), names)
    if (engine := names.get("engine") or getattr(names.get("trainer"), "engine", None)) is not None:
        assert max(engine.coverage().values()) > 0
        engine.destroy()


def test_reasons_say_something():
    assert all(len(block.reason) > 10 for block in BLOCKS if block.reason is not None)
    assert len(RUN) >= 3


# -- migrating.md --------------------------------------------------------------------------------------------


def keys_of_run_files() -> set[str]:
    from hift_ds.config import HiFTConfig
    from hift_ds.train.run_file import _all_keys

    keys = {name for _, name in _all_keys(RunConfig)} | {f"hift.{name}" for _, name in _all_keys(HiFTConfig)}
    return keys | {key.removeprefix("hift.") for key in keys}


def test_the_tables_of_other_tools_name_keys_that_exist():
    keys, checked = keys_of_run_files(), 0
    for line in (ROOT / "docs" / "migrating.md").read_text().splitlines():
        if line.startswith("| `") or line.startswith("| "):
            ours = line.split("|")[2]
            for key in re.findall(r"`((?:model|data|train|hift|export)\.[a-z_.]+)", ours):
                assert key.rstrip(".") in keys, f"{key}: {line}"
                checked += 1
            for value in re.findall(r"`deepspeed: ([a-z0-9_]+)`", ours):
                assert (ROOT / "ds_configs" / f"{value}.json").is_file(), value
    assert checked > 50


# -- site, notebook, Dockerfile ------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    """Without mkdocs: the file reads, and names each page once."""
    text = (ROOT / "mkdocs.yml").read_text()
    named = [page for section in yaml.safe_load(text)["nav"] for pages in section.values() for page in pages]
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    for page in re.findall(r"\]\(((?:docs/)?[\w/]+\.md)[)#]", (ROOT / "README.md").read_text()):
        assert (ROOT / page).is_file(), page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "HiFTTrainer" in (tmp_path / "api" / "index.html").read_text()


def cells() -> list[str]:
    notebook = json.loads((ROOT / "docs" / "quick_start.ipynb").read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebooks_cells_compile_and_their_commands_exist():
    for source in cells():
        shell = [line.lstrip("!% ") for line in source.splitlines() if line.startswith(("!", "%"))]
        compile("\n".join(line for line in source.splitlines() if not line.startswith(("!", "%"))), "cell", "exec")
        for words in command_lines("\n".join(shell)):
            make_parser({words[0]}).parse_known_args(words)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Through nbclient where it is installed, else cell by cell; on a tiny model in the place of the one it fetches."""
    import model_zoo
    from tests.helpers.tiny_tokenizers import byte_level

    model_zoo.tiny.build("llama", vocab_size=280, max_position_embeddings=512).save_pretrained(tmp_path / "tiny")
    byte_level().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIFT_NOTEBOOK_MODEL", str(tmp_path / "tiny"))
    if importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel"):
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(ROOT / "docs" / "quick_start.ipynb", as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    else:
        names: dict[str, object] = {}
        for source in cells():
            exec(compile(source, "cell", "exec"), names)
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


def test_the_dockerfile_names_files_that_exist():
    """Docker itself is not needed for this; an image has not been built."""
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    assert steps[0][0] == "FROM" and {step[0] for step in steps} <= known
    for name, rest in steps:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest
        if name in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)
    assert any("'.[train]'" in rest for name, rest in steps if name == "RUN")
