"""The names of the metrics, one constant each, and what they mean.

A name is "<topic>/<figure>". Writers of metrics and pages that show them
meet in this list and nowhere else.
"""

TRAIN_REWARD = "train/reward"  # mean reward of the step's sampled episodes
TRAIN_SUCCESS = "train/success"  # share of sampled episodes that succeed, 0..1
TRAIN_SAMPLES = "train/samples"  # completions the step trained on
TRAIN_RESPONSE_TOKENS = "train/response_tokens"  # sampled, in the step
TRAIN_LOSS = "train/loss"  # mean over the step's updates
TRAIN_GRAD_NORM = "train/grad_norm"  # before clipping, mean over updates
TRAIN_ENTROPY = "train/entropy"  # of the policy at the trained tokens, nats

RATIO_MEAN = "ratio/mean"  # importance ratio, mean over trained tokens
RATIO_MAX = "ratio/max"
RATIO_STD = "ratio/std"  # over trained tokens
RATIO_EFFECTIVE = "ratio/effective"  # effective sample size / tokens, 0..1
RATIO_CLIPPED = "ratio/clipped"  # share of tokens whose ratio is clipped, 0..1

MISMATCH_MEAN = "mismatch/mean"  # |engine - trainer log-probability|, nats,
MISMATCH_MAX = "mismatch/max"  # over tokens sampled by the same weights

# Of the modules that draft, by their number from 1 on: "mtp/kl_1", ...
MTP_KL = "mtp/kl"  # from the policy to the draft at the trained tokens, nats
MTP_ACCEPTED = "mtp/accepted"  # probability that a drafted token is accepted

# Means over the step's episodes, of each component (capped) and of each named
# reward: "reward/perf", "reward/answer", ...
REWARD = "reward"
NOTED = "noted"  # of each named reward: how many there are per completion
EPISODE_FAILED = "episode/failed"  # share that failed, 0..1
EPISODE_TOKENS = "episode/tokens"  # response tokens of an episode, mean

# Of each domain: "domain_success/terminal", ...
DOMAIN_SHARE = "domain_share"  # of the step's episodes, 0..1
DOMAIN_SUCCESS = "domain_success"  # share of its episodes that succeed, 0..1
DOMAIN_REWARD = "domain_reward"  # mean, components combined
DOMAIN_TOKENS = "domain_tokens"  # response tokens of an episode, mean
DOMAIN_SECONDS = "domain_seconds"  # wall-clock of an episode, median
DOMAIN_LEVEL = "domain_level"  # difficulty of the tasks that are drawn now

WATCH_ALARMS = "watch/alarms"  # that hold now; the log says which
WATCH_GRAD_NORM_SPREAD = "watch/grad_norm_spread"  # variance over squared mean
WATCH_LENGTH_DRIFT = "watch/length_drift"  # episodes' length / that at first
# Of each reward: correlation of its mean with success over recent steps, -1..1
WATCH_CORRELATION = "watch/correlation"

# What drafting did to the engine's decoding steps since the last step.
SPECULATION_LENGTH = "speculation/acceptance_length"  # tokens a sequence went
# on by in a step that verified drafts
SPECULATION_ACCEPTED = "speculation/accepted"  # share of drafted tokens, 0..1
SPECULATION_DRAFTS = "speculation/drafts"  # a sequence and step, 0 included
SPECULATION_SPEEDUP = "speculation/speedup"  # over plain steps, as estimated

TREE_REQUEST_TOKENS = "tree/request_tokens"  # before merging, in the step
TREE_UNIQUE_TOKENS = "tree/unique_tokens"  # after merging, in the step
TREE_MERGE_RATIO = "tree/merge_ratio"  # request tokens / unique tokens
TREE_POSSIBLE_RATIO = "tree/possible_ratio"  # if every request extended its
# predecessor, the request before it in its episode
TREE_COLLAPSED = "tree/collapsed"  # 1: the ratio is under half the possible one
TREE_FLOP_BOUND = "tree/flop_bound"  # FLOPs of the requests one by one / FLOPs
# of their merged forest
TREE_ACHIEVED = "tree/achieved"  # that forest's FLOPs / FLOPs executed, with
# replays, padding and the hidden part of visited blocks, 0..1
TREE_FILL = "tree/fill"  # share of the packs' slots that hold a token, 0..1
TREE_REPLAY = "tree/replay"  # share of those that a cut made repeat, 0..1
TREE_BATCHES = "tree/batches"  # device batches of the step
TREE_SHAPES = "tree/shapes"  # shapes of device batches so far, each compiled

THROUGHPUT_ROLLOUT = "throughput/rollout"  # tokens a busy second, last step
THROUGHPUT_TRAINING = "throughput/training"
THROUGHPUT_DATA = "throughput/data"
THROUGHPUT_IO = "throughput/io"

YIELD_THROUGHPUT = "yield/throughput"  # trained tokens a wall-clock second
YIELD_EFFICIENCY = "yield/efficiency"  # held-out gain per 1k trained samples
YIELD_J = "yield/j"  # the product of the two
YIELD_GRAD_NORM_VARIANCE = "yield/grad_norm_variance"  # over recent steps
YIELD_REWARD_CHANGE = "yield/reward_change"  # of the smoothed reward, a step

QUEUE_HEAD = "queue/head"  # index of the oldest group not yet consumed
QUEUE_IN_FLIGHT = "queue/in_flight"  # groups being sampled
QUEUE_WAITING = "queue/waiting"  # complete groups not yet consumed
QUEUE_WINDOW = "queue/window"  # W: groups from the head on that may be taken
QUEUE_OVER_LAG = "queue/over_lag"  # groups so far that were trained over the
# version bound
QUEUE_EXPIRED = "queue/expired"  # groups so far that were dropped for it, each
# task submitted again

DRIFT = "drift/largest"  # distance of the groups trained lately from those
# generated, beyond chance, 0..1: the largest of the following
DRIFT_LENGTH = "drift/length"  # of response tokens
DRIFT_DOMAIN = "drift/domain"  # of the shares of the domains
DRIFT_SECONDS = "drift/seconds"  # of the longest episode's wall-clock time
DRIFT_SUCCESS = "drift/success"  # of the mean perf reward

CURATION_ZERO_VARIANCE = "curation/zero_variance"  # groups so far that were
# dropped because all their advantages are 0; likewise the following
CURATION_LENGTH = "curation/length"  # for their length
CURATION_STALENESS = "curation/staleness"  # for the age of their tokens
CURATION_DUPLICATES = "curation/duplicates"  # because they repeat another
CURATION_QUOTAS = "curation/quotas"  # over their domain's quota twice
CURATION_OVERLONG_DROPPED = "curation/overlong_dropped"  # for a cut-off episode
CURATION_OVERLONG = "curation/overlong"  # groups whose overlong episodes were
# masked or penalised
CURATION_RESCORED = "curation/rescored"  # groups with later scores applied
CURATION_WAITED = "curation/waited"  # groups put off to the next batch
CURATION_RESUBMITTED = "curation/resubmitted"  # dropped tasks that come again
CURATION_REPLAYED = "curation/replayed"  # groups trained once more

WEIGHTS_VERSION = "weights/version"  # the version that the engine samples from
LAG_MEAN = "lag/mean"  # trainer steps between sampling and training a token
LAG_MAX = "lag/max"

TIME_STEP = "time/step"  # wall-clock seconds of the whole step
TIME_TRAIN = "time/train"  # of it, in the trainer
TIME_DATA = "time/data"  # crediting, merging and packing, in the background
TIME_ROLLOUT_WAIT = "time/rollout_wait"  # of it, waiting for a batch
TIME_ELAPSED = "time/elapsed"  # of the run so far, restarts included
MEMORY_RSS_GB = "memory/rss_gb"  # peak resident memory so far, 1e9 bytes

EVAL_HELDOUT = "eval/heldout"  # greedy success on held-out tasks, 0..1
EVAL_PHRASINGS = "eval/phrasings"  # the same on phrasings never trained on
