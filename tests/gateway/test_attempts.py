"""Which requests are the same one asked again, and which only look alike."""

import multidict
import pytest

from forge_jax.gateway import attempts


def caller(body=b"{}", **headers):
  names = {name.replace("_", "-"): value for name, value in headers.items()}
  return attempts.read(
    "/chat/completions", "m", body, multidict.CIMultiDict(names)
  )


def retry(count, body=b"{}"):
  return caller(body, X_Stainless_Retry_Count=str(count))


class Played:
  """Attempts of a session, each named by its place."""

  def __init__(self):
    self.attempts = attempts.Attempts()
    self._begun = []

  def begin(self, by):
    self._begun.append(self.attempts.begin(by))
    return len(self._begun) - 1

  def end(self, number, *, delivered, recorded=True):
    attempt = self._begun[number]
    if recorded:
      attempt.record(0, f"s/{number}")
    self.attempts.end(attempt, delivered)

  def ask(self, by, *, delivered=True, recorded=True):
    """An attempt from its beginning to its end; what it repeats."""
    number = self.begin(by)
    self.end(number, delivered=delivered, recorded=recorded)
    return self.repeats(number)

  def repeats(self, number):
    return self._begun[number].repeats(0)


@pytest.fixture
def played():
  return Played()


@pytest.mark.parametrize("again", [caller(), retry(0), retry(1)])
def test_a_lost_request_is_asked_again_once(played, again):
  assert played.ask(caller(), delivered=False) is None
  assert played.ask(caller(b"other"), delivered=False) is None
  assert played.ask(again) == "s/0"
  assert played.ask(caller()) is None
  assert played.attempts.lost == {"s/0", "s/1"}


def test_identical_requests_that_arrive_have_nothing_to_do_with_each_other(
  played,
):
  for _ in range(3):
    assert played.ask(caller()) is None
  first, second = played.begin(caller()), played.begin(caller())
  played.end(second, delivered=True)
  played.end(first, delivered=True)
  assert played.repeats(first) is played.repeats(second) is None
  assert not played.attempts.lost


def test_a_client_that_says_so_asks_again(played):
  """It may have given up before the gateway knows."""
  waiting = played.begin(caller())
  again = played.begin(retry(1))
  played.end(waiting, delivered=False)
  played.end(again, delivered=True)
  assert played.repeats(again) == "s/0"
  assert played.ask(retry(1)) == "s/1"  # nothing was lost on our side
  assert played.ask(retry(1, b"other")) is None


def test_a_retry_goes_back_to_what_was_recorded(played):
  played.ask(caller(), delivered=False)
  assert played.ask(retry(1), delivered=False, recorded=False) == "s/0"
  assert played.ask(retry(2), delivered=False) == "s/0"
  assert played.ask(retry(3)) == "s/2"


def test_two_lost_at_once_are_asked_again_one_by_one(played):
  one, two = played.begin(caller()), played.begin(caller())
  played.end(one, delivered=False)
  played.end(two, delivered=False)
  assert {played.ask(caller()), played.ask(caller())} == {"s/0", "s/1"}
  assert played.ask(caller()) is None


def test_what_arrived_takes_no_room(played):
  for _ in range(100):
    played.ask(caller())
  assert len(played.attempts._untied[caller().digest]) == 1


def test_ids_that_a_client_sends_are_kept():
  read = caller(
    X_Claude_Code_Session_Id="a",
    X_Claude_Code_Agent_Id="b",
    Session_Id="c" * 1000,
    Thread_Id="d",
    Authorization="secret",
    X_Stainless_Retry_Count="many",
  )
  assert read.client_ids == {
    "x-claude-code-session-id": "a",
    "x-claude-code-agent-id": "b",
    "session-id": "c" * 256,
    "thread-id": "d",
  }
  assert read.retries == 0
