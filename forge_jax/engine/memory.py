"""The process's memory."""

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc


def give_back() -> None:
  """Returns freed memory to the system; does nothing where that can't be asked.

  glibc keeps pieces of up to 32 MB, in an arena of each thread: most of a
  model's arrays. A process that replaces its weights often would go on growing.
  """
  if _trim is not None:
    _trim(0)
