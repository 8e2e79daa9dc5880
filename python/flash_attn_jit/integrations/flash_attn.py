"""A module ``flash_attn`` for programs that import flash-attn by name: in this process on request, or from the
distribution of ``packages/flash-attn``. Its files are those of ``flash_attn_module``."""

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["as_flash_attn"]

_NAME, _DISTRIBUTION = "flash_attn", "flash-attn"
VERSION = "2.8.3+jit"  # of the distribution; what comes behind the + tells it from flash-attn's own
_FOLDER = Path(__file__).with_name("flash_attn_module")


def as_flash_attn() -> None:
    """Makes ``import flash_attn`` find this package in this process: flash-attn 2's names, its version 2.8.3, and
    metadata of a distribution "flash-attn". For programs that ask for flash-attn by name: transformers'
    ``attn_implementation="flash_attention_2"``, diffusers' "flash" backend, models with remote code. ::

        import flash_attn_jit
        flash_attn_jit.as_flash_attn()      # before diffusers is imported
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flash_attention_2", dtype=torch.float16)

    There are ``flash_attn``, ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding``; importing other parts
    of flash-attn (``flash_attn.ops``, ``flash_attn.layers``) is an ImportError that says so. Processes that this one
    starts call it themselves, or find the distribution of ``packages/flash-attn``. Calling it again does nothing, nor
    does it where that distribution is installed.

    Raises:
        RuntimeError: there is another flash_attn, installed or imported, which stays; or diffusers, or a
            model's module of transformers that looks for one by itself, has been imported and has found none.
    """
    if is_ours():
        return
    _refuse_another()
    _refuse_those_that_have_looked()
    sys.meta_path.append(_Module())
    refuse_other_submodules()
    _forget_answers_of_transformers()


def is_ours() -> bool:
    """Whether ``import flash_attn`` finds this package."""
    if _NAME not in sys.modules and _version() != VERSION:
        return False
    return _places(importlib.import_module(_NAME)) == [str(_FOLDER)]


def _version() -> str | None:
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _places(module: ModuleType) -> list[str]:
    return list(getattr(module, "__path__", None) or [getattr(module, "__file__", None) or "no file"])


def _refuse_another() -> None:
    version = _version()
    if _NAME in sys.modules:
        came = f"has been imported from {', '.join(_places(sys.modules[_NAME]))}"
    elif spec := importlib.util.find_spec(_NAME):
        came = f"is at {', '.join(spec.submodule_search_locations or [str(spec.origin)])}"
    elif version is not None:
        came = "is the name of an installed distribution's module"
    else:
        return
    raise RuntimeError(
        f"flash_attn {came} (flash-attn {version or 'is no distribution here'}); accepted: none, for nothing is put "
        "over another. Uninstall it (pip uninstall flash-attn) or take it off the path, or import flash_attn_jit "
        "instead of it"
    )


# ---- What has looked for flash-attn before


def _refuse_those_that_have_looked() -> None:
    looked = ["diffusers"] if "diffusers.utils.import_utils" in sys.modules else []
    looked += [
        name
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and _QUESTIONS & vars(module).keys()
    ]
    if looked:
        raise RuntimeError(
            f"{', '.join(looked)} has been imported, and has found no flash_attn; accepted: as_flash_attn() before that"
        )


# What modules of transformers' models ask while they are imported, and import more or less then.
_QUESTIONS = {"is_flash_attn_available", "is_flash_attn_2_available"}


def _forget_answers_of_transformers() -> None:
    questions = sys.modules.get("transformers.utils.import_utils")
    for name, function in list(vars(questions).items()) if questions is not None else []:
        if "flash_attn" in name or name == "_package_distribution_mapping":
            getattr(function, "cache_clear", lambda: None)()
    paged: Any = sys.modules.get("transformers.integrations.flash_paged")
    if hasattr(paged, "FLASH_ATTN_VARLEN_FUNC"):  # transformers 4 imports it, or what raises in its place
        paged.FLASH_ATTN_VARLEN_FUNC = importlib.import_module(_NAME).flash_attn_varlen_func


# ---- The module


class _Module(DistributionFinder):
    """Finds flash_attn itself; its submodules are found in its folder as any package's are."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _NAME:
            return None
        file = _FOLDER / "__init__.py"
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(_FOLDER)])

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        if context is None or context.name is None or context.name.lower().replace("_", "-") == _DISTRIBUTION:
            yield _Metadata()


_FILES = {
    "METADATA": f"Metadata-Version: 2.1\nName: {_DISTRIBUTION}\nVersion: {VERSION}\n",
    "top_level.txt": f"{_NAME}\n",
}


class _Metadata(Distribution):
    def read_text(self, filename: str) -> str | None:
        return _FILES.get(filename)

    def locate_file(self, path: Any) -> Any:
        return _FOLDER.parent / path


class _OtherSubmodules(MetaPathFinder):
    """Stands behind the finders that look into flash_attn's folder."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        # Who only asks, by importlib.util.find_spec(), gets the answer None.
        is_import = sys._getframe(2).f_code.co_name == "_find_and_load_unlocked"
        if is_import and name.startswith(f"{_NAME}.") and is_ours():
            # Without the error's `name`: `from flash_attn import ops` would make an error of its own of it.
            raise ModuleNotFoundError(
                f"{name} is not there: this flash_attn is flash_attn_jit's, which has flash_attn, "
                f"{', '.join(f'{_NAME}.{part}' for part in _submodules())}, and nothing else of flash-attn"
            )


def _submodules() -> Iterable[str]:
    return sorted(file.stem for file in _FOLDER.glob("*.py") if file.stem != "__init__")


def refuse_other_submodules() -> None:
    """Importing what flash_attn lacks says what there is."""
    if not any(isinstance(finder, _OtherSubmodules) for finder in sys.meta_path):
        sys.meta_path.append(_OtherSubmodules())
