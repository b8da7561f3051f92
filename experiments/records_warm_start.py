"""Does a model of random weights learn to look records up, by imitation?

Question:  scripts play real episodes of looking records up: agent, gateway, pool and
           trainer are those of RL, and what succeeds is imitated. What share of
           the held-out questions does the model then answer, sampling by itself?
Command:   python -m launch.warm_start \
             --config=experiments/records_warm_start.py
           python -m launch.eval --checkpoint=runs/records_warm_start
Hardware:  two CPU cores.
Result:    of the held-out questions, 89% greedily, after 500 steps on the
           script "optimal" alone (--config.imitate="('optimal',)"), in nine
           minutes beside other programs on two cores of a shared EPYC,
           2026-11-25. The default, two scripts, was not measured.
"""

import ml_collections

from experiments import word_problems_smollm2
from forge_jax import settings
from forge_jax.model import scratch
from forge_jax.tasks import records


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = word_problems_smollm2.get_config().unlock()
  config.name = "records_warm_start"
  config.question = __doc__.partition("\n")[0]
  config.steps = 500
  config.imitate = ("optimal", "sequential")
  config.model.path = ""
  config.scratch = ml_collections.ConfigDict(
    settings.defaults(scratch.ScratchConfig)
  )
  config.domains = ml_collections.ConfigDict(
    {
      "records": settings.defaults(records.RecordsConfig, "seed")
      | {"weight": 1.0}
    }
  )
  config.engine.update(context=512)
  # Imitation: no baseline and no ratio; what another than the policy sampled
  # is no evidence of a mismatch, which temperature 0 says.
  config.credit.baseline = "none"
  config.rollout.update(group_size=1, temperature=0.0, in_flight=256, max_lag=2)
  config.trainer.update(
    groups_per_step=64,
    minibatches=1,
    ratio_min=1.0,
    ratio_max=1.0,
    learning_rate=3e-3,
    warmup_updates=30,
  )
  config.pack.update(tokens=4096, edges=4096, rows=4096)
  config.checkpoint.every = 0
  config.eval.update(heldout=200, phrasings=0, every=0)
  return config.lock()
