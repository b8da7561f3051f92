"""The packages that act, ask and capture run where JAX is not installed."""

import subprocess
import sys

_PROGRAM = """
import importlib, pkgutil, sys

class Blocked:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in ("jax", "jaxlib", "flax", "optax"):
      raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
names = ["forge_jax.engine." + n for n in ("api", "scripted", "server", "sglang")]
for package in ("tasks", "agents", "gateway"):
  root = importlib.import_module(f"forge_jax.{package}")
  prefix = root.__name__ + "."
  names += [m.name for m in pkgutil.walk_packages(root.__path__, prefix)]
for name in names:
  importlib.import_module(name)
print(len(names), "jax" in sys.modules)
"""


def test_agents_gateway_and_tasks_import_without_jax():
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  count, found = done.stdout.split()
  assert int(count) >= 15
  assert found == "False"
