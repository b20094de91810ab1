"""How good predictions are, in numbers: the definitions that papers and leaderboards use, in plain Python and numpy."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Span = tuple[str, int, int]  # kind, first word, last word


def classification_scores(predicted: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of one class for each row.

    Args:
        predicted: int[rows], the classes predicted.
        labels: int[rows], the right ones.

    Returns:
        ``accuracy``; ``f1``: with two classes that of class 1, with more the mean over the classes that occur
        ("macro"); ``matthews_correlation``, 0 where it is not defined.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    classes = sorted({*predicted.tolist(), *labels.tolist()})
    table = np.zeros((len(classes), len(classes)))
    np.add.at(table, (np.searchsorted(classes, labels), np.searchsorted(classes, predicted)), 1)
    if set(classes) <= {0, 1}:
        f1 = _f1(*_hits(predicted == 1, labels == 1))
    else:
        f1 = float(np.mean([_f1(*_hits(predicted == one, labels == one)) for one in classes]))
    right, rows, guessed, total = np.trace(table), table.sum(1), table.sum(0), table.sum()
    spread = (total**2 - (guessed**2).sum()) * (total**2 - (rows**2).sum())
    matthews = (right * total - (rows * guessed).sum()) / math.sqrt(spread) if spread > 0 else 0.0
    return {
        "accuracy": float((predicted == labels).mean()), "f1": f1, "matthews_correlation": float(matthews)
    }  # fmt: skip


def multi_label_scores(predicted: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The scores of several classes a row: ``accuracy``, the share of rows that are right as a whole, and ``f1`` over
    all decisions ("micro").

    Args:
        predicted: bool[rows, classes].
        labels: bool[rows, classes].
    """
    predicted, labels = np.asarray(predicted, bool), np.asarray(labels, bool)
    return {"accuracy": float((predicted == labels).all(1).mean()), "f1": _f1(*_hits(predicted, labels))}


def regression_scores(predicted: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """``mse`` and ``pearson``, which is 0 where one side does not vary; both float[rows]."""
    predicted, labels = np.asarray(predicted, np.float64), np.asarray(labels, np.float64)
    a, b = predicted - predicted.mean(), labels - labels.mean()
    spread = math.sqrt((a * a).sum() * (b * b).sum())
    return {
        "mse": float(((predicted - labels) ** 2).mean()), "pearson": float((a * b).sum() / spread) if spread else 0.0
    }  # fmt: skip


def tag_scores(predicted: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of words with tags: ``accuracy`` over words; ``precision``, ``recall`` and ``f1`` over whole entities,
    as CoNLL counts them (kind and both ends must be right). Where no tag has the form ``B-KIND`` (parts of speech),
    accuracy alone."""
    words = [(p, t) for ps, ts in zip(predicted, labels, strict=True) for p, t in zip(ps, ts, strict=True)]
    scores = {"accuracy": sum(p == t for p, t in words) / max(len(words), 1)}
    if not any(re.match(r"[BIES]-", tag) for tags in (*predicted, *labels) for tag in tags):
        return scores
    found = [{(row, *span) for row, tags in enumerate(rows) for span in entities(tags)} for rows in (predicted, labels)]
    hits = len(found[0] & found[1])
    return scores | {
        "precision": hits / len(found[0]) if found[0] else 0.0,
        "recall": hits / len(found[1]) if found[1] else 0.0,
        "f1": _f1(hits, len(found[0]), len(found[1])),
    }


def entities(tags: Sequence[str]) -> list[Span]:
    """The entities in a row of tags ``B-KIND``, ``I-KIND``, ``E-KIND``, ``S-KIND`` and ``O``. One begins wherever the
    kind changes or a ``B`` or ``S`` stands, after an ``E`` or ``S`` too."""
    spans: list[Span] = []
    begin, before, kind = 0, "O", ""
    for place, tag in enumerate([*tags, "O"]):
        letter, _, this = tag.partition("-")
        if before != "O" and (letter in ("O", "B", "S") or before in ("E", "S") or this != kind):
            spans.append((kind, begin, place - 1))
            before = "O"
        if letter != "O" and before == "O":
            begin = place
        before, kind = letter, this
    return spans


def answer_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD's ``exact_match`` and ``f1`` over words, each the best over a question's answers, from 0 to 100. A question
    without an answer is right if nothing is predicted."""
    exact, overlap = [], []
    for given, right in zip(predicted, answers, strict=True):
        right = right or [""]
        exact.append(max(float(_normal(given) == _normal(one)) for one in right))
        overlap.append(max(_word_f1(_normal(given).split(), _normal(one).split()) for one in right))
    return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def text_scores(predicted: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``bleu`` and ``rouge_l`` of texts with one reference each, from 0 to 100.

    BLEU is that of the whole corpus, up to 4 words together, brevity penalty, no smoothing, words cut at white space
    and punctuation; ROUGE-L is the mean F1 of the longest common subsequence of lower-case words.
    """
    lengths, hits, tries = [0, 0], np.zeros(4), np.zeros(4)
    rouge = []
    for given, right in zip(predicted, references, strict=True):
        a, b = _words(given), _words(right)
        lengths[0] += len(a)
        lengths[1] += len(b)
        for n in range(4):
            ours, theirs = (Counter(zip(*(words[i:] for i in range(n + 1)), strict=False)) for words in (a, b))
            hits[n] += (ours & theirs).total()
            tries[n] += ours.total()
        low = [[word.lower() for word in words if word.isalnum()] for words in (a, b)]
        rouge.append(_f1(_common_length(*low), len(low[0]), len(low[1])))
    short = math.exp(min(0.0, 1 - lengths[1] / lengths[0])) if lengths[0] else 0.0
    bleu = short * math.exp(np.log(hits / tries).mean()) if hits.all() else 0.0
    return {"bleu": 100 * bleu, "rouge_l": 100 * float(np.mean(rouge)) if rouge else 0.0}


def _hits(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    return float((predicted & labels).sum()), float(predicted.sum()), float(labels.sum())


def _f1(hits: float, predicted: float, right: float) -> float:
    return 2 * hits / (predicted + right) if predicted + right else 0.0


def _normal(text: str) -> str:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(given: list[str], right: list[str]) -> float:
    if not given or not right:
        return float(given == right)
    return _f1((Counter(given) & Counter(right)).total(), len(given), len(right))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def _common_length(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for one in a:
        before = 0
        for place, other in enumerate(b, start=1):
            before, row[place] = row[place], before + 1 if one == other else max(row[place], row[place - 1])
    return row[-1]
