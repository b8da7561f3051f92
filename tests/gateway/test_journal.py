"""The journal: what `sync` has acknowledged is there after any crash."""

import asyncio
import os
import signal
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import pytest

from forge_jax import errors
from forge_jax.gateway import journal, refusal
from forge_jax.pool import segment


def left(folder):
  """What a new process reads: [(session, record)]."""
  opened = journal.Journal(folder)
  try:
    return list(opened.read())
  finally:
    asyncio.run(opened.aclose())


async def write(folder, batches, **kwargs):
  opened = journal.Journal(folder, **kwargs)
  list(opened.read())
  for batch in batches:
    for session, record in batch:
      opened.append(session, record)
    await opened.sync()
  await opened.aclose()


async def test_records_come_back_in_order(tmp_path):
  batches = [
    [("a", {"n": 1, "ids": b"\x00\xff"}), ("b", {"text": "ü", "x": None})],
    [("a", {"n": 2, "list": [1, 2.5, True]})],
  ]
  await write(tmp_path / "j", batches)
  await write(tmp_path / "j", [[("b", {"n": 3})]])
  found = await asyncio.to_thread(left, tmp_path / "j")
  assert found == [*batches[0], *batches[1], ("b", {"n": 3})]


async def test_requests_at_the_same_time_share_a_sync(tmp_path, monkeypatch):
  syncs = []
  monkeypatch.setattr(segment.os, "fdatasync", syncs.append)
  opened = journal.Journal(tmp_path)
  assert list(opened.read()) == []

  async def one(number):
    opened.append("s", {"n": number})
    await opened.sync()

  await asyncio.gather(*map(one, range(100)))
  assert len(syncs) == 1
  await opened.aclose()


def test_what_was_acknowledged_survives_a_kill(tmp_path):
  code = f"""
import asyncio
from forge_jax.gateway import journal

async def main():
  opened = journal.Journal({str(tmp_path)!r})
  list(opened.read())
  for number in range(10**6):
    opened.append("s", {{"n": number, "text": "x" * (number % 977)}})
    await opened.sync()
    print(number, flush=True)

asyncio.run(main())
"""
  with subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      if int(line) >= 200:
        process.send_signal(signal.SIGKILL)
        break
    acknowledged = [int(line), *map(int, process.stdout.read().split())][-1]
  numbers = [record["n"] for _, record in left(tmp_path)]
  assert numbers == list(range(len(numbers)))
  assert len(numbers) > acknowledged >= 200


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.data())
def test_a_torn_tail_is_cut(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("j")
  batches = [[("s", {"n": n, "text": "x" * 50})] for n in range(3)]
  asyncio.run(write(folder, batches))
  (path,) = folder.glob("*.log")
  whole = path.read_bytes()
  start = whole.rindex(b"FJSG")
  end = data.draw(st.integers(start, len(whole) - 1))
  path.write_bytes(whole[:end] + b"\0" * data.draw(st.integers(0, 9)))
  assert left(folder) == [*batches[0], *batches[1]]
  asyncio.run(write(folder, [[("s", {"n": 9})]]))
  assert left(folder) == [*batches[0], *batches[1], ("s", {"n": 9})]


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.data())
def test_damage_is_an_error(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("j")
  asyncio.run(write(folder, [[("s", {"n": n})] for n in range(3)]))
  (path,) = folder.glob("*.log")
  whole = bytearray(path.read_bytes())
  at = data.draw(st.integers(0, whole.rindex(b"FJSG") - 1))
  whole[at] ^= 1 << data.draw(st.integers(0, 7))
  path.write_bytes(whole)
  with pytest.raises(
    errors.GatewayError, match=r"at byte \d+, with records after it"
  ):
    left(folder)


async def test_segments_go_when_nobody_needs_them(tmp_path):
  opened = journal.Journal(tmp_path, segment_bytes=1)
  assert list(opened.read()) == []
  for session in "abc":
    opened.append(session, {"n": 0})
    await opened.sync()
  assert len(list(tmp_path.glob("*.log"))) == 3
  opened.forget("b")  # what tells that it ended must stay as long as `a` does
  await opened.sync()
  assert len(list(tmp_path.glob("*.log"))) == 4
  opened.forget("a")
  assert len(list(tmp_path.glob("*.log"))) == 2  # c, and the end of b
  await opened.aclose()
  ended = [("c", {"n": 0}), ("b", {}), ("a", {})]
  assert await asyncio.to_thread(left, tmp_path) == ended


async def test_a_name_may_be_used_again(tmp_path):
  records = [("a", {"n": 0}), ("a", {}), ("a", {"n": 1})]
  await write(tmp_path, [[record] for record in records], segment_bytes=1)
  opened = journal.Journal(tmp_path, segment_bytes=1)
  assert list(opened.read()) == records
  opened.forget("a")
  await opened.sync()
  await opened.aclose()
  assert await asyncio.to_thread(left, tmp_path) == [("a", {})]


def full(*_):
  raise OSError(28, "No space left on device")


def torn(descriptor, buffers):
  """Writes a part of a batch before it fails."""
  os.write(descriptor, bytes(buffers[0])[:5])
  full()


# What fails, by name in `os`.
FAILURES = [
  {"fdatasync": full},
  {"writev": torn},
  {"fdatasync": full, "open": full},  # nor can a new segment be made
]


@pytest.mark.parametrize("failing", FAILURES)
@pytest.mark.parametrize("segment_bytes", [1, 2**20])
async def test_a_disk_that_was_full_loses_nothing(
  tmp_path, monkeypatch, failing, segment_bytes
):
  monkeypatch.setattr(journal, "_FIRST_PAUSE", 0.01)
  opened = journal.Journal(tmp_path, segment_bytes=segment_bytes)
  assert list(opened.read()) == []
  opened.append("s", {"n": 0})
  await opened.sync()
  with monkeypatch.context() as patch:
    for name, fails in failing.items():
      patch.setattr(segment.os, name, fails)
    opened.append("s", {"n": 1})
    with pytest.raises(refusal.Refusal, match="No space left") as caught:
      await opened.sync()
    assert caught.value.status == 503 and caught.value.retry_after > 0
    opened.append("s", {"n": 2})  # of a request that was running
    with pytest.raises(refusal.Refusal, match="No space left"):
      await opened.sync()
    await asyncio.sleep(0.05)  # it is tried again, in vain
    with pytest.raises(refusal.Refusal, match="No space left"):
      opened.check()
  while True:
    try:
      await opened.sync()
      break
    except refusal.Refusal:
      await asyncio.sleep(0.01)
  opened.check()
  opened.append("s", {"n": 3})
  await opened.sync()
  await opened.aclose()
  found = await asyncio.to_thread(left, tmp_path)
  assert found == [("s", {"n": n}) for n in range(4)]


async def test_the_end_does_not_wait_for_a_full_disk(tmp_path, monkeypatch):
  opened = journal.Journal(tmp_path)
  assert list(opened.read()) == []
  opened.append("s", {"n": 0})
  await opened.sync()
  with monkeypatch.context() as patch:
    patch.setattr(segment.os, "fdatasync", full)
    opened.append("s", {"n": 1})
    with pytest.raises(refusal.Refusal):
      await opened.sync()
    await opened.aclose()
  assert ("s", {"n": 0}) in await asyncio.to_thread(left, tmp_path)


async def test_a_folder_has_one_writer(tmp_path):
  opened = journal.Journal(tmp_path)
  list(opened.read())
  with pytest.raises(errors.ConfigError, match="a gateway that is running"):
    list(journal.Journal(tmp_path).read())
  await opened.aclose()
  again = journal.Journal(tmp_path)
  list(again.read())
  await again.aclose()
  with pytest.raises(errors.ConfigError, match="cannot be kept"):
    list(journal.Journal(os.devnull).read())
