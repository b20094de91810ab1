"""Samples as the model will see them, with the learned tokens marked, so that a person can check the mask."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby, islice
from typing import TYPE_CHECKING

from hift_ds.data.chat_templates import set_chat_template
from hift_ds.data.config import DataConfig
from hift_ds.data.encoding import Encoder
from hift_ds.data.formats import to_sample
from hift_ds.data.packing import IGNORED
from hift_ds.data.row_tokens import Tokenize, count_source
from hift_ds.data.rows import guessed, iterate_rows
from hift_ds.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

BEGIN, END = "⟦", "⟧"
"""Around learned tokens where there is no colour."""
_LEARNED, _CONTEXT = "bold green", "dim"


def show_samples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    console: Console,
    num_samples: int = 3,
) -> None:
    """Print the first samples of ``data.train``; reads no more rows than that.

    Raises:
        ConfigError, DataError: as :func:`~hift_ds.data.prepare.prepare_data`.
    """
    from rich.text import Text

    def show(text: str, style: str) -> None:
        console.print(Text(encodable(text, encoding), style=style), soft_wrap=True)

    encoding = console.encoding
    template = set_chat_template(tokenizer, config.template)
    tokenize = Tokenize(Encoder(tokenizer, config.train_on_prompt, config.mask_history), max_length, config.truncation)
    colour = console.is_terminal and not console.no_color
    legend = Text("learned: ")
    legend.append(_mark("like this", colour, encoding), style=_LEARNED)
    settings = f"   the rest is context   chat template: {template}   cut at {max_length:,} tokens"
    legend.append(encodable(settings, encoding))
    console.print(legend, soft_wrap=True)
    rows = (row for source in config.train_sources() for row in iterate_rows(source))
    for row in islice(rows, num_samples):
        sample = to_sample(json.loads(row["row"]), row["format"], row["origin"])
        out = tokenize({key: [value] for key, value in row.items()})
        for ids, labels, cut in zip(out["input_ids"], out["labels"], out["cut"], strict=True):
            learned = sum(label != IGNORED for label in labels)
            title = f"{row['origin']}   {row['format']}   {len(ids):,} tokens, {learned:,} learned"
            title += f", {cut:,} cut off" if cut else ""
            console.rule(characters=_either("─", "-", encoding), style=_CONTEXT)
            show(title, "bold")
            if refusal := next(filter(None, out["refused"]), None):
                show(f"passed over: {refusal}", "red")
            elif not ids:
                whole = f"{type(sample).__name__.lower()} dropped: nothing to learn within {max_length:,} tokens"
                show(whole, "red")
            console.print(marked(tokenizer, ids, labels, colour=colour, encoding=encoding), soft_wrap=True)


def show_totals(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    console: Console,
    num_rows: int | None = 1000,
) -> None:
    """Print what becomes of each source's rows: learned share, what is cut, dropped or looks like a mistake.

    Args:
        num_rows: of each source, from its beginning; None: all.
    """
    from rich.text import Text

    set_chat_template(tokenizer, config.template)
    tokenize = Tokenize(Encoder(tokenizer, config.train_on_prompt, config.mask_history), max_length, config.truncation)
    console.rule(characters=_either("─", "-", console.encoding), style=_CONTEXT)
    for source in config.train_sources():
        try:
            report = count_source(source, tokenize, num_rows)
            line, suspicious = str(report), bool(report.remarks or report.num_dropped or report.num_refused)
        except DataError as error:  # the samples above may still be worth seeing
            line, suspicious = str(error), True
        text = Text(encodable(line, console.encoding), style="yellow" if suspicious else "")
        console.print(text, soft_wrap=not console.is_terminal)


def show_task_rows(
    config: DataConfig,
    format: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    console: Console,
    num_samples: int = 3,
    num_rows: int | None = 1000,
) -> None:
    """Print the first rows of ``data.train`` as a task other than language modelling reads them, and of each source how
    many rows there are, how many are longer than ``max_length``, and what labels they have.

    Args:
        format: of the task's rows, a key of ``task_rows.TASK_FORMATS``.
        num_rows: of each source, from its beginning; None: all.

    Raises:
        DataError: data is missing or a row is malformed.
    """
    from rich.text import Text

    from hift_ds.data.task_rows import to_example

    def show(text: str, style: str = "") -> None:
        console.print(Text(encodable(text, console.encoding), style=style), soft_wrap=True)

    shown, totals = 0, []
    for source in config.train_sources():
        source = replace(source, format=format)
        longer, rows, labels = 0, 0, Counter[str]()
        for row in islice(iterate_rows(source), num_rows):
            example = to_example(json.loads(row["row"]), format, row["origin"])
            texts = [value for name, value in example.items() if isinstance(value, str) and name != "label"]
            length = sum(map(len, tokenizer(texts)["input_ids"])) if texts else 0
            # A long context of a question is cut into pieces, of which none is lost.
            rows, longer = rows + 1, longer + (length > max_length and format != "question")
            labels.update(map(str, [example["label"]] if "label" in example else example.get("tags", ())))
            if shown < num_samples:
                shown += 1
                console.rule(characters=_either("─", "-", console.encoding), style=_CONTEXT)
                show(f"{row['origin']}   {format}" + (f"   {length:,} tokens" if length else ""), "bold")
                for name, value in example.items():
                    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                    show(f"{name}: {said}")
        parts = [f"{source.path}: {'the first ' if rows == num_rows else ''}{rows:,} rows"]
        parts += [f"labels {', '.join(f'{name} {count:,}' for name, count in labels.most_common(8))}"] if labels else []
        parts += [f"{longer:,} longer than data.max_length {max_length:,}"] if longer else []
        parts += [note for note in [guessed(source)] if note]
        totals.append(("; ".join(parts), "yellow" if longer or len(labels) == 1 else ""))
    console.rule(characters=_either("─", "-", console.encoding), style=_CONTEXT)
    for line, style in totals:
        show(line, style)


def encodable(text: str, encoding: str) -> str:
    """``text``, with an escape for every character that the terminal's encoding lacks."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def marked(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    labels: list[int],
    *,
    colour: bool,
    encoding: str = "utf-8",
) -> Text:
    """The text of ``ids``; learned parts are green, or between brackets without ``colour``."""
    from rich.text import Text

    text = Text()
    done = 0
    for learned, group in groupby(labels, key=lambda label: label != IGNORED):
        end = done + len(list(group))
        part = encodable(_text_between(tokenizer, ids, done, end), encoding)
        part = _mark(part, colour, encoding) if learned else part
        text.append(part, style=_LEARNED if learned else _CONTEXT)
        done = end
    return text


def _mark(part: str, colour: bool, encoding: str = "utf-8") -> str:
    if colour:
        return part
    return f"{_either(BEGIN, '[[', encoding)}{part}{_either(END, ']]', encoding)}"


def _either(mark: str, plain: str, encoding: str) -> str:
    return mark if encodable(mark, encoding) == mark else plain


def _text_between(tokenizer: PreTrainedTokenizerBase, ids: list[int], begin: int, end: int) -> str:
    """What the tokens add to the text before them: alone, sentencepiece would lose their first space."""
    before, through = (_decode(tokenizer, ids[:stop]) for stop in (begin, end))
    return through[len(before) :] if through.startswith(before) else _decode(tokenizer, ids[begin:end])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
