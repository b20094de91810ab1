"""Is it right and fast on this accelerator? Checks with pass criteria, each a line of JSON; docs/gpu_validation.md is
the page.

    python benchmarks/gpu/validate.py                        all that need no model and no second GPU
    python benchmarks/gpu/validate.py races overlap          these
    python benchmarks/gpu/validate.py two_ranks run --model PATH --data FILE
    python benchmarks/gpu/validate.py --device cpu --tiny    what can run without an accelerator (the tests do)

Exit code 0 if everything passed. Results go to ``--out`` (results.jsonl and results.md); ``--tiny`` keeps every check
and its criteria but those of speed, which a CPU says nothing about.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
HERE = Path(__file__).resolve()

from benchmarks.gpu.checks import (  # noqa: E402
    TINY,
    Asked,
    Found,
    config_of,
    engine_of,
    leaves_no_memory,
    llama,
    size_for,
    synchronize,
    tokens_of,
)
from benchmarks.gpu.races import races  # noqa: E402

# -- the link ---------------------------------------------------------------------------------------------------------


def link(asked: Asked) -> Found:
    """Page-locked copies in, out and both at once, in 32 and 256 MiB."""
    import torch

    from hift_ds.errors import StateStoreError

    found = Found("link")
    for mib in (1, 2) if asked.tiny else (32, 256):
        size = mib << 20
        host = [torch.zeros(size, dtype=torch.uint8, pin_memory=asked.on_gpu) for _ in range(2)]
        there = [torch.zeros(size, dtype=torch.uint8, device=asked.device) for _ in range(2)]
        times = 2 if asked.tiny else max(1, 2048 // mib)
        row: dict[str, Any] = {"piece_mib": mib}
        for way in ("in", "out", "both"):
            streams = [torch.cuda.Stream() for _ in range(2)] if asked.on_gpu else [None, None]
            synchronize(asked.device)
            started = time.perf_counter()
            for _ in range(times):
                for direction, stream in zip(("in", "out"), streams, strict=True):
                    if way not in (direction, "both"):
                        continue
                    with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                        target, source = (there[0], host[0]) if direction == "in" else (host[1], there[1])
                        target.copy_(source, non_blocking=True)
            synchronize(asked.device)
            row[f"{way}_gb_s"] = times * size / (time.perf_counter() - started) / 1e9
        found.rows.append(row)
    best = dict(found.rows[-1])
    found.rows += [{"piece_mib": mib, "memory of node": node, "in_gb_s": rate} for node, rate in _from_each_node(asked)]
    try:
        found.rows.append({"disk read, O_DIRECT, page-locked, gb_s": _direct_read(asked)})
    except StateStoreError as error:  # then states on a disk there go through the page cache
        found.notes.append(f"no read past the page cache: {error}")
    if asked.on_gpu and not asked.tiny:
        found.require(min(best["in_gb_s"], best["out_gb_s"]) >= 20, "a direction is below 20 GB/s (PCIe 4 x16)")
        slowest = 0.8 * min(best["in_gb_s"], best["out_gb_s"])
        found.require(best["both_gb_s"] >= slowest, "both at once are slower than 80 % of one")
    return found


def _from_each_node(asked: Asked) -> list[tuple[str, float]]:
    """How fast page-locked memory of each NUMA node comes: memory is taken from the node whose core asks first."""
    import torch

    size, cores, rates = (1 << 20) if asked.tiny else (256 << 20), os.sched_getaffinity(0), []
    for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        here = _cores(node / "cpulist") & cores
        if not here:
            continue
        os.sched_setaffinity(0, here)
        try:
            host = torch.zeros(size, dtype=torch.uint8, pin_memory=asked.on_gpu)
            there = torch.zeros(size, dtype=torch.uint8, device=asked.device)
            synchronize(asked.device)
            started = time.perf_counter()
            for _ in range(8):
                there.copy_(host, non_blocking=True)
            synchronize(asked.device)
            rates.append((node.name, 8 * size / (time.perf_counter() - started) / 1e9))
        finally:
            os.sched_setaffinity(0, cores)
    return rates


def _cores(cpulist: Path) -> set[int]:
    ranges = [part.split("-") for part in cpulist.read_text().strip().split(",") if part]
    return {core for part in ranges for core in range(int(part[0]), int(part[-1]) + 1)}


def _direct_read(asked: Asked) -> float:
    """GB a second from a file into page-locked memory past the page cache, as states on disk come."""
    from hift_ds.store.file_io import page_aligned, read_file, write_file

    buffer = page_aligned((1 << 20) if asked.tiny else (1 << 30), asked.on_gpu)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        file = Path(folder) / "probe"
        checksum = write_file(file, [buffer], True)
        started = time.perf_counter()
        read_file(file, [buffer], True, checksum)
        return buffer.numel() / (time.perf_counter() - started) / 1e9


# -- overlap ----------------------------------------------------------------------------------------------------------


def overlap(asked: Asked) -> Found:
    """Steps of a 7B model with random weights against a bare loop with the same groups."""
    found = Found("overlap")
    size, changes = size_for(asked.device), TINY if asked.tiny else {}
    found.notes.append(f"{size}, random weights{', tiny' if asked.tiny else ''}")
    for batch, length in ((2, 16),) if asked.tiny else ((8, 512), (1, 2048)):
        bare = _seconds_of_bare_loop(asked, size, changes, batch, length)
        found.rows.append({"tokens": f"{batch} x {length}", "states": "bare loop", "seconds": bare})
        for name, state in {
            "device": {"residency": "device"} if asked.tiny else None,
            "host, 1 slot": {"slots": 1},
            "host, 2 slots": {"slots": 2},
            "host, slices of 2^24, 26 slots": {"slice_numel": 1 << 24, "slots": 26},
            "host, slices of 2^24, 2 slots": {"slice_numel": 1 << 24, "slots": 2},
        }.items():
            if state is None:
                continue
            row = _seconds_of_engine(asked, size, changes, batch, length, state)
            row = {"tokens": f"{batch} x {length}", "states": name, "factor": row["seconds"] / bare, **row}
            found.rows.append(row)
            found.require(row["synchronized"] == 0, f"{name}: the device was synchronized {row['synchronized']} times")
            if not asked.on_gpu or asked.tiny:
                continue
            if name not in ("host, 1 slot", "host, slices of 2^24, 2 slots"):
                found.require(
                    row["factor"] <= 1.05, f"{name}, {batch} x {length}: {row['factor']:.3f} of the bare loop"
                )
            elif row["factor"] > 1.05:  # what a slow step says of itself is what it is slower
                slower = row["seconds"] - bare
                found.require(
                    abs(row["waited_s"] - slower) <= max(0.2 * slower, 0.01),
                    f"{name}, {batch} x {length}: {slower:.3f} s slower, but says that it waited {row['waited_s']:.3f}",
                )
        for codec in ("none", "split_master+int8_moments"):
            state = {"slots": 2, **({} if codec == "none" else {"codec": codec})}
            hift = {"update": "in_backward", "group_size": "all"}
            row = _seconds_of_engine(asked, size, changes, batch, length, state, hift)
            found.rows.append({"tokens": f"{batch} x {length}", "states": f"all layers in backward, {codec}", **row})
            found.require(row["synchronized"] == 0, f"in backward: the device was synchronized {row['synchronized']} "
                          "times")  # fmt: skip
    return found


@leaves_no_memory
def _seconds_of_engine(
    asked: Asked,
    size: str,
    changes: dict[str, Any],
    batch: int,
    length: int,
    state: dict[str, Any],
    hift: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The mean step of the second cycle, or of four steps where all layers are one group; for what it says that it
    waited, and which part of that was for the most frequent cause."""
    import torch

    model = llama(size, asked.device, **changes)
    engine = engine_of(model, config_of(state, train_micro_batch_size_per_gpu=batch, hift=hift or {}))
    inputs, num = tokens_of(model, batch, length, asked.device), max(len(engine.groups), 4)
    counted, peak, waits, real = 0, 0, Counter[str](), torch.cuda.synchronize

    def counting(*args: Any, **kwargs: Any) -> None:
        nonlocal counted
        counted += 1
        real(*args, **kwargs)

    try:
        for step in range(2 * num):
            if step == num:
                synchronize(asked.device)
                torch.cuda.synchronize = counting
                started, waits = time.perf_counter(), Counter()
            engine.backward(engine(**inputs).loss)
            engine.step()
            waits.update(engine.last_report.waits)
            peak = max(peak, engine.last_report.peak_bytes)
    finally:
        torch.cuda.synchronize = real
    synchronize(asked.device)
    seconds = (time.perf_counter() - started) / num
    engine.destroy()
    return {
        "seconds": seconds, "waited_s": waits.total() / num, "mostly": ", ".join(c for c, _ in waits.most_common(1)),
        "synchronized": counted, "peak_gib": peak / 2**30,
    }  # fmt: skip


@leaves_no_memory
def _seconds_of_bare_loop(asked: Asked, size: str, changes: dict[str, Any], batch: int, length: int) -> float:
    """Forward, backward, clip and a fused AdamW on fp32 masters, one group a step, one group's states for all."""
    import torch

    from hift_ds.layers.grouping import partition_model

    model = llama(size, asked.device, **changes)
    model.config.use_cache = False
    groups = [[dict(model.named_parameters())[n] for n in g.param_names] for g in partition_model(model).groups]
    inputs, states = tokens_of(model, batch, length, asked.device), {}
    model.requires_grad_(False)
    for step in range(2 * len(groups)):
        if step == len(groups):
            synchronize(asked.device)
            started = time.perf_counter()
        params = groups[step % len(groups)]
        for param in params:
            param.requires_grad_(True)
        model(**inputs).loss.backward()
        key = tuple(param.shape for param in params)
        if key not in states:
            masters = [torch.nn.Parameter(param.detach().float()) for param in params]
            states[key] = masters, torch.optim.AdamW(masters, lr=1e-4, fused=True)
        masters, optimizer = states[key]
        for master, param in zip(masters, params, strict=True):
            master.grad, param.grad = param.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, param in zip(masters, params, strict=True):
            param.data.copy_(master.data)
            master.grad = None
            param.requires_grad_(False)
    synchronize(asked.device)
    return (time.perf_counter() - started) / len(groups)


# -- memory -----------------------------------------------------------------------------------------------------------


def memory(asked: Asked) -> Found:
    """What the estimator counts against the largest allocation of a real step: never below it."""
    from benchmarks.memory_against_allocator import EMBEDDING, HEAD, LOWEST, M106, MIDDLE, case, model_folder
    from hift_ds.errors import ConfigError

    found = Found("memory")
    shape = {"batch": 2, "length": 64} if asked.tiny else {"batch": 8, "length": 512}
    everything = {"activations": {"checkpointing": True, "chunked_loss": True, "offload": True},
                  "state": {"slice_numel": 1 << 21}}  # fmt: skip
    cases = {
        "fp32, embedding": case("fp32", EMBEDDING, **shape),
        "fp32, lowest block, checkpointing": case("fp32", LOWEST, {"activations": {"checkpointing": True}}, **shape),
        "masters, lowest block": case("mixed_hi", LOWEST, **shape),
        "masters, head": case("mixed_hi", HEAD, **shape),
        "masters, all switches": case("mixed_hi", EMBEDDING, everything, **shape),
        "masters, two micro-batches": case("mixed_hi", LOWEST, micro_batches=2, **shape),
        "no masters": case("bf16", LOWEST, **shape),
        "grouped heads": case("mixed_hi", LOWEST, **shape),
        "grouped heads, padded": case("mixed_hi", LOWEST, padded=True, **shape),
        "activations on the host": case("mixed_hi", LOWEST, {"activations": {"offload": True}}, **shape),
        "all layers in backward": case("mixed_hi", 0, {"update": "in_backward", "group_size": "all"}, **shape),
        "weights on the host": _with_weights_on_host(case("mixed_hi", LOWEST, **shape, visits=3)),
    }
    if asked.tiny:
        cases = {name: cases[name] for name in ("fp32, embedding", "grouped heads, padded", "weights on the host")}
    shape = {**M106, **(TINY if asked.tiny else {})}
    with model_folder(**shape) as whole, model_folder(**{**shape, "num_key_value_heads": 1}) as grouped:
        for name, one in cases.items():
            group = min(one.group, 1) if asked.tiny else one.group
            _probe_one(found, name, replace(one.setting, model=grouped if "grouped" in name else whole), group)
    if asked.on_gpu and not asked.tiny:
        one = case("mixed_hi", MIDDLE, batch=8, length=512)
        try:
            row = _probe_one(found, "LLaMA-2-7B", replace(one.setting, model="llama2_7b"), 17)
        except ConfigError as error:  # it has no room here, and says so
            found.notes.append(f"LLaMA-2-7B: left out: {error}")
            return found
        found.require(
            row["reserved_gib"] <= 1.1 * row["measured_gib"], "7B: more than 10 % of what is held is not used"
        )
    return found


# What is counted for an accelerator and is something else on a CPU.
OTHER_ON_CPU = {
    "grouped heads, padded": "its attention with a mask is another kernel, with buffers of its own",
    "weights on the host": "which is the device there, so that the weights are in what is measured",
}


def _probe_one(found: Found, name: str, setting: Any, group: int) -> dict[str, Any]:
    """A row: within 5 %, but for cuBLAS's workspaces, and never below what was measured."""
    from hift_ds.cli.probe import probe
    from hift_ds.forecast.setting import WORKSPACE_BYTES

    answer = probe(setting, group)
    error = answer["predicted_gib"] / answer["measured_gib"] - 1
    row = {"setting": name, **answer, "error": error}
    found.rows.append(row)
    if "reserved_gib" not in answer and name in OTHER_ON_CPU:
        found.notes.append(f"{name}: not judged on a CPU: {OTHER_ON_CPU[name]}")
        return row
    found.require(error >= -0.005, f"{name}: the forecast is {-error:.1%} below what was measured")
    assumed = WORKSPACE_BYTES / 2**30 if "reserved_gib" in answer else 0.0
    found.require(
        answer["predicted_gib"] - assumed <= 1.05 * answer["measured_gib"],
        f"{name}: the forecast is {error:+.1%} above what was measured",
    )
    return row


def _with_weights_on_host(one: Any) -> Any:
    """ZeRO-3 with ``offload_param``."""
    zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}
    config = {**one.setting.engine_config, "zero_optimization": zero}
    return replace(one, setting=replace(one.setting, engine_config=config))


# -- resuming ---------------------------------------------------------------------------------------------------------


def resume(asked: Asked) -> Found:
    """Killed twice at a random moment, with dropout on, and resumed: the weights of the run that was left alone, bit
    for bit."""
    found = Found("resume")
    random.seed(0)
    settings: dict[str, dict[str, Any]] = {
        "host": {},
        "asynchronous saves": {"checkpoint": {"asynchronous": True}},
        "host, codecs": {"state": {"codec": "split_master+int8_moments"}},
        "disk": {"state": {"residency": "disk"}},
        "all layers in backward": {"update": "in_backward", "group_size": "all", "state": {"slots": 2}},
    }
    for name, hift in list(settings.items())[: 2 if asked.tiny else None]:
        with tempfile.TemporaryDirectory() as folder:
            expected, _ = _run_child(asked, hift, Path(folder) / "alone", kill_after=None)
            began = []
            for _ in range(2):
                began.append(_run_child(asked, hift, Path(folder) / "killed", kill_after=random.randrange(2, 5))[1])
            resumed, last = _run_child(asked, hift, Path(folder) / "killed", kill_after=None)
        row = {"states": name, "same bits": resumed == expected, "resumed after steps": f"{began[1]}, {last}"}
        found.rows.append(row)
        found.require(resumed == expected and expected is not None, f"{name}: other weights after two kills")
        found.require(last > 0, f"{name}: it began anew instead of resuming")
    return found


def _run_child(asked: Asked, hift: dict[str, Any], folder: Path, kill_after: int | None) -> tuple[str | None, int]:
    """A run of 12 steps that saves each: its weights' digest, or ``None`` if it was killed, at a random moment within a
    quarter of a second of its ``kill_after``-th step; and the step that it went on from."""
    folder.mkdir(parents=True, exist_ok=True)
    if hift.get("state", {}).get("residency") == "disk":
        hift = {**hift, "state": {**hift["state"], "path": str(folder)}}
    job = json.dumps({"hift": hift, "folder": str(folder), "device": asked.device, "kill_after": kill_after,
                      "delay": random.random() / 4})  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE), "--child", job],
        capture_output=True,
        text=True,
        env=_child_environment(asked),
    )
    began = int(done.stdout.splitlines()[0]) if done.stdout else 0
    if kill_after is not None and done.returncode == -signal.SIGKILL:
        return None, began
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout.splitlines()[-1], began


def _child(job: dict[str, Any]) -> None:
    import torch

    torch.use_deterministic_algorithms(True)
    model = llama("llama2_7b", job["device"], **TINY, attention_dropout=0.1)
    hift = dict(job["hift"])
    engine = engine_of(model, config_of(hift.pop("state", {}), hift=hift))
    out, sys.stdout = sys.stdout, sys.stderr
    if (Path(job["folder"]) / "latest").exists():
        engine.load_checkpoint(job["folder"])
    print(engine.global_steps, file=out, flush=True)
    taken = 0
    while engine.global_steps < 12:
        engine.backward(engine(**tokens_of(model, 1, 16, job["device"], seed=engine.global_steps)).loss)
        engine.step()
        engine.save_checkpoint(job["folder"])
        taken += 1
        if job["kill_after"] == taken:
            threading.Timer(job["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
        if job["kill_after"] is not None and engine.global_steps == 11:
            time.sleep(60)  # until it comes
    engine.wait_for_checkpoint()
    digest = hashlib.sha256()
    for param in model.parameters():
        digest.update(param.detach().float().cpu().numpy().tobytes())
    print(digest.hexdigest(), file=out, flush=True)
    engine.destroy()


def _child_environment(asked: Asked) -> dict[str, str]:
    env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    return env if asked.on_gpu else {**env, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


# -- two ranks --------------------------------------------------------------------------------------------------------


def two_ranks(asked: Asked) -> Found:
    """Stages 0, 2 and 3 on two ranks against one rank with both ranks' rows, with the throughput timer off."""
    found = Found("two_ranks")
    alone = _losses(asked, 1, {"stage": 0})
    settings: dict[str, dict[str, Any]] = {"stage 0": {"stage": 0}, "stage 2": {"stage": 2}, "stage 3": {"stage": 3},
                                           "stage 3, weights on the host": {"stage": 3, "offload": True}}  # fmt: skip
    for name, setting in list(settings.items())[:: 2 if asked.tiny else 1]:
        losses = _losses(asked, 2, setting)
        apart = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
        found.rows.append({"setting": name, "largest difference of a loss": apart})
        found.require(apart <= 1e-3, f"{name}: losses differ by {apart:.2g}")
    return found


def _losses(asked: Asked, world_size: int, setting: dict[str, Any]) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = json.dumps({**setting, "device": asked.device, "ranks": world_size})
    children = [
        subprocess.Popen(
            [sys.executable, str(HERE), "--rank", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**_child_environment(asked), "RANK": str(rank), "LOCAL_RANK": str(rank),
                 "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(world_size)
    ]  # fmt: skip
    return json.loads(_answer_of(children).splitlines()[-1])


def _answer_of(children: list[subprocess.Popen], seconds: float = 900.0) -> str:
    """What the first of them printed, when all have ended well.

    Raises:
        RuntimeError: one has not, whatever the others wait for.
    """
    answers: dict[int, tuple[str, str]] = {}

    def read(rank: int, child: subprocess.Popen) -> None:
        answers[rank] = child.communicate()

    readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in enumerate(children)]
    for reader in readers:
        reader.start()
    try:
        _wait_for(lambda: all(c.poll() is not None for c in children) or any(c.poll() for c in children), seconds)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
        for reader in readers:
            reader.join()
    for rank, code in enumerate(codes):
        if code:
            raise RuntimeError(f"rank {rank} ended with {code}: {answers[rank][1][-2000:]}")
    if None in codes:
        raise RuntimeError(f"rank {codes.index(None)} had no answer within {seconds:.0f} s")
    return answers[0][0]


def _rank(job: dict[str, Any]) -> None:
    import torch

    out, sys.stdout = sys.stdout, sys.stderr
    rank = int(os.environ["RANK"])
    device = "cpu" if job["device"] == "cpu" else f"cuda:{rank}"
    if device != "cpu":
        torch.cuda.set_device(rank)
    offload = {"offload_param": {"device": "cpu", "pin_memory": device != "cpu"}} if job.get("offload") else {}
    model = llama("llama2_7b", device, **TINY).float()
    config = config_of({}, stage=job["stage"], bf16={"enabled": False})
    config["zero_optimization"] |= offload
    config["train_micro_batch_size_per_gpu"] = 2 // job["ranks"]
    engine = engine_of(model, config)
    losses = []
    for step in range(8):
        rows = tokens_of(model, 2, 16, device, seed=step)["input_ids"].chunk(job["ranks"])[rank]
        loss = engine(input_ids=rows, labels=rows).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        if job["ranks"] > 1:
            torch.distributed.all_reduce(mean)
        losses.append(float(mean) / job["ranks"])
    if rank == 0:
        print(json.dumps(losses), file=out, flush=True)
    engine.destroy()


# -- a run ------------------------------------------------------------------------------------------------------------


def run(asked: Asked) -> Found:
    """``hift-ds train`` on a model and data, three cycles with checkpoints, then from a batch that may not fit
    (``auto_find_batch_size``): it ends, exports, and no peak is above its forecast."""
    found = Found("run")
    with _model_and_data(asked) as (model, data):
        if model is None:
            found.notes.append("left out: needs --model and --data")
            return found
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            changes = [{"micro_batch_size": 2 if asked.tiny else 8}, {"micro_batch_size": 2 if asked.tiny else 512,
                                                                        "auto_find_batch_size": True}]  # fmt: skip
            for number, train in enumerate(changes):
                _one_run(asked, found, Path(folder) / f"run{number}", model, data, train)
    return found


def _one_run(asked: Asked, found: Found, out: Path, model: str, data: str, train: dict[str, Any]) -> None:
    file = write_run(out, model, data, asked, **train)
    command = [sys.executable, "-m", "hift_ds", "train", str(file)]
    done = subprocess.run(command, env=_child_environment(asked), cwd=ROOT, capture_output=True, text=True)
    found.require(done.returncode == 0, f"hift-ds train ended with {done.returncode}: {done.stderr[-1500:]}")
    if done.returncode:
        return
    found.require(bool(list(out.glob("model/*.safetensors"))), "nothing was exported")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "group_name" in step]
    seconds = sum(step["step_time_s"] for step in steps[len(steps) // 3 :])
    waited = sum(sum((step.get("waits_s") or {}).values()) for step in steps[len(steps) // 3 :])
    row: dict[str, Any] = {"steps": len(steps), "rows": train["micro_batch_size"], "waited": waited / seconds}
    peaks = [step for step in steps if step.get("forecast_memory_gib") and step.get("peak_memory_gib")]
    if peaks:
        worst = max(peaks, key=lambda step: step["peak_memory_gib"] / step["forecast_memory_gib"])
        row |= {key: worst[key] for key in ("group_name", "peak_memory_gib", "forecast_memory_gib")}
        found.require(worst["peak_memory_gib"] <= 1.05 * worst["forecast_memory_gib"], "a peak is above its forecast")
    found.rows.append(row)


def write_run(out: Path, model: str, data: str, asked: Asked, **train: Any) -> Path:
    """A run file of three cycles."""
    import yaml

    from hift_ds.hf.model_structure import read_config

    cycle = read_config(model).num_hidden_layers + 2
    train = {"output_dir": str(out), "max_steps": 3 * cycle, "save_steps": cycle, "learning_rate": 1e-5, **train}
    length = {"max_length": 128} if asked.tiny else {"max_length": 1024}
    config = {
        "model": {"path": model, "dtype": "bf16"},
        "data": {"train": data, "val_size": 4, **length},
        "train": train,
    }
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@contextlib.contextmanager
def _model_and_data(asked: Asked) -> Iterator[tuple[str | None, str]]:
    """What the command line names; with ``--tiny`` and no model a tiny one with rows to learn."""
    if asked.model is not None and asked.data is not None:
        yield asked.model, asked.data
        return
    if not asked.tiny:
        yield None, ""
        return
    import model_zoo
    from tests.helpers.tiny_tokenizers import byte_level

    with tempfile.TemporaryDirectory() as folder:
        model_zoo.tiny.build("llama", vocab_size=280, max_position_embeddings=256).save_pretrained(folder)
        byte_level().save_pretrained(folder)
        rows = [{"messages": [{"role": "user", "content": f"{i} + 1?"},
                              {"role": "assistant", "content": f"It is {i + 1}."}]} for i in range(44)]  # fmt: skip
        data = Path(folder) / "data.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        yield folder, str(data)


# -- a rank that dies -------------------------------------------------------------------------------------------------


def lost_rank(asked: Asked) -> Found:
    """``kill -9`` to one of two ranks of ``hift-ds train``: the job ends within a minute, and says which rank, in which
    step and group, and what the last good checkpoint is."""
    found = Found("lost_rank")
    with _model_and_data(asked) as (model, data), tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        if model is None:
            found.notes.append("left out: needs --model and --data")
            return found
        out = Path(folder) / "run"
        file = write_run(out, model, data, asked, micro_batch_size=1, max_steps=10_000, save_steps=2)
        job = subprocess.Popen(
            [sys.executable, "-m", "hift_ds", "train", "--num-procs", "2", str(file)], env=_child_environment(asked),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            _wait_for(lambda: any(out.glob("checkpoint-*/trainer_files.json")) or job.poll() is not None, 600)
            victim = _rank_of(job.pid, 1)
            found.require(victim is not None, "no second rank")
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
            started = time.perf_counter()
            said, _ = job.communicate(timeout=120)
            seconds = time.perf_counter() - started
        finally:
            job.kill()
        line = next((line for line in said.splitlines() if "was killed by SIGKILL" in line), "")
        found.rows.append({"seconds until the job ended": seconds, "it said": line})
        found.require(seconds < 60, f"the job took {seconds:.0f} s to end")
        named = all(word in line for word in ("rank 1", "in step", "group", "last good checkpoint"))
        found.require(named, f"rank, step, group or checkpoint is not named: {line or said[-1500:]}")
    return found


def _rank_of(parent: int, rank: int) -> int | None:
    import psutil

    children = psutil.Process(parent).children(recursive=True)
    return next((child.pid for child in children if child.environ().get("RANK") == str(rank)), None)


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


# -- peers side by side -----------------------------------------------------------------------------------------------


PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "hift_ds, states on the host": ("hift", {"state": {}}),
    "hift_ds, states on the device": ("hift", {}),
    "hift_ds, all layers in backward": ("hift", {"state": {}, "update": "in_backward", "group_size": "all"}),
    "full fine-tuning": ("full", {}),
    "ZeRO-Offload": ("zero_offload", {}),
    "LoRA, rank 16": ("lora", {}),
    "BAdam, a block a step": ("badam", {"switch_block_every": 1}),
}


def peers(asked: Asked) -> Found:
    """Seconds of a step and the highest allocation of each way of training, side by side, each in a process of its own.
    What is not installed, or does not fit, is left out with a line."""
    found = Found("peers", notes=[f"{size_for(asked.device)}, random weights{', tiny' if asked.tiny else ''}"])
    for name, (method, settings) in PEERS.items():
        job = json.dumps({"method": method, "settings": settings, "device": asked.device, "tiny": asked.tiny})
        try:
            done = subprocess.run([sys.executable, str(HERE), "--peer", job], env=_child_environment(asked),
                                  capture_output=True, text=True, timeout=1800)  # fmt: skip
        except subprocess.TimeoutExpired:
            found.notes.append(f"{name}: left out: no answer within 30 minutes")
            continue
        if done.returncode == 0:
            found.rows.append({"method": name, **json.loads(done.stdout.splitlines()[-1])})
        else:
            why = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            found.notes.append(f"{name}: left out: {why[0][:200] if why else done.returncode}")
    found.require(any("hift_ds" in row["method"] for row in found.rows), "ours did not run")
    return found


def _peer(job: dict[str, Any]) -> None:
    import resource

    import torch

    out, sys.stdout = sys.stdout, sys.stderr
    model = llama(size_for(job["device"]), job["device"], **(TINY if job["tiny"] else {})).train()
    model.config.use_cache = False
    inputs = tokens_of(model, *((2, 16) if job["tiny"] else (8, 512)), job["device"])
    cycle = model.config.num_hidden_layers + 2
    if job["method"] == "zero_offload":
        step = _zero_offload(model, job)
    else:
        from benchmarks.methods.methods import build

        method = build(job["method"], model, 0, lambda step: 1e-5, job["settings"])
        step = lambda: method.step(inputs)  # noqa: E731
    num = cycle if job["method"] in ("hift", "badam") and job["settings"].get("group_size") != "all" else 4
    on_gpu, peak = job["device"] != "cpu", 0
    for number in range(2 * num):
        if number == num:
            synchronize(job["device"])
            started = time.perf_counter()
        step() if job["method"] != "zero_offload" else step(inputs)
        if on_gpu:  # each time: our engine begins to count anew in every step
            peak = max(peak, torch.cuda.max_memory_allocated())
    synchronize(job["device"])
    seconds = (time.perf_counter() - started) / num
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds a step": seconds, "peak, GiB": peak / 2**30, "host, GiB": host / 2**30}), file=out,
          flush=True)  # fmt: skip


def _zero_offload(model: Any, job: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """DeepSpeed's stage 2 with optimizer states and updates on the host."""
    import deepspeed

    from hift_ds.process_group import as_single_process, nothing_compiled
    from hift_ds.store.machine import host_bytes

    # Masters, moments and gradients in fp32, some of it rounded up to powers of two.
    needed, there = 20 * sum(param.numel() for param in model.parameters()), host_bytes().available
    if needed > there:
        sys.exit(f"needs about {needed / 2**30:.0f} GiB of host memory, {there / 2**30:.0f} are free")
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": job["device"] != "cpu"}},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": job["tiny"]}},
        "zero_force_ds_cpu_optimizer": not job["tiny"],  # DeepSpeed's own compiles
    }  # fmt: skip
    with as_single_process(), nothing_compiled():  # else DeepSpeed asks MPI, and on a CPU compiles an operator
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)

    def step(inputs: dict[str, Any]) -> None:
        engine.backward(engine(**inputs).loss)
        engine.step()

    return step


# -- the tests, and the demo ------------------------------------------------------------------------------------------


LOOKS_EVERY_S = 5.0  # at who is on the GPU


def suite(asked: Asked) -> Found:
    """``make test``: as on a machine without a GPU, and no process of it on the GPU."""
    found = Found("suite")
    some = (
        ["tests/unit/test_schedule.py", "-p", "no:cacheprovider"] if asked.tiny else ["-n", "3", "--dist", "loadfile"]
    )
    # In a container this process may be there under another number, and others' too.
    before, seen = _processes_on_gpu() if asked.on_gpu else set(), set[str]()
    job = subprocess.Popen([sys.executable, "-m", "pytest", "-q", *some], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while True:
        try:
            said, _ = job.communicate(timeout=LOOKS_EVERY_S)
            break
        except subprocess.TimeoutExpired:
            seen |= _processes_on_gpu() - before if asked.on_gpu else set()
    found.rows.append({"pytest": said.strip().splitlines()[-1] if said.strip() else "", "on the GPU": len(seen)})
    found.require(job.returncode == 0, f"make test: {said[-1500:]}")
    found.require(not seen, f"processes {sorted(seen)} were on the GPU")
    return found


def _processes_on_gpu() -> set[str]:
    done = subprocess.run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True,
                          text=True)  # fmt: skip
    return set(done.stdout.split())


def gpu_tests(asked: Asked) -> Found:
    """``make test-gpu``, and again with torch's sanitizer of streams. Without a GPU: all are skipped, none breaks."""
    found = Found("gpu_tests")
    env = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_SANITIZER"}
    for sanitizer in ("off", "on") if asked.on_gpu else ("off",):
        if sanitizer == "on":  # torch looks whether there is such a variable, not for what it says
            env["TORCH_CUDA_SANITIZER"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]
        found.rows.append({"sanitizer": sanitizer, "pytest": last})
        found.require(done.returncode == 0, f"make test-gpu: {done.stdout[-1500:]}")
        found.require("CSAN detected" not in done.stdout + done.stderr, "the sanitizer reports a race")
        if not asked.on_gpu:
            found.require("skipped" in last and "passed" not in last, f"without a GPU: {last}")
    return found


def demo(asked: Asked) -> Found:
    """``make demo``: three minutes, the held-out loss falls, every parameter moves, the export loads. (It downloads a
    model; on a CPU it takes longer and is left out.)"""
    found = Found("demo")
    if not asked.on_gpu:
        found.notes.append("left out on a CPU: tests/unit/test_demo_data.py and `make demo-short` stand for it")
        return found
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "examples.demo"], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    found.rows.append({"seconds": seconds, "it said": done.stdout.strip().splitlines()[-1] if done.stdout else ""})
    found.require(done.returncode == 0, f"make demo: {done.stderr[-1500:]}")
    found.require(seconds <= 180, f"make demo took {seconds:.0f} s")
    return found


CHECKS: dict[str, Callable[[Asked], Found]] = {
    check.__name__: check
    for check in (link, suite, gpu_tests, races, demo, overlap, memory, resume, two_ranks, run, lost_rank, peers)
}
BY_DEFAULT = ("link", "races", "overlap", "memory", "resume", "peers")


def table(results: list[Found], machine: str) -> str:
    lines = [
        "# Validation on an accelerator",
        "",
        f"Measured by `benchmarks/gpu/validate.py` on {machine}.",
        "",
        f"Passed: {', '.join(f.name for f in results if not f.failures) or 'none'}. "
        f"Failed: {', '.join(f.name for f in results if f.failures) or 'none'}. What each does and asks for: "
        "docs/gpu_validation.md.",
        "",
    ]
    for found in results:
        lines += [f"## {found.name}: {'FAIL' if found.failures else 'PASS'} ({found.seconds:.0f} s)", ""]
        lines += [f"- {text}" for text in (*found.failures, *found.notes)]
        if found.rows:
            keys = list(dict.fromkeys(key for row in found.rows for key in row))
            lines += ["", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            lines += ["| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in found.rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine_of(device: str) -> str:
    import platform

    import torch

    from hift_ds.version import __version__

    commit = ""
    with contextlib.suppress(OSError):  # no git
        asks = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asks, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with_ = f"torch {torch.__version__}, hift_ds {__version__} {commit}".strip()
    if device == "cpu":
        return f"a CPU ({platform.machine()}), {with_}: says nothing about speed"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {with_}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}; default: {', '.join(BY_DEFAULT)}")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--model", help="folder or hub name, for run")
    parser.add_argument("--data", help="file of rows, for run")
    parser.add_argument("--out", type=Path, default=Path("gpu_validation"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for job, work in ((args.child, _child), (args.rank, _rank), (args.peer, _peer)):
        if job is not None:
            work(job)
            return 0
    unknown = [name for name in args.checks if name not in CHECKS]
    if unknown:
        parser.error(f"no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    if args.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny shows that the checks themselves work")
    asked = Asked(args.device, args.tiny, args.model, args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    machine = machine_of(args.device) + (", tiny shapes" if args.tiny else "")
    results, names = earlier_results(args.out / "results.jsonl", machine), args.checks or BY_DEFAULT
    for name in names:
        started = time.perf_counter()
        try:
            found = CHECKS[name](asked)
        except Exception as error:  # one that breaks must not cost the others
            found = Found(name, failures=[f"{type(error).__name__}: {error}"])
        found.seconds = time.perf_counter() - started
        results.pop(name, None)
        results[name] = found
        print(f"{'FAIL' if found.failures else 'PASS'} {name}", file=sys.stderr, flush=True)
        line = json.dumps({**found.__dict__, "machine": machine})
        print(line, flush=True)
        with (args.out / "results.jsonl").open("a") as lines:
            lines.write(line + "\n")
        (args.out / "results.md").write_text(table(list(results.values()), machine))
    return 1 if any(results[name].failures for name in names) else 0


def earlier_results(file: Path, machine: str) -> dict[str, Found]:
    """What earlier commands have found on this machine, by check: the page's commands make one table together."""
    found: dict[str, Found] = {}
    for line in file.read_text().splitlines() if file.is_file() else []:
        result = json.loads(line)
        found.pop(result["name"], None)
        if result.pop("machine", None) == machine:
            found[result["name"]] = Found(**result)
    return found


if __name__ == "__main__":
    raise SystemExit(main())
