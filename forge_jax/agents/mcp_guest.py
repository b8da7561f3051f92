"""The inside of a sandbox with MCP servers: starts them and joins each to the host.

It stands alone: the standard library only, and it is run by path. Its argument
is JSON: `port` of the way out, `token`, `servers` (command and variables of
each). A connection begins with one line, the token and a number: the server's,
whose stdin and stdout the connection then is, or -1. When the host ends the
latter, servers have `grace` seconds to end by themselves.
"""

import json
import os
import socket
import subprocess
import sys
import time


def main(plan):
  """Runs the servers until the host ends the connection that is nobody's."""
  control = _connect(plan, -1)
  servers = []
  for number, (command, variables) in enumerate(plan["servers"]):
    with _connect(plan, number) as link:
      try:
        servers.append(
          subprocess.Popen(
            command,
            stdin=link.fileno(),
            stdout=link.fileno(),
            env=os.environ | variables,
          )
        )
      except OSError as error:
        sys.exit(f"{command[0]}: {error}")
  while control.recv(1):
    pass
  deadline = time.monotonic() + plan["grace"]
  for server in servers:
    try:
      server.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      server.kill()


def _connect(plan, number):
  link = socket.create_connection(("127.0.0.1", plan["port"]))
  link.sendall(f"{plan['token']} {number}\n".encode())
  return link


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
