"""The pages themselves: arrays on the device and on the host, and moves.

`prefix_cache.py` says which page holds what. A page is one row, by its number,
of every array here; page 0 belongs to no sequence.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from forge_jax.engine import attention, drafts, prefix_cache
from forge_jax.engine import config as config_lib
from forge_jax.model import config as model_config

_MOVES = 8  # pages moved by one call


class Pages:
  """Holds keys, values and the states that drafting modules read."""

  def __init__(
    self,
    model: model_config.ModelConfig,
    config: config_lib.EngineConfig,
    kind: str,
    dtype: jnp.dtype,
    modules: int,
    mesh: Mesh,
  ):
    """Allocates them, for a kind of attention and so many drafting modules."""
    shapes = attention.cache_shapes(
      kind,
      config.pages,
      config.page,
      model.num_kv_heads,
      model.head_dim,
      config.tensor_parallel,
    )
    heads = NamedSharding(mesh, attention.cache_spec(kind))
    whole = NamedSharding(mesh, P())
    # Where the layers and the modules are.
    self.placement = heads, [drafts.ModuleCache(heads, whole)] * modules
    layer = lambda: tuple(jnp.zeros(s, dtype, device=heads) for s in shapes)
    state = (config.pages, config.page, model.width)
    self.layers: list[attention.Cache] = [
      layer() for _ in range(model.num_layers)
    ]
    self.modules = [
      drafts.ModuleCache(layer(), jnp.zeros(state, dtype, device=whole))
      for _ in range(modules)
    ]
    self._host = [
      np.zeros((config.host_pages, *x.shape[1:]), dtype)
      for x in jax.tree.leaves((self.layers, self.modules))
    ]
    self.compilations = 0  # traces of the functions below, for tests
    onto = {"donate_argnums": (0,), "out_shardings": self.placement}
    self._copy = jax.jit(self._copy_fn, **onto)
    self._save = jax.jit(self._save_fn)
    self._load = jax.jit(self._load_fn, **onto)

  def move(self, moves: Sequence[prefix_cache.Move]) -> None:
    """Copies pages, in order, on the device and from and to the host."""
    while moves:
      kind = moves[0].kind
      some = []
      for move in moves[:_MOVES]:
        if move.kind != kind:
          break
        some.append(move)
      moves = moves[len(some) :]
      source, target = np.zeros((2, _MOVES), np.int32)
      source[: len(some)] = [move.source for move in some]
      target[: len(some)] = [move.target for move in some]
      device = self.layers, self.modules
      if kind == "copy":
        self.layers, self.modules = self._copy(device, source, target)
      elif kind == "save":
        for host, x in zip(self._host, self._save(device, source), strict=True):
          host[target[: len(some)]] = np.asarray(x)[: len(some)]
      else:
        loaded = [host[source] for host in self._host]
        self.layers, self.modules = self._load(device, loaded, target)

  def warm_up(self) -> None:
    """Compiles every kind of move that there can be."""
    kinds = ["copy", "save", "load"] if self._host[0].size else ["copy"]
    self.move([prefix_cache.Move(kind, 0, 0) for kind in kinds])

  def _copy_fn(self, arrays, source, target):
    self.compilations += 1

    def one(i, arrays):
      # In order: a move may read what an earlier one wrote. Those past the
      # moves' end copy page 0 onto itself.
      return jax.tree.map(
        lambda x: jax.lax.dynamic_update_index_in_dim(
          x, x[source[i]], target[i], 0
        ),
        arrays,
      )

    return jax.lax.fori_loop(0, _MOVES, one, arrays)

  def _save_fn(self, arrays, source):
    self.compilations += 1
    return [x[source] for x in jax.tree.leaves(arrays)]

  def _load_fn(self, arrays, loaded, target):
    self.compilations += 1
    leaves, structure = jax.tree.flatten(arrays)
    new = [
      x.at[target].set(pages) for x, pages in zip(leaves, loaded, strict=True)
    ]
    return jax.tree.unflatten(structure, new)
