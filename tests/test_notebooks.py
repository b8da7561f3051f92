"""Notebooks define no logic: they run the package. What they name must exist."""

import ast
import importlib
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path):
  book = json.loads(path.read_text(encoding="utf-8"))
  assert book["nbformat"] == 4
  return [
    "".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"
  ]


def commands(source):
  """The shell commands of a cell, continued lines joined."""
  joined = source.replace("\\\n", " ")
  return [line[1:] for line in joined.splitlines() if line.startswith("!")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_python_that_imports_what_exists(path):
  for source in cells(path):
    if source.startswith(("%", "!")):
      continue
    tree = ast.parse(source)
    assert not [
      n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)
    ]
    for node in ast.walk(tree):
      if isinstance(node, ast.ImportFrom) and node.module.startswith(
        "forge_jax"
      ):
        module = importlib.import_module(node.module)
        for alias in node.names:
          if not hasattr(module, alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebooks_commands_name_modules_and_files_that_exist(path):
  found = [command for source in cells(path) for command in commands(source)]
  assert found
  for command in found:
    module = re.match(r"python -m ([\w.]+)", command)[1]
    assert (ROOT / (module.replace(".", "/") + ".py")).exists()
    for config in re.findall(r"--config=(\S+)", command):
      assert (ROOT / config).exists()
