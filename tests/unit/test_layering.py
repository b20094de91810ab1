"""The order of the house: a module imports only modules of lower layers, function bodies and imports for types alone
counted, so that there are no circles and each folder can be read without the ones above it; and importing the package
does no work. And a docstring can be read alone."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hift_ds

ROOT = Path(__file__).resolve().parents[2]

# Lowest first; a name that ends in "." stands for every module below it. The first match counts.
LAYERS = [
    ["hift_ds.errors", "hift_ds.dtypes", "hift_ds.durable", "hift_ds.version", "hift_ds.step_report"],
    ["hift_ds.shipped"],
    [
        "hift_ds.out_of_memory",
        "hift_ds.ranks",
        "hift_ds.collectives",
        "hift_ds.schedule",
        "hift_ds.lr",
        "hift_ds.config",
        "hift_ds.store.base",
        "hift_ds.store.machine",
        "hift_ds.optim.lion",
    ],
    ["hift_ds.reference", "hift_ds.precision", "hift_ds.process_group", "hift_ds.layers.", "hift_ds.store."],
    ["hift_ds.optim.", "hift_ds.activations.", "hift_ds.hf."],
    ["hift_ds.checkpoint.", "hift_ds.forecast."],
    ["hift_ds.engine.zero3."],
    ["hift_ds.engine."],
    ["hift_ds.simulation.", "hift_ds.report.", "hift_ds.data.", "hift_ds.integrations."],
    ["hift_ds.train."],
    ["hift_ds.cli.", "hift_ds.__main__", "hift_ds.launch", "hift_ds.launch_with"],
]

# Imports against the order, each with its reason. This list only shrinks.
ALLOWED: dict[tuple[str, str], str] = {}

# Who may import the simulation, which is a process of its own; with the reason. This list only shrinks.
IMPORTS_THE_SIMULATION: dict[str, str] = {}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module that ``path`` imports: in function bodies, for types alone and by ``hift_ds.name`` too."""
    found: set[str] = set()
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
            if module == "hift_ds":
                found.update(hift_ds._LAZY[a.name] for a in node.names if a.name in hift_ds._LAZY)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hift_ds":
            found.update({hift_ds._LAZY[node.attr]} if node.attr in hift_ds._LAZY else ())
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


MODULES = {module_name(p): p for p in (ROOT / "hift_ds").rglob("*.py")}
ZOO = {module_name(p): p for p in (ROOT / "model_zoo").rglob("*.py")}
EDGES = {
    name: {i for i in imports_of(path) if i in MODULES and i not in (name, "hift_ds")} for name, path in MODULES.items()
}


def folder(name: str) -> str:
    """Where a module is: hift_ds.engine.zero3.seam -> hift_ds.engine.zero3. A module at the top is itself."""
    parts = name.split(".")
    return ".".join(parts[: max(len(parts) - (MODULES[name].name != "__init__.py"), 2)])


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """Names along a circle of the graph, the first repeated at the end; ``None`` where there is none."""
    done: set[str] = set()

    def walk(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name not in done:
            for target in sorted(edges.get(name, ())):
                if found := walk(target, [*trail, name]):
                    return found
            done.add(name)
        return None

    return next((found for name in sorted(edges) if (found := walk(name, []))), None)


def merged(place: Callable[[str], str]) -> dict[str, set[str]]:
    """The import graph of places that hold modules."""
    edges: dict[str, set[str]] = {}
    for name, targets in EDGES.items():
        edges.setdefault(place(name), set()).update(place(target) for target in targets)
    return {name: targets - {name} for name, targets in edges.items()}


def test_the_search_for_circles_finds_one():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_imports_in_function_bodies_for_types_and_by_lazy_names_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "hift_ds" / "folder" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nfrom . import beside\nif TYPE_CHECKING:\n    import hift_ds.typed\n"
        "def f():\n    import hift_ds\n    from hift_ds.store import host\n    return hift_ds.initialize\n"
    )
    found = imports_of(path)
    assert {"hift_ds.store.host", "hift_ds.engine.initialize", "hift_ds.folder.beside", "hift_ds.typed"} <= found


def test_there_are_no_import_circles():
    assert (found := circle(EDGES)) is None, "import circle: " + " -> ".join(found)


def test_there_are_no_circles_between_folders():
    assert (found := circle(merged(folder))) is None, "circle of folders: " + " -> ".join(found)


def layer_of(name: str) -> int | None:
    for index, patterns in enumerate(LAYERS):
        if any(name == p or (p.endswith(".") and name.startswith(p)) for p in patterns):
            return index
    return None


def test_every_module_has_a_layer():
    without = [
        name for name in MODULES if layer_of(name + ".") is None and layer_of(name) is None and name != "hift_ds"
    ]
    assert not without, without


def test_imports_point_downwards():
    wrong = {
        (name, target): f"{name} (layer {layer_of(name)}) imports {target} (layer {layer_of(target)})"
        for name, targets in EDGES.items()
        if layer_of(name) is not None
        for target in targets
        if MODULES[target].name != "__init__.py" and (layer_of(target) is None or layer_of(target) > layer_of(name))
    }
    assert not (new := set(wrong) - set(ALLOWED)), "\n".join(wrong[edge] for edge in sorted(new))
    assert not (gone := set(ALLOWED) - set(wrong)), f"take out of ALLOWED: {sorted(gone)}"


def test_nobody_imports_the_simulation_which_is_a_process():
    importers = {
        name
        for name, targets in EDGES.items()
        if folder(name) != "hift_ds.simulation" and "hift_ds.simulation" in map(folder, targets)
    }
    assert importers == set(IMPORTS_THE_SIMULATION), importers


def test_deepspeed_is_imported_only_under_engine_and_where_it_reports():
    allowed = ("hift_ds.engine.", "hift_ds.process_group", "hift_ds.report.", "hift_ds.simulation.")
    wrong = [
        name
        for name, path in MODULES.items()
        if any(i.split(".")[0] == "deepspeed" for i in imports_of(path)) and not name.startswith(allowed)
    ]
    assert not wrong, wrong


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, hift_ds, logging; heavy = {'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy; assert not logging.getLogger().handlers; assert 'initialize' in dir(hift_ds)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The one door to the zoo: sizes that `hift-ds estimate` and `groups` take by name.
ZOO_DOOR = "hift_ds.hf.model_structure"


def test_the_library_imports_no_launcher_no_tests_and_the_zoo_in_one_place():
    outside = {
        (name, i.split(".")[0])
        for name, path in MODULES.items()
        for i in imports_of(path)
        if i.split(".")[0] in ("launch", "tests", "benchmarks", "examples", "model_zoo")
    }
    assert outside == {(ZOO_DOOR, "model_zoo")}, outside


def test_the_zoo_reads_nothing_of_ours_but_errors():
    read = {i for path in ZOO.values() for i in imports_of(path) if i in MODULES}
    assert read <= {"hift_ds.errors"}, read


# With these a fragment goes on that its function's name began: in a window that shows it alone it has no subject.
FRAGMENTS = {"Of", "As", "By", "That", "For", "With", "Without", "On", "At", "From", "Before", "After", "In", "To",
             "None", "Under", "Around", "While", "Until", "Args:"}  # fmt: skip


def fragments(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, first line) of every docstring of a function or class that does not begin as a sentence does."""
    documented = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(n))
    texts = [(node.lineno, ast.get_docstring(node)) for node in documented]
    return [(line, text.splitlines()[0]) for line, text in texts if text.split()[0].rstrip(",:") in FRAGMENTS]


def test_a_docstring_can_be_read_without_the_signature():
    assert fragments(ast.parse('def size():\n    """Of the whole tensor."""\n')) == [(1, "Of the whole tensor.")]
    found = {name: lines for name, path in MODULES.items() if (lines := fragments(ast.parse(path.read_text())))}
    assert not found, found
