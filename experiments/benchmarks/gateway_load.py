"""A lean load generator: agents' episodes over raw HTTP/1.1 connections.

It shares the cores with what it measures, so it does as little as it can: one
kept-alive connection per agent, bodies put together from bytes, replies read by
their length and compared, not parsed. Whatever differs from what was expected
is an error.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
import contextlib
import dataclasses
import json
from pydoc_data import topics
import time
import zlib

REPLY = (
  "That step is done and its result was written down; the next one follows "
  "from what the file says above."
)
_REPLIED = json.dumps({"content": REPLY})[1:-1].replace(": ", ":").encode()
_TURN = json.dumps({"role": "assistant", "content": REPLY}).encode()
# Real text, and enough of it that conversations differ.
_TEXT = "\n".join(topics.topics.values()).encode("ascii", "ignore").decode()


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
  """Episodes of one shape; sizes are bytes of messages."""

  name: str
  first: int  # of the first request
  grows: int  # from a turn to the next, the model's reply included
  turns: int

  @property
  def mean(self) -> float:
    """Bytes of messages of a request, on average."""
    return self.first + self.grows * (self.turns - 1) / 2


SMALL = Workload("2 kB", first=1150, grows=245, turns=8)
LARGE = Workload("100 kB", first=20_000, grows=4_100, turns=40)


@dataclasses.dataclass(slots=True)
class Tally:
  """What the agents of a run have seen."""

  served: int = 0  # completions
  errors: int = 0
  lost: int = 0  # completions that a client got and the forest has not
  unlinked: int = 0  # turns that do not extend the turn before
  seconds: list[float] = dataclasses.field(default_factory=list)
  problems: set[str] = dataclasses.field(default_factory=set)

  held: int = 0  # sessions that were closed with every turn they had got

  def percentile(self, percent: float) -> float:
    """Milliseconds that so many of the requests took at most."""
    if not self.seconds:
      return float("nan")
    ordered = sorted(self.seconds)
    at = min(len(ordered) - 1, int(len(ordered) * percent / 100))
    return ordered[at] * 1000

  def fail(self, what: str) -> None:
    """Counts an error."""
    self.errors += 1
    self.problems.add(what[:300])


class Connection:
  """One kept-alive HTTP/1.1 connection; opened anew when it broke."""

  def __init__(self, url: str):
    """`url` is http://host:port."""
    host, _, port = url.removeprefix("http://").partition(":")
    self._address = host, int(port)
    self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = (
      None
    )

  async def call(
    self, method: str, path: str, key: str, body: bytes = b""
  ) -> tuple[int, bytes]:
    """Sends a request; returns the status and the whole body."""
    if self._streams is None:
      self._streams = await asyncio.open_connection(*self._address, limit=2**24)
    reader, writer = self._streams
    head = (
      f"{method} {path} HTTP/1.1\r\nHost: gateway\r\n"
      f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
      f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(answer[9:12])
    _, _, rest = answer.partition(b"content-length:")
    length = int(rest.partition(b"\r\n")[0])
    return status, await reader.readexactly(length)

  def close(self) -> None:
    """Closes the connection; another call opens it again."""
    if self._streams is not None:
      self._streams[1].close()
      self._streams = None


class Agent:
  """Plays one conversation after another over a connection of its own."""

  def __init__(self, url: str, key: str, workload: Workload, tally: Tally):
    """`key` is sent with every completion request."""
    self.connection = Connection(url)
    self.key = key
    self._workload = workload
    self._tally = tally
    self.messages: list[bytes] = []

  def say(self, salt: str) -> None:
    """Adds the last reply, if any, and a message of the user."""
    size = self._workload.first
    if self.messages:
      self.messages.append(_TURN)
      size = self._workload.grows - len(_TURN) - 2  # commas
    self.messages.append(_message(size, f"{salt} {len(self.messages)}"))

  async def ask(self, salt: str) -> bool:
    """The next turn of the conversation; True if it was answered."""
    self.say(salt)
    body = b'{"model":"policy","messages":[%b]}' % b",".join(self.messages)
    began = time.perf_counter()
    try:
      status, reply = await self.connection.call(
        "POST", "/v1/chat/completions", self.key, body
      )
    except (OSError, EOFError, asyncio.IncompleteReadError) as error:
      self._tally.fail(f"{type(error).__name__}: {error}")
      self.connection.close()
      return False
    if status != 200 or _REPLIED not in reply:
      self._tally.fail(f"{status}: {reply[:200]!r}")
      return False
    self._tally.seconds.append(time.perf_counter() - began)
    self._tally.served += 1
    return True

  def forget(self) -> None:
    """Begins a new conversation."""
    self.messages.clear()


class Session:
  """A session of the gateway, and the agent that plays in it."""

  def __init__(
    self, url: str, admin_token: str, workload: Workload, tally: Tally
  ):
    """Opens nothing yet."""
    self.agent = Agent(url, "", workload, tally)
    self._token = admin_token
    self._tally = tally
    self.served = 0

  async def open(self, id: str) -> None:
    """Opens the session."""
    self._id, self.served = id, 0
    self.agent.forget()
    body = json.dumps({"id": id, "seed": 1}).encode()
    opened = await self._admin("/admin/sessions", body)
    self.agent.key = opened["api_key"]

  async def ask(self) -> None:
    """The session's next turn."""
    self.served += await self.agent.ask(self._id)

  async def close(self) -> None:
    """Closes the session; counts the turns that its records lack."""
    held = await self._admin(f"/sessions/{self._id}/close", b"{}")
    completions = held["completions"]
    lost = max(0, self.served - len(completions))
    self._tally.lost += lost
    self._tally.held += not lost
    self._tally.unlinked += sum(c["parent"] is None for c in completions[1:])

  async def _admin(self, path: str, body: bytes) -> dict:
    status, reply = await self.agent.connection.call(
      "POST", path, self._token, body
    )
    if status != 200:
      raise RuntimeError(f"{path}: {status}: {reply[:200]!r}")
    return json.loads(reply)


async def play_sessions(
  url: str,
  admin_token: str,
  workload: Workload,
  agents: int,
  seconds: float,
  tally: Tally,
) -> float:
  """Whole episodes, one after another per agent; returns requests/s.

  Each opens a session of its own, asks until the conversation has all its
  turns, and closes it.
  """
  end = time.perf_counter() + seconds

  async def play(number: int) -> None:
    session = Session(url, admin_token, workload, tally)
    # Agents begin at different turns, so that all sizes are always in flight.
    turns = 1 + number * workload.turns // agents
    episode = 0
    while time.perf_counter() < end:
      await session.open(f"{workload.turns}-{number}-{episode}")
      for _ in range(turns):
        await session.ask()
        if time.perf_counter() > end:
          break
      await session.close()
      episode, turns = episode + 1, workload.turns
    session.agent.connection.close()

  began = time.perf_counter()
  await asyncio.gather(*(play(n) for n in range(agents)))
  return tally.served / (time.perf_counter() - began)


async def play_conversations(
  url: str,
  key: str,
  workload: Workload,
  agents: int,
  seconds: float,
  tally: Tally,
) -> float:
  """The same conversations against a server without sessions; requests/s."""
  end = time.perf_counter() + seconds

  async def play(number: int) -> None:
    agent = Agent(url, key, workload, tally)
    turns = 1 + number * workload.turns // agents
    while time.perf_counter() < end:
      for _ in range(turns):
        await agent.ask(f"{number}")
        if time.perf_counter() > end:
          break
      agent.forget()
      turns = workload.turns
    agent.connection.close()

  began = time.perf_counter()
  await asyncio.gather(*(play(n) for n in range(agents)))
  return tally.served / (time.perf_counter() - began)


async def paced(
  sessions: Sequence[Session], rate: float, seconds: float
) -> None:
  """Asks `rate` times a second, whatever the replies take, session by session.

  A session that is still waiting for its reply is passed over.
  """
  waiting: dict[int, asyncio.Task[None]] = {}
  began = time.perf_counter()
  for n in range(int(rate * seconds)):
    await asyncio.sleep(began + n / rate - time.perf_counter())
    which = n % len(sessions)
    if len(waiting) == len(sessions):
      await asyncio.wait(waiting.values(), return_when=asyncio.FIRST_COMPLETED)
    while which in waiting:
      which = (which + 1) % len(sessions)
    task = asyncio.create_task(sessions[which].ask())
    waiting[which] = task
    task.add_done_callback(lambda _, which=which: waiting.pop(which))
  await asyncio.gather(*waiting.values())


@contextlib.asynccontextmanager
async def opened(
  url: str, admin_token: str, workload: Workload, count: int, tally: Tally
) -> AsyncIterator[list[Session]]:
  """Sessions that are open for the length of a block."""
  made = [Session(url, admin_token, workload, tally) for _ in range(count)]
  for n, session in enumerate(made):
    await session.open(f"held-{n}")
  yield made
  for session in made:
    await session.close()
    session.agent.connection.close()


async def ready(url: str, seconds: float) -> None:
  """Waits until a server answers a request for a URL with 200.

  Raises:
    TimeoutError: it does not.
  """
  address, _, path = url.removeprefix("http://").partition("/")
  async with asyncio.timeout(seconds):
    while True:
      connection = Connection(f"http://{address}")
      try:
        status, _ = await connection.call("GET", f"/{path}", "none")
        if status == 200:
          return
      except (OSError, EOFError):
        pass
      finally:
        connection.close()
      await asyncio.sleep(0.5)


def _message(size: int, salt: str) -> bytes:
  """A user's message of about `size` bytes; the salt makes it its own."""
  start = zlib.crc32(salt.encode()) % (len(_TEXT) - size)
  text = json.dumps(f"{salt} {_TEXT[start : start + size]}")
  message = '{"role":"user","content":' + text
  cut = message[: size - 2].rstrip("\\")  # before the quote and the brace
  return f'{cut}"}}'.encode()
