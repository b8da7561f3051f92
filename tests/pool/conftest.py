"""Connections to a schema of a test's own."""

import pytest

from forge_jax.pool import postgres


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
