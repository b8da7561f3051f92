"""Is a policy better with its context managed if it was trained that way?

Question:  a name is followed one to four times, and from the third on what was
           looked up does not fit in the context. A policy that has learned to
           search with all in view is trained further, in one arm with its
           context managed (only the last result is shown), in the other
           without (an episode that exceeds the context fails). Evaluated with
           it managed, which answers more of the held-out questions?
Command:   python -m launch.train --config=experiments/context_search.py
Its model: python -m launch.warm_start \
             --config=experiments/context_search_warm_start.py
The other arm: --config.context.strategy=none --workdir=runs/context_search_none
Other seed: --config.seed=1 --workdir=runs/...
Hardware:  a CPU core.
Result:    docs/results/context_search.md, 2026-11-30: not shown. Of 48 held-out
           questions 41.7% before, and after 8 steps 37.5% in both arms, seed 0.
           One seed, and few steps.
"""

import ml_collections

from experiments import context_search_warm_start, word_problems_smollm2
from forge_jax import settings
from forge_jax.tasks import records


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = word_problems_smollm2.get_config().unlock()
  config.name = "context_search"
  config.question = __doc__.partition("\n")[0]
  config.steps = 8
  config.model.path = "runs/context_search_warm_start/model"
  config.domains = ml_collections.ConfigDict(
    {
      "records": settings.defaults(
        records.RecordsConfig, "seed", **context_search_warm_start.RECORDS
      )
      | {"weight": 1.0}
    }
  )
  # Two results fit beside the question, or one and three that are not shown.
  config.engine.update(context=416)
  config.context.update(strategy="truncate", keep=1)
  config.rollout.update(in_flight=8)
  config.trainer.update(groups_per_step=8, minibatches=1, learning_rate=1e-3)
  config.pack.update(tokens=2048, edges=2048, rows=2048, buckets=1)
  config.checkpoint.every = 0
  config.eval.update(heldout=48, phrasings=0, every=0, context="truncate")
  return config.lock()
