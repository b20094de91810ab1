"""``python -m examples.hift_questions``: write the data set that comes with the package, ``bundled:hift_questions``.

Questions about hift_ds, answered by its own documentation: the tables of keys in docs/, the table of DeepSpeed configs,
and the docstrings of public classes and functions. It is there so that a run needs no data to be tried; a few hundred
rows teach a model to answer in this style, and no more.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "hift_ds" / "data" / "bundled" / "hift_questions.jsonl"

# file, heading -> how a key of the table below it is asked about
TABLES = {
    ("docs/run_file.md", "model"): "What does the key `model.{}` of a hift_ds run file set?",
    ("docs/run_file.md", "data"): "What does the key `data.{}` of a hift_ds run file set?",
    ("docs/run_file.md", "train"): "What does the key `train.{}` of a hift_ds run file set?",
    ("docs/run_file.md", "export"): "What does the key `export.{}` of a hift_ds run file set?",
    ("ds_configs/README.md", "DeepSpeed configs"): "What is the DeepSpeed config `{}` of hift_ds?",
    ("docs/concepts.md", "Words"): "In hift_ds, what does the word `{}` mean?",
    ("docs/data.md", "Formats"): "What does a row of training data in the format `{}` look like for hift_ds?",
    (
        "docs/states.md",
        "Optimizer states off the accelerator",
    ): 'What does `{}` in the "state" part of the "hift" block do?',
    ("docs/metrics.md", None): "What is `{}` in a run folder of hift_ds?",
}


def main() -> None:
    rows = list(documented_keys()) + list(documented_code())
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w", encoding="utf-8") as file:
        for question, answer in rows:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    print(f"{len(rows)} rows in {OUT.relative_to(ROOT)}")


def documented_keys() -> Iterator[tuple[str, str]]:
    """Question and answer for each row of a table whose first cell is one name in backticks."""
    for (file, wanted), question in TABLES.items():
        heading, columns = None, []
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if found := re.match(r"#+ `?([^`]+)`?$", line):
                heading = found[1]
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            if not cells:
                columns = []
            elif not columns:
                columns = cells
            elif (name := re.fullmatch(r"`([^`]+)`", cells[0])) and wanted in (None, heading):
                yield question.format(name[1]), _answer(columns, cells)


def _answer(columns: list[str], cells: list[str]) -> str:
    parts = []
    for column, cell in zip(columns[1:], cells[1:], strict=True):
        if cell:
            parts.append(f"{column.capitalize()}: {_sentence(cell)}" if column not in ("", "what") else _sentence(cell))
    return " ".join(reversed(parts) if columns[1] == "default" else parts)


def _sentence(text: str) -> str:
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text).replace("\\|", "|")
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?")) else ".")


def documented_code() -> Iterator[tuple[str, str]]:
    """Question and answer for each public class and function: the first paragraph of its docstring."""
    for path in sorted((ROOT / "hift_ds").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            doc = (ast.get_docstring(node) or "").split("\n\n")[0].split("\nArgs:")[0]
            if len(doc.split()) < 6:
                continue
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(doc.split())).replace("``", "`")
            yield f"What is the {kind} `{node.name}` in `{module}` for?", _sentence(text)


if __name__ == "__main__":
    main()
