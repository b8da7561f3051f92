"""Tickets in PostgreSQL: the items on offer, and which host has leased which.

Invariants:
  1. An item is leased by one host at a time, by the server's clock: `lease`
     takes the lowest free one with SKIP LOCKED, so that hosts never wait for
     each other. A lease that is not renewed ends.
  2. A group becomes part of the pool only while its very ticket (item, task
     number, attempt) is open; `insert` asks in the transaction that adds the
     row. So what a host rolled out for a history that the trainer has lost is
     not stored, and of two hosts that roll out one item the first stores.
  3. An item whose group is stored is leased to nobody any more.
"""

from collections.abc import Iterable
from typing import Protocol

from forge_jax import errors
from forge_jax.pool import index as index_lib
from forge_jax.pool import progress, records

TABLE = (
  "CREATE TABLE IF NOT EXISTS tickets (item BIGINT PRIMARY KEY,"
  " number BIGINT NOT NULL, attempt BIGINT NOT NULL, step BIGINT NOT NULL,"
  " host TEXT, until TIMESTAMPTZ)"
)
_STORED = (
  "EXISTS (SELECT 1 FROM records"
  f" WHERE kind = {records.GROUP} AND key = tickets.item)"
)
_FREE = "(host IS NULL OR until < now())"
_LEASE = (
  "UPDATE tickets SET host = ?, until = now() + make_interval(secs => ?)"
  f" WHERE item = (SELECT item FROM tickets WHERE {_FREE} AND NOT {_STORED}"
  " ORDER BY item LIMIT 1 FOR UPDATE SKIP LOCKED)"
  " RETURNING item, number, attempt, step"
)
_RENEW = (
  "UPDATE tickets SET host = ?, until = now() + make_interval(secs => ?)"
  " WHERE item = ? AND number = ? AND attempt = ?"
  f" AND (host = ? OR {_FREE})"
)
# Segments have the locks from 0 on.
_LEAD = "SELECT pg_try_advisory_lock(hashtext(?), -1)"
# The lock makes a transaction that withdraws the ticket wait for this one.
_ADD = (
  "INSERT INTO records (kind, key, segment, place, length, head)"
  " SELECT ?, ?, ?, ?, ?, ? FROM tickets"
  " WHERE item = ? AND number = ? AND attempt = ? FOR KEY SHARE"
  " ON CONFLICT (kind, key) DO NOTHING"
)


class Database(index_lib.Database, Protocol):
  """A connection to PostgreSQL."""

  schema: str  # of the pool


class Tickets:
  """The table of a pool's tickets. Used from any thread."""

  def __init__(self, database: Database):
    self._database = database

  def offer(self, ticket: progress.Ticket) -> None:
    """Puts an item on offer; a second offer changes nothing."""
    self._database.execute(
      "INSERT INTO tickets (item, number, attempt, step) VALUES (?, ?, ?, ?)"
      " ON CONFLICT (item) DO NOTHING",
      ticket,
    )

  def lease(self, host: str, seconds: float) -> progress.Ticket | None:
    """Takes the lowest item that nobody has leased or stored; or None."""
    found = self._database.execute(_LEASE, (host, seconds)).fetchall()
    return progress.Ticket(*found[0]) if found else None

  def renew(self, host: str, ticket: progress.Ticket, seconds: float) -> bool:
    """Prolongs a lease, or takes it back if nobody else has taken it since.

    Returns:
      False: another host has it, or the ticket is not open any more.
    """
    key = ticket.index, ticket.number, ticket.attempt
    done = self._database.execute(_RENEW, (host, seconds, *key, host))
    return bool(done.rowcount)

  def give_back(self, host: str, item: int) -> None:
    """Puts a leased item on offer again."""
    self._database.execute(
      "UPDATE tickets SET host = NULL, until = NULL"
      " WHERE item = ? AND host = ?",
      (item, host),
    )

  def open_items(self) -> list[int]:
    """The items on offer, leased or stored since, ascending."""
    found = self._database.execute("SELECT item FROM tickets ORDER BY item")
    return [item for (item,) in found.fetchall()]

  def stored(self) -> list[int]:
    """The open items whose groups are stored, ascending."""
    found = self._database.execute(
      f"SELECT item FROM tickets WHERE {_STORED} ORDER BY item"
    )
    return [item for (item,) in found.fetchall()]

  def withdraw(self, items: Iterable[int]) -> None:
    """Closes tickets: they are stored, or nobody asks for them any more."""
    with self._database.transaction():
      self._database.executemany(
        "DELETE FROM tickets WHERE item = ?", [(item,) for item in items]
      )

  def take_over(self) -> None:
    """Makes this the one connection that offers, and closes all tickets.

    No group of theirs can be stored once it returns.

    Raises:
      PoolError: another trainer's connection offers tickets.
    """
    schema = self._database.schema
    found = self._database.execute(_LEAD, (schema,)).fetchall()
    if found != [(True,)]:
      raise errors.PoolError(
        f"another trainer offers tickets in schema {schema!r}: a pool has one"
      )
    self.close_all()

  def close_all(self) -> None:
    """Closes all tickets."""
    self._database.execute("DELETE FROM tickets")

  def insert(self, row: index_lib.Row) -> bool:
    """Adds a group's row to the index, within a transaction of the caller's.

    Returns:
      False: its ticket is not open, or the group is stored already.
    """
    info = records.group_info(row.head, row.length)
    key = info.index, info.number, info.attempt
    return bool(self._database.execute(_ADD, (*row, *key)).rowcount)

  def close(self) -> None:
    """Closes the connection, and ends what `take_over` took."""
    self._database.close()
