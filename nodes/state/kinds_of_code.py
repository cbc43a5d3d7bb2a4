"""Functions, objects, classes, and the variables that code names.

[Note: what code names]
A pack's function may change any variable of its module, and of other modules of packs: by its name in the code, or by a
string that is its name (``setattr``, ``globals()[...]``). Every variable that it names in these ways and that exists is
kept. The rest of a module is not, since it can be a whole library. Methods of an object call one another, so what one
of them names counts as named by all.
"""

from __future__ import annotations

import functools
import itertools
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

from .kinds import MISSING, Changed, Kind, is_of_a_pack, is_stateless, nothing, package_of
from .kinds_of_containers import refill_dict

# How many code objects are known at once.
MOST_CODE = 4096


class Variables:
    """The variables of one module that code may change (Note: what code names).

    Args:
        namespace: that of the module.
        names: all names that the code has, for anything.
        named_by: the variables of the module that names this one; None for the code's own module.
    """

    def __init__(self, namespace: dict[str, Any], names: frozenset[str], named_by: Variables | None = None) -> None:
        self.namespace = namespace
        self.names = names
        self._imported = tuple(_imported(namespace, names)) if named_by is None else ()
        # Modules name one another, so there is one object for each.
        self._of_modules: dict[str, Variables] = {} if named_by is None else named_by._of_modules

    def keep(self) -> dict[str, Any]:
        namespace = self.namespace
        return {name: namespace[name] for name in self.names if name in namespace}

    def put_back(self, kept: dict[str, Any]) -> None:
        namespace = self.namespace
        for name in self.names:
            before = kept.get(name, MISSING)
            if before is MISSING:
                if not isinstance(namespace.get(name), types.ModuleType):  # Modules that were imported stay so.
                    namespace.pop(name, None)
            elif namespace.get(name, MISSING) is not before:
                namespace[name] = before

    def parts(self) -> list[Any]:
        values = [*self.keep().values(), *self._imported]
        return [self._of(value) if isinstance(value, types.ModuleType) else value for value in values]

    def _of(self, module: types.ModuleType) -> Variables | None:
        """What the same code may change in another module that it names."""
        found = self._of_modules.get(module.__name__)
        if found is None or found.namespace is not vars(module):
            if not is_of_a_pack(module):
                return None
            found = self._of_modules[module.__name__] = Variables(vars(module), self.names, self)
        return found


def _imported(namespace: dict[str, Any], names: frozenset[str]) -> Iterator[types.ModuleType]:
    """Modules that code imports when it runs."""
    package = namespace.get("__package__") or ""
    for name in names - namespace.keys():
        for full in (name, f"{package}.{name}", f"{package.rpartition('.')[0]}.{name}"):
            if isinstance(module := sys.modules.get(full), types.ModuleType) and is_of_a_pack(module):
                yield module


_variables: dict[tuple[types.CodeType, int], Variables] = {}


def _variables_of(function: types.FunctionType) -> Variables | None:
    """The variables that a function may change; None for a function that is no pack's."""
    if is_stateless(package_of(function)):
        return None
    key = function.__code__, id(function.__globals__)
    found = _variables.get(key)
    if found is None or found.namespace is not function.__globals__:
        if len(_variables) >= MOST_CODE:
            _variables.clear()
        found = _variables[key] = Variables(function.__globals__, _names(function.__code__))
    return found


@functools.lru_cache(maxsize=MOST_CODE)
def _names(code: types.CodeType) -> frozenset[str]:
    """All names in code, and strings that may be names, including the functions within it; no ``__special__`` ones."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    texts = (constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier())
    found = frozenset(code.co_names).union(texts, *inner)
    return frozenset(name for name in found if not name.startswith("__"))


def _data_of_module(module: types.ModuleType) -> dict[str, Any]:
    """The variables of a module that is reached in another way than by code that names it."""
    if not is_of_a_pack(module):
        return {}
    found = ((name, value) for name, value in vars(module).items() if not name.startswith("__"))
    return {name: value for name, value in found if not isinstance(value, _DEFINED)}


def _put_back_of_module(module: types.ModuleType, kept: dict[str, Any]) -> None:
    for name in _data_of_module(module).keys() - kept.keys():
        del vars(module)[name]
    vars(module).update({name: value for name, value in kept.items() if vars(module).get(name, MISSING) is not value})


_DEFINED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
PYTHON_MODULE = Kind(_data_of_module, _put_back_of_module, lambda module: [*_data_of_module(module).values()])
VARIABLES = Kind(Variables.keep, Variables.put_back, Variables.parts)


# -- functions ---------------------------------------------------------------------------------------------------------


def _keep_of_function(function: types.FunctionType) -> tuple:
    return [(cell, _content(cell)) for cell in function.__closure__ or ()], vars(function).copy()


def _put_back_of_function(function: types.FunctionType, kept: tuple) -> None:
    cells, attributes = kept
    for cell, content in cells:
        if content is not MISSING:
            cell.cell_contents = content
        elif _content(cell) is not MISSING:
            del cell.cell_contents
    refill_dict(vars(function), attributes)


def _parts_of_function(function: types.FunctionType) -> Iterator[Any]:
    yield from (_content(cell) for cell in function.__closure__ or ())
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    yield _variables_of(function)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # A variable that has no value yet, or none any more.
        return MISSING


FUNCTION = Kind(_keep_of_function, _put_back_of_function, _parts_of_function)


# -- objects -----------------------------------------------------------------------------------------------------------


def _keep_of_object(value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return getattr(value, "__dict__", {}).copy(), {name: getattr(value, name, MISSING) for name in slots(type(value))}


def _put_back_of_object(value: Any, kept: tuple[dict[str, Any], dict[str, Any]]) -> None:
    attributes, content_of_slots = kept
    if hasattr(value, "__dict__"):
        refill_dict(vars(value), attributes)
    for name, content in content_of_slots.items():
        if content is not MISSING:
            object.__setattr__(value, name, content)
        elif hasattr(value, name):
            object.__delattr__(value, name)


def _parts_of_object(value: Any) -> Iterator[Any]:
    attributes, content_of_slots = _keep_of_object(value)
    yield from attributes.values()
    yield from content_of_slots.values()
    yield type(value)


@functools.lru_cache(maxsize=4096)
def slots(kind: type) -> tuple[str, ...]:
    """The names of the slots of a class, as the class stores them."""
    found = []
    for one in kind.__mro__:
        names = vars(one).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{one.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


OBJECT = Kind(_keep_of_object, _put_back_of_object, _parts_of_object)


# -- classes -----------------------------------------------------------------------------------------------------------


def _keep_of_class(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("__") and _is_data(value)}


def _put_back_of_class(kind: type, kept: dict[str, Any]) -> None:
    for name in _keep_of_class(kind).keys() - kept.keys():
        delattr(kind, name)
    for name, value in kept.items():
        if vars(kind).get(name, MISSING) is not value:
            setattr(kind, name, value)


def _is_data(value: Any) -> bool:
    """Whether ``value`` is data that code sets on a class, and not a part of the class's definition."""
    return not (isinstance(value, type) or hasattr(type(value), "__get__"))


def _parts_of_class(kind: type) -> Iterator[Any]:
    yield from _keep_of_class(kind).values()
    yield from kind.__bases__
    yield from _variables_of_methods(kind)


_of_methods: weakref.WeakKeyDictionary[type, list[Variables]] = weakref.WeakKeyDictionary()


def _variables_of_methods(kind: type) -> list[Variables]:
    found = _of_methods.get(kind)
    if found is None:
        names: dict[int, tuple[dict[str, Any], frozenset[str]]] = {}
        for function in itertools.chain.from_iterable(map(_functions, vars(kind).values())):
            if (variables := _variables_of(function)) is not None:
                space = variables.namespace
                names[id(space)] = space, names.get(id(space), (space, frozenset()))[1] | variables.names
        found = _of_methods[kind] = [Variables(*each) for each in names.values()]
    return found


def _functions(value: Any) -> list[types.FunctionType]:
    """The functions of which an attribute of a class consists."""
    found = [value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset", "func", "__wrapped__"))]
    return [one for one in found if isinstance(one, types.FunctionType)]


CLASS = Kind(_keep_of_class, _put_back_of_class, _parts_of_class)


# -- unknown objects ---------------------------------------------------------------------------------------------------


def _tell(*_: Any) -> None:
    raise Changed("nobody can tell whether it has changed")


UNKNOWN = Kind(nothing, _tell, nothing)


def is_unknown(kind: type) -> bool:
    """Whether objects of this class keep their content where Python cannot look."""
    return not kind.__dictoffset__ and not any("__slots__" in vars(one) for one in kind.__mro__)
