"""Interfaces as sources have them, without an import: what a stand-in of tests/engines must have in common with the
package that it stands for."""

import ast
from pathlib import Path
from typing import Any

from engine_steps import ENGINES

Function = ast.FunctionDef | ast.AsyncFunctionDef


def stand_in_modules(package: str) -> dict[str, Path]:
    """Its modules by their names."""
    paths = sorted((ENGINES / package).rglob("*.py"))
    return {
        ".".join(path.relative_to(ENGINES).with_suffix("").parts): path for path in paths if path.stem != "__init__"
    }


def _parameters(function: Function) -> list[tuple[str, str, bool]]:
    """(name, kind, whether there is a default) of each."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    first_default = len(positional) - len(a.defaults)
    found = [(p.arg, "positional", i >= first_default) for i, p in enumerate(positional)]
    found += [(p.arg, "keyword", default is not None) for p, default in zip(a.kwonlyargs, a.kw_defaults)]
    found += [(p.arg, kind, False) for p, kind in ((a.vararg, "*"), (a.kwarg, "**")) if p is not None]
    return found


def _decorators(function: Function) -> set[str]:
    kinds = {"staticmethod", "classmethod", "property", "abstractmethod"}
    return {ast.unparse(d).rpartition(".")[2] for d in function.decorator_list} & kinds


def _value(statement: ast.AST) -> Any:
    """Of an assignment, where it is a constant."""
    value = getattr(statement, "value", None)
    try:
        return None if value is None else ast.literal_eval(value)
    except ValueError:
        return None


def names(body: list[ast.stmt]) -> dict[str, ast.AST]:
    """What a module or a class defines or imports, in `if` and `try` too."""
    found: dict[str, ast.AST] = {}
    for statement in body:
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            found.update({t.id: statement for t in statement.targets if isinstance(t, ast.Name)})
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = statement
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            found.update({a.asname or a.name: statement for a in statement.names})
        elif isinstance(statement, (ast.If, ast.Try)):
            found.update(names(statement.body))
    return found


def attributes(cls: ast.ClassDef) -> set[str]:
    """What instances have: fields, methods and what is written to self."""
    written = {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    return written | set(names(cls.body))


def class_of(source: str, name: str) -> ast.ClassDef:
    found = names(ast.parse(source).body).get(name)
    assert isinstance(found, ast.ClassDef), f"there is no class {name}"
    return found


def calls(source: str, of: str) -> list[ast.Call]:
    """Calls of what is written so."""
    return [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == of]


def differences(ours: str, theirs: str, own: set[str]) -> list[str]:
    """In which ways `ours`, a stand-in's source, says otherwise than `theirs`. own: Class.method or names that are no
    part of the interface."""
    return _differences("", ast.parse(ours).body, ast.parse(theirs).body, own)


def _differences(where: str, ours: list[ast.stmt], theirs: list[ast.stmt], own: set[str]) -> list[str]:
    found: list[str] = []
    known = names(theirs)
    for name, node in names(ours).items():
        path = f"{where}{name}"
        if path in own or isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        other = known.get(name)
        if other is None:
            found.append(f"{path} is not there")
        elif isinstance(other, (ast.Import, ast.ImportFrom)):
            continue  # from elsewhere
        elif isinstance(node, ast.ClassDef) and isinstance(other, ast.ClassDef):
            found += _differences(f"{path}.", node.body, other.body, own)
            found += _class_differences(path, node, other)
        elif isinstance(node, Function) and isinstance(other, Function):
            if _parameters(node) != _parameters(other):
                found.append(f"{path} has parameters {_parameters(other)}, not {_parameters(node)}")
            if _decorators(node) != _decorators(other):
                found.append(f"{path} has decorators {_decorators(other)}, not {_decorators(node)}")
        elif type(node) is not type(other) and isinstance(node, (ast.ClassDef, Function)):
            found.append(f"{path} is {ast.unparse(other)[:80]}")
        elif where and isinstance(node, ast.Assign) and _value(node) != _value(other):
            found.append(f"{path} is {_value(other)!r}, not {_value(node)!r}")
    return found


def _class_differences(path: str, ours: ast.ClassDef, theirs: ast.ClassDef) -> list[str]:
    """What a subclass must define, and what a record must be made with."""
    found = []
    for what, of in (("abstract methods", _abstract), ("fields without a default", _required)):
        if of(ours) != of(theirs):
            found.append(f"{path} has {what} {sorted(of(theirs))}, not {sorted(of(ours))}")
    return found


def _abstract(cls: ast.ClassDef) -> set[str]:
    return {n for n, f in names(cls.body).items() if isinstance(f, Function) and "abstractmethod" in _decorators(f)}


def _required(cls: ast.ClassDef) -> set[str]:
    if not any("dataclass" in ast.unparse(d) for d in cls.decorator_list):
        return set()
    return {n for n, f in names(cls.body).items() if isinstance(f, ast.AnnAssign) and f.value is None}
