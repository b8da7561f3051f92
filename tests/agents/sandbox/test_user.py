"""Who the sandboxed program is, for the machine and in its own eyes."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
NOBODY = 65534
RUNNER = """
import asyncio
from forge_jax.agents.sandbox import bubblewrap

async def main():
  async with await bubblewrap.Bubblewrap().open() as box:
    script = "id -u; cat /proc/self/uid_map; echo x >x; cat ~/work/x"
    result = await box.run(["sh", "-c", script], seconds=30)
    print(result.stdout.decode(), result.stderr.decode())

asyncio.run(main())
"""


async def test_the_program_is_no_root_whoever_we_are(open_box):
  box = await open_box()
  result = await box.run(
    ["sh", "-c", "id -u; id -G; cat /proc/self/uid_map"], seconds=10
  )
  user, groups, mapped = result.stdout.decode().splitlines()
  inside, _, count = map(int, mapped.split())
  assert (user, groups, inside, count) == ("1000", "1000", 1000, 1)
  (outside,) = {
    pathlib.Path(f"/proc/{pid}").stat().st_uid for pid in _children(box)
  }
  assert outside != 0
  assert os.geteuid() != 0 or outside != os.geteuid()


async def test_every_sandbox_of_root_is_another_user(open_box):
  if os.geteuid() != 0:
    pytest.skip("needs root")
  if "4294967295" not in pathlib.Path("/proc/self/uid_map").read_text():
    pytest.skip("the users that are set apart are not in this namespace")
  users = set()
  for _ in range(3):
    (user,) = {
      pathlib.Path(f"/proc/{pid}").stat().st_uid
      for pid in _children(await open_box())
    }
    users.add(user)
  assert len(users) == 3


def test_a_user_without_privileges_opens_sandboxes():
  if os.geteuid() != 0:
    pytest.skip("needs root, to become somebody else")
  python = _python_of_nobody()
  done = subprocess.run(
    [python, "-c", RUNNER],
    user=NOBODY,
    group=NOBODY,
    extra_groups=[],
    env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
    cwd="/",
    capture_output=True,
    text=True,
  )
  if "namespaces (unshare)" in done.stderr:
    pytest.skip("this machine refuses user namespaces to its users")
  assert done.stdout.split() == ["1000", "1000", "0", "1", "x"], done.stderr


def _children(box):
  """The processes that bubblewrap and the guest run as."""
  pid = box._process.pid
  path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
  return [pid, *map(int, path.read_text().split())]


def _python_of_nobody():
  """An interpreter that an ordinary user can run, new enough for us."""
  check = "import sys; assert sys.version_info >= (3, 11)"
  for python in (sys.executable, "/usr/bin/python3"):
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
      subprocess.run(
        [python, "-c", check], user=NOBODY, group=NOBODY, check=True
      )
      return python
  pytest.skip("an ordinary user can run no Python here")
