"""In which order a module's ``forward`` uses its children, read from its source; nothing is run.

Registration order is not execution order: OPT registers its final norm before its layers. A trial forward
would tell, but needs inputs for every kind of model and does not work on weights that ZeRO-3 has cut up. The
source text of ``forward`` needs neither, costs milliseconds, and says the same on every rank.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Use:
    """One place in ``forward`` where ``self.<path>`` appears.

    Attributes:
        path: what follows ``self``, such as ``"layers"`` or ``"transformer.wte"``.
        called: it is called here, not only looked at.
        loops: the ``for`` loops around it (and the one whose iterable it is in), by a number each.
    """

    path: str
    called: bool
    loops: frozenset[int]


def forward_uses(module: nn.Module) -> list[Use]:
    """Every use of ``self.<name>`` in the forward of ``module``, in the order the expressions are evaluated.

    Methods of ``self`` that forward calls are read in place. Empty if the source cannot be had.
    """
    reader = _Reader(module)
    reader.read_method("forward")
    return reader.uses


def _parsed(function: Callable) -> ast.FunctionDef | None:
    function = inspect.unwrap(function)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # built in, typed at a prompt, or made by exec
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


def _dotted(node: ast.expr) -> str | None:
    """``self.a.b`` and ``self.a["b"]`` as ``"a.b"``; ``self.a[i]`` as ``"a"``; None for all else."""
    parts: list[str] = []
    while True:
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        elif isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Constant):
                parts.append(str(node.slice.value))
            else:
                parts.clear()
            node = node.value
        else:
            break
    if isinstance(node, ast.Name) and node.id == "self" and parts:
        return ".".join(reversed(parts))
    return None


def _method_of_super(node: ast.expr) -> str | None:
    """``name`` if ``node`` is ``super().<name>``, else None."""
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call)):
        return None
    called = node.value.func
    return node.attr if isinstance(called, ast.Name) and called.id == "super" else None


class _Reader(ast.NodeVisitor):
    """Collects uses in evaluation order: arguments before the call, iterables before the body."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.uses: list[Use] = []
        self._loops: list[int] = []
        self._loops_seen = 0
        self._reading: list[tuple[type, str]] = []  # methods being read, each with the class that defines it

    def read_method(self, name: str, *, above: type | None = None) -> None:
        """Reads the method ``name`` of the module, or what ``super()`` in the class ``above`` would find."""
        classes = type(self.module).__mro__
        classes = classes[classes.index(above) + 1 :] if above in classes else classes
        owner = next((cls for cls in classes if name in vars(cls)), nn.Module)
        if owner is nn.Module or (owner, name) in self._reading or not inspect.isfunction(vars(owner)[name]):
            return
        tree = _parsed(vars(owner)[name])
        self._reading.append((owner, name))
        self._visit_all(tree.body if tree is not None else [])
        self._reading.pop()

    def _use(self, path: str, called: bool) -> None:
        self.uses.append(Use(path, called, frozenset(self._loops)))

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._visit_all(node.args)
        self._visit_all(node.keywords)
        path = _dotted(node.func)
        if (inherited := _method_of_super(node.func)) is not None:
            self.read_method(inherited, above=self._reading[-1][0])
        elif path is None:
            self.visit(node.func)
        elif "." not in path and path not in self.module._modules:
            self.read_method(path)
        else:
            self._use(path, called=True)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = _dotted(node)
        if path is None:
            self.visit(node.value)
        else:
            self._use(path, called=False)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        path = _dotted(node)
        if path is None:
            self.visit(node.value)
        else:
            self._use(path, called=False)
        self.visit(node.slice)

    def visit_For(self, node: ast.For) -> None:
        self._loops_seen += 1
        self._loops.append(self._loops_seen)
        self.visit(node.iter)
        self._visit_all(node.body)
        self._loops.pop()
        self._visit_all(node.orelse)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._visit_comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._visit_comprehension(node)

    def _visit_comprehension(self, node: ast.ListComp | ast.GeneratorExp) -> None:
        self._visit_all(node.generators)
        self.visit(node.elt)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        self._visit_all(node.targets)
