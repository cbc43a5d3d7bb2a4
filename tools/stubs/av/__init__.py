"""Stands in for PyAV where no video codecs are installed: importable, and an ImportError on first use.

ComfyUI imports ``av`` wherever a video type is named, also in code that never touches a video.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _Absent(type):
    """A name of PyAV that can be imported, annotated and subclassed, but not used."""

    def __call__(cls, *args, **kwargs):
        raise ImportError(f"{cls.__name__} needs PyAV: unpack the part 'video', or install the package 'av'")

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {})

    def __or__(cls, other):
        return cls

    __ror__ = __or__


class _Module(types.ModuleType):
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("av."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())
sys.modules[__name__].__class__ = _Module
