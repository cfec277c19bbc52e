"""Which arguments a class takes, its parents' included, and which names its code mentions."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Set
from types import ModuleType
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """What a class or function takes.

    Attributes:
        defaults: the arguments that have a name, with their defaults (None if there is none).
        others: what becomes of any other: 'refused' (a TypeError), 'lost' (taken by a **kwargs
            that nothing reads, as in some of mmdet's classes) or 'kept' (by a **kwargs with which
            the code does something else; whether it is read is not known).
    """

    defaults: dict[str, Any]
    others: str = "refused"


@functools.cache
def arguments(function: Any) -> Arguments:
    """Arguments of a class or function. A constructor's **kwargs is followed to the parent's
    constructor that it is passed to; what is looked up in it by name counts as an argument."""
    if not inspect.isclass(function):
        named, kwargs = _parameters(function)
        return Arguments(named, "kept" if kwargs else "refused")
    found: dict[str, Any] = {}
    parents = list(inspect.getmro(function))
    while parents:
        parent = parents.pop(0)
        if parent is object or "__init__" not in vars(parent):
            continue
        named, kwargs = _parameters(parent.__init__)
        named.pop("self", None)
        found = named | found
        if kwargs is None:
            return Arguments(found)
        use = _use(parent.__init__, kwargs)
        if use.unknown:
            return Arguments(found, "kept")
        found = dict.fromkeys(use.looked_up) | found
        if not use.passed:
            return Arguments(found, "lost")
        if use.after in parents:  # super(Parent, self) skips the parents before
            del parents[: parents.index(use.after) + 1]
    return Arguments(found)


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


class _Use(NamedTuple):
    """What a constructor does with its **kwargs: the names it looks up, whether it passes it to a
    parent's constructor (if as super(Parent, self), after which one), and whether it does anything
    else with it."""

    looked_up: Set[str] = frozenset()
    passed: bool = False
    after: type | None = None
    unknown: bool = False


def _use(constructor: Callable, kwargs: str) -> _Use:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    except (OSError, TypeError, SyntaxError):
        return _Use(unknown=True)

    def is_kwargs(node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == kwargs

    reads = sum(is_kwargs(node) for node in ast.walk(tree))
    names, passes, after = [], 0, None
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = node.func.value
        if node.func.attr == "__init__" and any(is_kwargs(k.value) for k in node.keywords):
            passes += 1
            if (
                isinstance(called, ast.Call)
                and called.args
                and isinstance(called.args[0], ast.Name)
            ):
                after = inspect.unwrap(constructor).__globals__.get(called.args[0].id)
        elif node.func.attr in ("get", "pop", "setdefault") and is_kwargs(called):
            names += [key.value for key in node.args[:1] if isinstance(key, ast.Constant)]
    return _Use(set(names), bool(passes), after, reads > passes + len(names))


class Mentions(NamedTuple):
    """The names in the code of a module or a class.

    Attributes:
        strings: as a string, `options.get("name")`, `options["name"]`.
        popped: those of them that are taken out of a dict, `options.pop("name")`.
        others: as an attribute or an argument, `options.name`, `def f(name)`.
    """

    strings: set[str]
    popped: set[str]
    others: set[str]


@functools.cache
def mentions(function: Any) -> Mentions:
    """The names in the modules of a class and its parents. A class that takes a dict of options
    apart itself mentions the names it looks for."""
    found = Mentions(set(), set(), set())
    for module in _modules(function):
        for names, more in zip(found, _mentions_of_module(module)):
            names |= more
    return found


@functools.cache
def names_used(function: Any) -> set[str]:
    """All names in the modules of a class and its parents, and in those of the classes and
    functions that these import and may hand a dict of options to."""
    modules = {*_modules(function)}
    for module in list(modules):
        for value in vars(module).values():
            if inspect.isclass(value) or inspect.isfunction(value):
                modules.update(_modules(value))
    return {name for module in modules for names in _mentions_of_module(module) for name in names}


def _modules(function: Any) -> list[ModuleType]:
    """The modules of a class and its parents; not torch's and mmengine's, which all classes share
    and which name no options of a detector."""
    parents = inspect.getmro(function) if inspect.isclass(function) else [function]
    names = {getattr(parent, "__module__", None) or "" for parent in parents}
    own = [n for n in names if n.partition(".")[0] not in ("torch", "mmengine")]
    return [sys.modules[name] for name in own if name in sys.modules]


@functools.cache
def _mentions_of_module(module: ModuleType) -> Mentions:
    found = Mentions(set(), set(), set())
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.isidentifier():  # not a docstring
                found.strings.add(node.value)
        elif isinstance(node, ast.Attribute):
            found.others.add(node.attr)
        elif isinstance(node, ast.arg):
            found.others.add(node.arg)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "pop":
            keys = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            found.popped.update(key for key in keys if isinstance(key, str))
    return found
