"""Hugging Face folders into shards and out of them: the same model as by ``from_pretrained``, never whole in memory."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

import hift_ds
from hift_ds.engine.zero3.export import export_partitioned
from hift_ds.engine.zero3.shards import is_partitioned, whole_of
from hift_ds.errors import CheckpointError, ConfigError
from model_zoo import tiny
from tests.helpers.distributed import run_distributed
from tests.helpers.engines import ds_config, make_engine

pytestmark = pytest.mark.distributed

BF16 = {"bf16": {"enabled": True}}


def zero(folder: Path, where: str) -> dict[str, Any]:
    block: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if where != "accelerator":
        path = {"nvme_path": str(folder / "weights")} if where == "nvme" else {}
        block["offload_param"] = {"device": where, **path}
    return block


def masters_of(engine: Any) -> dict[tuple[str, int], torch.Tensor]:
    """fp32 masters by (parameter, first element)."""
    optimizer, found = engine.optimizer, {}
    for group in optimizer.groups.values():
        for chunk in group.chunks:
            tensors = optimizer.states.store_of(group).read(chunk.id)
            for piece, record in zip(chunk.pieces, optimizer.states.records[chunk.id], strict=True):
                if record.master is not None:
                    found[group.members[piece.member].name, piece.start] = record.master.view(tensors).clone()
    return found


def train(engines: list[Any], rank: int, world_size: int, steps: int = 6) -> list[tuple[float, ...]]:
    generator, losses = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        ids = torch.randint(3, 67, (2 * world_size, 9), generator=generator)[rank::world_size].contiguous()
        step = []
        for engine in engines:
            engine.train()
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            step.append(float(loss.detach()))
        losses.append(tuple(step))
    return losses


def loads_like_from_pretrained(folder: Path, family: str, where: str, low: bool, optimizer: str = "AdamW") -> list[str]:
    """Weights, buffers and masters equal those of a replicated engine over ``from_pretrained``; so do six steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # torch's grouped product wants even sizes.
    more = {"experts_implementation": "eager"} if family == "mixtral" else {}
    config = ds_config(
        lr=1e-3, world_size=world_size, rows=2 * world_size, optimizer=optimizer, **(BF16 if low else {})
    )
    partitioned = {**config, "zero_optimization": zero(folder, where)}
    model = hift_ds.load_partitioned(folder / family, partitioned, **more)
    assert all(is_partitioned(p) and p.numel() == 0 for p in model.parameters())
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32, **more)
    if model.generation_config.to_dict() != twin.generation_config.to_dict():
        return [f"{family}: generation config"]
    engines = [make_engine(model, partitioned), make_engine(twin, config)]
    name = f"{family}, {where}, {'bf16' if low else 'fp32'}"
    errors = [f"{name}: {key}" for key, value in twin.named_buffers() if not torch.equal(value, model.get_buffer(key))]
    masters, expected = map(masters_of, engines)
    # Made of several tensors: rounded before they are masters.
    fused = [key for key in masters if "experts" in key[0]]
    for key in masters.keys() - set(fused):
        if not torch.equal(masters[key], expected.get(key, masters[key])):
            errors.append(f"{name}: master of {key}")
    tolerance = 1e-2 if low and fused else 2e-6
    losses = train(engines, rank, world_size)
    if any(abs(a - b) > tolerance for a, b in losses):
        errors.append(f"{name}: losses {losses}")
    trained = dict(twin.named_parameters())
    for key, param in model.named_parameters():
        if (whole_of(param).float() - trained[key].float()).abs().max() > tolerance:
            errors.append(f"{name}: {key} after training")
    for engine in engines:
        engine.destroy()
    return errors


def exports_what_transformers_loads(folder: Path, family: str) -> list[str]:
    """In several files, with the names and the tie of the input; and an export that fails does so on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = ds_config(lr=1e-2, world_size=world_size, rows=2 * world_size)
    config["zero_optimization"] = zero(folder, "accelerator")
    model = hift_ds.load_partitioned(folder / family, config)
    engine = make_engine(model, config)
    train([engine], rank, world_size, steps=3)
    out = folder / f"{family}-out"
    files = export_partitioned(model, out, max_shard_size="20KB")
    weights = {name: whole_of(param).clone() for name, param in model.named_parameters()}
    errors = []
    if rank == 0:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
        errors += [f"{family}: {n} exported" for n, p in loaded.named_parameters() if not torch.equal(p, weights[n])]
        names = [set().union(*(load_file(f) for f in path.glob("*.safetensors"))) for path in (out, folder / family)]
        errors += [] if names[0] == names[1] else [f"{family}: names {names[0] ^ names[1]}"]
        errors += [] if len(files) > 1 else [f"{family}: one file only"]
    elif files:
        errors.append(f"{family}: rank {rank} says it wrote {files}")
    for out_dir, size in ((folder / family / "config.json", "5GB"), (out, "five")):
        try:
            export_partitioned(model, out_dir, max_shard_size=size)
            errors.append(f"{family}: exported to {out_dir} in files of {size}")
        except (CheckpointError, ConfigError):
            pass
    engine.destroy()
    return errors


def refuses_what_is_wrong(folder: Path) -> list[str]:
    """The same on every rank, so that none waits for another."""
    config = ds_config(world_size=dist.get_world_size())
    config["zero_optimization"] = zero(folder, "accelerator")
    errors = []
    for name, expected in (
        ("lacking", "lacks 1 weights"),
        ("unknown", "has no place"),
        ("untied", "the model ties them"),
    ):
        try:
            hift_ds.load_partitioned(folder / name, config)
            errors.append(f"{name} was loaded")
        except CheckpointError as error:
            errors += [] if expected in str(error) else [f"{name}: {error}"]
    try:
        hift_ds.load_partitioned(folder / "llama", {**config, "zero_optimization": {"stage": 2}})
        errors.append("stage 2 was accepted")
    except ConfigError as error:
        errors += [] if "must be 3" in str(error) else [str(error)]
    return errors


def all_cases(folder: str) -> list[str]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = Path(folder)
    errors = loads_like_from_pretrained(path, "llama", "nvme", low=True)
    if dist.get_world_size() == 1:
        return errors
    errors += loads_like_from_pretrained(path, "llama", "accelerator", low=False)
    errors += loads_like_from_pretrained(path, "gpt2", "cpu", low=True)
    errors += loads_like_from_pretrained(path, "gpt2", "nvme", low=False, optimizer="Adafactor")
    errors += loads_like_from_pretrained(path, "gemma2", "accelerator", low=True)
    errors += loads_like_from_pretrained(path, "mixtral", "cpu", low=False)
    errors += loads_like_from_pretrained(path, "mixtral", "nvme", low=True)
    errors += exports_what_transformers_loads(path, "gpt2")
    errors += exports_what_transformers_loads(path, "mixtral")
    return errors + refuses_what_is_wrong(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Tiny models in several files each, and broken copies of them."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "gemma2", "mixtral"):
        tiny.build(family, seed=3).save_pretrained(folder / family, max_shard_size="20KB")
    whole = folder / "whole"
    tiny.build("llama", seed=3).save_pretrained(whole)
    weights = load_file(whole / "model.safetensors")
    for name, changed in (
        ("lacking", {k: v for k, v in weights.items() if not k.endswith("layers.1.mlp.up_proj.weight")}),
        ("unknown", {**weights, "model.extra.weight": torch.ones(3)}),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text((whole / "config.json").read_text())
        save_file(changed, folder / name / "model.safetensors", metadata={"format": "pt"})
    untied = folder / "untied"
    untied.mkdir()
    entries = json.loads((whole / "config.json").read_text()) | {"tie_word_embeddings": True}
    (untied / "config.json").write_text(json.dumps(entries))
    save_file(weights, untied / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("world_size", [1, 2])
def test_folders_in_and_out(models, world_size):
    for rank, errors in enumerate(run_distributed(all_cases, world_size, str(models))):
        assert not errors, f"rank {rank}: " + "\n".join(errors)


# -- memory ---------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory in use by this process that is not a mapped file.

    What has been freed is given back first: glibc keeps up to twice the largest block that was ever freed on top of its
    heap (here 16 MiB, two gradients of the embeddings), or not, as the order of the heap's blocks happens to be.
    """
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def trains_without_holding_the_model(folder: str) -> tuple[int, int]:
    """(bytes of all weights, most memory of our own in use at the end of any phase)."""
    # No states and no masters: what is measured are the weights.
    config = ds_config(lr=1e-3, rows=1, optimizer="SGD", hift={"master_weights": False}, **BF16)
    config["zero_optimization"] = zero(Path(folder), "nvme")
    make_engine(
        transformers.LlamaForCausalLM(tiny.config("llama")), {**config, "zero_optimization": {"stage": 0}}
    ).destroy()
    before, used = anonymous_bytes(), []  # what Python's modules take is in memory already
    model = hift_ds.load_partitioned(f"{folder}/large", config)
    used.append(anonymous_bytes() - before)
    engine = make_engine(model, config)
    ids = torch.arange(8).view(1, 8)
    for _ in range(3):
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        del loss
        used.append(anonymous_bytes() - before)
    num_bytes = sum(p.ds_numel * p.element_size() for p in model.parameters())
    engine.destroy()
    return num_bytes, max(used)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_one_rank_trains_a_model_that_it_never_holds(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=24, num_attention_heads=8, vocab_size=4000
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    weights = {name: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for name, p in model.named_parameters()}
    (tmp_path / "large").mkdir()
    save_file(weights, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path / "large")
    (num_bytes, used) = run_distributed(trains_without_holding_the_model, 1, str(tmp_path))[0]
    assert num_bytes > 150e6
    assert used < 0.3 * num_bytes, f"{used:,} bytes of memory for {num_bytes:,} bytes of weights"
