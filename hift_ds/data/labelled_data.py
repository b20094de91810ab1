"""Texts with a label, and words with a tag each."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hift_ds.data import scores
from hift_ds.data.encoding import without_affixes
from hift_ds.data.files import holds_text_alone
from hift_ds.data.packing import IGNORED
from hift_ds.data.prepare import PreparedData
from hift_ds.data.rows import code_stamp
from hift_ds.data.task_data import Preparation, arrays_of, right_padded, tokenised
from hift_ds.data.task_rows import as_class
from hift_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import EvalPrediction, PreTrainedTokenizerBase


# -- one label a row


def classification_data(how: Preparation, format: str) -> PreparedData:
    """Texts, or pairs of texts, with a label, a list of labels, or a number to predict.

    Raises:
        DataError: a label in the evaluation data that training does not have, or labels of several kinds.
    """
    train, evaluated, notes = how.examples(format)
    labels = [json.loads(json.loads(text)["label"]) for text in train["example"]]
    if all(map(holds_text_alone, train["origin"])):
        labels = _read_numbers(labels, how)
    _refuse_unpublished(labels, train["origin"])
    vectors = False
    if all(isinstance(label, float | int) for label in labels) and any(isinstance(label, float) for label in labels):
        names, kind = None, "regression"
        if how.config.labels:
            raise DataError("data.labels: the labels are numbers with a fraction, which have no names; remove it")
    elif any(isinstance(label, list) for label in labels):
        if not all(isinstance(label, list) for label in labels):
            raise DataError("data.train: some labels are lists and some are not; train on one kind")
        vectors = _are_vectors(labels)
        flat = list(range(len(labels[0]))) if vectors else [one for label in labels for one in label]
        names = Labels.of(flat, how, "AutoModelForSequenceClassification")
        kind = "multi_label_classification"
    else:
        names = Labels.of(labels, how, "AutoModelForSequenceClassification")
        kind = "single_label_classification"
    tokenize = TokenizeTexts(
        right_padded(how), how.max_length, how.config.truncation, kind, names, vectors, code_stamp()
    )
    parts, reports = tokenised(
        how, (train, evaluated), tokenize, notes,
        lambda rows: [] if names is None or kind.startswith("multi") else [names.counted(rows["labels"])],
    )  # fmt: skip
    options = {"num_labels": 1, "problem_type": kind} if names is None else {**names.options(), "problem_type": kind}
    from transformers import DataCollatorWithPadding

    return PreparedData(
        parts[0], parts[1], DataCollatorWithPadding(right_padded(how)), "none", reports,
        score=ClassScores(kind), model_options=options,
    )  # fmt: skip


def _refuse_unpublished(labels: list[Any], origins: Sequence[str]) -> None:
    """Raises DataError if a class is -1, as in GLUE's test splits. Among numbers with a fraction -1 is a number."""
    if -1 not in labels or any(isinstance(label, float) for label in labels):
        return
    raise DataError(
        f"{origins[labels.index(-1)]}: label: -1 stands for rows whose label is not published (a test split); take "
        "another split, or give classes names"
    )


_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?")


def _read_numbers(labels: list[Any], how: Preparation) -> list[Any]:
    """Labels of a file in which everything is text: as numbers if all are, and are no names that were given."""
    if not all(isinstance(label, str) and _NUMBER.fullmatch(label.strip()) for label in labels):
        return labels
    if set(labels) <= {*how.config.labels, *_of_the_head(how.model_config, "AutoModelForSequenceClassification")}:
        return labels
    return [_number_in(label) for label in labels]


def _number_in(text: str) -> int | float:
    return as_class(json.loads(text))


@dataclass(frozen=True)
class Labels:
    """Names of classes, in the order of their numbers.

    Attributes:
        by_number: the data have numbers, which are these numbers already.
    """

    names: tuple[str, ...]
    by_number: bool

    @classmethod
    def of(cls, labels: list[Any], how: Preparation, auto_class: str) -> Labels:
        """The labels of the training data: ``data.labels``, else those of a model that has such a head, else all there
        are.

        Raises:
            DataError: numbers and names, or a label that is not of ``data.labels``.
        """
        kinds = {bool if isinstance(label, bool) else type(label) for label in labels}
        if len(kinds) > 1:
            raise DataError(
                f"data.train: labels are {' and '.join(sorted(k.__name__ for k in kinds))}; expected one kind"
            )
        numbers = kinds == {int}
        given = tuple(how.config.labels) or _of_the_head(how.model_config, auto_class)
        if given and not numbers and not how.config.labels and not {_name(label) for label in labels} <= set(given):
            given = ()  # a head of other classes, which is replaced
        if given and numbers and not how.config.labels and max(labels) >= len(given):
            given = ()
        if given:
            found = cls(given, by_number=numbers)
            for label in set(labels):
                found.number(label, "data.train")
            return found
        every = sorted(set(labels), key=lambda label: (_as_number(label), str(label)))
        return cls(tuple(_name(label) for label in every), by_number=numbers and every == list(range(len(every))))

    def number(self, label: object, origin: str) -> int:
        """The number of a label. Raises DataError if it is none of them."""
        if self.by_number and isinstance(label, int) and 0 <= label < len(self.names):
            return label
        if not self.by_number and _name(label) in self.names:
            return self.names.index(_name(label))
        raise DataError(
            f"{origin}: label {label!r} is none of {_listed(self.names)} (data.labels, or the training data)"
        )

    def options(self) -> dict[str, Any]:
        """The entries of a transformers config that name the labels."""
        return {
            "num_labels": len(self.names), "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }  # fmt: skip

    def counted(self, numbers: list[Any]) -> str:
        """A line with the number of rows of each label, by the labels' ``numbers``."""
        counts = Counter(numbers)
        shown = [f"{name} {counts[number]:,}" for number, name in enumerate(self.names[:8])]
        return f"{len(self.names)} labels: " + ", ".join(shown) + (", ..." if len(self.names) > 8 else "")


def _are_vectors(labels: Sequence[Any]) -> bool:
    """Whether labels are lists of a 0 or 1 for each class, and not lists of the classes that apply: of those not all
    would name the classes 0 and 1, and none a class twice."""
    lists = all(isinstance(label, list) and len(label) == len(labels[0]) > 1 for label in labels)
    return lists and all(not isinstance(one, str) and one in (0, 1) for label in labels for one in label)


def _name(label: object) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)


def _as_number(label: str | float) -> float:
    try:
        return float(label)
    except ValueError:
        return 0.0


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _of_the_head(config: Mapping[str, Any], auto_class: str) -> tuple[str, ...]:
    """The labels of a model folder that has a head of this kind already; none otherwise."""
    head = auto_class.removeprefix("AutoModel")
    if not any(name.endswith(head) for name in config.get("architectures") or []):
        return ()
    names = config.get("id2label") or {}
    return tuple(names[key] for key in sorted(names, key=int))


@dataclass(frozen=True)
class TokenizeTexts:
    """Examples with ``text``, ``text_pair`` and ``label`` -> ``input_ids`` and ``labels``; a function for ``map``."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: str
    kind: str
    labels: Labels | None
    vectors: bool
    stamp: str

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        example = json.loads(row["example"])
        given = (example["text"], example["text_pair"]) if example["text_pair"] else (example["text"],)
        texts = [without_affixes(self.tokenizer, text) for text in given]
        whole = self.tokenizer(*texts)
        cut = max(len(whole["input_ids"]) - self.max_length, 0)
        out = self.tokenizer(*texts, truncation=True, max_length=self.max_length) if cut else whole
        dropped = bool(cut) and self.truncation == "drop"
        return {
            **out,
            "labels": self._label(json.loads(example["label"]), row["origin"]),
            "cut": cut,
            "dropped": dropped,
        }

    def _label(self, label: object, origin: str) -> Any:
        if isinstance(label, str) and _NUMBER.fullmatch(label.strip()):
            names = None if self.labels is None or self.labels.by_number else self.labels.names
            label = _number_in(label) if names is None or label not in names else label
        if self.labels is None:
            if not isinstance(label, int | float):
                raise DataError(f"{origin}: label {label!r}, but the training data have numbers to predict")
            return float(label)
        if self.vectors:
            if not isinstance(label, list) or not _are_vectors([label]) or len(label) != len(self.labels.names):
                raise DataError(
                    f"{origin}: label {label!r}, but the training data have a 0 or 1 for each of "
                    f"{_listed(self.labels.names)}; give this row one for each"
                )
            return [float(one) for one in label]
        if self.kind.startswith("multi"):
            classes = label if isinstance(label, list) else [label]
            if len(set(classes)) < len(classes) and not isinstance(classes[0], str):
                raise DataError(
                    f"{origin}: label {label!r} names a class twice; if it is a 0 or 1 for each class, give every row "
                    "one for each"
                )
            wanted = {self.labels.number(one, origin) for one in classes}
            return [float(number in wanted) for number in range(len(self.labels.names))]
        return self.labels.number(label, origin)


@dataclass(frozen=True)
class ClassScores:
    """Predictions -> scores, for a Trainer's ``compute_metrics``."""

    kind: str

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = arrays_of(prediction)
        if self.kind == "regression":
            return scores.regression_scores(logits.reshape(len(logits)), labels)
        if self.kind.startswith("multi"):
            return scores.multi_label_scores(logits > 0, labels > 0.5)
        return scores.classification_scores(logits.argmax(-1), labels)


# -- a tag for each word


def tagged_data(how: Preparation, format: str) -> PreparedData:
    """Words with a tag each: the first token of a word carries its tag, the others none.

    Raises:
        DataError: a tag in the evaluation data that training does not have.
        ConfigError: the tokenizer does not say which word a token is of.
    """
    if not how.tokenizer.is_fast:
        raise ConfigError("model.tokenizer: task token_classification needs a fast tokenizer (a tokenizer.json)")
    train, evaluated, notes = how.examples(format)
    tags = [json.loads(tag) for text in train["example"] for tag in json.loads(text)["tags"]]
    tags = [tag for tag in tags if tag != IGNORED]
    names = Labels.of(tags, how, "AutoModelForTokenClassification")
    tokenize = TokenizeWords(right_padded(how, prefix_space=True), how.max_length, how.config.truncation, names,
                             code_stamp())  # fmt: skip
    told = f"{len(names.names)} tags: {_listed(names.names)}"
    parts, reports = tokenised(how, (train, evaluated), tokenize, notes, lambda rows: [told])
    from transformers import DataCollatorForTokenClassification

    return PreparedData(
        parts[0], parts[1], DataCollatorForTokenClassification(right_padded(how)), "none", reports,
        score=TagScores(names.names), model_options=names.options(),
    )  # fmt: skip


@dataclass(frozen=True)
class TokenizeWords:
    """Examples with ``tokens`` and ``tags`` -> ``input_ids`` and ``labels``; a function for ``map``."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: str
    labels: Labels
    stamp: str

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        example = json.loads(row["example"])
        tags = [json.loads(tag) for tag in example["tags"]]
        numbers = [tag if tag == IGNORED else self.labels.number(tag, row["origin"]) for tag in tags]
        out = self.tokenizer(example["tokens"], is_split_into_words=True)
        cut = max(len(out["input_ids"]) - self.max_length, 0)
        if cut:
            out = self.tokenizer(
                example["tokens"], is_split_into_words=True, truncation=True, max_length=self.max_length
            )
        words, labels = out.word_ids(), []
        for place, word in enumerate(words):
            begins = word is not None and (place == 0 or words[place - 1] != word)
            labels.append(numbers[word] if begins else IGNORED)
        return {**out, "labels": labels, "cut": cut, "dropped": bool(cut) and self.truncation == "drop"}


@dataclass(frozen=True)
class TagScores:
    """Predictions -> scores of the tags of words, for a Trainer's ``compute_metrics``."""

    names: tuple[str, ...]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = arrays_of(prediction)
        predicted = logits.argmax(-1)
        rows = [[self.names[n] for n in row[of != IGNORED]] for row, of in zip(predicted, labels, strict=True)]
        right = [[self.names[n] for n in of[of != IGNORED]] for of in labels]
        return scores.tag_scores(rows, right)
