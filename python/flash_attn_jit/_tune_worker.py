"""The process that measures for ``tune()`` and ``autotune()``: the compiled module alone, without torch.

Run by its path, as ``_tune_worker.py MODULE_FILE``: the package itself imports torch.
"""

import sys
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location


def main(module_file: str) -> None:
    spec = spec_from_file_location("_core", module_file, loader=ExtensionFileLoader("_core", module_file))
    assert spec is not None and spec.loader is not None
    core = module_from_spec(spec)
    spec.loader.exec_module(core)
    core.run_tune_worker()


if __name__ == "__main__":
    main(sys.argv[1])
