"""The tasks of a run file: for each its model class, trainer, arguments, data and scores. One table, ``TASKS``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from hift_ds.errors import ConfigError

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from hift_ds.data.prepare import PreparedData
    from hift_ds.data.task_data import Preparation

TaskName = Literal[
    "sft", "text", "dpo", "kto", "reward", "classification", "token_classification", "qa", "seq2seq"
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        auto_class: of transformers, which makes the model.
        trainer: module and class; ours is put before it.
        arguments: module and class of its arguments.
        format: of its rows; None: found from the columns.
        data: module of ``hift_ds.data`` and function that prepare it; None: language modelling's.
        options: arguments that differ from the class's defaults.
        label_names: batch entries that make a loss; None: the trainer knows.
        metrics: what its evaluation measures besides the loss; the first are shown.
    """

    auto_class: str = "AutoModelForCausalLM"
    trainer: str = "transformers.Trainer"
    arguments: str = "transformers.TrainingArguments"
    format: str | None = None
    data: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = ("labels",)
    metrics: tuple[str, ...] = ()

    @property
    def is_language_modelling(self) -> bool:
        """Learned tokens of samples that this package encodes."""
        return self.data is None

    @property
    def has_own_head(self) -> bool:
        """Whether the task puts a head of its own on the model, which begins at random unless the folder has one."""
        return not self.auto_class.endswith("LM")

    @property
    def uses_trl(self) -> bool:
        """Whether TRL has the task's trainer."""
        return self.trainer.startswith("trl.")

    def trainer_class(self) -> type[Trainer]:
        """The trainer's class; a ConfigError where its package is not installed."""
        return _named(self.trainer)

    def arguments_class(self) -> type[TrainingArguments]:
        """The class of the trainer's arguments; a ConfigError where its package is not installed."""
        return _named(self.arguments)

    def model_class(self) -> Any:
        """The ``Auto...`` class of transformers that makes the task's model."""
        return _named(f"transformers.{self.auto_class}")

    def prepare(self, how: Preparation) -> PreparedData:
        """The function that stands for ``prepare_data`` in tasks that have one of their own."""
        assert self.data is not None and self.format is not None
        make: Callable[..., PreparedData] = _named(f"hift_ds.data.{self.data}")
        return make(how, self.format)


_REWARDS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")

TASKS: dict[str, Task] = {
    "sft": Task(metrics=("perplexity",)),
    "text": Task(metrics=("perplexity",), format="text"),
    "dpo": Task(
        trainer="trl.DPOTrainer", arguments="trl.DPOConfig", format="preference",
        data="preference_data.preference_data", label_names=None, metrics=_REWARDS,
    ),
    "kto": Task(
        trainer="trl.KTOTrainer", arguments="trl.KTOConfig", format="rated", data="preference_data.preference_data",
        label_names=None, metrics=("rewards/margins", "rewards/chosen", "rewards/rejected"),
    ),
    "reward": Task(
        auto_class="AutoModelForSequenceClassification", trainer="trl.RewardTrainer", arguments="trl.RewardConfig",
        format="preference", data="preference_data.preference_data", label_names=None, metrics=("accuracy", "margin"),
    ),
    "classification": Task(
        auto_class="AutoModelForSequenceClassification", format="labelled", data="labelled_data.classification_data",
        metrics=("accuracy", "f1", "matthews_correlation", "mse", "pearson"),
    ),
    "token_classification": Task(
        auto_class="AutoModelForTokenClassification", format="tagged", data="labelled_data.tagged_data",
        metrics=("f1", "accuracy", "precision", "recall"),
    ),
    "qa": Task(
        auto_class="AutoModelForQuestionAnswering", format="question", data="question_data.question_data",
        label_names=("start_positions", "end_positions"), metrics=("exact_match", "f1"),
    ),
    "seq2seq": Task(
        auto_class="AutoModelForSeq2SeqLM", trainer="transformers.Seq2SeqTrainer",
        arguments="transformers.Seq2SeqTrainingArguments", format="pair", data="pair_data.pair_data",
        options={"predict_with_generate": True}, metrics=("bleu", "rouge_l"),
    ),
}  # fmt: skip

assert set(TASKS) == set(get_args(TaskName))


def _named(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ConfigError(f"task: this one needs the package {module}: pip install {module} ({error})") from None
