"""Which processes there are and what they hold, as /proc has it.

It stands alone: the standard library only, and the guest imports it by path.
"""

import os

_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants(root):
  """Process ids of a process's children, theirs, and so on."""
  children = {}
  for name in os.listdir("/proc"):
    if name.isdigit():
      try:
        with open(f"/proc/{name}/stat", "rb") as file:
          # The name, in parentheses, may hold anything.
          parent = int(file.read().rpartition(b")")[2].split()[1])
      except (OSError, IndexError):
        continue
      children.setdefault(parent, []).append(int(name))
  found = children.get(root, [])
  for pid in found:  # it grows
    found += children.get(pid, [])
  return found


def resident(pid):
  """Bytes of a process in memory; 0: it has ended."""
  try:
    with open(f"/proc/{pid}/statm", "rb") as file:
      return int(file.read().split()[1]) * _PAGE
  except (OSError, IndexError):
    return 0


def proportional(pid):
  """The same, but of a page that n processes share, an n-th."""
  try:
    with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
      for line in file:
        if line.startswith(b"Pss:"):
          return int(line.split()[1]) * 1024
  except OSError:
    pass  # it has ended, or hides
  return resident(pid)
