"""The inside end of a sandbox's way out: a TCP port joined to a socket file.

It stands alone: the standard library only, and the guest imports it by path.
"""

import contextlib
import socket
import threading

_CHUNK = 65536


def listen(port):
  """A socket that listens at a port of the loopback."""
  return socket.create_server(("127.0.0.1", port), backlog=64)


def serve(listener, path):
  """Joins each connection to one of its own to the socket file, for ever."""
  while True:
    inner, _ = listener.accept()
    threading.Thread(target=_join, args=(inner, path), daemon=True).start()


def _join(inner, path):
  outer = socket.socket(socket.AF_UNIX)
  with inner, outer:
    outer.connect(path)
    back = threading.Thread(target=_pump, args=(outer, inner), daemon=True)
    back.start()
    _pump(inner, outer)
    back.join()


def _pump(source, sink):
  try:
    while data := source.recv(_CHUNK):
      sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
  except OSError:  # either end is gone: so shall the other be
    for end in (source, sink):
      with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
