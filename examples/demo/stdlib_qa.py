"""Questions and answers about the Python standard library, made from the docstrings of the Python that runs
this.

Sources are parsed, not imported: importing every module of the library would open windows and print poems.
Only types and functions written in C, which have no source, are asked for their docstring at run time, from a
short list of modules that are harmless to import. Whole modules are held out, not single questions, so that
evaluation asks about libraries the model was not trained on. The same Python gives the same files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hift_ds.errors import DataError

# About a tenth of the pairs, and such as a reader can judge.
HELDOUT = {"bisect", "calendar", "colorsys", "configparser", "csv", "difflib", "fileinput", "fnmatch",
           "fractions", "heapq", "html", "ipaddress", "json", "pathlib", "queue", "random", "selectors",
           "shutil", "smtplib", "sqlite3", "statistics", "string", "textwrap", "webbrowser",
           "zipfile"}  # fmt: skip

# Written in C, safe to import, and what people ask about most.
C_MODULES = ("builtins", "math", "itertools", "functools", "operator", "collections", "time", "datetime",
             "zlib", "binascii", "struct", "array", "io", "re", "sys", "gc", "cmath", "marshal")  # fmt: skip

# Not libraries (tests, programs, what is on its way out), or Windows' twin of a module that has the same
# docstrings.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "distutils", "site-packages",
           "pydoc_data", "__pycache__", "__phello__", "encodings", "antigravity", "this", "ntpath",
           "nturl2path", "macpath", "tkinter", "turtle", "msilib", "pydoc"}  # fmt: skip
RENAMED = {"posixpath": "os.path", "genericpath": "os.path"}

_JUNK = re.compile(
    r">>>|->|\bTODO\b|\bXXX\b|\bFIXME\b|deprecat|for internal use|internal helper|not part of the public"
    r"|private"
    r"|see the documentation|see base class|overrid|helper (function|method)|backward|compatib|\bdocstring\b"
    r"|subclasses (should|must)|same as|like the|^see |^alias|^internal|^initiali[sz]e self"
    r"|^create and return a new obj"
    r"|__\w+__|https?://|\bI\b|\bI'|@param|:param|:return|\.\. ",
    re.IGNORECASE,
)
_SIGNATURE_LINE = re.compile(r"^[\w.]+\(.*?\)\s*(->\s*.+|:)?$")
_ROLE = re.compile(r":[\w:]+:`~?([^`]+)`")


@dataclass(frozen=True)
class Entry:
    """One documented thing.

    Attributes:
        kind: module, class, function, method or property.
        call: the name, with the arguments of what can be called.
    """

    module: str
    name: str
    kind: str
    call: str
    doc: str


def build(out_dir: str | Path) -> dict[str, int]:
    """Write ``train.jsonl`` and ``heldout.jsonl`` in the ``messages`` format. Returns how many pairs each
    has.

    Raises:
        DataError: this Python has no docstrings to learn from (run with -OO, or its sources are stripped).
    """
    pairs = make_pairs(iter_entries())
    if len(pairs) < 500:
        raise DataError(f"only {len(pairs)} documented functions found in the standard library; is it stripped?")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in ("train", "heldout"):
        rows = [(q, a) for module, q, a in pairs if (module in HELDOUT) == (split == "heldout")]
        with open(out_dir / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for question, answer in rows:
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        counts[split] = len(rows)
    return counts


def make_pairs(entries: Iterable[Entry]) -> list[tuple[str, str, str]]:
    """(top-level module, question, answer), no question or answer twice, in an order that mixes modules."""
    pairs: dict[str, tuple[str, str, str]] = {}
    answers: set[str] = set()
    for entry in sorted(entries, key=lambda e: (e.module, e.name, e.kind)):
        answer = clean_answer(entry.doc)
        question = ask(entry)
        if answer is None or question in pairs or answer.lower() in answers:
            continue
        answers.add(answer.lower())
        pairs[question] = (entry.module.split(".")[0], question, answer)
    return sorted(pairs.values(), key=lambda pair: _hash(pair[1]))


def ask(entry: Entry) -> str:
    """A question as a person would put it; which of the wordings is decided by the name."""
    templates = {
        "module": ("What is the Python module `{}` for?", "What does Python's `{}` module provide?"),
        "class": ("What is `{}` in Python?", "What is the class `{}` in Python's standard library for?"),
        "function": ("What does `{}` do in Python?", "In Python, what does the function `{}` do?"),
        "method": ("What does the method `{}` do in Python?", "In Python, what does `{}` do?"),
        "property": ("What is the attribute `{}` in Python?",),
    }[entry.kind]
    return templates[_hash(entry.name) % len(templates)].format(entry.call)


def clean_answer(doc: str) -> str | None:
    """The first paragraph of a docstring as one line of prose, or None if it is no answer to a question."""
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc).strip())
    lines = [line.strip() for line in paragraphs[0].splitlines()]
    while lines and _SIGNATURE_LINE.match(lines[0]):
        lines.pop(0)
    if not lines and len(paragraphs) > 1:
        lines = [line.strip() for line in paragraphs[1].splitlines()]
    text = " ".join(lines)
    text = re.sub(r"^[\w.]+\([^)]*\)\s*(->\s*[\w\[\], .|]+?)?\s*(--+|:)\s+", "", text)
    text = _ROLE.sub(r"`\1`", text).replace("``", "`")
    text = re.sub(r"\s+", " ", text).strip()
    words = text.split()
    if len(words) < 5 or not 30 <= len(text) <= 320 or not text.isascii() or _JUNK.search(text):
        return None
    if text.endswith((":", ",", ";", "-", "e.g.", "(")) or text.count("`") % 2 or text.count("(") != text.count(")"):
        return None
    if not text[0].isalpha() or sum(c.isalpha() or c == " " for c in text) < 0.8 * len(text):
        return None
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def iter_entries() -> Iterator[Entry]:
    """Everything documented in the library's Python sources, then what is written in C."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any("test" in part for part in parts):
            continue
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        public = _public_names(root, parts)
        if public is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in old docstrings
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        yield from _entries_of_source(tree, ".".join(parts), public)
    for name in C_MODULES:
        yield from _entries_of_c_module(name)


def _public_names(root: Path, parts: tuple[str, ...]) -> dict[str, str] | str | None:
    """Where a module's names are public: under its own name (a string), under its package's (name by name),
    nowhere.

    ``asyncio/tasks.py`` is where ``asyncio.wait_for`` is written, and nobody asks about
    ``asyncio.tasks.wait_for``.
    """
    module = RENAMED.get(".".join(parts), ".".join(parts))
    private = any(part.startswith("_") for part in parts)
    package = root.joinpath(*parts[:-1], "__init__.py")
    if len(parts) > 1 and package.is_file():
        exported = _exports(package, parts[-1], root.joinpath(*parts))
        if exported:
            return {name: ".".join(parts[:-1]) for name in exported} | ({} if private else {"": module})
    return None if private else module


def _exports(package: Path, submodule: str, path: Path) -> set[str]:
    """The names that a package's ``__init__`` takes from one of its submodules."""
    names: set[str] = set()
    for node in ast.parse(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module == submodule:
            for alias in node.names:
                names |= _all_of(path) if alias.name == "*" else {alias.name}
    return names


def _all_of(path: Path) -> set[str]:
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            return {e.value for e in getattr(node.value, "elts", ()) if isinstance(e, ast.Constant)}
    return set()


def _entries_of_source(tree: ast.Module, module: str, public: dict[str, str] | str) -> Iterator[Entry]:
    own = public if isinstance(public, str) else public.get("")
    if own and (doc := ast.get_docstring(tree)):
        yield Entry(own, own, "module", own, doc)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = node.name
        where = (public.get(name) or own) if isinstance(public, dict) else own
        if name.startswith(("_", "do_")) or not where:
            continue
        if not isinstance(node, ast.ClassDef):
            yield from _entry_of_function(node, where, f"{where}.{name}", "function")
        else:
            if doc := ast.get_docstring(node):
                yield Entry(where, f"{where}.{name}", "class", f"{where}.{name}", doc)
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and not member.name.startswith(
                    ("_", "do_")
                ):
                    yield from _entry_of_function(member, where, f"{where}.{name}.{member.name}", "method")


def _entry_of_function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, module: str, name: str, kind: str
) -> Iterator[Entry]:
    doc = ast.get_docstring(node)
    if not doc:
        return
    if kind == "function" and [argument.arg for argument in node.args.args[:1]] == ["self"]:
        yield Entry(module, name, "class", name, doc)  # a special form of typing, written as a function
        return
    decorators = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
    if decorators & {"property", "cached_property", "setter"}:
        yield Entry(module, name, "property", name, doc)
        return
    arguments = ast.parse(ast.unparse(node.args).join(["def f(", "): pass"])).body[0].args
    for argument in [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]:
        if argument is not None:
            argument.annotation = None
    text = ast.unparse(arguments)
    if kind == "method" and "staticmethod" not in decorators:
        text = re.sub(r"^\w+(, /)?(, |$)", "", text)
    yield Entry(module, name, kind, _call(name, text), doc)


def _entries_of_c_module(module: str) -> Iterator[Entry]:
    content = importlib.import_module(module)
    prefix = "" if module == "builtins" else module + "."
    for name, value in sorted(vars(content).items()):
        home = getattr(value, "__module__", None) or module
        if name.startswith("_") or name.endswith("hook"):
            continue  # hooks are what a running program has put there
        if home not in (module, "_" + module, "_io", "_operator", "builtins"):
            continue
        if home == "builtins" and module != "builtins":
            continue
        doc = getattr(value, "__doc__", None)
        if inspect.isclass(value) and doc and not issubclass(value, BaseException):
            yield Entry(module, prefix + name, "class", prefix + name, doc)
            for attribute, member in sorted(vars(value).items()):
                if inspect.ismethoddescriptor(member) and not attribute.startswith("_") and member.__doc__:
                    full = f"{prefix}{name}.{attribute}"
                    yield Entry(module, full, "method", _call(full, _c_arguments(member)), member.__doc__)
        elif inspect.isbuiltin(value) and doc:
            yield Entry(module, prefix + name, "function", _call(prefix + name, _c_arguments(value)), doc)


def _c_arguments(value: object) -> str:
    value = getattr(value, "__func__", value)
    text = (getattr(value, "__text_signature__", None) or "").strip()[1:-1]
    if not text and not getattr(value, "__text_signature__", None):
        first_line = re.match(rf"[\w.]*\b{value.__name__}\(([^()]*)\)", value.__doc__ or "")
        text = re.sub(r"\[,?|\]|\s+$", "", first_line.group(1)) if first_line else "..."
    return re.sub(r"^\$(self|module|type)(, /)?(, )?", "", text)


def _call(name: str, arguments: str) -> str:
    return f"{name}({arguments if len(arguments) <= 50 else '...'})"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
