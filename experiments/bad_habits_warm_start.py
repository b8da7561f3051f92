"""Does a very small model learn to look names up, with some bad habits?

Question:  as experiments/records_warm_start.py, smaller and with fewer names, so
           that it takes minutes of one core; what is imitated succeeds, but in
           six of ten episodes looks one name up after another and in three begins
           with a call that is none. It is what experiments/bad_habits.py begins
           with.
Command:   python -m launch.warm_start \\
             --config=experiments/bad_habits_warm_start.py
           python -m launch.eval --checkpoint=runs/bad_habits_warm_start \\
             --heldout=100
Hardware:  two CPU cores.
Result:    100% of 100 held-out questions greedily, and 98.8% of 256 sampled training
           episodes, 1.6 rounds of look-ups each, of whose replies 9% are malformed
           calls; seven minutes at most (two cores of a shared EPYC, beside other
           programs), 2026-12-01, seed 0. Names are guessed for 200 steps; from
           there the loss falls to step 470 (2026-11-30). Of 96 names instead of 16,
           and twice the episodes a step, they still were after 150 steps.
"""

import ml_collections

from experiments import records_warm_start


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = records_warm_start.get_config().unlock()
  config.name = "bad_habits_warm_start"
  config.question = __doc__.partition("\n")[0]
  config.steps = 600
  config.imitate = ("optimal", *6 * ("sequential",), *3 * ("malformed",))
  config.scratch.update(width=64, mlp_width=128)
  config.domains.records.update(starts=(2, 2), names=16)
  config.trainer.update(groups_per_step=16, warmup_updates=20)
  # Three of four episodes of a step have been trained before: playing them
  # takes longer than training.
  config.curation.update(replay=0.75, replay_steps=1000)
  config.pack.update(tokens=2048, edges=2048, rows=2048, buckets=2)
  config.eval.heldout = 8  # of the scripts
  return config.lock()
