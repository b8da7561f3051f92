"""The bounds that a window keeps, as numbers or as shares."""

import dataclasses

from forge_jax import errors

POLICIES = ("windowed", "fifo", "greedy")
OVER_LAG = ("train", "drop")


@dataclasses.dataclass(frozen=True, slots=True)
class WindowConfig:
  """The bounds on order and age; counts are of groups.

  N and W are numbers of groups, or, as floats up to 1, shares: of the run's
  total for N, of N for W. (A window of one group is policy "fifo".)
  """

  policy: str = "windowed"  # or "fifo" (window 1), "greedy" (window N)
  in_flight: int | float = 16  # N: most groups submitted from the head on
  window: int | float = 0.3  # W: groups from the head on that may be taken
  # Optimizer steps a group may be begun ahead of; 0: in step; None: no bound.
  max_lag: int | None = 1
  # Of a group taken more than max_lag steps after it was begun: "train" it
  # all the same, or "drop" it and submit its task again.
  over_lag: str = "train"
  attempts: int = 3  # groups a task gets; the last is not dropped for its lag
  groups_per_step: int = 8  # P: groups an optimizer step consumes
  total: int | None = None  # groups that the whole run trains; None: no end

  def __post_init__(self):
    for name, known in (("policy", POLICIES), ("over_lag", OVER_LAG)):
      if getattr(self, name) not in known:
        raise errors.ConfigError(
          f"window {name} is {getattr(self, name)!r}; expected one of {known}"
        )
    for name, least in (
      ("max_lag", 0),
      ("attempts", 1),
      ("groups_per_step", 1),
    ):
      value = getattr(self, name)
      if value is not None and value < least:
        raise errors.ConfigError(
          f"window {name} is {value}; expected at least {least}"
        )
    _count("in_flight", self.in_flight, self.total)
    _count("window", self.window, self.capacity)

  @property
  def capacity(self) -> int:
    """N, in groups."""
    return _count("in_flight", self.in_flight, self.total)

  @property
  def width(self) -> int:
    """W as the policy has it, in groups."""
    if self.policy == "fifo":
      return 1
    if self.policy == "greedy":
      return self.capacity
    return min(_count("window", self.window, self.capacity), self.capacity)


def _count(name: str, value: int | float, whole: int | None) -> int:
  """A number of groups, given as one or as a share of `whole`."""
  if isinstance(value, float) and 0 < value <= 1:
    if whole is None:
      raise errors.ConfigError(
        f"window {name} is the share {value}, but there is no total"
      )
    return max(1, round(value * whole))
  if value < 1 or value != int(value):
    raise errors.ConfigError(
      f"window {name} is {value}; expected at least 1 group, or a share of at "
      "most 1.0"
    )
  return int(value)
