"""Bugs: changes of a function's syntax tree that a tired author might make."""

import ast
from collections.abc import Iterator
import random

_SWAPS: dict[type[ast.AST], type[ast.AST]] = {
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mod: ast.FloorDiv,
  ast.FloorDiv: ast.Mod,
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.In: ast.NotIn,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
  ast.And: ast.Or,
  ast.Or: ast.And,
}


def mutate(source: str, count: int, rng: random.Random) -> str:
  """A function's source with `count` places of it changed, or all there are.

  Changed are operators (`_SWAPS`), whole numbers by one, and returned truth
  values. Comments are lost: what comes back is `ast.unparse` of the tree.
  """
  tree = ast.parse(source)
  places = list(_places(tree))
  for node, field in rng.sample(places, min(count, len(places))):
    _change(node, field, rng)
  return ast.unparse(tree) + "\n"


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
  """What can be changed: a node and the field that it is in."""
  for node in ast.walk(tree):
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
      if type(node.op) in _SWAPS:
        yield node, "op"
    elif isinstance(node, ast.Compare):
      if type(node.ops[0]) in _SWAPS:
        yield node, "ops"
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
      yield node, "value"  # a truth value is a whole number, too


def _change(node: ast.AST, field: str, rng: random.Random) -> None:
  old = getattr(node, field)
  if field == "op":
    node.op = _SWAPS[type(old)]()
  elif field == "ops":
    node.ops = [_SWAPS[type(old[0])](), *old[1:]]
  elif isinstance(old, bool):
    node.value = not old
  else:
    node.value = old + rng.choice((-1, 1))
