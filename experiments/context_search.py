"""Is a policy better with its context managed if it was trained that way?

Question:  a name is followed once or twice, and what is looked up in two steps
           does not fit in the context. A policy that has learned to search
           with all in view is trained further, in one arm with its context
           managed (only the last result is shown), in the other without (an
           episode that exceeds the context fails). Evaluated with it managed,
           which answers more of the held-out questions?
Command:   python -m launch.train --config=experiments/context_search.py
Its model: the two commands of experiments/context_search_warm_start.py
The other arm: --config.context.strategy=none --workdir=runs/context_search_none
Other seed: --config.seed=1 --workdir=runs/...
Hardware:  a CPU core, a minute.
Result:    docs/results/context_search.md, 2026-12-01: of 96 held-out questions
           74.0% before; 100% with its context managed in training, 72.9%, 65.6%
           and 53.1% without (seeds 0, 1, 2).
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
  config.steps = 20
  config.model.path = "runs/context_search_start/model"
  config.domains = ml_collections.ConfigDict(
    {
      "records": settings.defaults(
        records.RecordsConfig,
        "seed",
        **context_search_warm_start.RECORDS | {"hops": (1, 2)},
      )
      | {"weight": 1.0}
    }
  )
  # With two results in view the last reply does not fit: 314 tokens; with the first
  # one hidden it does: 274.
  config.engine.update(context=296)
  config.agent.max_turns = 5
  config.context.update(strategy="truncate", keep=1)
  config.rollout.update(in_flight=8)
  config.trainer.update(groups_per_step=16, minibatches=1, learning_rate=3e-4)
  config.pack.update(tokens=2048, edges=2048, rows=2048, buckets=1)
  config.checkpoint.every = 0
  config.eval.update(
    heldout=96, phrasings=0, every=10, during=48, context="truncate"
  )
  return config.lock()
