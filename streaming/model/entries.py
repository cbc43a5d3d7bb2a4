"""Reports when modules are entered and left: by a call, or by any other method of theirs.

[Note: entries]
A model mostly calls its blocks, and torch has hooks for that. Some models call other methods of a block
(``block.forward_pose(...)``), for which torch has no hooks. So while a module is watched, a :class:`Method` on it
replaces each method of its class, except those of ``nn.Module``: it is not known which of them compute. Each calls the
method that it replaces: what other code has put on the module under that name, or what its class has at the time. It is
removed again, and if other code has kept it, it only passes calls on.

A module that has been entered is not entered again: a forward that calls methods of its own, or a method that calls the
module, is one entry, and reported once. So only an entry from outside costs more than one check.

Classes are not changed, because other models have modules of them too. Nor does a module get another class, because
much code checks that. ``forward`` is left alone: torch's hooks are around it, and compilers and other packs replace it.
A call of ``block.forward(...)`` enters nothing (by_units.py, Note: entered by its units).

torch.compile traces through :class:`Method` where the module has been entered already, and so sees nothing of it. What
runs at an entry is hidden from it, as hooks are (hooks.py, Note: compiled models).

A method may return weights of its module, or views of them, which are used after the module has been left; so copies of
them are returned. A shallow copy of a watched module has the :class:`Method` of the original, and runs that.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import nn

# Called at an entry with (module, args, kwargs); may return other arguments.
Begins = Callable[[nn.Module, tuple, dict[str, Any]], "tuple[tuple, dict[str, Any]] | None"]

# Classes of tensors whose storage tells where their values are.
PLAIN = (torch.Tensor, nn.Parameter)

# The hooks of all Entries, and those of them that are outermost.
_ours: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()
_outermost: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()

# A method that returns at once and computes later is no entry.
LATER = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Ends(Protocol):
    """Called after an entry; may return another output. The output is None after an exception, and only then."""

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any: ...


def is_ours(hook: Callable[..., Any]) -> bool:
    """Whether a hook on a module is one of :class:`Entries`."""
    return _is_in(_ours, hook)


def _is_in(hooks: weakref.WeakSet[Callable[..., Any]], hook: Callable[..., Any]) -> bool:
    """Whether it is one of these, which are ours. Hooks of other code may have no hash."""
    return isinstance(hook, _hidden_class()) and hook in hooks


def hidden(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls ``hook`` and is hidden from torch.compile; itself if that is what it is."""
    if is_ours(hook):
        return hook
    hiding = _hidden_class()(hook)
    _ours.add(hiding)
    return hiding


@cache
def _hidden_class() -> type:
    """A class of functions that torch.compile does not look into. Made when it is first needed: that imports much.

    torch.compiler.disable makes eleven objects. There is one class of which it hides all calls, and not one wrapper for
    each hook, as thousands of objects bring nearer that Python's collector looks through all (collector.py).
    """

    class Hidden:
        __slots__ = ("__weakref__", "_hook")

        def __init__(self, hook: Callable[..., Any]) -> None:
            self._hook = hook

        @torch.compiler.disable
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._hook(*args, **kwargs)

    return Hidden


class Entries:
    """Reports the entries into several modules to one listener.

    Args:
        outermost: a call is reported to it before all others, and after them, whoever watches the module later.
    """

    def __init__(self, outermost: bool = False) -> None:
        self._is_outermost = outermost
        self._handles: list[Any] = []
        self._doors: list[_Door] = []

    def watch(
        self, module: nn.Module, begins: Begins, ends: Ends, always_ends: bool = True, methods: bool = True
    ) -> None:
        """Report when ``module`` is entered and left; before and after all hooks that it has already.

        Args:
            module: what is entered.
            begins: called before.
            ends: called after.
            always_ends: whether ``ends`` is called after an ``Exception`` too. After another ``BaseException`` it is
                not called, as with torch's hooks, and :meth:`settle` is needed.
            methods: whether other methods are entries too, not only a call.
        """
        found = entry_methods(type(module)) if methods else ()
        # Without names under which the module has something that cannot be called.
        names = [name for name in found if callable(vars(module).get(name, _nothing))]
        if names:
            door = _Door(begins, ends, always_ends)
            self._doors.append(door)
            begins, ends, always_ends = door.enter, door.leave, True
        hidden_begins, hidden_ends = hidden(begins), hidden(ends)
        self._handles.append(module.register_forward_pre_hook(hidden_begins, prepend=True, with_kwargs=True))
        self._handles.append(module.register_forward_hook(hidden_ends, always_call=always_ends))
        if self._is_outermost:
            _outermost.update((hidden_begins, hidden_ends))
        _put_outside(module._forward_pre_hooks, last=False)
        _put_outside(module._forward_hooks, last=True)
        self._handles += [Method.put(module, name, door, hidden_begins, hidden_ends) for name in names]

    def settle(self) -> None:
        """Count every module as left, whatever an interrupt has left behind."""
        for door in self._doors:
            door.inside, door.depth = False, 0

    def remove(self) -> None:
        """Report nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._doors.clear()


def _put_outside(hooks: OrderedDict[int, Callable[..., Any]], last: bool) -> None:
    """Have the outermost hook called first, or last. torch puts hooks in order in the same way."""
    for number in [number for number, hook in hooks.items() if _is_in(_outermost, hook)]:
        hooks.move_to_end(number, last=last)


class _Door:
    """Reports those entries into one module that come from outside.

    Attributes:
        inside: whether it has been entered. (A plain value, because torch.compile reads it.)
        depth: the number of calls that have begun and not ended, including a method around them.
    """

    def __init__(self, begins: Begins, ends: Ends, always_ends: bool) -> None:
        self.inside = False
        self.depth = 0
        self._begins, self._ends, self._always_ends = begins, ends, always_ends

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.depth += 1
        if self.depth > 1:
            return None
        self.inside = True
        return self._begins(module, args, kwargs)

    def leave(self, module: nn.Module, args: object, output: Any) -> Any:
        if self.depth == 0:
            return None  # Settled meanwhile, or never entered: a hook that comes before has failed.
        self.depth -= 1
        if self.depth > 0:
            return None
        self.inside = False
        return self._ends(module, args, output) if output is not None or self._always_ends else None


class Method:
    """Replaces one method of a module (Note: entries), and looks like that method to code that inspects it.

    Args:
        module: the module, which is referred to weakly, because it holds this object.
        name: of the method.
        instead_of: what was on the module under this name; None where there was only what its class has.
    """

    def __init__(self, module: nn.Module, name: str, instead_of: Any) -> None:
        self._module = weakref.ref(module)
        self._name = name
        self._beneath = instead_of
        self._door: _Door | None = None
        self._enter: Callable[..., Any] = _nothing
        self._leave: Callable[..., Any] = _nothing

    @classmethod
    def put(
        cls, module: nn.Module, name: str, door: _Door, enter: Callable[..., Any], leave: Callable[..., Any]
    ) -> Method:
        """Put one on ``module``, until :meth:`remove`; beneath one that reports to whoever is outermost."""
        above, top = None, _in_use(vars(module).get(name))
        while isinstance(top, Method) and _is_in(_outermost, top._enter):
            above, top = top, _in_use(top._beneath)
        method = cls(module, name, top)
        method._door, method._enter, method._leave = door, enter, leave
        if above is None:
            vars(module)[name] = method
        else:
            above._beneath = method
        return method

    def remove(self) -> None:
        """Restore what was on the module before; if other code has put something else there, that stays."""
        self._door, self._enter, self._leave = None, _nothing, _nothing
        module = self.module
        if module is not None and vars(module).get(self._name) is self:
            beneath = _in_use(self._beneath)
            if beneath is None:
                del vars(module)[self._name]
            else:
                vars(module)[self._name] = beneath

    @property
    def module(self) -> nn.Module | None:
        """The module; None if it does not exist any more."""
        return self._module()

    @property
    def in_use(self) -> bool:
        """Whether it reports entries."""
        return self._door is not None

    @property
    def instead_of(self) -> Any:
        """What other code has put on the module under this name; None if there is nothing."""
        return getattr(self._beneath, "instead_of", self._beneath)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        door = self._door
        if door is None or door.inside:
            return self._call(args, kwargs)
        module, output = self.__self__, None
        try:
            args, kwargs = self._enter(module, args, kwargs) or (args, kwargs)
            output = _apart(self._call(args, kwargs), module)
        except Exception:
            self._leave(module, args, None)
            raise
        except BaseException:
            door.inside, door.depth = False, 0
            raise
        changed = self._leave(module, args, () if output is None else output)  # None would mean an exception.
        return output if changed is None or output is None else changed

    def _call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        beneath = self._beneath
        if beneath is None:
            module = self._module()
            if module is not None:
                return getattr(type(module), self._name)(module, *args, **kwargs)
            return self.__func__(self.__self__, *args, **kwargs)  # Raises, because the module is gone.
        if isinstance(beneath, Method) and not beneath.in_use:
            self._beneath = _in_use(beneath)  # Otherwise the chain would grow each time that one is put there.
            return self._call(args, kwargs)
        return beneath(*args, **kwargs)

    # -- like a method -------------------------------------------------------------------------------------------

    @property
    def __self__(self) -> nn.Module:
        module = self.module
        if module is None:
            raise ReferenceError(f"the module whose {self._name} this is does not exist any more")
        return module

    @property
    def __func__(self) -> Callable[..., Any]:
        return getattr(type(self.__self__), self._name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.instead_of or MethodType(self.__func__, self.__self__))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and not name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.instead_of or self.__func__, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Method:
        """Return one for a copy of the module; it reports nothing."""
        return Method(copy.deepcopy(self.__self__, memo), self._name, copy.deepcopy(self.instead_of, memo))


@torch.compiler.disable
def _apart(output: Any, module: nn.Module) -> Any:
    """Return ``output`` with copies of the module's own tensors, also in tuples, lists and dictionaries: its weights
    are there only until it is left. Code that writes to the output writes to the copies."""
    if output is None:
        return None
    own = [*module.parameters(), *module.buffers()]
    addresses = {each.untyped_storage().data_ptr() for each in own if type(each) in PLAIN}

    def apart(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            mine = type(value) in PLAIN and value.untyped_storage().data_ptr() in addresses
            return value.detach().clone() if mine or any(value is each for each in own) else value
        if type(value) in (tuple, list):
            parts = [apart(part) for part in value]
            return value if all(new is old for new, old in zip(parts, value, strict=True)) else type(value)(parts)
        if type(value) is dict:
            parts = {name: apart(part) for name, part in value.items()}
            return value if all(parts[name] is old for name, old in value.items()) else parts
        return value

    return apart(output)


def _nothing(*args: Any) -> None:
    """Report nothing."""


def _in_use(value: Any) -> Any:
    """Return ``value``, or what is beneath it if it is a :class:`Method` that reports nothing."""
    while isinstance(value, Method) and not value.in_use:
        value = value._beneath
    return value


def entry_methods(kind: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the methods by which a module of this class may be entered, beside its call."""
    return tuple(_entry_methods(kind))


def _entry_methods(kind: type[nn.Module]) -> Iterator[str]:
    for one in kind.__mro__:
        if one in (nn.Module, object):
            continue
        for name, value in vars(one).items():
            if name.startswith("__") or hasattr(nn.Module, name) or not isinstance(value, FunctionType):
                continue
            if getattr(kind, name) is value and not value.__code__.co_flags & LATER:
                yield name
