"""Where a teacher's words come from: a local model, kept on disk once written."""

from limbeck.teachers.cache import TextCache, default_folder, weights_hash

__all__ = ["TextCache", "default_folder", "weights_hash"]
