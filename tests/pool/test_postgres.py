"""A pool of several hosts: leases, dead hosts, a lost or a wrong database."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import sample_groups

from forge_jax import errors
from forge_jax.pool import postgres, progress, segment, store


@pytest.fixture
def connect(postgres_server, request):
  """Connects to a schema of this test's own."""
  schema = f"test_{abs(hash(request.node.name))}"
  opened = []

  def call():
    opened.append(postgres.Postgres(postgres_server, schema))
    return opened[-1]

  call.arguments = (postgres_server, schema)
  yield call
  for database in opened:
    database.close()


def test_hosts_append_to_segments_of_their_own(connect, tmp_path):
  with (
    postgres.open_pool(tmp_path, connect()) as one,
    postgres.open_pool(tmp_path, connect()) as other,
  ):
    for index, pool in enumerate([one, other, one, other]):
      pool.append(sample_groups.make_group(index, seed=index))
    other.append(sample_groups.make_group(0, seed=99))  # one has stored it
    assert one.indices() == other.indices() == [0, 1, 2, 3]
    for pool in (one, other):
      for index in range(4):
        expected = sample_groups.make_group(index, seed=index)
        sample_groups.assert_same(expected, pool.get(index))
  assert segment.numbers(tmp_path) == [0, 1]


def test_an_item_is_leased_by_one_host_at_a_time(connect):
  """Eight connections at once: each item once, in order for each host."""
  tickets = [progress.Ticket(i, i + 100, i % 2, 7) for i in range(60)]
  offers = postgres.Tickets(connect())
  for ticket in tickets:
    offers.offer(ticket)
    offers.offer(ticket)
  databases = [connect() for _ in range(8)]
  taken = [[] for _ in databases]

  def work(number):
    mine = postgres.Tickets(databases[number])
    while ticket := mine.lease(f"host {number}", 60.0):
      taken[number].append(ticket)

  threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(t for one in taken for t in one) == tickets
  assert all(one == sorted(one) for one in taken)
  assert offers.open_items() == list(range(60))
  offers.withdraw(range(59))
  assert offers.open_items() == [59]


def test_a_lease_ends_unless_it_is_renewed(connect):
  tickets = postgres.Tickets(connect())
  tickets.offer(progress.Ticket(0, 0, 0, 0))
  assert tickets.lease("a", 60.0).index == 0
  assert tickets.lease("b", 60.0) is None
  assert tickets.renew("a", 0, 0.0) and not tickets.renew("b", 0, 60.0)
  time.sleep(0.01)
  assert tickets.lease("b", 60.0).index == 0  # a's lease was over
  assert not tickets.renew("a", 0, 60.0)
  tickets.give_back("a", 0)  # a has it no longer
  assert tickets.lease("c", 60.0) is None
  tickets.give_back("b", 0)
  assert tickets.lease("c", 60.0).index == 0


_HOST = """
import sys
import sample_groups
from forge_jax.pool import postgres
path, server, schema, name = sys.argv[1:]
database = postgres.Postgres(server, schema)
tickets = postgres.Tickets(postgres.Postgres(server, schema))
pool = postgres.open_pool(path, database)
print("open", flush=True)
while ticket := tickets.lease(name, 0.5):
  pool.append(sample_groups.make_group(ticket.index, seed=ticket.index))
  print(ticket.index, flush=True)
  tickets.withdraw([ticket.index])
"""


def start_host(path, connect, name):
  folder = pathlib.Path(__file__).parent
  root = folder.parent.parent
  environ = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{folder}"}
  return subprocess.Popen(
    [sys.executable, "-c", _HOST, str(path), *connect.arguments, name],
    stdout=subprocess.PIPE,
    env=environ,
    text=True,
  )


def test_hosts_that_die_lose_nothing_and_others_take_over(connect, tmp_path):
  """One host is killed in the middle, another one finishes."""
  tickets = postgres.Tickets(connect())
  for index in range(60):
    tickets.offer(progress.Ticket(index, index, 0, 0))
  acknowledged = []
  for name in ("first", "second"):
    with start_host(tmp_path, connect, name) as host:
      assert host.stdout.readline() == "open\n"
      if name == "first":
        for _ in range(25):
          acknowledged.append(int(host.stdout.readline()))
        host.send_signal(signal.SIGKILL)
      acknowledged += map(int, host.stdout.read().split("\n")[:-1])
    if name == "second":
      assert host.returncode == 0
    time.sleep(0.6)  # until the dead host's lease is over
  left = tickets.open_items()
  with postgres.open_pool(tmp_path, connect()) as pool:
    assert set(acknowledged) <= set(pool.indices())
    # What a host had stored and not withdrawn is stored, and still on offer.
    assert set(pool.indices()) | set(left) == set(range(60))
    for index in pool.indices():
      expected = sample_groups.make_group(index, seed=index)
      sample_groups.assert_same(expected, pool.get(index))
  assert len(acknowledged) > 30


def test_a_lost_index_is_made_again(connect, tmp_path):
  with postgres.open_pool(tmp_path, connect()) as pool:
    for index in range(3):
      pool.append(sample_groups.make_group(index, seed=index))
  database = connect()
  for table in ("records", "segments"):
    database.execute(f"DELETE FROM {table}")
  with pytest.raises(errors.PoolError, match="is it the right database"):
    postgres.open_pool(tmp_path, database)
  assert len(postgres.rebuild(tmp_path, database).rows) == 3
  with postgres.open_pool(tmp_path, database) as pool:
    assert pool.indices() == [0, 1, 2]


def test_a_lost_connection_ends_the_pool_and_nothing_is_lost(connect, tmp_path):
  database = connect()
  pool = postgres.open_pool(tmp_path, database)
  pool.append(sample_groups.make_group(0, seed=0))
  (pid,) = database.execute("SELECT pg_backend_pid()").fetchall()[0]
  connect().execute("SELECT pg_terminate_backend(?)", (pid,))
  for _ in range(2):
    with pytest.raises(errors.PoolError, match="PostgreSQL"):
      pool._append(store.records.claim_record(store.records.Claim(1, ())), "x")
  pool.close()
  with postgres.open_pool(tmp_path, connect()) as again:
    assert again.indices() == [0] and again.claims() == []


def test_what_cannot_be_used_is_named(connect, postgres_server, tmp_path):
  with pytest.raises(errors.PoolError, match="schema 'No good'"):
    postgres.Postgres(postgres_server, "No good")
  with pytest.raises(errors.PoolError, match=r"PostgreSQL: .*refused"):
    postgres.Postgres("postgresql://forge@127.0.0.1:1/postgres")
  with postgres.open_pool(tmp_path, connect()):
    pass
  connect().execute("UPDATE meta SET value = '9' WHERE name = 'schema'")
  with pytest.raises(errors.PoolError, match="schema version 9"):
    postgres.open_pool(tmp_path, connect())
