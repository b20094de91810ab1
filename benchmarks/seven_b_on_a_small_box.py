"""Full-parameter steps of a 7B model on a machine with 24 GiB of memory and no GPU.

    python benchmarks/seven_b_on_a_small_box.py --path /scratch                 LLaMA-2-7B's shape
    python benchmarks/seven_b_on_a_small_box.py --path /scratch --model 135m    minutes, to see that it works

The model has LLaMA's shape and random weights. They are written as safetensors, tensor by tensor, and mapped
from there, so that only what an update has changed is in anonymous memory. Masters and moments of all layer
groups are on disk. The steps visit groups at the bottom, in the middle and at the top, each twice: the first
visit makes its states, the second reads them back. Then one checkpoint: all weights, and the states of the
visited groups.

Looks first whether memory and disk suffice, and says what is missing. Writes
benchmarks/results/seven_b_on_a_small_box.md (``--out``) and removes what it put under ``--path``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "seven_b_on_a_small_box.md"
MODELS = {"tiny": "tiny", "135m": "smollm2_135m", "1b": "tinyllama_1_1b", "7b": "llama2_7b"}
BYTES_A_PARAMETER = {  # of state, with AdamW and bf16 weights
    "fp32": 12.0, "split_master": 10.0, "split_master+bf16_moments": 6.0, "split_master+int8_moments": 4.04,
}  # fmt: skip
GB, GIB = 1e9, 2**30


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--path", type=Path, required=True, help="folder on a local disk, for weights, states, checkpoint"
    )
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--tokens", type=int, default=128, help="of one step, one sequence")
    parser.add_argument("--codec", choices=BYTES_A_PARAMETER, default="split_master+int8_moments")
    parser.add_argument("--slots", type=int, choices=(1, 2), default=1)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = model_config(MODELS[args.model])
    shapes = tensor_shapes(config)
    if missing := what_is_missing(args, shapes):
        print("\n".join(missing), file=sys.stderr)
        return 1
    args.path.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="hift-small-box-", dir=args.path) as scratch,
        MemoryWatch() as memory,
    ):
        started = time.perf_counter()
        write_random_weights(Path(scratch) / "model", config, shapes)
        print(f"weights written: {time.perf_counter() - started:.0f} s", flush=True)
        result = train(args, Path(scratch), memory)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report(args, result, memory))
    print(args.out.read_text())
    return 0


# -- before ------------------------------------------------------------------------------------------------


def model_config(name: str) -> Any:
    from transformers import AutoConfig

    from model_zoo import FAMILIES

    llama = FAMILIES["llama"]
    entries = llama.tiny if name == "tiny" else llama.sizes[name]
    return AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"], **entries)


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """By name, tied weights once."""
    from hift_ds.hf.model_structure import build_on_meta

    return {name: tuple(param.shape) for name, param in build_on_meta(config).named_parameters()}


def what_is_missing(args: argparse.Namespace, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """One line for memory and one for the disk, if there is too little."""
    from hift_ds.store.machine import disk_bytes_free, host_bytes

    numel = sum(numel_of(shape) for shape in shapes.values())
    largest = max(group_numels(shapes))
    # Anonymous memory: slots in compact form, the decoded states of one group, its fp32 gradient in parts and
    # in bf16, the changed weights of the visited groups, and 2 GiB for Python, torch and activations.
    memory = largest * (args.slots * BYTES_A_PARAMETER[args.codec] + 12 + 2) + 4 * largest * 2 + 2 * GIB
    disk = numel * (2 + BYTES_A_PARAMETER[args.codec] + 2) + 4 * largest * 12
    missing = []
    if (found := host_bytes().available) < memory:
        missing.append(
            f"memory: {memory / GIB:.1f} GiB needed, {found / GIB:.1f} GiB available; end other programs, or "
            "take a smaller --model"
        )
    if (found := disk_bytes_free(args.path)) < disk:
        missing.append(
            f"disk: {disk / GB:.1f} GB needed at {args.path} (weights, states, one checkpoint), "
            f"{found / GB:.1f} GB free; give another --path or a more compact --codec"
        )
    return missing


def numel_of(shape: tuple[int, ...]) -> int:
    numel = 1
    for length in shape:
        numel *= length
    return numel


def group_numels(shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Of each block, and of everything else as if it were one group each."""
    groups: dict[str, int] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        key = ".".join(parts[:3]) if "layers" in parts else name
        groups[key] = groups.get(key, 0) + numel_of(shape)
    return list(groups.values())


def write_random_weights(folder: Path, config: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """A Hugging Face folder, one file per block; memory holds one file's tensors."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        files.setdefault(parts[2] if "layers" in parts else name, []).append(name)
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: random_weight(shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    size = 2 * sum(numel_of(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_weight(shape: tuple[int, ...], generator: Any) -> Any:
    """Norms are 1, matrices N(0, 0.02), as a new model's."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)


# -- training ----------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, scratch: Path, memory: MemoryWatch) -> dict[str, Any]:
    import torch

    import hift_ds
    from hift_ds.hf.safetensors_folder import load_pretrained

    model = load_pretrained(scratch / "model")
    state = {"residency": "disk", "path": str(scratch / "states"), "slots": args.slots, "codec": args.codec}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "hift": {"state": state},
    }
    engine = hift_ds.initialize(model=model, config=config)[0]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (1, args.tokens), generator=generator).to(engine.device)
    steps = []
    for index in visits(len(engine.groups)):
        go_to(engine, index)
        started = time.perf_counter()
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        seconds, done = time.perf_counter() - started, engine.last_report
        moved = done.state_bytes_in + done.state_bytes_out
        step = {"group": done.group_name, "loss": float(loss.detach()), "grad_norm": done.grad_norm}
        steps.append({**step, "seconds": seconds, "stalled": done.stalled_s, "moved": moved})
        print(f"{done.group_name}: loss {steps[-1]['loss']:.4f}, {seconds:.1f} s, "
              f"{memory.anonymous_now() / GIB:.1f} GiB anonymous", flush=True)  # fmt: skip
    memory.mark("steps")
    started = time.perf_counter()
    assert engine.save_checkpoint(scratch / "checkpoint", tag="touched")
    result = {
        "numel": sum(param.numel() for param in model.parameters()),
        "groups": len(engine.groups),
        "state_bytes": engine.optimizer.store.total_bytes(),
        "steps": steps,
        "save_s": time.perf_counter() - started,
        "checkpoint_bytes": sum(file.stat().st_size for file in (scratch / "checkpoint").rglob("*") if file.is_file()),
    }
    memory.mark("checkpoint")
    engine.destroy()
    return result


def visits(num_groups: int) -> Iterator[int]:
    """Bottom, middle and top, twice."""
    for _ in range(2):
        yield from sorted({0, num_groups // 2, num_groups - 1})


def go_to(engine: Any, index: int) -> None:
    """Make ``index`` the active group, wherever the schedule stands: the run need not last a whole cycle."""
    from hift_ds.schedule import Cursor

    schedule = engine.schedule
    schedule.cursor = Cursor(schedule.cursor.cycle, schedule.order_of_cycle.index(index), 0)
    engine.optimizer.activate()
    engine.optimizer.store.prefetch(engine.optimizer.groups[index].chunks[0].id)


class MemoryWatch:
    """This process's peaks of resident memory, sampled: anonymous, and with the mapped weights that the
    kernel may drop at any time."""

    def __init__(self) -> None:
        self.peak = {"RssAnon": 0, "VmRSS": 0}
        self.marks: dict[str, dict[str, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def anonymous_now(self) -> int:
        return self._read()["RssAnon"]

    def mark(self, name: str) -> None:
        """The peaks up to here."""
        self._sample()
        self.marks[name] = dict(self.peak)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._sample()

    def _sample(self) -> None:
        for key, value in self._read().items():
            self.peak[key] = max(self.peak[key], value)

    def _read(self) -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        return {key: int(fields[key].split()[0]) * 1024 for key in self.peak}


# -- the page ----------------------------------------------------------------------------------------------


def report(args: argparse.Namespace, result: dict[str, Any], memory: MemoryWatch) -> str:
    import torch

    from hift_ds.store.machine import host_bytes

    lines = [
        "# Full-parameter steps of a 7B model on a small machine" if args.model == "7b" else f"# Steps of {args.model}",
        "",
        f"`python benchmarks/seven_b_on_a_small_box.py --path PATH --model {args.model} "
        f"--tokens {args.tokens} --codec {args.codec} --slots {args.slots}`",
        "",
        f"LLaMA shape `{MODELS[args.model]}`: {result['numel'] / 1e6:,.0f}M random parameters in bf16, "
        f"mapped from safetensors; {result['groups']} layer groups, AdamW with fp32 masters, "
        f"{result['state_bytes'] / GB:.1f} GB of states "
        f"on disk if all groups were visited ({args.codec}).",
        f"{os.cpu_count()} cores, {host_bytes().total / GIB:.0f} GiB, no GPU, "
        f"{torch.get_num_threads()} compute threads, torch {torch.__version__}; "
        f"load average at the end {os.getloadavg()[0]:.1f}." + (f" {args.note}" if args.note else ""),
        "",
        "| group | loss | gradient norm | s | of which waited for states | states moved |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['group']} | {s['loss']:.4f} | {s['grad_norm']:.3f} | {s['seconds']:.1f} | "
        f"{s['stalled']:.2f} | {s['moved'] / GB:.2f} GB |"
        for s in result["steps"]
    ]
    peaks = memory.marks
    lines += [
        "",
        f"Peak resident memory of the steps: {peaks['steps']['RssAnon'] / GIB:.1f} GiB anonymous, "
        f"{peaks['steps']['VmRSS'] / GIB:.1f} GiB with the pages of the mapped weights, which the "
        f"kernel drops when it needs room. With the checkpoint: "
        f"{peaks['checkpoint']['RssAnon'] / GIB:.1f} and {peaks['checkpoint']['VmRSS'] / GIB:.1f} GiB.",
        "",
        f"Checkpoint (all weights, states of the visited groups): {result['checkpoint_bytes'] / GB:.1f} GB "
        f"in {result['save_s']:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
