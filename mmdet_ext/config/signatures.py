"""Which arguments a class takes, its parents' included."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any


@functools.cache
def arguments(function: Any) -> dict[str, Any] | None:
    """Arguments of a class or function and their defaults; None if it takes any.

    A constructor's **kwargs is followed to its parents where it is passed to them. Where it is
    not, as in some of mmdet's classes, what lands there is lost and does not count, but for what
    is looked up by name. What else a constructor does with it is not known.
    """
    if not inspect.isclass(function):
        named, kwargs = _parameters(function)
        return None if kwargs else named
    found: dict[str, Any] = {}
    for parent in inspect.getmro(function):
        if parent is object or "__init__" not in vars(parent):
            continue
        named, kwargs = _parameters(parent.__init__)
        named.pop("self", None)
        found = named | found
        if kwargs is None:
            return found
        looked_up, passed, unknown = _uses(parent.__init__, kwargs)
        if unknown:
            return None
        found = dict.fromkeys(looked_up) | found
        if not passed:
            return found
    return found


def _parameters(function: Callable) -> tuple[dict[str, Any], str | None]:
    """The arguments that have a name, with their defaults, and what the function calls its
    **kwargs, if it has one."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled
        return {}, "kwargs"
    named, kwargs = {}, None
    for parameter in parameters:
        if parameter.kind == parameter.VAR_KEYWORD:
            kwargs = parameter.name
        elif parameter.kind != parameter.VAR_POSITIONAL:
            default = parameter.default
            named[parameter.name] = None if default is parameter.empty else default
    return named, kwargs


def _uses(constructor: Callable, kwargs: str) -> tuple[set[str], bool, bool]:
    """What a constructor does with its **kwargs: the names it looks up, whether it passes it to
    its parent's constructor, and whether it does anything else with it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):
        return set(), False, True

    def is_kwargs(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == kwargs

    reads = sum(is_kwargs(node) for node in ast.walk(tree))
    names, passes = [], 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr == "__init__":
            passes += sum(k.arg is None and is_kwargs(k.value) for k in node.keywords)
        elif node.func.attr in ("get", "pop", "setdefault") and is_kwargs(node.func.value):
            names += [key.value for key in node.args[:1] if isinstance(key, ast.Constant)]
    return set(names), bool(passes), reads > passes + len(names)
