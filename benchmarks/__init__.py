"""Ours beside its peers, in one process on the same tensors and models: `make bench`."""
