"""What must hold beside the times: gradients, compilations, memory.

A small decoder runs through the product's step; the reference runs each sample
alone, with dense causal attention, and shares with it only the layers and the
loss.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import resource

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import tree_workloads
from forge_jax import types
from forge_jax.algo import cispo
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.trainer import update
from forge_jax.tree import pack

MODEL = model_config.ModelConfig(
  vocab_size=64,
  width=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=64,
  max_context=64,
  tied_embeddings=True,
)
# Small enough that reduced workloads are cut, and meet every bucket.
PACK = pack.PackConfig(
  tokens=64, edges=64, rows=64, packs=2, block=16, buckets=2
)
COUNT, LENGTH = 24, 64  # of the reference: samples, tokens of the longest


class Equivalence:
  """A decoder's gradient through packed trees against samples one by one."""

  def __init__(
    self,
    model: model_config.ModelConfig = MODEL,
    *,
    wide: bool,
    compute: str | None = None,
    remat: str = "elementwise",
  ):
    """Random weights, none of them small.

    Args:
      model: the decoder's shape.
      wide: float64 throughout, instead of float32.
      compute: what the layers compute in, where not the same.
      remat: the tree's; see model.decoder.REMAT.
    """
    self._wide = wide
    dtype = jnp.float64 if wide else jnp.float32
    with jax.enable_x64(wide):
      decoder = decoder_lib.Decoder(
        model, dtype=compute or dtype, rngs=nnx.Rngs(params=0)
      )
      graph, params = nnx.split(decoder)
      rng = np.random.default_rng(0)
      self._params = jax.tree.map(
        lambda x: jnp.asarray(x + rng.normal(scale=0.2, size=x.shape), dtype),
        jax.device_get(params),
      )
      self.updater = update.Updater(
        nnx.merge(graph, self._params),
        update.UpdateConfig(block=PACK.block, head_chunk=32, remat=remat),
        sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
      )
      self._state = update.TrainState(self._params, None)
      self._reference = jax.jit(
        jax.value_and_grad(lambda params, *x: _separate(graph, params, *x))
      )

  def tree(self, batches: Sequence[types.PackedBatch]) -> tuple:
    """Loss and gradient of packed batches."""
    with jax.enable_x64(self._wide):
      gradient, loss = self.updater.zero_gradient(self._state), 0.0
      for batch in batches:
        gradient, sums = self.updater.accumulate(
          self._state, gradient, batch, 0
        )
        loss += sums["loss"]
      return jax.block_until_ready((loss, gradient))

  def separate(self, samples: Sequence[types.Sample]) -> tuple:
    """Loss and gradient of the samples one by one."""
    with jax.enable_x64(self._wide):
      return self._reference(self._params, *_rows(samples))

  def error(self, samples: Sequence[types.Sample]) -> float:
    """Worst over the gradient's leaves of max |a - b| / max |b|."""
    batches, _ = pack.pack(samples, PACK, vocab_size=MODEL.vocab_size)
    return worst(self.tree(batches)[1], self.separate(samples)[1])


def worst(a, b) -> float:
  """Greatest over the leaves of max |a - b| / max |b|."""

  def error(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.abs(x - y).max() / np.abs(y).max())

  return max(jax.tree.leaves(jax.tree.map(error, a, b)))


def _rows(samples: Sequence[types.Sample]) -> tuple[np.ndarray, ...]:
  """tokens, old log-probabilities, advantages, weights, [COUNT, LENGTH]."""
  tokens = np.zeros((COUNT, LENGTH), np.int32)
  figures = np.zeros((3, COUNT, LENGTH), np.float32)
  for i, sample in enumerate(samples):
    start = len(sample.prompt_ids)
    stop = start + len(sample.response_ids)
    tokens[i, :start] = sample.prompt_ids
    tokens[i, start:stop] = sample.response_ids
    for row, name in zip(
      figures, ("logprobs", "advantages", "weights"), strict=True
    ):
      row[i, start:stop] = getattr(sample, name)
  return tokens, *figures


def _separate(graph, params, *rows) -> jax.Array:
  """Loss of samples one by one; what follows a sample is masked by weight 0."""
  decoder = nnx.merge(graph, params)

  def one(row):
    tokens_T, *figures = row
    logits_TV = decoder_lib.causal_logits(decoder, tokens_T[None])[0, :-1]
    logprob_T = jnp.take_along_axis(
      jax.nn.log_softmax(logits_TV), tokens_T[1:, None], axis=1
    )[:, 0]
    return cispo.cispo_loss(logprob_T, *(x[1:] for x in figures))[0]

  return jax.lax.map(one, rows).sum()


def run(names: Sequence[str]) -> dict[str, float | int]:
  """Worst gradient errors over the reduced workloads; recompilations."""
  samples = [reduced(name) for name in names]
  double, single = Equivalence(wide=True), Equivalence(wide=False)
  return {
    "float64_grad_error": max(map(double.error, samples)),
    "float32_grad_error": max(map(single.error, samples)),
    "recompilations": recompilations(single),
  }


def reduced(name: str, seed: int = 0) -> list[types.Sample]:
  """The requests of a workload at the size of `Equivalence`."""
  workload = tree_workloads.reduced(tree_workloads.WORKLOADS[name])
  rng = np.random.default_rng(seed)
  return tree_workloads.requests(
    tree_workloads.episodes(workload, rng, MODEL.vocab_size)
  )


@contextlib.contextmanager
def compilations() -> Iterator[Callable[[], int]]:
  """Counts what XLA compiles while the context lasts."""
  count = 0

  def listen(event: str, seconds: float, **_: object) -> None:
    nonlocal count
    del seconds
    count += event == "/jax/core/compile/backend_compile_duration"

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield lambda: count
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def recompilations(check: Equivalence, batches: int = 50) -> int:
  """What is compiled after a shape's first batch, over random batches."""
  rng = np.random.default_rng(0)
  seen, extra, count = set(), 0, 0
  with compilations() as compiled:
    while count < batches:
      workload = dataclasses.replace(
        tree_workloads.reduced(tree_workloads.WORKLOADS["strip"]),
        rollouts=int(rng.integers(1, 5)),
        turns=int(rng.integers(1, 5)),
        thinking=int(rng.integers(0, 6)),
      )
      group = tree_workloads.episodes(workload, rng, MODEL.vocab_size)
      samples = tree_workloads.requests(group)
      for batch in pack.pack(samples, PACK, vocab_size=MODEL.vocab_size)[0]:
        before, traces = compiled(), check.updater.traces
        check.tree([batch])
        if batch.tokens_BT.shape in seen:
          extra += max(compiled() - before, check.updater.traces - traces)
        seen.add(batch.tokens_BT.shape)
        count += 1
  return extra


def peak_bytes() -> int:
  """The most memory this process has had resident."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
