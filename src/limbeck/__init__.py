"""limbeck distils a large language model into a small one."""

from limbeck.errors import LimbeckError
from limbeck.pipeline import Run, compare, distill
from limbeck.recipe import Recipe

__version__ = "0.1.0"

__all__ = ["LimbeckError", "Recipe", "Run", "__version__", "compare", "distill"]
