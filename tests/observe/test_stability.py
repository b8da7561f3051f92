"""The watch: when it is silent, what it says, and when it ends a run."""

import logging
import math

import pytest

from forge_jax import errors
from forge_jax.observe import metrics, names, stability

FINE = {
  names.TRAIN_SUCCESS: 0.5,
  names.TRAIN_LOSS: 0.1,
  names.TRAIN_GRAD_NORM: 1.0,
  names.TRAIN_ENTROPY: 0.5,
  names.RATIO_EFFECTIVE: 0.95,
  names.EPISODE_TOKENS: 100.0,
}


def watched(steps, **config):
  """A watch after these steps; each says what is not as in FINE."""
  watch = stability.Stability(stability.StabilityConfig(**config))
  for step, values in enumerate(steps, start=1):
    watch.observe(metrics.StepMetrics(step, 0.0, FINE | values))
  return watch


def test_a_healthy_run_is_silent(caplog):
  steps = [{names.TRAIN_SUCCESS: 0.02 * step} for step in range(40)]
  watch = watched(steps)
  watch.check([])
  assert list(watch.alarms) == [] and not caplog.records
  values = watch.values()
  assert values[names.WATCH_ALARMS] == 0
  assert values[names.WATCH_GRAD_NORM_SPREAD] == 0
  assert values[names.WATCH_LENGTH_DRIFT] == 1


@pytest.mark.parametrize(
  ("last", "message"),
  [
    ({names.TRAIN_ENTROPY: 0.001}, "entropy is 0.001"),
    ({names.RATIO_EFFECTIVE: 0.1}, "10% of the tokens effective"),
    ({names.EPISODE_TOKENS: 400.0}, "4 times as long"),
    ({names.EPISODE_TOKENS: 10.0}, "0.1 times as long"),
    ({f"{names.NOTED}/language_mixing": 0.3}, "30% of the completions"),
    ({names.TRAIN_GRAD_NORM: 100.0}, "gradient norm's variance"),
    ({names.EPISODE_FAILED: 0.75}, "75% of the episodes failed"),
  ],
)
def test_an_alarm_is_logged_once_and_ends(last, message, caplog):
  watch = watched([{}] * 8 + [last, last])
  (said,) = watch.alarms
  assert message in said
  assert watch.values()[names.WATCH_ALARMS] == 1
  assert [r.levelno for r in caplog.records] == [logging.WARNING]
  assert caplog.messages[0].startswith("step 9: ")
  for step in range(11, 30):
    watch.observe(metrics.StepMetrics(step, 0.0, FINE))
  assert list(watch.alarms) == []
  watch.check([])  # an alarm does not end a run


def trend(reward, success):
  return [
    {f"{names.REWARD}/{'process'}": reward(t), names.TRAIN_SUCCESS: success(t)}
    for t in range(10)
  ]


def test_a_reward_that_rises_while_success_falls_is_gamed():
  gamed = watched(trend(lambda t: 0.1 * t, lambda t: 0.9 - 0.02 * t))
  (said,) = gamed.alarms
  assert "the reward process rises while success falls" in said
  key = f"{names.WATCH_CORRELATION}/process"
  assert gamed.values()[key] == pytest.approx(-1)
  for steps in (
    trend(lambda t: 0.1 * t, lambda t: 0.5 + 0.02 * t),  # both rise
    trend(lambda t: -0.1 * t, lambda t: 0.5 + 0.02 * t),  # it is given up
    trend(lambda t: 0.1 * t, lambda t: 0.5 + 0.1 * (t % 2)),  # unrelated
    trend(lambda t: 0.3, lambda t: 0.9 - 0.02 * t),  # constant
  ):
    assert list(watched(steps).alarms) == []


def test_a_collapse_names_the_last_good_checkpoint():
  rise = [{names.TRAIN_SUCCESS: 0.1 * min(step, 8)} for step in range(20)]
  fall = [{names.TRAIN_SUCCESS: 0.0}] * 30
  watched(rise).check([5, 10])
  watched([*rise, *fall[:5]]).check([5, 10])  # a bad stretch is no collapse
  watch = watched([*rise, *fall])
  with pytest.raises(errors.CollapseError) as raised:
    watch.check([5, 10, 25, 40])
  assert "smoothed success has fallen from 64% at step 20" in str(raised.value)
  assert "last good checkpoint is that of step 10;" in str(raised.value)
  with pytest.raises(errors.CollapseError, match="no checkpoint is left"):
    watch.check([40])
  watched([*rise, *fall], stop=False).check([10])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [names.TRAIN_LOSS, names.TRAIN_GRAD_NORM])
def test_what_is_not_finite_is_a_collapse(name, value):
  watch = watched([{}, {}, {name: value}, {}])
  with pytest.raises(errors.CollapseError, match=f"step 3: {name} is") as e:
    watch.check([1, 2, 3])
  assert "checkpoint is that of step 2" in str(e.value)


def test_a_run_whose_every_episode_fails_ends():
  fails = {names.TRAIN_SUCCESS: 0.0, names.EPISODE_FAILED: 1.0}
  watched([{}, *[fails] * 4, {names.EPISODE_FAILED: 0.9}, fails]).check([])
  with pytest.raises(errors.CollapseError, match="step 7: every episode of 5"):
    watched([{}, {}, *[fails] * 5]).check([2])


def test_a_run_that_never_succeeded_cannot_collapse():
  steps = [{names.TRAIN_SUCCESS: 0.05 * (step < 3)} for step in range(60)]
  watched(steps).check([])


def test_evaluations_and_steps_without_a_gradient_are_no_trouble():
  watch = stability.Stability(stability.StabilityConfig())
  watch.observe(metrics.StepMetrics(0, 0.0, {names.EVAL_HELDOUT: 0.1}))
  bare = {names.TRAIN_SUCCESS: 1.0}
  for step in range(1, 20):
    watch.observe(metrics.StepMetrics(step, 0.0, bare))
  assert watch.values() == {names.WATCH_ALARMS: 0.0}


@pytest.mark.parametrize("bad", [{"window": 0}, {"gaming": 1.5}])
def test_thresholds_must_work(bad):
  with pytest.raises(errors.ConfigError, match=next(iter(bad))):
    stability.StabilityConfig(**bad)
