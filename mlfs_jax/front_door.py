"""The front door of a package: names imported when they are first used, so that ``--help`` waits for nothing."""

import importlib
import sys
import types
from collections.abc import Mapping


def open_front_door(package: str, home: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Give a package, from its ``__init__``, the names in ``home``; returns them, for ``__all__``.

    Args:
        home: module of the package -> names that live there.
    """
    module_of = {name: module for module, names in home.items() for name in names}

    class FrontDoor(types.ModuleType):
        def __getattr__(self, name: str):
            if name not in module_of:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            value = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
            setattr(self, name, value)
            return value

        def __setattr__(self, name: str, value):
            # importing ``mlfs_jax.generate`` would put the module in the place of the function of that name
            if not (name in module_of and isinstance(value, types.ModuleType)):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return [*vars(self), *module_of]

    sys.modules[package].__class__ = FrontDoor
    return sorted(module_of)
