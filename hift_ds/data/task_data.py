"""The datasets of tasks other than language modelling, as their trainers take them.

rows (sources) -> examples (task_rows) -> what the trainer's collator takes. Preference data stay texts or messages,
which TRL's trainers tokenise themselves.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hift_ds.data import scores
from hift_ds.data.chat_templates import set_chat_template
from hift_ds.data.config import DataConfig
from hift_ds.data.prepare import IGNORED, PreparedData, load_splits
from hift_ds.data.sources import cache_in_use, code_stamp, guessed
from hift_ds.data.task_rows import Example, to_example
from hift_ds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import EvalPrediction, PreTrainedTokenizerBase

STRIDE_SHARE = 3  # of a long context for questions, neighbouring pieces share the third part of max_length
N_BEST = 20  # starts and ends of answers that are combined
LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class TaskReport:
    """What became of one dataset's rows, in words. ``tokens``: in an epoch; of preferences an estimate, with
    ``data.max_length`` for the longest."""

    name: str
    num_rows: int
    parts: tuple[str, ...]
    num_samples: int
    tokens: int
    longest_tokens: int

    def __str__(self) -> str:
        return "; ".join([f"{self.name}: {self.num_rows:,} rows", *self.parts])


@dataclass(frozen=True)
class Preparation:
    """What the preparation of every task is given.

    Attributes:
        config: the run file's ``data`` section.
        tokenizer: of the run.
        max_length: tokens of the longest sample.
        model_config: contents of the model folder's config.json.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    max_length: int
    model_config: Mapping[str, Any] = field(repr=False)

    def examples(self, format: str) -> tuple[Dataset, Dataset | None, list[str]]:
        """Rows of training and evaluation with the columns ``example`` (JSON) and ``origin``; and what was guessed."""
        sources = [replace(source, format=format) for source in self.config.train_sources()]
        held_out = [replace(source, format=format) for source in self.config.eval_sources()]
        train, evaluated = load_splits(self.config, sources, held_out)
        parse = Parse(format, code_stamp())
        with cache_in_use():
            parts = [part.map(parse, remove_columns=part.column_names, desc="Reading rows")
                     for part in (train, evaluated) if part is not None]  # fmt: skip
        notes = [note for source in sources if (note := guessed(source))]
        return parts[0], parts[1] if evaluated is not None else None, notes

    def mapped(self, rows: Dataset, function: Callable[[Any], Any], **options: Any) -> Dataset:
        """``rows`` through a function that the cache of ``datasets`` knows by its contents."""
        workers = self.config.num_workers
        with cache_in_use():
            return rows.map(function, num_proc=workers if workers > 1 else None, desc="Tokenising", **options)


@dataclass(frozen=True)
class Parse:
    """A row -> its example as JSON; a function for ``Dataset.map``."""

    format: str
    stamp: str

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        example = to_example(json.loads(row["row"]), row["format"], row["origin"])
        return {"example": json.dumps(example, ensure_ascii=False), "origin": row["origin"]}


# -- preferences: TRL tokenises ------------------------------------------------------------------------------


def preference_data(how: Preparation, format: str) -> PreparedData:
    """For TRL's DPO, KTO and reward trainers: texts as they are, or messages for the chat template.

    Raises:
        DataError: some rows are texts and others messages.
    """
    template = set_chat_template(how.tokenizer, how.config.template)
    train, evaluated, notes = how.examples(format)
    if format == "rated" and how.config.shuffle:  # its trainer takes rows in their order
        train = train.shuffle(seed=how.config.seed)
    parts = [_as_columns(part) for part in (train, evaluated) if part is not None]
    reports = []
    for name, part in zip(("train", "eval"), parts, strict=False):
        told = []
        if "label" in part.column_names:
            told.append(f"{sum(part['label']):,} wanted answers, {len(part) - sum(part['label']):,} unwanted")
        form = "texts, without a chat template" if isinstance(part[0][part.column_names[0]], str) else "messages"
        reports.append(
            TaskReport(
                name,
                len(part),
                (form, *told, *(notes if name == "train" else ())),
                len(part),
                _estimated_tokens(part, how.tokenizer),
                how.max_length,
            )
        )
    return PreparedData(parts[0], parts[1] if evaluated is not None else None, None, template, tuple(reports))


def _as_columns(rows: Dataset) -> Dataset:
    from datasets import Dataset

    first: dict[str, tuple[type, str]] = {}
    columns: dict[str, list[Any]] = {}
    kinds: dict[tuple[str, ...], str] = {}
    for text, origin in zip(rows["example"], rows["origin"], strict=True):
        example: Example = json.loads(text)
        kinds.setdefault(tuple(sorted(example)), origin)
        if len(kinds) > 1:
            (ours, one), (theirs, other) = kinds.items()
            raise DataError(
                f"{other}: has {', '.join(theirs)}, but {one} has {', '.join(ours)}; train on one kind of row"
            )
        for name, value in example.items():
            kind, where = first.setdefault(name, (type(value), origin))
            if kind is not type(value):
                raise DataError(
                    f"{origin}: {name} is a {_form(type(value))}, but in {where} it is a {_form(kind)}; train on one "
                    "kind"
                )
            columns.setdefault(name, []).append(value)
    return Dataset.from_dict(columns)


def _form(kind: type) -> str:
    return "text" if kind is str else "list of messages" if kind is list else kind.__name__


# -- one label a row -----------------------------------------------------------------------------------------


def classification_data(how: Preparation, format: str) -> PreparedData:
    """Texts, or pairs of texts, with a label, a list of labels, or a number to predict.

    Raises:
        DataError: a label in the evaluation data that training does not have, or labels of several kinds.
    """
    train, evaluated, notes = how.examples(format)
    labels = [json.loads(json.loads(text)["label"]) for text in train["example"]]
    if all(isinstance(label, float | int) for label in labels) and any(isinstance(label, float) for label in labels):
        names, kind = None, "regression"
    elif any(isinstance(label, list) for label in labels):
        if not all(isinstance(label, list) for label in labels):
            raise DataError("data.train: some labels are lists and some are not; train on one kind")
        names = Labels.of([one for label in labels for one in label], how, "AutoModelForSequenceClassification")
        kind = "multi_label_classification"
    else:
        names = Labels.of(labels, how, "AutoModelForSequenceClassification")
        kind = "single_label_classification"
    tokenize = TokenizeTexts(_right_padded(how), how.max_length, how.config.truncation, kind, names, code_stamp())
    parts, reports = [], []
    for name, rows in (("train", train), ("eval", evaluated)):
        if rows is None:
            continue
        whole = how.mapped(rows, tokenize, remove_columns=rows.column_names)
        counts = [] if names is None or kind.startswith("multi") else [names.counted(whole["labels"])]
        part, told = _without_dropped(whole, name, how)
        parts.append(part)
        reports.append(
            TaskReport(name, len(rows), (*told, *counts, *(notes if name == "train" else ())), *_lengths(part))
        )
    options = {"num_labels": 1, "problem_type": kind} if names is None else {**names.options(), "problem_type": kind}
    return PreparedData(
        parts[0], parts[1] if evaluated is not None else None, _padding(how.tokenizer), "none", tuple(reports),
        score=ClassScores(kind), model_options=options,
    )  # fmt: skip


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
        """Of the training data: ``data.labels``, else those of a model that has such a head, else all there are.

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

    def number(self, label: Any, origin: str) -> int:
        """Raises DataError if it is none of them."""
        if self.by_number and isinstance(label, int) and 0 <= label < len(self.names):
            return label
        if not self.by_number and _name(label) in self.names:
            return self.names.index(_name(label))
        raise DataError(
            f"{origin}: label {label!r} is none of {_listed(self.names)} (data.labels, or the training data)"
        )

    def options(self) -> dict[str, Any]:
        """Entries of a transformers config."""
        return {
            "num_labels": len(self.names), "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }  # fmt: skip

    def counted(self, numbers: list[Any]) -> str:
        counts = Counter(numbers)
        shown = [f"{name} {counts[number]:,}" for number, name in enumerate(self.names[:8])]
        return f"{len(self.names)} labels: " + ", ".join(shown) + (", ..." if len(self.names) > 8 else "")


def _name(label: Any) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)


def _as_number(label: Any) -> float:
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
    stamp: str

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        example = json.loads(row["example"])
        texts = (example["text"], example["text_pair"]) if example["text_pair"] else (example["text"],)
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

    def _label(self, label: Any, origin: str) -> Any:
        if self.labels is None:
            if not isinstance(label, int | float):
                raise DataError(f"{origin}: label {label!r}, but the training data have numbers to predict")
            return float(label)
        if self.kind.startswith("multi"):
            wanted = {self.labels.number(one, origin) for one in (label if isinstance(label, list) else [label])}
            return [float(number in wanted) for number in range(len(self.labels.names))]
        return self.labels.number(label, origin)


@dataclass(frozen=True)
class ClassScores:
    """Predictions -> scores, for a Trainer's ``compute_metrics``."""

    kind: str

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        if self.kind == "regression":
            return scores.regression_scores(logits.reshape(len(logits)), prediction.label_ids)
        if self.kind.startswith("multi"):
            return scores.multi_label_scores(logits > 0, prediction.label_ids > 0.5)
        return scores.classification_scores(logits.argmax(-1), prediction.label_ids)


# -- a tag for each word -------------------------------------------------------------------------------------


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
    names = Labels.of(tags, how, "AutoModelForTokenClassification")
    tokenize = TokenizeWords(_right_padded(how, prefix_space=True), how.max_length, how.config.truncation, names,
                             code_stamp())  # fmt: skip
    parts, reports = [], []
    for name, rows in (("train", train), ("eval", evaluated)):
        if rows is None:
            continue
        part, told = _without_dropped(how.mapped(rows, tokenize, remove_columns=rows.column_names), name, how)
        parts.append(part)
        told = [*told, f"{len(names.names)} tags: {_listed(names.names)}", *(notes if name == "train" else ())]
        reports.append(TaskReport(name, len(rows), tuple(told), *_lengths(part)))
    from transformers import DataCollatorForTokenClassification

    return PreparedData(
        parts[0], parts[1] if evaluated is not None else None,
        DataCollatorForTokenClassification(_right_padded(how)), "none", tuple(reports),
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
        numbers = [self.labels.number(json.loads(tag), row["origin"]) for tag in example["tags"]]
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
    names: tuple[str, ...]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted, labels = logits.argmax(-1), prediction.label_ids
        rows = [[self.names[n] for n in row[of != IGNORED]] for row, of in zip(predicted, labels, strict=True)]
        right = [[self.names[n] for n in of[of != IGNORED]] for of in labels]
        return scores.tag_scores(rows, right)


# -- answers in a text ---------------------------------------------------------------------------------------


def question_data(how: Preparation, format: str) -> PreparedData:
    """Questions whose answer is a part of a context, which is cut into overlapping pieces where it is long.

    Raises:
        ConfigError: the tokenizer does not say where in the text a token is.
    """
    if not how.tokenizer.is_fast:
        raise ConfigError("model.tokenizer: task qa needs a fast tokenizer (a tokenizer.json)")
    train, evaluated, notes = how.examples(format)
    tokenize = TokenizeQuestions(_right_padded(how), how.max_length, code_stamp())
    parts, reports = [], []
    for name, rows in (("train", train), ("eval", evaluated)):
        if rows is None:
            continue
        part = how.mapped(
            rows, tokenize, batched=True, batch_size=200, with_indices=True, remove_columns=rows.column_names
        )
        empty = sum(not json.loads(text)["texts"] for text in rows["example"])
        told = [f"{len(part):,} pieces of at most {how.max_length:,} tokens"]
        told += [f"{empty:,} questions without an answer"] if empty else []
        reports.append(TaskReport(name, len(rows), (*told, *(notes if name == "train" else ())), *_lengths(part)))
        parts.append(part)
    score = None
    if evaluated is not None:
        score = AnswerScores([json.loads(text) for text in evaluated["example"]], parts[1])
        parts[1] = parts[1].remove_columns(["offsets", "example"])
    return PreparedData(
        parts[0].remove_columns(["offsets", "example"]), parts[1] if evaluated is not None else None,
        _padding(how.tokenizer), "none", tuple(reports), score=score,
    )  # fmt: skip


@dataclass(frozen=True)
class TokenizeQuestions:
    """Examples -> pieces with ``start_positions`` and ``end_positions`` of the first answer (the first token of a piece
    that does not hold all of it), ``offsets`` of the context's tokens and the number of their ``example``."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    stamp: str

    def __call__(self, batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {}
        for text, index in zip(batch["example"], indices, strict=True):
            example = json.loads(text)
            try:
                pieces = self.tokenizer(
                    example["question"].strip(), example["context"], truncation="only_second",
                    max_length=self.max_length, stride=self.max_length // STRIDE_SHARE,
                    return_overflowing_tokens=True, return_offsets_mapping=True,
                )  # fmt: skip
            except Exception:  # the tokenizer's own words are about numbers that nobody here has given
                raise DataError(
                    f"data.max_length: {self.max_length} leaves no room for a context beside the question "
                    f"{example['question'][:60]!r}; raise it"
                ) from None
            for number in range(len(pieces["input_ids"])):
                offsets = [
                    list(offset) if part == 1 else [-1, -1]
                    for offset, part in zip(pieces["offset_mapping"][number], pieces.sequence_ids(number), strict=True)
                ]
                begin, end = _answer_tokens(offsets, example["texts"][:1], example["starts"][:1])
                row = {name: pieces[name][number] for name in pieces
                       if name not in ("offset_mapping", "overflow_to_sample_mapping")}  # fmt: skip
                row |= {"start_positions": begin, "end_positions": end, "offsets": offsets, "example": index}
                for name, value in row.items():
                    out.setdefault(name, []).append(value)
        return out


def _answer_tokens(offsets: list[list[int]], texts: list[str], starts: list[int]) -> tuple[int, int]:
    """First and last token of the answer; (0, 0) if this piece has not all of it."""
    if not texts:
        return 0, 0
    begin, end = starts[0], starts[0] + len(texts[0])
    inside = [place for place, (low, high) in enumerate(offsets) if low >= 0 and low < end and high > begin]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


@dataclass(frozen=True)
class AnswerScores:
    """Logits of the starts and ends of answers in each piece -> the best answer to each question -> scores.

    Attributes:
        examples: question, context, texts, starts.
        pieces: their pieces, in the order of the predictions.
    """

    examples: list[Example]
    pieces: Dataset

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        starts, ends = prediction.predictions[:2]
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(self.examples)
        nothing = [np.inf] * len(self.examples)
        for piece, start, end in zip(self.pieces, starts, ends, strict=True):
            index = piece["example"]
            context = self.examples[index]["context"]
            nothing[index] = min(nothing[index], float(start[0] + end[0]))
            for score, low, high in _spans(np.asarray(start), np.asarray(end), piece["offsets"]):
                if score > best[index][0]:
                    best[index] = (score, context[low:high])
        may_be_empty = any(not example["texts"] for example in self.examples)
        given = [
            "" if may_be_empty and null > score else text for (score, text), null in zip(best, nothing, strict=True)
        ]
        return scores.answer_scores(given, [example["texts"] for example in self.examples])


def _spans(start: Any, end: Any, offsets: list[list[int]]) -> list[tuple[float, int, int]]:
    """(score, first letter, end) of what may be an answer."""
    inside = np.array([low >= 0 for low, _ in offsets])
    places = np.flatnonzero(inside)
    firsts = places[np.argsort(-start[places], kind="stable")[:N_BEST]]
    lasts = places[np.argsort(-end[places], kind="stable")[:N_BEST]]
    return [
        (float(start[a] + end[b]), offsets[a][0], offsets[b][1])
        for a in firsts for b in lasts
        if a <= b < a + LONGEST_ANSWER
    ]  # fmt: skip


# -- a text from a text --------------------------------------------------------------------------------------


def pair_data(how: Preparation, format: str) -> PreparedData:
    """Source and target texts of an encoder with a decoder."""
    train, evaluated, notes = how.examples(format)
    tokenize = TokenizePairs(_right_padded(how), how.max_length, how.config.truncation, code_stamp())
    parts, reports = [], []
    for name, rows in (("train", train), ("eval", evaluated)):
        if rows is None:
            continue
        part, told = _without_dropped(how.mapped(rows, tokenize, remove_columns=rows.column_names), name, how)
        parts.append(part)
        reports.append(TaskReport(name, len(rows), (*told, *(notes if name == "train" else ())), *_lengths(part)))
    from transformers import DataCollatorForSeq2Seq

    tokenizer = _right_padded(how)
    return PreparedData(
        parts[0], parts[1] if evaluated is not None else None,
        DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED), "none", tuple(reports),
        score=TextScores(tokenizer),
    )  # fmt: skip


@dataclass(frozen=True)
class TokenizePairs:
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    truncation: str
    stamp: str

    def __call__(self, row: dict[str, str]) -> dict[str, Any]:
        example = json.loads(row["example"])
        sides = [{"text": example["source"]}, {"text_target": example["target"]}]
        whole = [self.tokenizer(**side)["input_ids"] for side in sides]
        cut = sum(max(len(ids) - self.max_length, 0) for ids in whole)
        if cut:
            whole = [self.tokenizer(**side, truncation=True, max_length=self.max_length)["input_ids"] for side in sides]
        end = self.tokenizer.eos_token_id
        if (
            end is not None and whole[1][-1:] != [end] and len(whole[1]) < self.max_length
        ):  # else it never learns to stop
            whole[1] = [*whole[1], end]
        return {
            "input_ids": whole[0], "attention_mask": [1] * len(whole[0]), "labels": whole[1], "cut": cut,
            "dropped": bool(cut) and self.truncation == "drop",
        }  # fmt: skip


@dataclass(frozen=True)
class TextScores:
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        given = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        pad = self.tokenizer.pad_token_id
        texts = [
            self.tokenizer.batch_decode(np.where(ids < 0, pad, ids), skip_special_tokens=True)
            for ids in (given, prediction.label_ids)
        ]
        return scores.text_scores(*texts)


# -- shared --------------------------------------------------------------------------------------------------


def _right_padded(how: Preparation, prefix_space: bool = False) -> PreTrainedTokenizerBase:
    """A copy that pads on the right, and cuts where ``data.truncation`` says.

    Args:
        prefix_space: for words one by one: byte-level tokenizers tell a word by the space before it.
    """
    tokenizer = copy.deepcopy(how.tokenizer)
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left" if how.config.truncation == "keep_end" else "right"
    if prefix_space and getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer.add_prefix_space = True
        if getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", None) is False:
            tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    return tokenizer


def _padding(tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import DataCollatorWithPadding

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    return DataCollatorWithPadding(tokenizer)


def _lengths(rows: Dataset) -> tuple[int, int, int]:
    """How many, their tokens, and those of the longest."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return len(lengths), sum(lengths), max(lengths)


def _estimated_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """From the first 100 rows, without what a chat template adds."""
    first = rows.select(range(min(100, len(rows))))
    texts = [json.dumps(value, ensure_ascii=False) for name in first.column_names for value in first[name]]
    return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) * len(rows) // len(first)


def _without_dropped(rows: Dataset, name: str, how: Preparation) -> tuple[Dataset, list[str]]:
    """The rows that stay, and what is to be said of the others."""
    cut, dropped = np.asarray(rows["cut"]), np.asarray(rows["dropped"])
    told = [f"longest {_lengths(rows)[2]:,} tokens"]
    if (shorter := int(((cut > 0) & ~dropped).sum())) > 0:
        told.append(f"{shorter:,} cut to data.max_length {how.max_length:,} ({int(cut[~dropped].sum()):,} tokens lost)")
    if dropped.any():
        told.append(f"{int(dropped.sum()):,} dropped: longer than {how.max_length:,} tokens")
        rows = rows.select(np.flatnonzero(~dropped))
    if not len(rows):
        raise DataError(f"data.{name}: all rows are longer than data.max_length {how.max_length}; raise it")
    return rows.remove_columns(["cut", "dropped"]), told
