"""Does a model of random weights learn to follow records, with all in view?

Question:  scripts follow a name one to four times, and every result stays in
           view: nothing of the context is managed. What succeeds is imitated;
           what share of the held-out questions does the model then answer?
Command:   python -m launch.warm_start \
             --config=experiments/context_search_warm_start.py
Then:      python -m launch.warm_start \
             --config=experiments/context_search_warm_start.py \
             --config.model.path=runs/context_search_warm_start/model \
             --config.context.strategy=truncate --config.context.keep=1 \
             --config.domains.records.hops="(1, 3)" --config.steps=12 \
             --config.trainer.learning_rate=5e-4 \
             --config.trainer.warmup_updates=0 \
             --workdir=runs/context_search_start
           goes on with the context managed, and is stopped before that is
           learned: this is what `context_search.py` begins with.
Hardware:  a CPU core, six CPU minutes.
Result:    of 48 held-out questions the model answers all with all in view, and
           33.3% with the context managed: all that are one step away, 2 of 34
           others. After the second command it answers 62.5% of 96 that are one
           to three steps away: 28 of 28, 19 of 33, 13 of 35 (seed 0,
           2026-12-01). 360 steps, enough on another machine, left 31.2% with all
           in view here.
"""

import ml_collections

from experiments import records_warm_start

# A result takes about 80 tokens, of which 13 count.
RECORDS = {"starts": (1, 1), "hops": (1, 4), "padding": 64, "names": 24}


def get_config() -> ml_collections.ConfigDict:
  """The experiment; every value can be overridden by --config.<key>=..."""
  config = records_warm_start.get_config().unlock()
  config.name = "context_search_warm_start"
  config.question = __doc__.partition("\n")[0]
  config.steps = 600
  config.imitate = ("optimal",)
  config.scratch.update(width=64, mlp_width=128)
  config.domains.records.update(RECORDS)
  config.engine.update(context=576)
  config.rollout.in_flight = 16
  config.trainer.update(groups_per_step=16, warmup_updates=20)
  # Three of four episodes of a step have been trained before: playing them
  # takes longer than training.
  config.curation.update(replay=0.75, replay_steps=1000)
  config.pack.update(tokens=2048, edges=2048, rows=2048, buckets=2)
  config.eval.heldout = 0
  return config.lock()
