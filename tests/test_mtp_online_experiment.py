"""The experiment on draft modules, without its training."""

import random

from flax import nnx
import numpy as np
import pytest

from experiments import mtp_online
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import mtp


def test_a_list_is_rewarded_for_neighbours_in_order():
  task = mtp_online.Lists()
  assert len(task.words) == 60
  listed = lambda some: " ".join(some) + "."
  ordered = task.words[::7][: mtp_online.WORDS]
  assert task.reward(listed(ordered)) == 1
  assert task.reward(listed(ordered[::-1])) == 0
  assert task.reward(listed([*ordered[1:], ordered[0]])) == pytest.approx(4 / 5)
  assert task.reward(listed([*ordered[:3], "x", *ordered[3:5]])) == 3 / 5
  for wrong in (listed([*ordered, "x"]), " ".join(ordered), ""):
    assert task.reward(wrong) == 0
  _, response = task.text(random.Random(0))
  assert 0 < task.reward(response) < 1
  assert mtp_online.encode(response)[-1] == mtp_online.STOP


def test_a_state_takes_the_modules_of_another():
  shape = model_config.ModelConfig(
    vocab_size=8,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_width=8,
    max_context=16,
  )
  one, other = (
    nnx.state(
      mtp.grow(
        decoder_lib.Decoder(shape, rngs=nnx.Rngs(params=n)),
        1,
        init="fresh",
        rngs=nnx.Rngs(params=9 + n),
      )
    )
    for n in range(2)
  )
  mixed = decoder_lib.flatten(mtp_online.with_module_of(one, other))
  for name, value in mixed.items():
    source = other if name.startswith("mtp/") else one
    np.testing.assert_array_equal(value, decoder_lib.flatten(source)[name])
