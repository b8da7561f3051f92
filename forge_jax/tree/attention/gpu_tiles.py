"""How the GPU kernels of tree attention are cut into tiles.

Chosen without a GPU, by what Triton 3.9 and ptxas make of the kernels: among
FlashAttention-2's tiles and smaller ones, the tile with the fewest instructions
a product that spills no register on Hopper (sm_90), few on A100 (sm_80; at most
72 bytes of a thread), and fits the 163 KB of shared memory of an A100. The
forward pass keeps 128 queries a tile, for less traffic to the L2 cache; the
backward kernels fit twice on a Hopper multiprocessor at 2 bytes a number. A
tile pair that needs no mask skips a quarter of its loop's instructions.
"""

import dataclasses

MOST_CHANNELS = 128


@dataclasses.dataclass(frozen=True)
class Tile:
  """Tokens of a tile, and the compiler's parameters."""

  queries: int
  keys: int
  warps: int
  stages: int  # tiles in flight: copies of the loop's operands

  def within(self, block: int) -> "Tile":
    """The same, each side a power of two that divides `block`."""
    most = block & -block
    return dataclasses.replace(
      self, queries=min(self.queries, most), keys=min(self.keys, most)
    )


def tile(kernel: str, channels: int, width: int) -> Tile:
  """The tile of a kernel.

  Args:
    kernel: "forward", "dq" or "dkv".
    channels: of a head, at most MOST_CHANNELS.
    width: bytes of a number, 2 or 4.
  """
  return _TILES[kernel, 64 if channels <= 64 else MOST_CHANNELS, width]


_TILES = {
  ("forward", 64, 2): Tile(queries=128, keys=64, warps=4, stages=3),
  ("forward", 128, 2): Tile(queries=128, keys=64, warps=8, stages=3),
  ("dq", 64, 2): Tile(queries=128, keys=32, warps=4, stages=3),
  ("dq", 128, 2): Tile(queries=64, keys=64, warps=4, stages=2),
  ("dkv", 64, 2): Tile(queries=64, keys=64, warps=4, stages=2),
  ("dkv", 128, 2): Tile(queries=64, keys=64, warps=4, stages=2),
  ("forward", 64, 4): Tile(queries=64, keys=64, warps=4, stages=2),
  ("forward", 128, 4): Tile(queries=64, keys=32, warps=4, stages=2),
  ("dq", 64, 4): Tile(queries=64, keys=64, warps=4, stages=2),
  ("dq", 128, 4): Tile(queries=64, keys=32, warps=4, stages=2),
  ("dkv", 64, 4): Tile(queries=32, keys=64, warps=4, stages=2),
  ("dkv", 128, 4): Tile(queries=32, keys=32, warps=4, stages=2),
}
