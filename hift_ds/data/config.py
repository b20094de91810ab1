"""The ``data`` section of a run file."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hift_ds.data.formats import check_format
from hift_ds.data.sources import Source, parse_sources


class DataConfig(BaseModel):
    """What is trained on, and how it becomes tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    train: Any
    """A file (JSON lines, JSON, CSV, TSV, parquet, arrow, txt, md), a folder of these, ``hub:owner/name``,
    LLaMA-Factory's dataset_info.json, an object with ``path`` and ``split``, ``subset``, ``format``, ``columns``,
    ``max_samples``, ``weight``, ``documents``, ``name``, or a list of any of these."""
    eval: Any = None
    """Held-out data, written like ``train``."""
    val_size: float = Field(0.0, ge=0)
    """Without ``eval``: rows of ``train`` to hold out, as a share below 1 or a number."""
    format: str | None = None
    """messages, sharegpt, prompt_completion, alpaca or text; null: found from the columns."""
    columns: dict[str, str] = {}
    """Our column name: the name in the data, as in ``{prompt: question, completion: answer}``."""
    template: str = "auto"
    """auto: the tokenizer's chat template, else alpaca. Or alpaca, chatml (qwen), gemma, llama3, mistral, vicuna,
    zephyr, or a file with a Jinja template."""
    max_length: int | None = Field(None, ge=2)
    """Tokens of the longest sample; null: 2048, or what the model allows if that is less."""
    truncation: Literal["keep_start", "keep_end", "drop"] = "keep_start"
    """What becomes of a longer sample. Plain text is cut into several samples instead."""
    packing: bool = False
    """Fill rows with several samples that do not see each other. Less padding for samples of mixed length."""
    train_on_prompt: bool = False
    """Learn every token, not only answers."""
    mask_history: bool = False
    """Learn only the last answer of a conversation."""
    labels: list[str] = []
    """Names of the classes or tags, in the order of their numbers; empty: from the data."""
    shuffle: bool = True
    """Draw a new order of the rows in every epoch. false: as they stand in the data."""
    streaming: bool = False
    """Read the rows of ``train`` while they are trained on, without storing them; needs train.max_steps."""
    shuffle_buffer: int = Field(10_000, ge=2)
    """With ``streaming`` and ``shuffle``: rows in memory, from which the next one is drawn."""
    max_samples: int | None = Field(None, ge=1)
    """Rows to take from the beginning of each source."""
    seed: int = 42
    """The seed of the held-out split and of the order of samples."""
    num_workers: int = Field(1, ge=1)
    """Processes that tokenise."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        check_format(value)
        return value

    @model_validator(mode="after")
    def _agree(self) -> DataConfig:
        if self.val_size >= 1 and self.val_size != int(self.val_size):
            raise ValueError(f"val_size: expected a share below 1 or a whole number, got {self.val_size}")
        if self.val_size and self.eval is not None:
            raise ValueError("val_size and eval both given; remove one")
        if self.streaming and self.val_size:
            raise ValueError(f"val_size: {self.val_size:g} with streaming: true, which ends nowhere; give eval instead")
        self.train_sources()  # raises on what is not a source
        if any(source.weight is not None for source in self.eval_sources()):
            raise ValueError("eval: weight has no meaning there; every row is evaluated once")
        return self

    def train_sources(self) -> list[Source]:
        """The sources of ``data.train``."""
        return parse_sources(self.train, "data.train", **self._defaults(), streaming=self.streaming)

    def eval_sources(self) -> list[Source]:
        """The sources of ``data.eval``; none where it is not set."""
        return [] if self.eval is None else parse_sources(self.eval, "data.eval", **self._defaults())

    def _defaults(self) -> dict[str, Any]:
        return {"format": self.format, "columns": self.columns, "max_samples": self.max_samples}
