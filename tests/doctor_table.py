"""The doctor's checks as docs/troubleshooting.md lists them, read from its source: ``python -m tests.doctor_table`` prints the table."""

from __future__ import annotations

import ast
import inspect
import re
from types import ModuleType

from etha_ray.doctor import host, services, software

_MODULES = (host, software, services)
_UNKNOWN = "…"


def table() -> str:
    """A row for each way in which a check warns or fails: its name, what it says, what it advises; capitals are filled in."""
    rows = [row for module in _MODULES for row in _rows(module)]
    return "\n".join(["| check | | it says | what to do |", "|---|---|---|---|", *dict.fromkeys(rows)])


def _rows(module: ModuleType) -> list[str]:
    found = []
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(function, ast.FunctionDef):
            named = _assigned(function)
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
            for call in sorted(calls, key=lambda call: call.lineno):
                assert isinstance(call.func, ast.Name)
                if call.func.id in ("warn", "fail"):
                    name, says, remedy = (_text(argument, named) for argument in call.args)
                    found.append(f"| {name} | {call.func.id} | {_cell(says)} | {_cell(remedy)} |")
    return found


def _assigned(function: ast.FunctionDef) -> dict[str, ast.expr]:
    """What names of the function stand for, where that is text."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            pairs = zip(target.elts, node.value.elts, strict=True) if isinstance(node.value, ast.Tuple) else [(target, node.value)]
            for name, value in pairs:
                if isinstance(name, ast.Name) and isinstance(value, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                    found[name.id] = value
    return found


def _text(node: ast.expr, named: dict[str, ast.expr]) -> str:
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, named) for part in parts)
        case ast.FormattedValue(value=value):
            return _text(value, named)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left, named) + _text(right, named)
        case ast.Name(id=name):
            return _text(named[name], named) if name in named else name.strip("_").upper()
    return _UNKNOWN


def _cell(text: str) -> str:
    return re.sub(f"{_UNKNOWN}+", _UNKNOWN, text).replace("|", "\\|")


if __name__ == "__main__":
    print(table())
