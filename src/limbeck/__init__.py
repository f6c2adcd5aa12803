"""limbeck distils a large language model into a small one."""

from importlib import import_module
from typing import TYPE_CHECKING

from limbeck.errors import LimbeckError

if TYPE_CHECKING:
    from limbeck.pipeline import Run, compare, distill
    from limbeck.recipe import Recipe

__version__ = "0.1.0"

__all__ = ["LimbeckError", "Recipe", "Run", "__version__", "compare", "distill"]

if not TYPE_CHECKING:
    # Imported when asked for: the command line and the processes that it starts need a part of the package each.
    _HOMES = {"Recipe": "recipe", "Run": "pipeline", "compare": "pipeline", "distill": "pipeline"}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(f"limbeck.{_HOMES[name]}"), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
