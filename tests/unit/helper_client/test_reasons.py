"""The reasons that the server's code sends: each must satisfy the protocol, or its requests would be refused."""

import ast
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import qat_server
from qat_shared.messages import AnyRequest, Reason, SocketDirectory

REQUESTS = {kind.__name__ for kind in AnyRequest.__args__}
LONGEST_WORD = max(SocketDirectory, key=len)
"""Stands for a placeholder of a reason: only words of the protocol may be one."""


def trees() -> dict[Path, ast.Module]:
    root = Path(qat_server.__file__).parent
    return {path: ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}


def calls(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and f".{ast.unparse(node.func)}".endswith(name):
            yield node


def texts(expression: ast.expr, tree: ast.Module, every: list[ast.Module]) -> list[str]:
    """The values of a reason: a text, a module's constant, or the last argument of calls of the client's method."""
    match expression:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else LONGEST_WORD for part in parts)]
        case ast.Name(id=name):
            assigned = [
                node.value
                for node in tree.body
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name and node.value is not None
            ]
            if assigned:
                return [text for value in assigned for text in texts(value, tree, every)]
            (method,) = (
                node.name
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and [argument.arg for argument in node.args.args][-1:] == [name]
            )
            callers = [(call, other) for other in every for call in calls(other, f"helper.{method}")]
            assert callers, f"nobody calls {method}"
            return [text for call, other in callers for text in texts(call.args[-1], other, every)]
    pytest.fail(f"the reason {ast.unparse(expression)} is neither a text nor a constant")


def sent() -> dict[str, list[str]]:
    """The reasons of each kind of request."""
    found: dict[str, list[str]] = {}
    every = trees()
    for tree in every.values():
        for kind in REQUESTS:
            for call in calls(tree, f".{kind}"):
                for keyword in call.keywords:
                    if keyword.arg == "reason":
                        found.setdefault(kind, []).extend(texts(keyword.value, tree, list(every.values())))
    return found


def test_every_reason_of_the_server_satisfies_the_protocol() -> None:
    reasons = sent()
    assert len(reasons) >= 6, "the search finds the requests' reasons"
    assert "serve it to pods" in reasons["BindDriver"]
    for kind, listed in reasons.items():
        for reason in listed:
            assert msgspec.convert(reason, Reason) == reason, kind
    assert max(len(reason) for listed in reasons.values() for reason in listed) > 30
