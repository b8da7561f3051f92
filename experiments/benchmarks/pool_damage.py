"""Random damage to a pool and to checkpoints: is it all noticed?

A trial flips a bit of a file, or cuts its end off. It counts as noticed if the
damage is told by the name of the file, what is lost is named, and the newest
good state is what one then gets:

  segment      `verify` names it and each lost record; after `--repair` the
               others are there, and the lost ones can be stored again
  index        opening says so; nothing is lost, it is made again
  checkpoint   restoring says so and gives back the newest good one, bit for bit
"""

import logging
import pathlib
import random
import shutil

from flax import nnx
import jax
import numpy as np

from experiments.benchmarks import pool_crash
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import sharding
from forge_jax.pool import records, segment, store
from forge_jax.pool import verify as verify_lib
from forge_jax.trainer import checkpoint, manifest, update

_GROUPS = 12
# By kind: its files, and how often one of them is damaged.
_FILES = {
  "segment": ("pool/segment-*", 9),
  "index": ("pool/index.*", 2),
  "checkpoint": ("checkpoints/**/*", 9),
}
_MODEL = model_config.ModelConfig(
  vocab_size=64,
  width=16,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_width=16,
  max_context=64,
  tied_embeddings=True,
)


def run(path: pathlib.Path, trials: int, seed: int = 0) -> dict[str, int]:
  """Damages copies of a pool and of two checkpoints; counts."""
  trial = Trial(path / "damage", random.Random(seed))
  kinds = dict.fromkeys(_FILES, 0)
  noticed = 0
  for _ in range(trials):
    kind, good = trial.play()
    kinds[kind] += 1
    noticed += good
  return {"corruptions": trials, "noticed": noticed} | {
    f"{kind}_corruptions": count for kind, count in kinds.items()
  }


class Trial:
  """A good pool and two good checkpoints, and copies to damage."""

  def __init__(self, folder: pathlib.Path, rng: random.Random):
    self._good, self._bad = folder / "good", folder / "bad"
    self._rng = rng
    config = store.PoolConfig(segment_bytes=200_000)
    with store.DataPool.open(self._good / "pool", config) as pool:
      for index in range(_GROUPS):
        pool.append(pool_crash.group(index))
        if index % 4 == 3:
          step = index // 4 + 1
          trained = tuple(range(index - 3, index + 1))
          pool.claim(records.Claim(step, trained))
    decoder = decoder_lib.Decoder(_MODEL, rngs=nnx.Rngs(params=0))
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    updater = update.Updater(decoder, update.UpdateConfig(), mesh)
    state = updater.initial_state()
    self._states = {1: state, 2: jax.tree.map(lambda x: x + 1, state)}
    saver = checkpoint.Checkpointer(self._good, checkpoint.CheckpointConfig())
    for step, values in self._states.items():
      saver.save(step, values, {"step": step})
    saver.close()

  def play(self) -> tuple[str, bool]:
    """One trial: what kind of file was damaged, and whether all was well."""
    shutil.rmtree(self._bad, ignore_errors=True)
    shutil.copytree(self._good, self._bad)
    kinds = list(_FILES)
    (kind,) = self._rng.choices(kinds, weights=[_FILES[k][1] for k in kinds])
    files = [p for p in sorted(self._bad.glob(_FILES[kind][0])) if p.is_file()]
    file = self._rng.choice([p for p in files if p.stat().st_size])
    place = _damage(file, self._rng)
    if kind == "segment":
      return kind, self._segment(file, place)
    if kind == "index":
      return kind, self._index()
    return kind, self._checkpoint(file)

  def _segment(self, file: pathlib.Path, place: tuple[int, int]) -> bool:
    original = self._good / "pool" / file.name
    lost = {
      (e.kind, e.key)
      for e in segment.scan(original)
      if e.place.offset < place[1] and place[0] < e.place.end
    }
    names = {f"{records.NAMES[kind]} {key}" for kind, key in lost}
    report = verify_lib.verify(file.parent)
    told = str(file) in "".join(report.damage) and set(report.lost) == names
    verify_lib.verify(file.parent, repair=True)
    gone = {key for kind, key in lost if kind == records.GROUP}
    with store.DataPool.open(file.parent) as pool:
      kept = set(pool.indices()) == set(range(_GROUPS)) - gone
      for index in gone:
        pool.append(pool_crash.group(index))
    return told and kept and self._holds_all(file.parent)

  def _index(self) -> bool:
    with _Said() as said:
      complete = self._holds_all(self._bad / "pool")
    return complete and "does not agree" in said.text

  def _checkpoint(self, file: pathlib.Path) -> bool:
    step = int(file.relative_to(self._bad / "checkpoints").parts[0])
    saver = checkpoint.Checkpointer(self._bad, checkpoint.CheckpointConfig())
    try:
      with _Said() as said:
        state, host = saver.restore(self._states[1])
    finally:
      saver.close()
    newest = 1 if step == 2 else 2
    if step == 2:
      told = f"DAMAGED checkpoint of step {step}" in said.text
      told = told and file.name in said.text
    else:  # nobody asked for it
      faults = manifest.faults(self._bad / "checkpoints" / "1")
      told = file.name in " ".join(faults)
    same = all(
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(state),
        jax.tree.leaves(self._states[newest]),
        strict=True,
      )
    )
    return told and same and host == {"step": newest}

  def _holds_all(self, path: pathlib.Path) -> bool:
    with store.DataPool.open(path) as pool:
      return pool.indices() == list(range(_GROUPS)) and all(
        pool.get(i).episodes[0].seed == i for i in range(_GROUPS)
      )


class _Said(logging.Handler):
  """What is logged in a block."""

  def __init__(self):
    super().__init__()
    self.text = ""

  def emit(self, record: logging.LogRecord) -> None:
    self.text += record.getMessage() + "\n"

  def __enter__(self) -> "_Said":
    self._logger = logging.getLogger("forge_jax")
    self._propagate = self._logger.propagate
    self._logger.propagate = False  # hundreds of trials would fill the screen
    self._logger.addHandler(self)
    return self

  def __exit__(self, *_) -> None:
    self._logger.removeHandler(self)
    self._logger.propagate = self._propagate


def _damage(file: pathlib.Path, rng: random.Random) -> tuple[int, int]:
  """Flips a bit or cuts the end off; returns the bytes that it spoilt."""
  data = bytearray(file.read_bytes())
  place = rng.randrange(len(data))
  if rng.random() < 0.5:
    data[place] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return place, place + 1
  file.write_bytes(data[:place])
  return place, len(data)
