"""A trainer step with modules that draft: they learn, the policy is untouched."""

import dataclasses
import pathlib
import sys

import numpy as np

from forge_jax.model import decoder as decoder_lib
from forge_jax.tree import pack

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import test_update
import tiny

UPDATE = test_update.UPDATE


def named(state):
  return {n: np.asarray(x) for n, x in decoder_lib.flatten(state).items()}


def test_the_policy_is_updated_as_if_there_were_no_modules():
  found = []
  for modules in (0, 2):
    up = test_update.updater(modules=modules)
    state, total, sums = test_update.gradient(up, tiny.samples())
    state, norm = up.apply(state, total)
    found.append((named(state.params), float(norm), float(sums["loss"])))
  (plain, *figures), (grown, *same) = found
  np.testing.assert_allclose(figures, same, rtol=1e-6)
  for name, value in plain.items():
    np.testing.assert_allclose(grown[name], value, atol=1e-7, err_msg=name)
  assert any(name.startswith("mtp/1/") for name in grown)


def test_a_loss_on_drafts_reaches_the_modules_only():
  still = [
    dataclasses.replace(sample, advantages=0 * sample.advantages)
    for sample in tiny.samples()
  ]
  up = test_update.updater(modules=2)
  _, total, sums = test_update.gradient(up, still)
  assert float(sums["mtp_kl"][0]) > 0
  for name, value in named(total).items():
    assert value.any() == name.startswith("mtp/"), name


def test_the_merged_tree_gives_the_modules_gradient_of_separate_samples():
  samples = tiny.samples()
  up = test_update.updater(modules=2)
  state, merged, sums = test_update.gradient(up, samples)
  separate, loss = up.zero_gradient(state), 0.0
  for sample in samples:
    [batch], _ = pack.pack([sample], test_update.PACK, vocab_size=64)
    separate, one = up.accumulate(state, separate, batch, 0)
    loss += float(one["mtp_kl"][1])
  np.testing.assert_allclose(float(sums["mtp_kl"][1]), loss, rtol=1e-5)
  want = named(separate)
  for name, value in named(merged).items():
    scale = np.abs(want[name]).max() + 1e-12
    assert np.abs(value - want[name]).max() / scale <= 1e-5, name


def test_drafts_come_closer_to_the_policy_and_frozen_ones_do_not():
  for rate in (1e-3, 0.0):
    config = dataclasses.replace(
      UPDATE, learning_rate=0.0, mtp_learning_rate=rate
    )
    up = test_update.updater(config, modules=2)
    state, kl, accepted = up.initial_state(), [], []
    for _ in range(15):
      _, total, sums = test_update.gradient(up, tiny.samples(), state=state)
      state, _ = up.apply(state, total)
      kl.append(float(sums["mtp_kl"][0]))
      accepted.append(float(sums["mtp_accepted"][0]))
    assert (kl[-1] < 0.8 * kl[0]) == (rate > 0)
    assert (accepted[-1] > accepted[0]) == (rate > 0)
