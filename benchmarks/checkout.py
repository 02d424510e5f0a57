"""Makes a checkout importable as `inferloom` without installing it. Imports nothing but the standard library."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def bootstrap() -> None:
    """The top-level folders are the sub-packages, as in pyproject.toml."""
    if "inferloom" in sys.modules:
        return
    home = ROOT / "inferloom"
    spec = spec_from_file_location("inferloom", home / "__init__.py", submodule_search_locations=[str(home), str(ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(f"{home} is no package")
    sys.modules["inferloom"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
