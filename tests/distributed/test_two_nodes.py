"""Two "nodes", started by launch/multi_node.sh on each without ssh: network namespaces of this machine joined by a
virtual
cable, or, where the system has none to give, two launchers on its loopback interface."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import model_zoo
from hift_ds.cli.export import export_checkpoint
from hift_ds.errors import CheckpointError
from hift_ds.layers.grouping import partition_model
from hift_ds.ranks import free_port
from tests.helpers.tiny_tokenizers import byte_level

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.31.1", "10.77.31.2")
MICRO_BATCHES = 2
NOTHING_KEPT = {  # a weight is gathered each time it is used
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@dataclass(frozen=True)
class Node:
    address: str
    interface: str
    namespace: str | None = None

    def command(self, *arguments: str | Path) -> list[str]:
        inside = [] if self.namespace is None else ["ip", "netns", "exec", self.namespace]
        return [*inside, *map(str, arguments)]

    def bytes_sent(self) -> int:
        counter = f"/sys/class/net/{self.interface}/statistics/tx_bytes"
        return int(subprocess.run(self.command("cat", counter), capture_output=True, text=True, check=True).stdout)


LOOPBACK = [Node("127.0.0.1", "lo"), Node("127.0.0.2", "lo")]


@contextlib.contextmanager
def namespaces() -> Iterator[list[Node] | None]:
    """None if this system has none to give."""
    nodes = [Node(a, f"hc{os.getpid()}{x}", f"hift{os.getpid()}{x}") for a, x in zip(ADDRESSES, "ab", strict=True)]
    one, other = nodes
    try:
        made = nodes
        try:
            for node in nodes:
                _ip("netns", "add", node.namespace)
            _ip("link", "add", one.interface, "netns", one.namespace, "type", "veth",
                "peer", "name", other.interface, "netns", other.namespace)  # fmt: skip
            for node in nodes:
                _ip("-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.interface)
                _ip("-n", node.namespace, "link", "set", node.interface, "up")
                _ip("-n", node.namespace, "link", "set", "lo", "up")
                node.bytes_sent()
        except (subprocess.CalledProcessError, FileNotFoundError):
            made = None
        yield made
    finally:
        if shutil.which("ip"):
            for node in nodes:
                subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Job:
    """The same run on all nodes, with a folder for each."""

    nodes: list[Node]
    folder: Path

    @property
    def outputs(self) -> list[Path]:
        return [self.folder / f"disk-{i}" / "run" for i in range(len(self.nodes))]

    def write(self, stage: int) -> Any:
        """The model that the run begins with."""
        model = model_zoo.tiny.build(
            "llama", vocab_size=280, max_position_embeddings=256, hidden_size=128, intermediate_size=344
        )
        model.save_pretrained(self.folder / "model")
        byte_level().save_pretrained(self.folder / "model")
        rows = [{"prompt": f"{i} + 1?", "completion": f"It is {i + 1}."} for i in range(40)]
        (self.folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        run = {
            "model": {"path": str(self.folder / "model")},
            "data": {"train": str(self.folder / "data.jsonl"), "max_length": 64},
            "train": {
                "output_dir": "given to each node", "micro_batch_size": 2, "gradient_accumulation_steps": MICRO_BATCHES,
                "learning_rate": 1e-2, "lr_scheduler": "constant", "report_to": [],
            },
            "deepspeed": {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": stage, **NOTHING_KEPT},
                "checkpoint": {"use_node_local_storage": True},
            },
        }  # fmt: skip
        (self.folder / "run.yaml").write_text(yaml.safe_dump(run))
        (self.folder / "hostfile").write_text("".join(f"{node.address} slots=1\n" for node in self.nodes))
        return model

    def start(self, *overrides: str) -> tuple[str, list[int]]:
        """Run it. What the first node printed, and the bytes that each node sent."""
        port, before, processes = free_port(), [node.bytes_sent() for node in self.nodes], []
        for rank, (node, output) in enumerate(zip(self.nodes, self.outputs, strict=True)):
            env = dict(
                os.environ, NODE_RANK=str(rank), MASTER_ADDR=self.nodes[0].address, MASTER_PORT=str(port),
                GLOO_SOCKET_IFNAME=node.interface, PYTHON=sys.executable, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
            )  # fmt: skip
            script = [ROOT / "launch" / "multi_node.sh", self.folder / "hostfile", self.folder / "run.yaml"]
            command = node.command(*script, f"train.output_dir={output}", *overrides)
            processes.append(
                subprocess.Popen(
                    command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
                )
            )
        try:
            texts = [process.communicate(timeout=280)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, text in zip(processes, texts, strict=True):
            assert process.returncode == 0, text[-3000:]
        return texts[0], [node.bytes_sent() - n for node, n in zip(self.nodes, before, strict=True)]


def bytes_of_a_cycle(model: Any, stage: int) -> float:
    """What a node must send at least: gradients once a step in fp32, half of them for the other node, and then the new
    weights in bf16; or, partitioned, its half of every weight in each forward and of those from the active group up in
    each backward. Gloo makes a reduce-scatter of an all-reduce, which sends twice as much."""
    numels = [group.numel for group in partition_model(model).groups]
    total = sum(numels)
    gradients, half = 2 * (4 * total / 2), 2 / 2  # bytes of half a bf16 weight
    if stage < 3:
        return gradients + half * total
    gathered = len(numels) * total + sum(sum(numels[active:]) for active in range(len(numels)))
    return gradients + MICRO_BATCHES * half * gathered


def check_export_of_one_node(job: Job, exported: dict[str, torch.Tensor]) -> None:
    """It has half of the masters: refused, unless the other half is brought along."""
    ours, theirs = (output / "checkpoint-40" for output in job.outputs)
    with pytest.raises(CheckpointError, match="bring the files of all nodes together"):
        export_checkpoint(ours, job.folder / "alone", dtype="fp32")
    for file in (theirs / "global_step40").glob("*rank-00001*"):
        shutil.copy(file, ours / "global_step40")
    export_checkpoint(ours, job.folder / "together", dtype="fp32")
    for name, weight in load_file(job.folder / "together" / "model.safetensors").items():
        assert torch.equal(weight, exported[name]), name


def check_run_on(nodes: list[Node], folder: Path, stage: int) -> tuple[Any, list[list[int]]]:
    """Train, lose a checkpoint on one node, go on, export. The bytes that each node sent in the two runs."""
    job = Job(nodes, folder)
    model = job.write(stage)
    printed, first = job.start("train.max_steps=10", "train.save_steps=5")
    assert printed.count("2 processes on CPU") == 1
    for rank, output in enumerate(job.outputs):
        saved = output / "checkpoint-10" / "global_step10"
        assert (saved / "model.safetensors").exists()  # each node has what it needs to resume
        assert [f.name for f in saved.glob("states-rank-*")] == [f"states-rank-{rank:05d}.safetensors"]
        assert (output / "checkpoint-10" / "trainer_state.json").exists()

    shutil.rmtree(job.outputs[1] / "checkpoint-10")
    printed, second = job.start("train.max_steps=40", "train.save_steps=20")
    assert f"{job.outputs[0] / 'checkpoint-10'} is not on every node; going on from " in printed
    results = json.loads((job.outputs[0] / "all_results.json").read_text())
    assert results["steps"] == 40 and results["cycles"] == 8 and results["never_updated"] == 0

    exported = load_file(job.outputs[0] / "model" / "model.safetensors")
    trained = load_file(job.outputs[0] / "checkpoint-40" / "global_step40" / "model.safetensors")
    initial = dict(model.named_parameters())
    for name, weight in exported.items():  # the masters of both nodes
        assert weight.dtype == torch.float32 and torch.equal(weight.bfloat16(), trained[name]), name
        for half in zip(weight.view(-1).chunk(2), initial[name].detach().view(-1).chunk(2), strict=True):
            assert not torch.equal(half[0], half[0].bfloat16().float()) and not torch.equal(*half), name
    assert not (job.outputs[1] / "model").exists()
    check_export_of_one_node(job, exported)
    return model, [first, second]


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_nodes_train_save_resume_and_export_without_a_shared_folder(tmp_path, stage):
    with namespaces() as nodes:
        model, (first, second) = check_run_on(nodes or LOOPBACK, tmp_path, stage)
    if nodes is None:
        pytest.skip("ran on loopback; without network namespaces the traffic cannot be counted")
    # Steps 6 to 40 against steps 1 to 10: the second run does five cycles more, and else the same. What comes on top
    # are headers, acknowledgements, the norm and the flags; partitioned, for each of the 484 gathers of a cycle too.
    for rank in range(2):
        sent, least = (second[rank] - first[rank]) / 5, bytes_of_a_cycle(model, stage)
        print(f"stage {stage}, node {rank}: {sent:,.0f} bytes a cycle, counted {least:,.0f}")
        assert least < sent < (1.15 if stage == 3 else 1.05) * least


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_launchers_on_loopback(tmp_path, stage):
    """What the test above does where there are no namespaces."""
    check_run_on(LOOPBACK, tmp_path, stage)
