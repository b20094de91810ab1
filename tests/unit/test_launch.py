"""From a run file to a fine-tuned model: through DeepSpeed's launcher on two processes, and phase by phase on
one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.runtime.config import DeepSpeedConfig

import model_zoo
from hift_ds.activations.switches import _without_cache
from hift_ds.checkpoint.trainer_folder import broken_seal
from hift_ds.cli import train as command
from hift_ds.cli.main import main as cli_main
from hift_ds.config import HiFTConfig
from hift_ds.errors import CheckpointError
from hift_ds.hf.safetensors_folder import tensor_dtypes
from hift_ds.report.metrics import read_metrics
from hift_ds.train import preflight, settings, worker
from hift_ds.train.finetune import finetune
from hift_ds.train.run_config import load_run_config
from tests.helpers.distributed import deepspeed_launcher
from tests.helpers.tiny_tokenizers import LLAMA_LIKE, byte_level, sentencepiece_folder

ROOT = Path(__file__).resolve().parents[2]
NUM_GROUPS = 5  # of the tiny llama


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a model and with data whose answers differ in length."""
    folder = tmp_path_factory.mktemp("inputs")
    model = model_zoo.tiny.build("llama", vocab_size=280, max_position_embeddings=256)
    model.save_pretrained(folder / "model")
    byte_level().save_pretrained(folder / "model")
    rows = [
        {"messages": [
            {"role": "user", "content": f"{i} + 1?"},
            {"role": "assistant", "content": f"It is {i + 1}." + " ok" * (i % 4)},
        ]}
        for i in range(44)
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    import datasets

    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))


def write_run(inputs: Path, output_dir: Path, **changes: Any) -> Path:
    """A run file; ``train__max_steps=3`` sets ``train.max_steps``."""
    run: dict[str, Any] = {
        "model": {"path": str(inputs / "model")},
        "data": {"train": str(inputs / "data.jsonl"), "val_size": 4, "max_length": 128},
        "train": {
            "output_dir": str(output_dir), "max_steps": 12, "micro_batch_size": 2, "global_batch_size": 8,
            "learning_rate": 1e-2, "weight_decay": 0.1, "eval_steps": 6, "save_steps": 6,
        },
        "deepspeed": str(ROOT / "ds_configs" / "bf16_host.json"),
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            run.setdefault(section, {})[name] = value
        else:
            run[section] = value
    file = output_dir.parent / f"{output_dir.name}.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype="auto").state_dict()


# -- two processes -------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_deepspeed_launch_on_two_processes_and_resume_on_one(inputs, tmp_path):
    out = tmp_path / "run"
    file = write_run(inputs, out, data__packing=True, data__val_size=5)  # odd: one row is filled in
    launcher = deepspeed_launcher(2)
    done = subprocess.run(
        [*launcher, str(ROOT / "launch"), str(file), "train.seed=7"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("2 processes on CPU") == 1 and "Traceback" not in done.stderr  # one rank speaks

    results = json.loads((out / "all_results.json").read_text())
    assert results["steps"] == 12 and results["cycles"] == 2 and results["never_updated"] == 0
    assert results["eval_loss"] < results["eval_loss_before"] - 0.2
    metrics = read_metrics(out)
    assert [record["step"] for record in metrics.steps] == list(range(1, 13))
    assert [record["group"] for record in metrics.steps] == [i % NUM_GROUPS for i in range(12)]
    assert [record["step"] for record in metrics.evals] == [0, 6, 12]
    assert set(json.loads((out / "coverage.json").read_text())["updates"].values()) == {2, 3}
    assert all(group["moved"] > 0 for group in json.loads((out / "groups.json").read_text()))
    for name in (
        "loss.png",
        "groups.png",
        "run.yaml",
        "deepspeed.json",
        "checkpoint-12/global_step12/manifest.json",
    ):
        assert (out / name).stat().st_size > 0
    assert yaml.safe_load((out / "run.yaml").read_text())["train"]["seed"] == 7

    before, after = weights_in(inputs / "model"), weights_in(out / "model")
    assert tensor_dtypes(out / "model") == tensor_dtypes(inputs / "model")  # fp32: exported from the masters
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in after.values())
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer("Hi")["input_ids"] == byte_level()("Hi")["input_ids"] and tokenizer.chat_template
    GenerationConfig.from_pretrained(out / "model")

    resumed = finetune(load_run_config(file, ["train.seed=7", "train.max_steps=17"]))
    assert resumed["steps"] == 17 and resumed["cycles"] == 3
    assert resumed["eval_loss_before"] == results["eval_loss_before"]
    assert resumed["eval_tokens"] == results["eval_tokens"]
    steps = read_metrics(out).steps
    assert [record["step"] for record in steps] == list(range(1, 18))
    assert steps[-1]["group"] == 16 % NUM_GROUPS


@pytest.mark.distributed
def test_signals_reach_the_workers_which_save_and_leave_none_behind(inputs, tmp_path):
    psutil = pytest.importorskip("psutil")
    out = tmp_path / "run"
    file = write_run(inputs, out, train__max_steps=100_000, train__eval_steps=None, train__save_steps=None)
    starter = subprocess.Popen(
        [sys.executable, "-m", "hift_ds.cli.main", "train", str(file), "--num-procs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    workers: list[Any] = []
    try:
        lines = []
        for line in starter.stdout:
            lines.append(line)
            if line.startswith("step "):
                workers = psutil.Process(starter.pid).children(recursive=True)
                starter.send_signal(signal.SIGTERM)
                break
        lines += starter.stdout.readlines()
        assert starter.wait(timeout=60) == 0, "".join(lines)
        assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=10)[1]
    finally:
        for process in [*workers, starter]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    saved = next(out.glob("checkpoint-*"))
    step = int(saved.name.removeprefix("checkpoint-"))
    assert f"saved after step {step}; the same command goes on from there" in "".join(lines)
    assert (saved / f"global_step{step}" / "manifest.json").exists() and not (out / "model").exists()


# -- one process ---------------------------------------------------------------------------------------------


def test_interrupted_run_ends_like_an_uninterrupted_one(inputs, tmp_path, caplog):
    out = tmp_path / "run"
    run = load_run_config(
        write_run(inputs, out, train__save_total_limit=None, hift={"order": "random", "reshuffle": True})
    )
    whole = finetune(run)
    expected = weights_in(out / "model")

    newest = out / "checkpoint-12"
    states = next((newest / "global_step12").glob("states-rank-00000.safetensors"))
    damaged = bytearray(states.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    states.write_bytes(damaged)
    shutil.copytree(out / "checkpoint-6", out / "checkpoint-14")
    (out / "checkpoint-14" / "trainer_state.json").unlink()  # killed before the last file
    (out / "all_results.json").unlink()  # a finished run would not begin at all
    again = finetune(run)
    assert "checkpoint-14 was never completed" in caplog.text
    assert "checksum" in caplog.text and "trying" in caplog.text  # checkpoint-12, found out while loading
    assert again["steps"] == 12 and again["eval_loss"] == whole["eval_loss"]
    for name, value in weights_in(out / "model").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("at", [0, 4])
def test_a_signal_ends_an_evaluation_after_its_batch_and_the_run_goes_on_exactly(inputs, tmp_path, monkeypatch, at):
    """The first evaluation, of 10 batches: one step follows, so that there is something to go on from."""
    from hift_ds.train.trainer import TokenMeanEvaluation

    options = {"train__max_steps": 6, "train__eval_steps": 4, "train__save_steps": 100, "data__val_size": 20}
    options["train__eval_batch_size"] = 2
    finetune(load_run_config(write_run(inputs, tmp_path / "whole", **options)))
    run = load_run_config(write_run(inputs, tmp_path / "run", **options))
    batches, real = [], TokenMeanEvaluation.prediction_step

    def third_is_interrupted(self, *args, **kwargs):
        batches.append(self.state.global_step)
        if batches.count(at) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(TokenMeanEvaluation, "prediction_step", third_is_interrupted)
        stopped = finetune(run)
    saved = max(at, 1)
    assert stopped["stopped_by"] == "SIGTERM" and stopped["steps"] == saved
    assert batches == ([0] * 3 if at == 0 else [0] * 10 + [4] * 3)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{saved}"]
    assert broken_seal(tmp_path / "run" / f"checkpoint-{saved}", weights=True) is None
    assert not {"loss.png", "report.html"} & {path.name for path in (tmp_path / "run").iterdir()}  # who stops, waits
    assert finetune(run)["steps"] == 6
    expected = weights_in(tmp_path / "whole" / "model")
    for name, value in weights_in(tmp_path / "run" / "model").items():
        assert torch.equal(value, expected[name]), name


def test_two_runs_do_not_export_into_one_folder(inputs, tmp_path, capsys):
    """Found before either has trained; afterwards nothing of the lock is left."""
    target = tmp_path / "model"
    code = (
        "import sys, time, pathlib; from hift_ds.checkpoint.folder_lock import FolderLock;"
        "lock = FolderLock(pathlib.Path(sys.argv[1]), leaves_file=False); print('held', flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout.readline() == "held\n"
        file = write_run(inputs, tmp_path / "run", export__dir=str(target), train__max_steps=2)
        assert worker.main([str(file)]) == 2
        error = capsys.readouterr().err
        assert f"export.dir: {str(target)!r} is in use by another run (process {owner.pid} on " in error
        assert (target / "run.lock").exists() and not list((tmp_path / "run").glob("checkpoint-*"))
        checkpointed = write_run(inputs, tmp_path / "other", train__max_steps=2)
        finetune(load_run_config(checkpointed))
        assert cli_main(["export", str(tmp_path / "other"), str(target)]) == 2
        assert "OUT: " in capsys.readouterr().err
    finally:
        owner.kill()
        owner.wait()
    assert cli_main(["export", str(tmp_path / "other"), str(target)]) == 0
    assert not (target / "run.lock").exists() and not (tmp_path / "other" / "model" / "run.lock").exists()


def test_never_resume_refuses_a_folder_with_checkpoints(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "checkpoint-3").mkdir(parents=True)
    assert worker.main([str(write_run(inputs, out)), "train.resume=never"]) == 2
    assert "checkpoint-3" in capsys.readouterr().err
    assert worker.main([str(write_run(inputs, out)), f"train.resume={out / 'checkpoint-3'}"]) == 2
    assert "never completed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        (
            {"deepspeed": None, "train__optimizer": "Adafactor", "train__gradient_checkpointing": True},
            torch.float32,
        ),
        (
            {"export__dtype": "bf16", "train__save_steps": None, "export__max_shard_size": "20KB"},
            torch.bfloat16,
        ),
        ({"hift": False, "deepspeed": None}, torch.float32),
    ],
    ids=["fp32_adafactor", "sharded_bf16_export", "full_fine_tuning"],
)
def test_other_ways_to_train_and_export(inputs, tmp_path, changes, dtype):
    out = tmp_path / "run"
    results = finetune(load_run_config(write_run(inputs, out, train__max_steps=6, **changes)))
    assert results["eval_loss"] < results["eval_loss_before"]
    after = weights_in(out / "model")
    assert {value.dtype for value in after.values()} == {dtype}
    assert json.loads((out / "model" / "config.json").read_text())["use_cache"] is True
    assert (out / "checkpoint-6" / "latest").exists()  # the last step is saved whatever save_steps says
    if dtype == torch.bfloat16:
        assert len(list((out / "model").glob("model-*.safetensors"))) > 1


def test_a_run_file_with_the_update_in_backward(inputs, tmp_path, capsys):
    """By the preset: its first lines say how many layers a step has, and why, and which norm clips; what moved and what
    was made again is in the metrics, the coverage and the pictures."""
    out = tmp_path / "run"
    hift = {"group_size": "auto", "clipping": "speculative"}
    finetune(load_run_config(write_run(inputs, out, deepspeed="bf16_host_full", hift=hift, train__max_grad_norm=1e3)))
    said = capsys.readouterr().out
    assert re.search(r"group size auto: .* a step \(\d+ groups?\) at [\d,]+ tokens", said), said
    assert "clipping speculative: gradients are scaled down to 1000 by the norm of the step" in said
    steps, coverage = read_metrics(out).steps, json.loads((out / "coverage.json").read_text())
    assert len(steps) == 12 and all(step["grad_bytes_out"] > 0 for step in steps)
    assert coverage["trials"]["num_made"] == sum(step["tried"] for step in steps)
    assert coverage["trials"]["num_undone"] == sum(step["undone"] for step in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize("hift", [{}, False], ids=["hift", "full"])
def test_a_generation_config_that_transformers_refuses_to_save_goes_out_as_it_came(inputs, tmp_path, hift):
    """As Llama-2 and Vicuna ship it; the Trainer aligns its special tokens, and the first checkpoint would fail."""
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "pad_token_id": 77}
    (model / "generation_config.json").write_text(json.dumps(settings))
    out = tmp_path / "run"
    options = {"train__max_steps": 2, "train__save_steps": 1, "train__eval_steps": None, "data__val_size": 0}
    run = write_run(inputs, out, model__path=str(model), hift=hift, deepspeed=None, **options)
    assert finetune(load_run_config(run))["steps"] == 2
    for folder in (out / "checkpoint-1", out / "checkpoint-2", out / "model"):
        written = json.loads((folder / "generation_config.json").read_text())
        assert (written["temperature"], written["top_p"]) == (0.9, 0.6) and not written.get("do_sample")


def test_what_a_checkpoint_cannot_write_is_found_before_training(inputs, tmp_path, monkeypatch):
    """A bare sentencepiece model that AutoTokenizer reads otherwise beside this config.json."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, intermediate_size=8, vocab_size=420))
    model.save_pretrained(tmp_path / "model")
    sentencepiece_folder(tmp_path / "model", **LLAMA_LIKE)
    monkeypatch.setattr("hift_ds.train.finetune.build_trainer", lambda *a, **k: pytest.fail("training began"))
    run = write_run(inputs, tmp_path / "run", model__path=str(tmp_path / "model"), deepspeed=None)
    with pytest.raises(CheckpointError, match="AutoTokenizer reads other ids"):
        finetune(load_run_config(run))


def test_a_multimodal_folder_learns_texts_without_a_cache(inputs, tmp_path):
    """Its config has use_cache for the text only; the export gets it back."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"vocab_size": 280, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    assert not hasattr(config, "use_cache") and config.text_config.use_cache
    model = Gemma3ForConditionalGeneration(config).train()
    assert _without_cache(model, (), {}) == ((), {"use_cache": False})  # also in a loop of one's own
    model.save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    options = {"train__max_steps": 2, "train__eval_steps": None, "data__val_size": 0, "deepspeed": None}
    run = write_run(inputs, tmp_path / "run", model__path=str(tmp_path / "model"), **options)
    assert finetune(load_run_config(run))["steps"] == 2
    written = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert written["text_config"]["use_cache"] is True and "use_cache" not in written


def test_eval_loss_is_the_mean_over_tokens(inputs, tmp_path):
    """Whatever the batch size: one row at a time or all at once give the same."""
    losses = []
    for rows in (1, 4):
        out = tmp_path / f"run{rows}"
        options = {
            "train__max_steps": 1,
            "train__eval_batch_size": rows,
            "train__eval_steps": 1,
            "deepspeed": None,
        }
        losses.append(finetune(load_run_config(write_run(inputs, out, **options)))["eval_loss_before"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# -- bad input -----------------------------------------------------------------------------------------------


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        ({"train__learning_rat": 1}, None, "learning_rate"),
        ({"train__early_stopping_patience": 2}, None, "'early_stopping_patience'; did you mean 'early_stopping'?"),
        (
            {"model__attn_implementation": "flesh"},
            None,
            "model.attn_implementation: 'flesh' cannot be used here",
        ),
        ({"model__attn_implementation": "flash_attention_2"}, None, "package for FlashAttention2"),
        ({"model__path": "nowhere"}, None, "model.path"),
        ({"data__train": "nowhere.jsonl"}, None, "nowhere.jsonl"),
        ({"data__max_length": 4096}, None, "256 positions"),
        ({"train__global_batch_size": 3}, None, "multiple"),
        ({"hift": {"groups": [["embed"], ["nonesuch"]]}}, None, "nonesuch"),
        ({"hift": {"groups": [["embed"]]}}, None, "model.layers.0"),
        ({"hift": {"always_active": ["nonesuch"]}}, None, "nonesuch"),
        ({"hift": {"state": {"residenz": "host"}}}, None, "residency"),
        ({"train__optimizer": "AdamX"}, None, "'AdamX'"),
        ({"train__report_to": "paper"}, None, "train.report_to: paper"),
        ({"train__output_dir": "runs/first[1]"}, None, "has one of * ? [ in it"),
        ({}, truncate_weights, "model.safetensors"),
        ({}, pickle_weights, "safetensors"),
    ],
)
def test_bad_input_is_one_line_before_any_weight_is_read(
    inputs, tmp_path, monkeypatch, capsys, changes, spoil, message
):
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    if spoil is not None:
        spoil(model)
    monkeypatch.setattr("hift_ds.train.load_model.load_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    file = write_run(inputs, tmp_path / "run", **{"model__path": str(model), **changes})
    assert worker.main([str(file)]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("hift-ds: error: ")
    assert len(printed.err.strip().splitlines()) == 1 and "Traceback" not in printed.err


def test_all_labels_masked_and_empty_data(inputs, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert (
        worker.main(
            [
                str(
                    write_run(
                        inputs,
                        tmp_path / "a",
                        data__train=str(empty),
                        data__val_size=0,
                        train__eval_steps=None,
                    )
                )
            ]
        )
        == 2
    )
    assert "empty.jsonl" in capsys.readouterr().err
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("\n".join(json.dumps({"prompt": "x" * 300, "completion": "y"}) for _ in range(8)))
    assert worker.main([str(write_run(inputs, tmp_path / "b", data__train=str(nothing)))]) == 2
    assert "nothing to learn" in capsys.readouterr().err


# -- hift-ds train and the scripts ---------------------------------------------------------------------------


def test_train_command_counts_and_refuses(inputs, tmp_path, monkeypatch):
    from hift_ds.cli.main import main
    from hift_ds.errors import ConfigError

    started: list[Any] = []
    monkeypatch.setenv("RANK", "0")  # left behind by an engine of this process, of which nothing follows
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the command sets it; monkeypatch takes it back
    monkeypatch.setattr(
        command,
        "_launch",
        lambda devices, port, arguments, on_cpu, output_dir: started.append((devices, arguments)) or 0,
    )
    monkeypatch.setattr(command, "_run_here", lambda arguments: started.append(arguments) or 0)
    file = str(write_run(inputs, tmp_path / "run"))
    for accelerators, options, expected in (
        ([], [], [file]),
        ([], ["--num-procs", "2", "train.seed=1"], (["0", "1"], [file, "train.seed=1"])),
        (["3", "5"], [], (["3", "5"], [file])),
        (["3", "5"], ["--num_procs", "1"], [file]),
    ):
        monkeypatch.setattr(command, "_visible_accelerators", lambda found=accelerators: found)
        assert main(["train", file, *options]) == 0
        assert started.pop() == expected
    assert main(["train", file, "--num-procs", "3"]) == 2
    monkeypatch.setenv("WORLD_SIZE", "2")  # torchrun hift-ds train ...
    assert main(["train", file]) == 0 and started.pop() == [file]
    assert main(["train", file, "train.sed=3"]) == 2 and not started
    with pytest.raises(ConfigError, match="RUN.yaml"):
        worker._parse([])


def test_every_rank_gets_the_variables_of_a_launcher(tmp_path, monkeypatch):
    started: list[Any] = []

    class Ranks:
        def __init__(self, command, environments, progress_file):
            started.append((command, environments))

        def wait(self):
            return None

    monkeypatch.setattr(command, "RankProcesses", Ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    for on_cpu in (False, True):
        assert command._launch(["3", "5"], 1234, ["run.yaml"], on_cpu=on_cpu, output_dir=tmp_path) == 0
        words, environments = started.pop()
        assert words[-3:] == ["-m", "hift_ds.train.worker", "run.yaml"]
        for rank, env in enumerate(environments):
            assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"]) == (
                str(rank), str(rank), "2", "2",
            )  # fmt: skip
            assert env["OMP_NUM_THREADS"] == "6" and env["MASTER_PORT"] == "1234"
            assert on_cpu or env["CUDA_VISIBLE_DEVICES"] == "3,5"


def test_no_shell_on_the_way_evaluates_an_override(tmp_path):
    """DeepSpeed gives its words to pdsh as they are; pdsh gives them to a shell on every node."""
    (tmp_path / "bin").mkdir()
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/words\n')
    pdsh.chmod(0o755)
    ssh = tmp_path / "bin" / "ssh"  # DeepSpeed asks the first host for its name
    ssh.write_text("#!/bin/sh\necho 127.0.0.1\n")
    ssh.chmod(0o755)
    (tmp_path / "hostfile").write_text("node1 slots=2\nnode2 slots=2\n")
    overrides = [f"train.run=$(touch {tmp_path}/executed)", "data.columns={a: b}", "x=`id`;'\"", "*"]
    env = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SKIP_SSH_CHECK": "1",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "multi_node.sh"), str(tmp_path / "hostfile"), "run.yaml", *overrides],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words").read_text().splitlines()
    encoded = [word for word in words if word.startswith("--encoded=")]
    assert len(encoded) == 1 and not any("touch" in word or "`" in word for word in words)
    args = worker._parse(["--local_rank=1", *encoded])
    assert (args.run_file, args.overrides, args.local_rank) == ("run.yaml", overrides, 1)


def test_worker_takes_local_rank_wherever_the_launcher_puts_it():
    for argv in (
        ["--local_rank=1", "run.yaml", "train.seed=2"],
        ["run.yaml", "train.seed=2", "--local-rank", "1"],
    ):
        args = worker._parse(argv)
        assert (args.local_rank, args.run_file, args.overrides) == (1, "run.yaml", ["train.seed=2"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("node-1 slots=2\nnode-1 slots=2\n", "line 2: node-1 is given twice"),
        ("# a comment\nnode-1 4\n", "line 2: expected 'NAME slots=N'"),
        ("node-1 slots=0\n", "slots=0"),
        ("\n", "names no host"),
    ],
)
def test_multi_node_checks_the_hostfile_first(tmp_path, lines, message):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(lines)
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "launch" / "multi_node.sh", hostfile, "run.yaml"], capture_output=True, text=True, env=env
    )
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_scripts_parse_and_the_example_is_a_hostfile(tmp_path):
    slurm = (ROOT / "launch" / "slurm.sbatch").read_text()
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
    ):  # the last: ranks that share host memory
        assert f" {name}=$SLURM_" in slurm.replace("'", " ")
    for script in ("single_node.sh", "multi_node.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)
        assert os.access(ROOT / "launch" / script, os.X_OK)
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "hostfile.py", ROOT / "launch" / "hostfile.example"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2 nodes, 16 slots: node-1 x 8, node-2 x 8\n"
    no_arguments = subprocess.run([ROOT / "launch" / "single_node.sh"], capture_output=True, text=True)
    assert no_arguments.returncode == 2 and "RUN.yaml" in no_arguments.stderr


def test_the_few_fp32_weights_of_a_folder_in_bf16_keep_their_bits(inputs, tmp_path):
    """At a rate too small to move anything, every tensor comes out as it went in."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(inputs, tmp_path / "inputs")
    (file,) = (tmp_path / "inputs" / "model").glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: 1 + torch.rand(value.shape, generator=generator) if "norm" in name else value.bfloat16()
        for name, value in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "run"
    run = write_run(
        tmp_path / "inputs", out, train__learning_rate=1e-30, train__weight_decay=0.0, train__max_steps=6,
        train__eval_steps=None, data__val_size=0,
    )  # fmt: skip
    finetune(load_run_config(run, []))
    after = {name: value for f in (out / "model").glob("*.safetensors") for name, value in load_file(f).items()}
    assert any(value.dtype == torch.float32 for value in after.values())
    for name, value in after.items():
        assert value.dtype == tensors[name].dtype and torch.equal(value, tensors[name]), name


def test_a_run_reads_its_deepspeed_json_once_and_builds_its_config_once(inputs, tmp_path, monkeypatch):
    """From the check of the run file to the export, with a hift block in the JSON; nothing is left to be chosen."""
    (tmp_path / "ds.json").write_text(json.dumps({"hift": {"order": "top2down", "group_size": 1}}))
    calls = Counter()

    def counted(name):
        function = getattr(settings, name)
        return lambda *args, **kwargs: (calls.update([name]), function(*args, **kwargs))[1]

    for name in ("read_json_file", "parse_block", "deepspeed_config", "training_arguments"):
        monkeypatch.setattr(settings, name, counted(name))
    for cls in (HiFTConfig, DeepSpeedConfig):
        make = cls.__init__
        monkeypatch.setattr(cls, "__init__", lambda *a, make=make, **k: (calls.update([str(make)]), make(*a, **k))[1])
    monkeypatch.setattr(preflight, "training_arguments", settings.training_arguments)
    file = write_run(
        inputs,
        tmp_path / "run",
        deepspeed=str(tmp_path / "ds.json"),
        train__max_steps=1,
        train__save_steps=None,
    )
    finetune(load_run_config(file))
    written = json.loads((tmp_path / "run" / "deepspeed.json").read_text())
    assert written["hift"]["order"] == "top2down"
    assert set(calls.values()) == {1} and len(calls) == 6, calls
