"""A finished run started again changes nothing; a run folder has one writer; no process of a job outlives another."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from hift_ds.checkpoint.folder_lock import LOCK_FILE, FolderLock
from hift_ds.checkpoint.manifest import verify
from hift_ds.errors import USER_ERROR, ConfigError
from hift_ds.ranks import launch_variables
from hift_ds.train import worker
from hift_ds.train.finetune import finetune
from hift_ds.train.processes import FirstEnd, ProgressNotes, _is_launcher, bind_to_device
from hift_ds.train.run_config import load_run_config
from tests.unit.test_launch import ROOT, inputs, own_cache, weights_in, write_run  # noqa: F401  (fixtures)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE
    }


# -- a finished run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"hift": False, "deepspeed": None}], ids=["layer groups", "full fine-tuning"])
def test_a_finished_run_started_again_changes_nothing(inputs, tmp_path, capsys, more):  # noqa: F811
    """Seven steps of four in an epoch: the loop of transformers would train the eighth."""
    out = tmp_path / "run"
    file = write_run(inputs, out, train__max_steps=7, train__save_steps=3, train__save_total_limit=None, **more)
    results = finetune(load_run_config(file))
    before, weights = contents(out), weights_in(out / "model")
    assert finetune(load_run_config(file)) == results
    assert contents(out) == before
    assert "run is complete: 7 steps" in capsys.readouterr().out

    # Killed between its last checkpoint and the end of the export.
    (out / "all_results.json").unlink()
    shutil.rmtree(out / "model")
    again = finetune(load_run_config(file))
    assert again["steps"] == 7 and "train_loss" not in again
    for name, weight in weights_in(out / "model").items():
        assert torch.equal(weight, weights[name]), name
    after = contents(out)
    same = [n for n in before if n.startswith("checkpoint-") or n in ("metrics.jsonl", "run.yaml", "coverage.json")]
    assert not [name for name in same if after[name] != before[name]]
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-7",
    ]

    # Fewer steps than were done are a mistake, and leave everything as it is; more go on.
    with pytest.raises(ConfigError, match=r"ends at step 6 .*checkpoint-7 has done 7"):
        finetune(load_run_config(file, ["train.max_steps=6"]))
    assert contents(out) == after
    assert finetune(load_run_config(file, ["train.max_steps=8"]))["steps"] == 8


def test_full_fine_tuning_executes_nothing_of_a_checkpoint(inputs, tmp_path, capsys):  # noqa: F811
    """DeepSpeed's own files are pickles, which it loads whatever they name. What it writes itself goes on."""
    out = tmp_path / "run"
    stages = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    file = write_run(
        inputs,
        out,
        hift=False,
        deepspeed=stages,
        train__max_steps=4,
        train__save_steps=2,
        train__save_total_limit=None,
    )
    whole = finetune(load_run_config(file))
    shutil.rmtree(out / "checkpoint-4")
    resumed = finetune(load_run_config(file))
    assert resumed["steps"] == 4 and resumed["eval_loss"] == whole["eval_loss"]

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for number, name in (
        (4, "mp_rank_00_model_states.pt"),
        (2, "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ):
        path = out / f"checkpoint-{number}" / f"global_step{number}" / name
        content = torch.load(path, weights_only=False)
        torch.save({**content, "extra": Attack()}, path)
    capsys.readouterr()
    assert worker.main([str(file), "train.max_steps=5"]) == 2
    error = capsys.readouterr().err
    assert "names code to run when it is read" in error and "Traceback" not in error
    assert not (tmp_path / "executed").exists()


# -- one writer ----------------------------------------------------------------------------------------------


def hold(folder: Path) -> subprocess.Popen:
    code = (
        "import sys, time, pathlib; from hift_ds.checkpoint.folder_lock import FolderLock;"
        "lock = FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_folder_has_one_writer_and_a_killed_one_leaves_no_lock(inputs, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    owner = hold(out)
    try:
        assert worker.main([str(write_run(inputs, out))]) == 2
        error = capsys.readouterr().err
        assert f"is in use by another run (process {owner.pid} on " in error and error.count("\n") == 1
        assert [path.name for path in out.iterdir()] == [LOCK_FILE]
    finally:
        owner.kill()
        owner.wait()
    FolderLock(out).release()


def refused_to_a_child(folder: Path) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            FolderLock(folder)
        except ConfigError:
            os._exit(75)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75


def test_a_process_holds_a_folder_until_the_last_of_its_locks_ends(tmp_path, monkeypatch):
    out, other = tmp_path / "out", tmp_path / "other"
    first, second = (FolderLock(out, leaves_file=False) for _ in range(2))
    assert refused_to_a_child(out)
    second.release()
    second.release()
    assert refused_to_a_child(out)
    first.release()
    assert not out.exists()

    lockf = fcntl.lockf

    def late(handle, how):
        """Another process, which held it, has taken the file away meanwhile."""
        monkeypatch.undo()
        (other / LOCK_FILE).unlink()
        lockf(handle, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    third = FolderLock(other, leaves_file=False)
    assert refused_to_a_child(other)
    (other / LOCK_FILE).unlink()
    (other / LOCK_FILE).write_text("another's by now")
    third.release()
    assert (other / LOCK_FILE).read_text() == "another's by now"


def test_a_folder_that_cannot_be_made_is_one_line(inputs, tmp_path, capsys):  # noqa: F811
    out = tmp_path / ("x" * 300)
    assert worker.main([str(write_run(inputs, tmp_path / "r", train__output_dir=str(out)))]) == 2
    error = capsys.readouterr().err
    assert "train.output_dir" in error and "File name too long" in error and error.count("\n") == 1


# -- no process of a job outlives another ----------------------------------------------------------------------


def start(
    inputs: Path,  # noqa: F811
    out: Path,
    command: list[str],
) -> tuple[subprocess.Popen, list[psutil.Process], list[str]]:
    """A job on two ranks that has taken some steps and saved: its parent, the ranks, what it has printed."""
    file = write_run(inputs, out, train__max_steps=100_000, train__eval_steps=None, train__save_steps=2)
    parent = subprocess.Popen(
        [sys.executable, *command[:-1], *([str(file)] if command[-1] == "RUN" else [])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    lines: list[str] = []
    for line in parent.stdout:
        lines.append(line)
        if line.startswith("step "):
            break
    assert lines and lines[-1].startswith("step "), "".join(lines)
    deadline = time.monotonic() + 60
    while not any(out.glob("checkpoint-*/trainer_files.json")):  # the first may have been rotated away
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = [p for p in psutil.Process(parent.pid).children(recursive=True) if "RANK" in p.environ()]
    return parent, sorted(ranks, key=lambda p: p.environ()["RANK"]), lines


OURS = ["-m", "hift_ds", "train", "--num-procs", "2", "RUN"]
DEEPSPEEDS = [
    "-m",
    "deepspeed.launcher.runner",
    "--num_gpus",
    "2",
    "--master_port",
    "29713",
    str(ROOT / "launch"),
    "RUN",
]


@pytest.mark.distributed
def test_a_killed_rank_ends_the_job_which_says_who_when_and_what_is_left(inputs, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    parent, ranks, lines = start(inputs, out, OURS)
    try:
        assert len(ranks) == 2
        ranks[1].kill()
        lines += parent.stdout.readlines()
        assert parent.wait(timeout=40) == 128 + signal.SIGKILL
        assert not psutil.wait_procs(ranks, timeout=1)[1]
    finally:
        for process in [*ranks, parent]:
            if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
                process.kill()
    line = next(line for line in lines if line.startswith("hift-ds: error: rank 1 was killed by SIGKILL"))
    found = re.search(r"in step (\d+) \(group [\w.]+\); last good checkpoint: (\S+checkpoint-(\d+));", line)
    assert found and int(found[3]) <= int(found[1]) + 1, line
    assert verify(Path(found[2]) / f"global_step{found[3]}").global_steps == int(found[3])


@pytest.mark.distributed
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(OURS, id="hift-ds train"),
        pytest.param(DEEPSPEEDS, id="deepspeed launch", marks=pytest.mark.slow),
    ],
)
def test_a_killed_parent_takes_its_ranks_with_it(inputs, tmp_path, command):  # noqa: F811
    out = tmp_path / "run"
    parent, ranks, _ = start(inputs, out, command)
    try:
        assert len(ranks) == 2
        os.kill(parent.pid, signal.SIGKILL)
        assert not psutil.wait_procs(ranks, timeout=20)[1]
        FolderLock(out).release()  # nobody holds it any more
    finally:
        for process in ranks:
            if process.is_running():
                process.kill()
        parent.kill()
        parent.wait()


def test_notes_and_launchers(tmp_path):
    notes = ProgressNotes(tmp_path / "notes")
    notes.write(1, "in step 7 (group layers.2)")
    notes.write(1, "in step 8")
    assert ProgressNotes(tmp_path / "notes").read(1) == "in step 8" and notes.read(0) == notes.read(5) == ""
    assert FirstEnd(0, -signal.SIGSEGV, "").describe() == "rank 0 was killed by SIGSEGV before its first step"
    assert _is_launcher(b"/usr/bin/python3\0-u\0-m\0deepspeed.launcher.launch\0--world_info=x\0")
    assert _is_launcher(b"/v/bin/python\0/v/bin/deepspeed\0launch\0run.yaml\0")
    assert not _is_launcher(b"bash\0deepspeed.sh\0") and not _is_launcher(b"/usr/bin/python3\0-m\0pytest\0")


def test_the_worker_binds_itself_before_anything_is_loaded(monkeypatch, capsys):
    bound = []
    for name, value in launch_variables(rank=0, world_size=1, port=1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(worker, "end_with_launcher", lambda: None)
    monkeypatch.setattr(worker, "bind_to_device", bound.append)
    assert worker.main(["no/such/run.yaml"]) == USER_ERROR and bound == [3]
    assert "no/such/run.yaml" in capsys.readouterr().err


def test_a_rank_runs_on_the_cores_beside_its_gpu(tmp_path, monkeypatch):
    bound, device = [], tmp_path / "bus" / "pci" / "devices" / "0000:3b:00.0"
    device.mkdir(parents=True)
    monkeypatch.delenv("ACCELERATE_CPU_AFFINITY", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: bound.append(cpus))
    assert bind_to_device(0, tmp_path) is None  # no GPU
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert bind_to_device(0, tmp_path) is None  # the system does not tell
    (device / "local_cpulist").write_text("0-3,8,64-99\n")
    assert bind_to_device(0, tmp_path) == {0, 1, 2, 3, 8} and bound == [{0, 1, 2, 3, 8}]
    (device / "local_cpulist").write_text("0-15\n")  # one node
    assert bind_to_device(0, tmp_path) is None and len(bound) == 1
    monkeypatch.setenv("ACCELERATE_CPU_AFFINITY", "1")
    (device / "local_cpulist").write_text("0-3\n")
    assert bind_to_device(0, tmp_path) is None and len(bound) == 1
