"""docs/troubleshooting.md has every line of the code, with a way out, and no line that the code no longer has."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def script():
    spec = importlib.util.spec_from_file_location("make_troubleshooting", ROOT / "docs" / "make_troubleshooting.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_every_line_is_on_the_page_with_a_way_out():
    made = script()
    found = made.messages()
    assert len(found) > 250
    assert not [m.text for m in found if made.explanation(m) is None], (
        "say what it means in docs/make_troubleshooting.py"
    )
    assert (ROOT / "docs" / "troubleshooting.md").read_text() == made.page(), "run python docs/make_troubleshooting.py"


def test_lines_are_found_however_they_are_written():

    made = script()
    code = """
raise ConfigError(f"a {x}: expected " "b" + f"{y}; do c")
def f():
    return CheckpointError("%s is gone" % name)
logger.warning("%s has %d steps; wait", a, b)
logger.info("not this")
def why_not(folder):
    return f"{folder} is empty"
"""
    calls = list(made._calls(ast.parse(code), {"ConfigError"}))
    assert [(kind, made._text(node)) for kind, node in calls] == [
        ("error", "… is empty"),
        ("error", "a …: expected b…; do c"),
        ("warning", "… has … steps; wait"),
    ]
    assert {"HiFTError", "ConfigError", "DamagedCheckpoint", "OutOfMemory", "Malformed"} <= made.error_classes()


def test_each_rule_is_of_some_line():
    made = script()

    texts = [m.text for m in made.messages()]
    first = [next((p for p, _ in made.EXPLAINED if re.search(p, text)), None) for text in texts]
    assert not [p for p, _ in made.EXPLAINED if p not in first], "a rule that no line needs"
