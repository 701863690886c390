"""ggml's own numbers, as the `gguf` package has them: type codes, block sizes, file types.

They are one module of that package, whose door also loads its readers, writers and their libraries: 30 ms of every start, for
parts that nothing here uses. So the module is loaded from its file, by itself; where it is not a plain file, by the door.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def _constants() -> ModuleType:
    package = None if "gguf" in sys.modules else find_spec("gguf")
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        spec = spec_from_file_location("aprlab.quants._ggml_constants", Path(folder) / "constants.py")
        if spec is not None and spec.loader is not None and (Path(folder) / "constants.py").is_file():
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    return import_module("gguf.constants")


_TABLES = _constants()
GGMLQuantizationType = _TABLES.GGMLQuantizationType
GGML_QUANT_SIZES: dict[int, tuple[int, int]] = _TABLES.GGML_QUANT_SIZES
LlamaFileType = _TABLES.LlamaFileType
