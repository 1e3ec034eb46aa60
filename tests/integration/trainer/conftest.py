"""Worlds of worker processes over gloo."""

from tests.worlds import data_file, make_model, make_world, model_dir, pairs_file

__all__ = ["data_file", "make_model", "make_world", "model_dir", "pairs_file"]
