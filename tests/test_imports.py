"""Who may import whom: the house's direction, read from the source.

The rules are data at the top; the checks read every import with `ast`,
wherever in a file it stands. The last test imports the JAX-free packages with
JAX made unimportable, which no reading of the source can replace.
"""

import ast
from collections.abc import Iterator
import dataclasses
import graphlib
import itertools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "forge_jax"
MOST_LINES = 400

# Modules that anyone may import; they import only each other.
LEAVES = ("types", "errors", "paths", "observe.metrics", "observe.names")
LEAVES += ("agents.sandbox.base",)
# What a package may import beside the leaves and itself.
ALLOWED = {
  "algo": (),
  "model": (),
  "tree": (),
  "tasks": (),
  "agents": ("tasks.base",),
  "gateway": ("engine.api", "engine.scripted", "pool.segment"),
  "engine": ("model", "algo.mtp"),
  "pool": (),
  "rollout": ("tasks", "agents", "pool", "gateway.client", "gateway.wire"),
  "trainer": ("model", "tree", "algo", "pool"),
  "observe": (),
  "client": ("gateway.wire",),
  "settings": (),  # between a configuration and dataclasses: for launch
}
# JAX, what is built on it, and what the engine alone computes with.
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "llguidance")
# What installs and runs without JAX.
JAX_FREE = (
  *LEAVES,
  *("agents", "gateway", "tasks", "pool", "rollout", "observe"),
  *("client", "engine.api", "engine.scripted"),
)
# Top-level packages that only their own files may import.
PRIVATE = ("launch", "experiments")


@dataclasses.dataclass(frozen=True)
class Import:
  """One imported name: `from forge_jax.tasks import base` in a file."""

  path: pathlib.Path  # relative to the root of the tree
  line: int
  importer: str  # dotted module
  target: str  # dotted module, or name in a module

  def __str__(self):
    return f"{self.path}:{self.line}: {self.importer} imports {self.target}"


def python_files(root: pathlib.Path) -> list[pathlib.Path]:
  tops = [root / top for top in (PACKAGE, *PRIVATE)]
  return sorted(p for top in tops for p in top.rglob("*.py"))


def module_name(root: pathlib.Path, path: pathlib.Path) -> str:
  parts = path.relative_to(root).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(root: pathlib.Path) -> Iterator[Import]:
  """Every import of the tree; a relative one has a target with a dot first."""
  for path in python_files(root):
    importer = module_name(root, path)
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      if isinstance(node, ast.Import):
        targets = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        module = "." * node.level + (node.module or "")
        targets = [f"{module}.{alias.name}" for alias in node.names]
      else:
        continue
      for target in targets:
        yield Import(path.relative_to(root), node.lineno, importer, target)


def within(name: str, prefix: str) -> bool:
  return name == prefix or name.startswith(prefix + ".")


def inner(name: str) -> str | None:
  """A name without the package's; None: not of the package."""
  return name.removeprefix(PACKAGE + ".") if within(name, PACKAGE) else None


def breaches(root: pathlib.Path) -> list[str]:
  """The imports that go against the table, each with what is allowed."""
  found = []
  for one in read_imports(root):
    importer, target = inner(one.importer), inner(one.target)
    top = one.target.split(".")[0]
    if one.target.startswith("."):
      found.append(f"{one}: relative imports hide their direction")
    elif top in PRIVATE and not within(one.importer, top):
      found.append(f"{one}: nobody imports {top}")
    elif importer is not None and target is not None:
      allowed = permitted(importer)
      if allowed is None:
        found.append(f"{one}: {importer} has no row in {__name__}")
      elif not any(within(target, prefix) for prefix in allowed):
        found.append(f"{one}: it may import {', '.join(allowed)}")
  return found


def permitted(importer: str) -> tuple[str, ...] | None:
  """The prefixes that a module may import; None: it is not in the table."""
  if importer in (*LEAVES, PACKAGE):
    return LEAVES
  unit = importer.split(".")[0]
  if unit not in ALLOWED:
    return None
  return (unit, *ALLOWED[unit], *LEAVES)


def modules(root: pathlib.Path) -> set[str]:
  return {module_name(root, path) for path in python_files(root)}


def edges(root: pathlib.Path) -> dict[str, dict[str, Import]]:
  """By module: the modules and outside names it imports, with the place.

  To import a module is to run the packages around it, too.
  """
  known = modules(root)
  graph: dict[str, dict[str, Import]] = {name: {} for name in known}
  for one in read_imports(root):
    parts = one.target.split(".")
    for end in range(1, len(parts) + 1):
      name = ".".join(parts[:end])
      if name in known or end == 1:
        graph[one.importer].setdefault(name, one)
  return graph


def package_cycles(root: pathlib.Path) -> list[str]:
  """The first cycle between packages, with an import for each of its sides."""
  places: dict[tuple[str, str], Import] = {}
  graph: dict[str, set[str]] = {}
  for one in read_imports(root):
    importer, target = inner(one.importer), inner(one.target)
    if importer is None or target is None or importer in LEAVES:
      continue
    # A leaf is a unit of its own, so that observe may import errors.
    if any(within(target, leaf) for leaf in LEAVES):
      continue
    source, sink = importer.split(".")[0], target.split(".")[0]
    if source != sink:
      graph.setdefault(source, set()).add(sink)
      places.setdefault((source, sink), one)
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    # The sorter lists each node before one that depends on it.
    around = error.args[1][::-1]
    return [str(places[pair]) for pair in itertools.pairwise(around)]
  return []


def jax_chains(root: pathlib.Path) -> list[str]:
  """How each JAX-free module that comes to import JAX does so."""
  graph = edges(root)
  found = []
  for start in sorted(graph):
    name = inner(start)
    if name is None or not any(within(name, free) for free in JAX_FREE):
      continue
    chain = chain_to_jax(graph, start)
    if chain:
      found.append("\n  then ".join(map(str, chain)))
  return found


def chain_to_jax(
  graph: dict[str, dict[str, Import]], start: str
) -> list[Import]:
  """The imports on a shortest way from a module to JAX; empty: none."""
  frontier: list[tuple[str, list[Import]]] = [(start, [])]
  seen = {start}
  for module, chain in frontier:
    for target, place in graph.get(module, {}).items():
      if target in JAX:
        return [*chain, place]
      if target in graph and target not in seen:
        seen.add(target)
        frontier.append((target, [*chain, place]))
  return []


def long_files(root: pathlib.Path) -> list[str]:
  counts = {
    path.relative_to(root): len(path.read_text("utf-8").splitlines())
    for path in python_files(root)
  }
  return [
    f"{path}: {lines} lines, at most {MOST_LINES}"
    for path, lines in counts.items()
    if lines > MOST_LINES
  ]


@pytest.mark.parametrize(
  "check", [breaches, package_cycles, jax_chains, long_files]
)
def test_the_house_is_in_order(check):
  found = check(ROOT)
  assert not found, "\n" + "\n".join(found)


def test_the_table_is_of_this_tree():
  known = {name for module in modules(ROOT) if (name := inner(module))}
  units = {n.split(".")[0] for n in known if n not in (*LEAVES, PACKAGE)}
  assert units == set(ALLOWED)
  assert set(LEAVES) <= known


def test_the_jax_free_packages_import_without_jax():
  free = [
    name
    for name in sorted(modules(ROOT))
    if any(within(inner(name) or "", one) for one in JAX_FREE)
  ]
  assert len(free) > len(JAX_FREE)
  code = (
    "import importlib, sys\n"
    f"for name in {JAX}: sys.modules[name] = None\n"
    f"for name in {free}: importlib.import_module(name)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stderr


# The checks themselves, on small trees.


def build(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return root


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    (
      "forge_jax/agents/react.py",
      "import os\nfrom forge_jax.gateway import server\n",
      "agents/react.py:2: forge_jax.agents.react imports "
      "forge_jax.gateway.server: it may import agents, tasks.base,",
    ),
    (
      "forge_jax/trainer/loop.py",
      "def f():\n  import forge_jax.engine.api\n",
      "loop.py:2: forge_jax.trainer.loop imports forge_jax.engine.api",
    ),
    ("forge_jax/errors.py", "from forge_jax.pool import store", "may import"),
    ("forge_jax/pool/store.py", "from launch import train", "nobody imports"),
    ("launch/train.py", "import experiments.demo", "nobody imports"),
    ("experiments/demo.py", "from launch import train", "nobody imports"),
    ("forge_jax/pool/store.py", "from . import codec", "relative"),
    ("forge_jax/new/thing.py", "from forge_jax import types", "no row"),
  ],
)
def test_a_breach_is_named(tmp_path, name, text, message):
  (found,) = breaches(build(tmp_path, {name: text}))
  assert message in found


def test_what_is_allowed_is_no_breach(tmp_path):
  files = {
    "forge_jax/agents/react.py": "from forge_jax.tasks import base\n",
    "forge_jax/agents/base.py": "from forge_jax import errors, types\n",
    "forge_jax/engine/e.py": "from forge_jax.observe import metrics\n",
    "forge_jax/observe/metrics.py": "from forge_jax import errors\n",
    "launch/train.py": "from forge_jax.trainer import loop\nimport launch.x\n",
  }
  assert breaches(build(tmp_path, files)) == []


def test_a_cycle_is_named(tmp_path):
  files = {
    "forge_jax/pool/a.py": "from forge_jax.tree import b\n",
    "forge_jax/tree/b.py": "from forge_jax.algo import c\n",
    "forge_jax/algo/c.py": "import os\nfrom forge_jax.pool import a\n",
  }
  found = package_cycles(build(tmp_path, files))
  assert sorted(found) == [
    "forge_jax/algo/c.py:2: forge_jax.algo.c imports forge_jax.pool.a",
    "forge_jax/pool/a.py:1: forge_jax.pool.a imports forge_jax.tree.b",
    "forge_jax/tree/b.py:1: forge_jax.tree.b imports forge_jax.algo.c",
  ]


def test_jax_is_found_behind_a_package(tmp_path):
  files = {
    "forge_jax/__init__.py": "",
    "forge_jax/gateway/server.py": "from forge_jax.engine import api\n",
    "forge_jax/engine/__init__.py": "\nfrom jax import numpy\n",
    "forge_jax/engine/api.py": "",
    "forge_jax/model/decoder.py": "import jax\n",
  }
  found = jax_chains(build(tmp_path, files))
  assert found == [
    "forge_jax/gateway/server.py:1: forge_jax.gateway.server imports "
    "forge_jax.engine.api\n"
    "  then forge_jax/engine/__init__.py:2: forge_jax.engine imports jax.numpy"
  ]


def test_a_long_file_is_named(tmp_path):
  files = {
    "forge_jax/long.py": "pass\n" * (MOST_LINES + 1),
    "launch/fits.py": "pass\n" * MOST_LINES,
  }
  found = long_files(build(tmp_path, files))
  assert found == ["forge_jax/long.py: 401 lines, at most 400"]
