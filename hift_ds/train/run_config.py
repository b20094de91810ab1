"""The run file: one YAML, closed and typed, with ``section.key=value`` overrides.

Each key and default is declared here (``data`` in :mod:`hift_ds.data.config`, ``hift`` in
:mod:`hift_ds.config`) and described in docs/run_file.md. Paths are relative to the working directory, as
everything on a command line is; only ``deepspeed`` is also looked for beside the run file, so that a preset
and its DeepSpeed JSON can travel together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from hift_ds.data.config import DataConfig
from hift_ds.dtypes import Dtype
from hift_ds.errors import ConfigError
from hift_ds.shipped import file_or_shipped
from hift_ds.train.run_file import apply_overrides, explain, read_yaml, refuse_other_tools
from hift_ds.train.tasks import TASKS, TaskName

RUN_FILE_COPY = "run.yaml"  # in the run folder: every key, defaults included


class Section(BaseModel):
    """A section of a run file: closed, and not to be changed once it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """What is fine-tuned."""

    path: str
    """A folder with safetensors, or a Hub name (``hub:owner/name``, or ``owner/name`` if no such folder
    exists)."""
    tokenizer: str | None = None
    """Its folder, if not the model's."""
    dtype: Literal["auto", Dtype] = "auto"
    """Dtype of the weights in training. auto: what the DeepSpeed JSON says, else as stored."""
    added_tokens: list[str] = []
    """Tokens to add to the vocabulary; the embeddings get rows for them, which are trained and exported."""
    added_special_tokens: list[str] = []
    """The same for special tokens, which are left out where a text is decoded without them."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ...; null: transformers' choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class EarlyStoppingConfig(Section):
    """When a run ends before its last step."""

    patience: int | None = Field(None, ge=1)
    """Evaluations in a row without a better ``best_metric`` after which the run ends; null: never."""
    threshold: float = Field(0.0, ge=0)
    """How much better counts as better."""


class TrainConfig(Section):
    """How long, how much at once, and how fast."""

    output_dir: str
    """The run folder: config, metrics, plots, checkpoints."""
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps; given, ``epochs`` does not count."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows in one forward pass of one accelerator; null: as in the DeepSpeed JSON, else 1."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Forward passes in one optimizer step; null: from ``global_batch_size``, else the JSON, else 1."""
    global_batch_size: int | None = Field(None, ge=1)
    """Rows in one optimizer step: micro_batch_size x gradient_accumulation_steps x accelerators."""
    eval_batch_size: int | None = Field(None, ge=1)
    """Rows in one forward pass of evaluation; null: as in training."""
    auto_find_batch_size: bool = False
    """Out of memory in training: begin again with a tenth fewer rows in a forward pass, until they fit. On one rank."""
    optimizer: str | None = None
    """AdamW, Adam, SGD, Adagrad, Adafactor, RMSprop, Lion, Muon, any torch.optim class, or a dotted path.
    null: as in the DeepSpeed JSON, else AdamW."""
    optimizer_args: dict[str, Any] = {}
    """More arguments of the optimizer, such as ``{betas: [0.9, 0.95]}``."""
    learning_rate: float = Field(2e-5, ge=0)
    lr_scheduler: str = "cosine"
    """A name of transformers.SchedulerType."""
    lr_scheduler_args: dict[str, Any] = {}
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of all steps in which the learning rate rises from 0."""
    warmup_steps: int = Field(0, ge=0)
    """The same as a number of steps."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip gradients to this norm, taken over the active group; 0: do not clip."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more compute."""
    logging_steps: int = Field(1, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    """Steps between evaluations; null: after each epoch."""
    save_steps: int | None = Field(500, ge=1)
    """Steps between checkpoints; null: only at the end."""
    save_total_limit: int | None = Field(2, ge=1)
    """Checkpoints to keep; a checkpoint holds masters and optimizer states, up to 14 bytes a parameter."""
    load_best_model_at_end: bool = False
    """Export the checkpoint with the best ``best_metric`` instead of the last."""
    best_metric: str = "loss"
    """What evaluation measures that decides: loss, perplexity, or one of the task's (docs/tasks.md). Of losses,
    perplexity and mse the lowest is best, of others the highest."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    arguments: dict[str, Any] = {}
    """More fields of the task's own arguments class (transformers' TrainingArguments, TRL's DPOConfig, ...)."""
    resume: str = "auto"
    """auto: go on from the newest good checkpoint in output_dir. never: start anew. Or a checkpoint's
    folder."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient that is not finite, or a gradient norm a thousand times its group's usual: end the run, leave
    the step out, or leave it out and go back to the last checkpoint."""
    hang_timeout_s: float = Field(7200.0, ge=0)
    """End the run when nothing has happened for so long, a save included; 0: wait without end."""
    seed: int = 42
    report_to: list[str] = []
    """Loggers of transformers: tensorboard, wandb, mlflow, ..."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [] if value == "none" else [value]
        return value

    @field_validator("lr_scheduler")
    @classmethod
    def _known_scheduler(cls, value: str) -> str:
        from transformers.trainer_utils import SchedulerType

        known = [name.value for name in SchedulerType]
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}, got {value!r}")
        return value

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio: {self.warmup_ratio} and warmup_steps: {self.warmup_steps} both given; remove one"
            )
        if self.auto_find_batch_size and self.global_batch_size is not None:
            raise ValueError(
                "auto_find_batch_size: true changes the rows of a step, which global_batch_size: "
                f"{self.global_batch_size} fixes; remove one"
            )
        # Not "is it given": a run folder's run.yaml gives every key, and is read again.
        if self.best_metric != "loss" and not (self.load_best_model_at_end or self.early_stopping.patience):
            raise ValueError(f"best_metric: {self.best_metric} needs load_best_model_at_end or early_stopping.patience")
        if self.load_best_model_at_end:
            if self.save_steps is None or self.eval_steps is None:
                name = "save_steps" if self.save_steps is None else "eval_steps"
                raise ValueError(f"load_best_model_at_end: true needs {name}, got null")
            if self.save_steps % self.eval_steps:
                raise ValueError(
                    "load_best_model_at_end: true needs save_steps to be a multiple of eval_steps, "
                    f"got {self.save_steps} and {self.eval_steps}"
                )
        return self


class ExportConfig(Section):
    """The fine-tuned model in Hugging Face's layout."""

    dir: str | None = None
    """Its folder; null: ``model`` in train.output_dir."""
    dtype: Literal["auto", Dtype] = "auto"
    """Dtype of the written weights. auto: as in the input."""
    max_shard_size: str = "5GB"

    """Size of one file; a larger tensor gets a file of its own."""

    @field_validator("max_shard_size")
    @classmethod
    def _a_size(cls, value: str) -> str:
        from hift_ds.hf.export import parse_size

        parse_size(value)
        return value


class RunConfig(Section):
    """A checked run file. ``run.file`` and ``run.overrides`` say where it came from."""

    task: TaskName = "sft"
    """What is learned: sft (chat and completion), text (plain language modelling), dpo, kto, reward, classification,
    token_classification, qa (extractive), seq2seq."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    export: ExportConfig = ExportConfig()
    deepspeed: Any = None
    """A DeepSpeed JSON, or its contents. Its own batch sizes, optimizer and precision hold unless given
    above."""
    hift: Any = {}
    """Keys of the "hift" block, over those of the DeepSpeed JSON; and ``fit``: what is chosen for the card. false:
    ordinary full fine-tuning, all at once."""

    _file: Path | None = PrivateAttr(None)
    _overrides: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _tokens_and_task(self) -> RunConfig:
        if self.task in ("dpo", "kto") and (self.model.added_tokens or self.model.added_special_tokens):
            raise ValueError(
                f"model.added_tokens: the reference of task {self.task} is the model as it was, which lacks them; "
                "train them with task sft first"
            )
        return self

    @model_validator(mode="after")
    def _streaming(self) -> RunConfig:
        if not self.data.streaming:
            return self
        if self.train.max_steps is None:
            raise ValueError("data.streaming: true needs train.max_steps, since the number of rows is not known")
        if not TASKS[self.task].is_language_modelling:
            raise ValueError(f"data.streaming: true is for task sft and text; the task here is {self.task}")
        for name in ("train_sampling_strategy", "group_by_length"):
            if name in self.train.arguments:
                raise ValueError(f"train.arguments.{name}: with data.streaming rows come as they are read; remove one")
        return self

    @model_validator(mode="after")
    def _task_and_data(self) -> RunConfig:
        if TASKS[self.task].format is None:
            return self
        names = ["format"] if self.task == "text" else ["format", "packing", "train_on_prompt", "mask_history"]
        for name in names:
            if (given := getattr(self.data, name)) != type(self.data).model_fields[name].default:
                tasks = "sft" if name == "format" else "sft and text"
                raise ValueError(f"data.{name}: {given} is for task {tasks}; the task here is {self.task}")
        if self.task != "text" and self.hift and self.hift.get("fit", "off") not in (False, "off"):
            raise ValueError(f"hift.fit: {self.hift['fit']} is for task sft and text; the task here is {self.task}")
        if self.data.labels and self.task not in ("classification", "token_classification"):
            raise ValueError(f"data.labels: is for tasks with labels; the task here is {self.task}")
        return self

    @field_validator("deepspeed")
    @classmethod
    def _json_or_path(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | dict):
            return value
        raise ValueError(f"expected the path of a DeepSpeed JSON or its contents, got {value!r}")

    @field_validator("hift")
    @classmethod
    def _block_or_false(cls, value: Any) -> Any:
        if not (value is False or isinstance(value, dict)):
            raise ValueError(f"expected keys of the hift block or false, got {value!r}")
        fit = value.get("fit", "auto") if value else "off"
        is_number = isinstance(fit, int | float) and not isinstance(fit, bool) and fit > 0
        if not is_number and fit is not False and fit not in ("auto", "off"):  # YAML reads off as false
            raise ValueError(f"hift.fit: expected auto, off or a number of GiB, got {fit!r}")
        return value

    @property
    def hift_block(self) -> dict[str, Any]:
        """Keys of the "hift" block."""
        return {key: value for key, value in (self.hift or {}).items() if key != "fit"}

    @property
    def fit(self) -> float | Literal["auto"] | None:
        """GiB of the card that the run is to fit; "auto": of the one that is there; None: nothing is chosen."""
        if not TASKS[self.task].is_language_modelling:  # what can be forecast
            return None
        fit = self.hift.get("fit", "auto") if self.hift is not False else None
        return None if fit in (False, "off") else fit

    @property
    def file(self) -> Path | None:
        """The run file that this was read from, if it was."""
        return self._file

    @property
    def overrides(self) -> tuple[str, ...]:
        """The ``section.key=value`` that were given beside the file."""
        return self._overrides

    @property
    def data_of_task(self) -> DataConfig:
        """``data``, its rows read as language modelling's task says: those of ``text`` have texts only."""
        format = self.data.format or TASKS[self.task].format
        return (
            self.data if not TASKS[self.task].is_language_modelling else self.data.model_copy(update={"format": format})
        )

    @property
    def export_dir(self) -> Path:
        """The folder of the exported model: ``export.dir``, or ``model`` in the run's folder."""
        return Path(self.export.dir).expanduser() if self.export.dir else self.output_dir / "model"

    @property
    def output_dir(self) -> Path:
        """The run's folder, with ``~`` resolved."""
        return Path(self.train.output_dir).expanduser()

    def is_given(self, key: str) -> bool:
        """Whether the run file or an override sets ``section.name``, to its default even."""
        section, name = key.split(".")
        return name in getattr(self, section).model_fields_set


def load_run_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read and check a run file.

    Args:
        path: of the YAML file, or the name of one that comes with the package: ``llama3_8b``.
        overrides: ``section.key=value`` texts; values are YAML: ``data.train=[a.jsonl, b.jsonl]``.

    Raises:
        ConfigError: one line with file or override, key, what was given and what is expected.
    """
    file = file_or_shipped(path, "preset")
    content = read_yaml(file)
    refuse_other_tools(content, file)
    overridden = apply_overrides(content, overrides)
    try:
        run = RunConfig.model_validate(content)
    except ValidationError as error:
        raise explain(error, RunConfig, file, overridden) from None
    except ConfigError as error:  # of the parts that are checked by their own module
        raise ConfigError(f"{file}: {error}") from None
    run._file = file
    run._overrides = tuple(overrides)
    return run
