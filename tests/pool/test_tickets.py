"""Tickets: leased by one host at a time, and the fence around the pool."""

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
from forge_jax.pool import postgres, progress
from forge_jax.pool import tickets as tickets_lib


def test_an_item_is_leased_by_one_host_at_a_time(connect):
  """Eight connections at once: each item once, in order for each host."""
  tickets = [progress.Ticket(i, i + 100, i % 2, 7) for i in range(60)]
  offers = tickets_lib.Tickets(connect())
  for ticket in tickets:
    offers.offer(ticket)
    offers.offer(ticket)
  databases = [connect() for _ in range(8)]
  taken = [[] for _ in databases]

  def work(number):
    mine = tickets_lib.Tickets(databases[number])
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
  tickets = tickets_lib.Tickets(connect())
  ticket = progress.Ticket(0, 0, 0, 0)
  tickets.offer(ticket)
  assert tickets.lease("a", 60.0) == ticket
  assert tickets.lease("b", 60.0) is None
  assert tickets.renew("a", ticket, 0.0) and tickets.renew("a", ticket, 60.0)
  assert not tickets.renew("b", ticket, 60.0)
  assert tickets.renew("a", ticket, 0.0)
  time.sleep(0.01)
  assert tickets.lease("b", 60.0).index == 0  # a's lease was over
  assert not tickets.renew("a", ticket, 60.0)
  tickets.give_back("a", 0)  # a has it no longer
  assert tickets.lease("c", 60.0) is None
  tickets.give_back("b", 0)
  assert tickets.lease("c", 60.0).index == 0


_HOST = """
import sys
import sample_groups
from forge_jax.pool import postgres
from forge_jax.pool import tickets as tickets_lib
path, server, schema, name = sys.argv[1:]
database = postgres.Postgres(server, schema)
tickets = tickets_lib.Tickets(postgres.Postgres(server, schema))
pool = postgres.open_pool(path, database, leased=True)
print("open", flush=True)
while ticket := tickets.lease(name, 0.5):
  pool.append(sample_groups.make_group(ticket.index, seed=ticket.index))
  print(ticket.index, flush=True)
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
  tickets = tickets_lib.Tickets(connect())
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
  assert tickets.stored() == tickets.open_items() == list(range(60))
  with postgres.open_pool(tmp_path, connect()) as pool:
    assert pool.indices() == list(range(60))
    for index in pool.indices():
      expected = sample_groups.make_group(index, seed=index)
      sample_groups.assert_same(expected, pool.get(index))
  # One that was stored and not said before the kill is not leased again.
  assert len(set(acknowledged)) == len(acknowledged) >= 59


def test_a_group_is_stored_only_while_its_ticket_is_open(connect, tmp_path):
  trainer = connect()
  tickets = tickets_lib.Tickets(trainer)
  tickets.take_over()
  for item in range(3):
    tickets.offer(progress.Ticket(item, item, 0, 0))
  with postgres.open_pool(tmp_path, connect(), leased=True) as host:
    host.append(sample_groups.make_group(0, seed=0))
    # The trainer begins anew: item 1 is another attempt's, 2 is not asked for.
    tickets.close_all()
    tickets.offer(progress.Ticket(1, 7, 1, 4))
    for item in (0, 1, 2):
      host.append(sample_groups.make_group(item, seed=9))
    assert host.indices() == [0]
    sample_groups.assert_same(sample_groups.make_group(0, seed=0), host.get(0))
    tickets.close_all()
    tickets.offer(progress.Ticket(1, 1, 0, 4))
    host.append(sample_groups.make_group(1, seed=1))
    assert host.indices() == [0, 1]


def test_closing_tickets_waits_for_what_is_being_stored(connect, tmp_path):
  """No group appears after the trainer has closed its ticket."""
  tickets = tickets_lib.Tickets(connect())
  tickets.offer(progress.Ticket(0, 0, 0, 0))
  host = connect()
  row = postgres.SharedIndex(host, leased=True)
  closing = threading.Thread(target=tickets.close_all)
  with postgres.open_pool(tmp_path, connect(), leased=True) as pool:
    pool.append(sample_groups.make_group(0, seed=0))
    stored = pool.index.find(1, 0)
  host.execute("DELETE FROM records")
  with host.transaction():
    assert row.insert(stored)
    closing.start()
    closing.join(0.3)
    assert closing.is_alive()  # until the row is committed
  closing.join()
  assert tickets.open_items() == [] and row.find(1, 0) == stored


def test_a_pool_has_one_trainer(connect):
  first = connect()
  tickets_lib.Tickets(first).take_over()
  with pytest.raises(errors.PoolError, match="another trainer offers"):
    tickets_lib.Tickets(connect()).take_over()
  first.close()
  tickets_lib.Tickets(connect()).take_over()
