"""The samples of a pack call: checked, cut to size, side by side.

A sample's last loss-bearing token and what follows it are read by no
loss-bearing token: they need no hidden state and are cut off. Samples without
a loss-bearing token are left out.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from forge_jax import errors, types

_FLOATS = ("logprobs", "advantages", "weights")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Items:
  """Samples that bear a loss, by name; rows are their loss-bearing tokens.

  Rows are in the order of their items, then of their depths.
  """

  names: list[str]
  inputs: list[np.ndarray]  # int32 [any], tokens whose hidden states are needed
  row_item: np.ndarray  # int, place in `names`
  row_depth: np.ndarray  # int, depth in the sample
  row_token: np.ndarray  # int32
  old_logprob: np.ndarray  # float32, one a row, as are the others
  advantage: np.ndarray  # float32
  weight: np.ndarray  # float32
  version: np.ndarray  # int32

  def count(self) -> np.ndarray:
    """Rows of each item; int, each positive."""
    return np.bincount(self.row_item, minlength=len(self.names))


def collect(samples: Sequence[types.Sample], vocab_size: int) -> Items:
  """Checks samples and lays their rows side by side.

  Args:
    samples: tokens of weight 0 bear no loss.
    vocab_size: token ids must be below it.

  Raises:
    SampleError: naming a sample that is malformed.
  """
  samples = sorted(samples, key=lambda sample: sample.name)
  for sample in samples:
    _check_shapes(sample)
  ids = [a for s in samples for a in (s.prompt_ids, s.response_ids)]
  tokens = np.concatenate([np.empty(0, np.int32), *ids])
  response = {
    name: np.concatenate(
      [np.empty(0, np.float32), *(getattr(s, name) for s in samples)]
    )
    for name in _FLOATS
  }
  # One pass over everything; only a failure asks which sample it is.
  good = all(np.isfinite(values).all() for values in response.values())
  if len(tokens):
    good = good and tokens.min() >= 0 and tokens.max() < vocab_size
  if not good:
    for sample in samples:
      _check_values(sample, vocab_size)
  versions = [np.empty(0, np.int32), *(s.versions for s in samples)]
  return _rows(samples, tokens.astype(np.int32, copy=False), response, versions)


def _rows(
  samples: Sequence[types.Sample],
  tokens: np.ndarray,
  response: dict[str, np.ndarray],
  versions: Sequence[np.ndarray],
) -> Items:
  """Finds the loss-bearing tokens of all samples at once."""
  prompt = np.array([len(s.prompt_ids) for s in samples], np.int64)
  size = np.array([len(s.response_ids) for s in samples], np.int64)
  start = np.cumsum(prompt + size) - (prompt + size)
  row = np.flatnonzero(response["weights"])
  owner = np.repeat(np.arange(len(samples)), size)[row]
  depth = row - (np.cumsum(size) - size)[owner] + prompt[owner]
  rootless = owner[depth == 0]
  if len(rootless):
    raise errors.SampleError(
      f"sample {samples[rootless[0]].name}: its first token bears a loss but "
      "the prompt is empty, so no hidden state predicts it"
    )
  count = np.bincount(owner, minlength=len(samples))
  kept = np.flatnonzero(count)
  last = depth[np.cumsum(count)[kept] - 1]
  return Items(
    names=[samples[i].name for i in kept],
    inputs=[
      tokens[a : a + length]
      for a, length in zip(start[kept].tolist(), last.tolist(), strict=True)
    ],
    row_item=(np.cumsum(count > 0) - 1)[owner],
    row_depth=depth,
    row_token=tokens[start[owner] + depth],
    old_logprob=response["logprobs"][row].astype(np.float32),
    advantage=response["advantages"][row].astype(np.float32),
    weight=response["weights"][row].astype(np.float32),
    version=np.concatenate(versions)[row].astype(np.int32),
  )


def _check_shapes(sample: types.Sample) -> None:
  shape = (len(sample.response_ids),)
  for name in (*_FLOATS, "versions"):
    array = getattr(sample, name)
    if array.shape != shape:
      raise errors.SampleError(
        f"sample {sample.name}: {name} has shape {array.shape}, but "
        f"{shape[0]} response tokens"
      )


def _check_values(sample: types.Sample, vocab_size: int) -> None:
  for name in _FLOATS:
    array = getattr(sample, name)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
      raise errors.SampleError(
        f"sample {sample.name}: {name}[{bad[0]}] is {array[bad[0]]}"
      )
  for name in ("prompt_ids", "response_ids"):
    array = getattr(sample, name)
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(bad):
      raise errors.SampleError(
        f"sample {sample.name}: {name}[{bad[0]}] is {array[bad[0]]}, outside "
        f"the vocabulary of {vocab_size}"
      )
