"""What a run has made, or any folder with a model, ready to be talked to and evaluated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ds.errors import CheckpointError, ConfigError
from hift_ds.hf.model_folder import HUB, resolve_model
from hift_ds.train.run_config import RUN_FILE_COPY, RunConfig, load_run_config
from hift_ds.train.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TASK_OF_CLASS = {
    "ForSequenceClassification": "classification", "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "qa", "ForConditionalGeneration": "seq2seq",
}  # fmt: skip


@dataclass(frozen=True)
class TrainedModel:
    """Where a model lies and what is known of its training.

    Attributes:
        folder: with config.json, safetensors and tokenizer.
        run_dir: the run folder that it came from; ``None`` for a model folder alone.
        run: the settings of that run.
        trust_remote_code: run the code that a model folder alone brings along; a run's settings say it for theirs.
    """

    folder: Path
    run_dir: Path | None = None
    run: RunConfig | None = None
    trust_remote_code: bool = False

    @property
    def trusts_its_code(self) -> bool:
        """Whether Python code that comes with the model may run."""
        return self.trust_remote_code or (self.run is not None and self.run.model.trust_remote_code)

    @property
    def task(self) -> str:
        """The run's task; of a model folder alone the one that its class is for."""
        if self.run is not None:
            return self.run.task
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        name = (config.get("architectures") or [""])[0]
        return next((task for ending, task in _TASK_OF_CLASS.items() if name.endswith(ending)), "sft")

    def load(
        self, *, dtype: str = "auto", device: str | None = None, writes_text: bool = True
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, in evaluation mode, and its tokenizer with its chat template.

        Args:
            dtype: fp32, bf16, fp16, or ``auto`` for that of the files.
            device: of torch; ``None``: the accelerator if there is one.
            writes_text: another model is an error.

        Raises:
            ConfigError: it does not write text and should, or cannot be loaded.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        check_device(device)

        from hift_ds.data.tokenizers import load_tokenizer
        from hift_ds.dtypes import torch_dtype
        from hift_ds.hf.weight_names import zero_init_set_aside

        trust = self.trusts_its_code
        tokenizer = load_tokenizer(self.folder, trust_remote_code=trust, key=str(self.folder))
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust, local_files_only=True)
            name = (config.architectures or ["a model without architectures"])[0]
            cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            if not name.endswith(("LMHeadModel", "ForCausalLM", "ForConditionalGeneration")):
                if writes_text:
                    raise ConfigError(
                        f"{self.folder}: holds {name}, which does not write text; expected a language model"
                    )
                cls = TASKS[self.task].model_class()
            with zero_init_set_aside():
                model = cls.from_pretrained(
                    self.folder, dtype="auto" if dtype == "auto" else torch_dtype(dtype), use_safetensors=True,
                    trust_remote_code=trust, local_files_only=True,
                )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self.folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        if device is None:
            found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
            device = found.type if found is not None else "cpu"
        return model.to(device).eval(), tokenizer


def check_device(device: str | None) -> None:
    """Raises :class:`ConfigError` if torch has no such device here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--device: torch cannot use {device!r} here ({reason}); name one that it has, or leave it out"
        ) from None


def find_trained(path: str | Path, *, trust_remote_code: bool = False) -> TrainedModel:
    """What ``path`` names: a run folder, whose exported model it is then, or a folder with a model.

    ``hub:owner/name`` is fetched from the Hugging Face Hub.

    Raises:
        ConfigError: neither, or the Hub does not give it.
        CheckpointError: the run has not exported its model yet.
    """
    if str(path).startswith(HUB):
        folder = resolve_model(str(path), key="RUN", trust_remote_code=trust_remote_code)
    else:
        folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{str(path)!r}: no such folder; expected the folder of a run (train.output_dir) or of a model, or "
            f"{HUB}owner/name"
        )
    copy = folder / RUN_FILE_COPY
    if not copy.is_file():
        if (folder / "config.json").is_file():
            return TrainedModel(folder, trust_remote_code=trust_remote_code)
        raise ConfigError(
            f"{str(path)!r}: has neither a {RUN_FILE_COPY} of a run nor a config.json of a model; name one that has"
        )
    run = load_run_config(copy)
    for place in (run.export_dir, folder / "model"):  # the second: a run folder that was moved
        if (place / "config.json").is_file():
            return TrainedModel(place, folder, run, trust_remote_code)
    raise CheckpointError(
        f"{str(path)!r}: the run has not exported its model to {str(run.export_dir)!r}; let it end, or use "
        f"hift-ds export {path} OUT and name OUT"
    )


def generation_options(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float | None
) -> dict[str, Any]:
    """Keyword arguments of ``model.generate``: what ends an answer, and how its tokens are drawn.

    Args:
        temperature: 0: the likeliest token each time; ``None``: as the model's generation config says.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)  # a chat template may have brought another end of turn than the model's
    options: dict[str, Any] = {"eos_token_id": ends or None, "pad_token_id": tokenizer.pad_token_id}
    if temperature is not None and temperature > 0:
        return options | {"do_sample": True, "temperature": temperature}
    if temperature is not None:
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return options
