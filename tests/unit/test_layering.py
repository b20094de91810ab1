"""The import order of DESIGN: a module may import only modules of lower layers, so there are no cycles and each part
can be read alone; and importing the package does no work."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Lowest first; a name ending in "." stands for every module below it. The first match counts.
LAYERS = [
    ["hift_ds.errors", "hift_ds.version", "hift_ds.step_report"],
    [
        "hift_ds.collectives",
        "hift_ds.schedule",
        "hift_ds.lr",
        "hift_ds.config",
        "hift_ds.store.base",
        "hift_ds.optim.lion",
        "hift_ds.optim.muon",
    ],
    [
        "hift_ds.reference",
        "hift_ds.precision",
        "hift_ds.forward_order",
        "hift_ds.model_structure",
        "hift_ds.arch",
        "hift_ds.store.",
    ],
    ["hift_ds.grouping", "hift_ds.optim."],
    ["hift_ds.checkpoint.", "hift_ds.memory.", "hift_ds.train.resume"],
    ["hift_ds.engine."],
    ["hift_ds.data.", "hift_ds.integrations.", "hift_ds.report."],
    ["hift_ds.train."],
    ["hift_ds.demo.", "hift_ds.cli", "hift_ds.__main__"],
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of ours that are imported when ``path`` is: function-local and TYPE_CHECKING imports do not count."""
    found: set[str] = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            visit(ast.iter_child_nodes(node))

    visit(ast.parse(path.read_text()).body)
    return found


MODULES = {module_name(p): p for p in (ROOT / "hift_ds").rglob("*.py")}


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name in MODULES}


def test_there_are_no_import_cycles():
    edges = {name: ours(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def walk(name, trail):
        assert name not in trail, "import cycle: " + " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                walk(target, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        walk(name, [])


def layer_of(name: str) -> int | None:
    for index, patterns in enumerate(LAYERS):
        if any(name == p or (p.endswith(".") and name.startswith(p)) for p in patterns):
            return index
    return None


def test_imports_point_downwards():
    wrong = [
        f"{name} (layer {layer_of(name)}) imports {target} (layer {layer_of(target)})"
        for name, path in MODULES.items()
        if layer_of(name) is not None
        for target in ours(path)
        if target != "hift_ds"
        and MODULES[target].name != "__init__.py"
        and (layer_of(target) is None or layer_of(target) > layer_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_deepspeed_is_imported_only_under_engine_and_where_it_reports():
    allowed = ("hift_ds.engine.", "hift_ds.report.")
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


def test_the_library_does_not_import_the_zoo_or_the_launcher():
    wrong = {
        n: i for n, p in MODULES.items() for i in imports_of(p) if i.split(".")[0] in ("launch", "tests")
    }
    assert not wrong, wrong
