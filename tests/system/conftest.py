"""The small run's model, written once."""

import pathlib

import pytest
import small_run


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> pathlib.Path:
  """A Hugging Face folder."""
  folder = tmp_path_factory.mktemp("model") / "tiny"
  small_run.write_model(folder)
  return folder
