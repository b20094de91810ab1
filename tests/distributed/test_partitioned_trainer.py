"""The Trainer and the run file under ZeRO-3 on two ranks: the same run as with replicated weights; save, resume,
generate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
import yaml
from safetensors.torch import load_file

import model_zoo
from hift_ds.engine.zero3.shards import is_partitioned, whole_of
from hift_ds.errors import ConfigError
from hift_ds.integrations.transformers import HiFTMixin, HiFTTrainer
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_tokenizers import byte_level
from tests.helpers.trainer import AUTO, arguments, ragged_dataset

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 20}


class HiFTSeq2SeqTrainer(HiFTMixin, transformers.Seq2SeqTrainer):
    pass


def trainer_for(folder: Path, zero: dict[str, Any], load_from: Path | None = None) -> HiFTTrainer:
    args = arguments(
        folder, {**AUTO, "zero_optimization": zero}, max_steps=9, learning_rate=1e-3, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=5, eval_on_start=True,
    )  # fmt: skip
    if load_from is None:
        model = model_zoo.tiny.build("llama", seed=3)
    else:  # transformers makes it under deepspeed.zero.Init, because the arguments say so
        model = transformers.AutoModelForCausalLM.from_pretrained(load_from)
        assert all(is_partitioned(param) for param in model.parameters())
    return HiFTTrainer(model=model, args=args, train_dataset=ragged_dataset(24), eval_dataset=ragged_dataset(6, seed=9))


def run_trainer(
    folder: Path, zero: dict[str, Any], load_from: Path | None = None, resume: Path | None = None
) -> dict[str, Any]:
    trainer = trainer_for(folder, zero, load_from)
    if load_from is not None:
        with pytest.raises(ConfigError, match="eval_on_start"):
            trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    ids = torch.arange(3, 7).view(1, 4)
    num_new = 4 + 3 * dist.get_rank()  # the rank that is done first must go on gathering for the other
    found = {
        "losses": [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history],
        "predictions": torch.as_tensor(trainer.predict(ragged_dataset(5, seed=9)).predictions),
        "text": trainer.model.generate(
            ids,
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        ).tolist(),
        "weights": {
            name: (whole_of(param) if is_partitioned(param) else param.detach()).clone()
            for name, param in trainer.model.named_parameters()
        },
    }
    trainer.save_model(str(folder / "saved"))
    trainer.engine.destroy()
    if dist.get_rank() == 0:
        written = load_file(folder / "saved" / "model.safetensors")
        assert written.keys() == found["weights"].keys()
        assert all(torch.equal(written[name], value) for name, value in found["weights"].items())
        assert (folder / "saved" / "config.json").exists() and (folder / "saved" / "training_args.bin").exists()
        if resume is None:  # one file with two names, gathered for neither
            checkpoint = folder / "checkpoint-5"
            assert (checkpoint / "model.safetensors").samefile(checkpoint / "global_step5" / "model.safetensors")
            assert (checkpoint / "config.json").exists() and (checkpoint / "generation_config.json").exists()
    return found


def trainer_cases(folder: Path) -> list[str]:
    model_folder = folder / "model"
    if dist.get_rank() == 0:
        model_zoo.tiny.build("llama", seed=3).save_pretrained(model_folder)
    dist.barrier()
    expected = run_trainer(folder / "replicated", {"stage": 0})
    runs = {
        "partitioned": run_trainer(
            folder / "partitioned", {**ZERO3, "stage3_gather_16bit_weights_on_model_save": True}
        ),
        "from_pretrained": run_trainer(folder / "loaded", ZERO3, load_from=model_folder),
    }
    errors = []
    for name, found in runs.items():
        if found["losses"] != pytest.approx(expected["losses"], abs=2e-6):
            errors.append(f"{name}: losses {found['losses']}, expected {expected['losses']}")
        if found["text"] != expected["text"]:
            errors.append(f"{name}: generated {found['text']}, expected {expected['text']}")
        if (found["predictions"] - expected["predictions"]).abs().max() > 1e-5:
            errors.append(f"{name}: predictions")
        errors += [
            f"{name}: {key}"
            for key, value in expected["weights"].items()
            if (found["weights"][key] - value).abs().max() > 5e-6
        ]
    resumed = run_trainer(folder / "resumed", ZERO3, resume=folder / "partitioned" / "checkpoint-5")
    same = {
        name: torch.equal(value, resumed["weights"][name]) for name, value in runs["partitioned"]["weights"].items()
    }
    return errors + [f"resumed: {name}" for name, equal in same.items() if not equal]


def evaluate_by_generating(folder: Path) -> list[str]:
    """Seq2SeqTrainer with predict_with_generate, which runs the encoder alone, between steps of any layer group."""
    results = []
    for zero in ({"stage": 0}, ZERO3):
        model = model_zoo.tiny.build("t5", seed=3)
        rows = [{k: v[0] for k, v in model_zoo.tiny.batch(model, rows=1, seed=seed).items()} for seed in range(8)]
        args = arguments(
            folder / str(zero["stage"]), {**AUTO, "zero_optimization": zero}, cls=transformers.Seq2SeqTrainingArguments,
            max_steps=15, learning_rate=1e-2, predict_with_generate=True, generation_max_length=6,
            eval_strategy="steps", eval_steps=1,
        )  # fmt: skip
        trainer = HiFTSeq2SeqTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        losses = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
        results.append((losses, trainer.predict(rows[:3]).predictions.tolist()))
        trainer.engine.destroy()
    (losses, texts), (losses3, texts3) = results
    errors = [] if losses3 == pytest.approx(losses, abs=2e-6) else [f"seq2seq: losses {losses3}, expected {losses}"]
    return errors + ([] if texts == texts3 else [f"seq2seq: generated {texts3}, expected {texts}"])


# -- the run file ---------------------------------------------------------------------------------------------------


def write_run(folder: Path, name: str, preset: str, **train: Any) -> Path:
    run = {
        "model": {"path": str(folder / "input")},
        "data": {"train": str(folder / "data.jsonl"), "val_size": 4, "max_length": 128},
        "train": {
            "output_dir": str(folder / name), "max_steps": 6, "micro_batch_size": 2, "global_batch_size": 8,
            "learning_rate": 1e-2, "eval_steps": 3, "save_steps": 3, **train,
        },
        "deepspeed": str(ROOT / "ds_configs" / f"{preset}.json"),
    }  # fmt: skip
    file = folder / f"{name}-{dist.get_rank()}.yaml"
    file.write_text(yaml.safe_dump(run))
    return file


def run_file_cases(folder: Path) -> list[str]:
    """Each preset gives the losses of the replicated one, and a folder that transformers loads; one is interrupted."""
    from hift_ds.train.finetune import finetune
    from hift_ds.train.run_config import load_run_config

    os.chdir(folder)  # the disk preset puts its files there
    rank, results, errors = dist.get_rank(), {}, []
    if rank == 0:
        model_zoo.tiny.build("llama", vocab_size=280, max_position_embeddings=256).save_pretrained(folder / "input")
        byte_level().save_pretrained(folder / "input")
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{i} + 1?"},
                    {"role": "assistant", "content": f"It is {i + 1}."},
                ]
            }
            for i in range(44)
        ]
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dist.barrier()
    for preset in ("bf16_host", "bf16_zero3", "bf16_zero3_param_cpu", "bf16_zero3_param_disk"):
        interrupted = preset == "bf16_zero3_param_disk"
        if interrupted:  # and resumed by the same command
            finetune(load_run_config(write_run(folder, preset, preset, max_steps=4, lr_scheduler="constant")))
        scheduler = {"lr_scheduler": "constant"}
        results[preset] = finetune(load_run_config(write_run(folder, preset, preset, **scheduler)))
    dist.barrier()
    expected = results.pop("bf16_host")
    for preset, found in results.items():
        for key in ("eval_loss", "eval_loss_before", "steps", "cycles", "never_updated"):
            if found[key] != pytest.approx(expected[key], abs=2e-3):
                errors.append(f"{preset}: {key} {found[key]}, expected {expected[key]}")
        weights, trained = (load_file(folder / name / "model" / "model.safetensors") for name in ("bf16_host", preset))
        if weights.keys() != trained.keys():
            errors.append(f"{preset}: exported {trained.keys()}")
        errors += [f"{preset}: {n}" for n, value in weights.items() if (trained[n] - value).abs().max() > 5e-3]
    return errors


def all_cases(folder: str) -> list[str]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    (Path(folder) / "trainer").mkdir(exist_ok=True)
    here = Path(folder)
    return trainer_cases(here / "trainer") + evaluate_by_generating(here / "seq2seq") + run_file_cases(here)


def test_partitioned_runs_are_replicated_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for rank, errors in enumerate(run_distributed(all_cases, 2, str(tmp_path))):
        assert not errors, f"rank {rank}: " + "\n".join(errors)
