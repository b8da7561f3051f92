"""A disk that is full when a test says so."""

import errno
import os


class Disk:
  """Makes segment writes stop when `room` bytes are left."""

  def __init__(self, monkeypatch, room):
    self.room, self._writev = room, os.writev
    monkeypatch.setattr(os, "writev", self.writev)

  def writev(self, descriptor, buffers):
    if not self.room:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    data = b"".join(buffers)[: self.room]
    self.room -= len(data)
    return self._writev(descriptor, [data])
