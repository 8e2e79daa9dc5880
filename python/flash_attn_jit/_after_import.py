"""Something to do once a module is imported, by whomever, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Finder(MetaPathFinder):
    """Finds the one module as Python does, and has `action` called once it has run."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def run_and_act(module: ModuleType) -> None:
            run(module)
            del loader.exec_module  # the class's again: a reload acts no second time
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.action()

        # On this loader alone, which stays the type that it is.
        loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


def after_import(name: str, action: Callable[[], None]) -> None:
    """Calls `action` now where the module of that name is imported, else once it is."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))
