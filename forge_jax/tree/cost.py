"""What training costs, in FLOPs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
  """FLOPs of a forward and a backward pass; only ratios matter to packing."""

  token: float = 1.0  # of the linear layers, per token
  pair: float = 0.0  # of attention, per visible (query, key), all heads, layers
  edge: float = 0.0  # of the LM head, per distinct loss-bearing token

  def total(self, tokens: float, pairs: float, edges: float) -> float:
    """FLOPs of so many tokens, visible pairs and edges."""
    return self.token * tokens + self.pair * pairs + self.edge * edges


PER_TOKEN = Cost()  # where a model's figures are not known
