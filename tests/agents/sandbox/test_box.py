"""Running programs in a sandbox: what goes in, what comes out, what is left."""

import asyncio
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

from forge_jax import errors
from forge_jax.agents.sandbox import base, bubblewrap, unsafe
from forge_jax.agents.sandbox import box as box_lib

ROOT = pathlib.Path(__file__).parents[3]
PROBES = pathlib.Path(__file__).parent / "probes"


@pytest.fixture(params=["bubblewrap", "watched", "unsafe"])
async def box(request, open_box):
  """A sandbox of each kind, with small limits."""
  limits = base.Limits(output_bytes=1000, memory_bytes=256 * base.MIB)
  if request.param == "unsafe":
    async with await unsafe.UnsafeProcess().open(limits) as opened:
      yield opened
  else:
    yield await open_box(limits, use_cgroups=request.param == "bubblewrap")


async def test_a_command_gets_and_gives(box):
  await box.put({"in/a.txt": b"one\n"})
  script = 'cat in/a.txt -; echo "$WHO" >&2; echo two >out.txt; exit 3'
  result = await box.run(
    ["sh", "-c", script], seconds=10, stdin=b"\x00\xff", env={"WHO": "me"}
  )
  assert (result.code, result.stdout) == (3, b"one\n\x00\xff")
  assert result.stderr == b"me\n"
  assert result.failure == "exit status 3"
  assert await box.get() == {"in/a.txt": b"one\n", "out.txt": b"two\n"}
  assert await box.get(["*.txt"]) == await box.get()
  assert await box.get(["out*"]) == {"out.txt": b"two\n"}


async def test_only_regular_files_come_out(box):
  script = "ln -s /etc/passwd link; mkfifo pipe; mkdir .d; echo x >.d/f"
  assert (await box.run(["sh", "-c", script], seconds=10)).failure is None
  assert await box.get() == {".d/f": b"x\n"}


async def test_a_harvest_is_bounded(box):
  await box.put({"a": b"x" * 600, "b": b"x" * 600})
  with pytest.raises(errors.SandboxError, match="more than 1000 files or 1000"):
    await box.get(most_bytes=1000)
  with pytest.raises(errors.SandboxError, match="more than 1 files"):
    await box.get(most_files=1)
  assert len(await box.get()) == 2


async def test_a_program_is_put(box):
  await box.put({"tool": b"#!/bin/sh\necho made\n"}, executable=True)
  assert (await box.run(["./tool"], seconds=10)).stdout == b"made\n"


async def test_endless_output_is_cut_in_the_middle(box):
  script = 'echo first; i=0; while [ $i -lt 2000 ]; do echo "line $i"; i=$((i+1)); done; echo last'
  result = await box.run(["sh", "-c", script], seconds=30)
  assert result.failure is None
  assert len(result.stdout) == 1000
  assert result.stdout.startswith(b"first\n")
  assert result.stdout.endswith(b"last\n")
  whole = 6 + 5 + sum(len(f"line {i}\n") for i in range(2000))
  assert result.dropped_bytes == whole - 1000


async def test_a_command_ends_at_its_deadline(box):
  result = await box.run(["sh", "-c", "echo on; yes >&2"], seconds=0.5)
  assert result.timed_out and result.stdout == b"on\n"
  assert len(result.stderr) == 1000
  assert result.failure.startswith("timed out after 0.")
  assert (await box.run(["echo", "well"], seconds=10)).stdout == b"well\n"


async def test_no_daemon_survives_its_command(box, none_left):
  mark = f"mark-{os.getpid()}-{id(box)}"
  await box.put({"resources.py": (PROBES / "resources.py").read_bytes()})
  command = ["python3", "resources.py", "leave_daemon", f'{{"mark": "{mark}"}}']
  assert (await box.run(command, seconds=10)).failure is None
  await none_left(mark)


async def test_a_signal_is_told(box):
  result = await box.run(["sh", "-c", "kill -SEGV $$"], seconds=10)
  assert (result.code, result.failure) == (-11, "ended by signal 11")


async def test_a_program_that_is_not_there(box):
  with pytest.raises(errors.SandboxError, match=r"No such file.*'no-such'"):
    await box.run(["no-such"], seconds=10)
  assert (await box.run(["true"], seconds=10)).failure is None


async def test_a_cancelled_command_takes_the_sandbox_with_it(box, none_left):
  mark = f"77{os.getpid()}{id(box) % 10**6}"
  command = asyncio.create_task(box.run(["sleep", mark], seconds=60))
  await asyncio.sleep(0.3)
  command.cancel()
  with pytest.raises(asyncio.CancelledError):
    await command
  with pytest.raises(errors.SandboxError, match="run was interrupted"):
    await box.run(["true"], seconds=10)
  await box.aclose()
  await none_left(mark)


async def test_commands_asked_for_at_once_run_one_after_another(box):
  script = "ls; : >$0; sleep 0.1; rm $0"
  results = await asyncio.gather(
    *(box.run(["sh", "-c", script, str(n)], seconds=9) for n in range(3))
  )
  assert [(r.stdout, r.failure) for r in results] == [(b"", None)] * 3


async def test_closing_twice_is_once(box):
  await box.aclose()
  await box.aclose()
  with pytest.raises(errors.SandboxError, match="closed"):
    await box.run(["true"], seconds=10)


async def test_the_system_is_read_only_and_the_work_is_private(open_box):
  one, other = await open_box(), await open_box()
  await one.put({"/tmp/a": b"", "mine": b"x", "/home/agent/b": b""})
  assert await other.get() == {}
  result = await other.run(["ls", "/tmp", "/home/agent"], seconds=10)
  assert result.stdout == b"/home/agent:\nwork\n\n/tmp:\n"
  with pytest.raises(errors.SandboxError, match="Read-only file system"):
    await one.put({"/usr/x": b""})


async def test_many_at_once_without_a_thread_each(open_box):
  boxes = [await open_box() for _ in range(4)]
  before = threading.active_count()
  results = await asyncio.gather(
    *[b.run(["echo", str(n)], seconds=30) for n, b in enumerate(boxes)]
  )
  assert [r.stdout for r in results] == [b"0\n", b"1\n", b"2\n", b"3\n"]
  assert threading.active_count() == before


async def test_what_is_shown_is_seen_read_only(open_box, tmp_path):
  (tmp_path / "tool.sh").write_text("#!/bin/sh\necho shown\n")
  (tmp_path / "tool.sh").chmod(0o755)
  tmp_path.chmod(0o755)  # the program is another user than this one
  box = await open_box(show=(str(tmp_path),), path=(str(tmp_path),))
  assert (await box.run(["tool.sh"], seconds=10)).stdout == b"shown\n"
  result = await box.run(["touch", str(tmp_path / "x")], seconds=10)
  assert b"Read-only file system" in result.stderr


RUNNER = """
import asyncio, sys
from forge_jax.agents.sandbox import bubblewrap, unsafe

async def main():
  kind = {"bubblewrap": bubblewrap.Bubblewrap, "unsafe": unsafe.UnsafeProcess}
  box = await kind[sys.argv[1]]().open(gateway="http://127.0.0.1:9")
  asyncio.create_task(box.run(["sh", "-c", f"sleep {sys.argv[2]} & "
    f"setsid sleep {sys.argv[2]}"], seconds=300))
  await asyncio.sleep(300)

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["bubblewrap", "unsafe"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_nothing_survives_its_runner(kind, number, none_left, open_box):
  await open_box()  # skips where there can be no sandbox
  mark = f"88{os.getpid()}{time.monotonic_ns() % 10**6}"
  runner = subprocess.Popen(
    [sys.executable, "-c", RUNNER, kind, mark], cwd=ROOT
  )
  try:
    for _ in range(3000):
      sleeping = [p for p in processes("sleep") if mark in p]
      if len(sleeping) == 2:
        break
      await asyncio.sleep(0.01)
    assert len(sleeping) == 2
  finally:
    runner.send_signal(number)
    runner.wait()
  await none_left(mark)


def processes(name):
  """Command lines of the machine's processes of a name."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_text().split("\0")
    except OSError:
      continue
    if words[0] == name:
      found.append(" ".join(words))
  return found


async def test_a_killed_runners_leftovers_are_swept(open_box):
  box = await open_box()
  done = subprocess.Popen(["true"])
  done.wait()
  left = pathlib.Path("/tmp") / f"forge-sandbox-{done.pid}-x"
  left.mkdir()
  (left / "stage").mkdir()
  await open_box()
  assert not left.exists()
  assert (await box.run(["true"], seconds=10)).failure is None


REPLIES = {
  "no frame": b"hello",
  "a huge object": struct.pack(">II", 2**31, 0),
  "a huge payload": struct.pack(">II", 2, 2**31) + b"{}",
  "no JSON": struct.pack(">II", 2, 0) + b"{]",
  "no object": struct.pack(">II", 2, 0) + b"[]",
  "a deep one": struct.pack(">II", 10**6, 0) + b"[" * 10**6,
  "an empty one": struct.pack(">II", 2, 0) + b"{}",
  "an odd one": struct.pack(">II", 30, 0) + b'{"stdout_bytes": 1, "code":[]}',
}


@pytest.mark.parametrize("name", REPLIES)
async def test_a_hostile_guest_is_an_error(name, tmp_path):
  (tmp_path / "reply").write_bytes(REPLIES[name])
  code = (
    "import sys; out = sys.stdout.buffer\n"
    "out.write(bytes.fromhex('0000000200000000') + b'{}'); out.flush()\n"
    "sys.stdin.buffer.read(50); out.write(open('reply', 'rb').read())"
  )
  process = await asyncio.create_subprocess_exec(
    *(sys.executable, "-c", code),
    cwd=tmp_path,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  hostile = box_lib.Box(
    process, work="/", home="/", gateway=None, limits=base.Limits()
  )
  async with await box_lib.open_box(hostile) as box:
    for _ in range(2):
      with pytest.raises(errors.SandboxError):
        await box.run(["true"], seconds=5)


def test_bubblewrap_is_asked_for_by_name(monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  with pytest.raises(errors.SandboxError, match="apt-get install bubblewrap"):
    bubblewrap.Bubblewrap()


def test_an_old_bubblewrap_is_refused(monkeypatch, tmp_path):
  (tmp_path / "bwrap").write_text("#!/bin/sh\necho bubblewrap 0.6.1\n")
  (tmp_path / "bwrap").chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(errors.SandboxError, match=r"0\.6\.1; expected 0\.8"):
    bubblewrap.Bubblewrap()


def test_what_is_shown_must_be_there():
  try:
    bubblewrap.Bubblewrap()
  except errors.SandboxError as error:
    pytest.skip(str(error))
  with pytest.raises(errors.ConfigError, match="'/nowhere'"):
    bubblewrap.Bubblewrap(bubblewrap.BubblewrapConfig(show=("/nowhere",)))


def test_limits_are_positive():
  with pytest.raises(errors.ConfigError, match="processes is 0"):
    base.Limits(processes=0)
