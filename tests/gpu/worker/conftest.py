"""Worlds of worker processes on GPUs."""

from tests.worlds import data_file, make_model, make_world, model_dir

__all__ = ["data_file", "make_model", "make_world", "model_dir"]
