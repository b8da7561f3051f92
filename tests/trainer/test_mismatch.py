"""Engine and trainer disagree: a warning, or the end, with the worst tokens."""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
import pytest

from forge_jax import errors
from forge_jax.trainer import mismatch, trainer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import test_trainer


def groups_with_a_wrong_token(by):
  """The first episode's last token has a log-probability that is off."""
  first, *others = test_trainer.groups()
  episode = first.episodes[0]
  last = episode.completions[-1]
  logprobs = last.logprobs.copy()
  logprobs[-1] -= by
  wrong = dataclasses.replace(last, logprobs=logprobs)
  completions = (*episode.completions[:-1], wrong)
  episode = dataclasses.replace(episode, completions=completions)
  episodes = (episode, *first.episodes[1:])
  return [dataclasses.replace(first, episodes=episodes), *others], wrong


def test_a_large_mismatch_stops_before_the_update_and_names_the_worst_token():
  _, made = test_trainer.make(mismatch_stop=2.0)
  before = jax.tree.map(np.array, made.state)
  groups, wrong = groups_with_a_wrong_token(by=1000.0)
  with pytest.raises(errors.MismatchError) as raised:
    made.take_step(made.prepare(groups))
  worst = str(raised.value).partition("The worst: ")[2].partition(";")[0]
  whole = np.concatenate([wrong.prompt_ids, wrong.response_ids]).tolist()
  assert worst.startswith(
    f"token {whole[-1]} at position {len(whole) - 1} after {whole[-7:-1]}: "
    "engine -1004, trainer -4."
  )
  assert "trainer.mismatch_stop is 2" in str(raised.value)
  assert made.step == 0
  jax.tree.map(np.testing.assert_array_equal, before, made.state)


@pytest.mark.parametrize(("limit", "warns"), [(0.05, True), (0.9, False)])
def test_a_smaller_one_warns_and_trains(caplog, limit, warns):
  _, made = test_trainer.make(mismatch_warn=limit)
  with caplog.at_level("WARNING", logger="forge_jax"):
    made.take_step(made.prepare(test_trainer.groups()))
  told = [r.message for r in caplog.records if "disagree" in r.message]
  assert bool(told) == warns
  assert all("of version 0 sampled" in message for message in told)
  assert made.step == 1


def test_tokens_of_other_weights_do_not_count():
  _, made = test_trainer.make(mismatch_stop=0.5, mismatch_warn=0.0)
  made.restore(7, made.state)
  groups, _ = groups_with_a_wrong_token(by=1000.0)
  made.take_step(made.prepare(groups))
  assert made.step == 8


@pytest.mark.parametrize("limits", [(-0.1, 1.0), (2.0, 1.0)])
def test_limits_that_make_no_sense_are_refused(limits):
  with pytest.raises(errors.ConfigError, match="0 <= warn <= stop"):
    mismatch.MismatchConfig(*limits)
  with pytest.raises(errors.ConfigError, match="0 <= warn <= stop"):
    trainer.TrainerConfig(mismatch_warn=limits[0], mismatch_stop=limits[1])
