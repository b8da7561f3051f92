"""The slot ledger against its invariants."""

import numpy as np

from forge_jax.engine import slots


def tokens(*ids):
  return np.asarray(ids, np.int32)


def test_a_first_prompt_reuses_nothing():
  ledger = slots.SlotLedger(2, 16)
  slot, donor, reused = ledger.acquire(tokens(1, 2, 3))
  assert donor == slot and reused == 0 and ledger.live == 1


def test_a_second_prompt_copies_the_shared_prefix_of_a_live_slot():
  ledger = slots.SlotLedger(2, 16)
  first, _, _ = ledger.acquire(tokens(1, 2, 3, 4))
  ledger.commit(first, tokens(1, 2, 3, 4))
  second, donor, reused = ledger.acquire(tokens(1, 2, 9))
  assert (donor, reused) == (first, 2) and second != first


def test_the_last_prompt_token_is_never_reused():
  ledger = slots.SlotLedger(2, 16)
  first, _, _ = ledger.acquire(tokens(1, 2, 3))
  ledger.commit(first, tokens(1, 2, 3))
  assert ledger.acquire(tokens(1, 2, 3))[2] == 2


def test_a_conversation_continues_in_its_own_slot():
  ledger = slots.SlotLedger(3, 16)
  first, _, _ = ledger.acquire(tokens(1, 2))
  ledger.commit(first, tokens(1, 2, 3))
  ledger.release(first)
  other, _, _ = ledger.acquire(tokens(7, 8))
  ledger.commit(other, tokens(7, 8))
  slot, donor, reused = ledger.acquire(tokens(1, 2, 3, 4, 5))
  assert slot == donor == first and reused == 3


def test_the_least_recently_used_idle_slot_is_overwritten():
  ledger = slots.SlotLedger(2, 16)
  first, _, _ = ledger.acquire(tokens(1, 2))
  ledger.commit(first, tokens(1, 2))
  second, _, _ = ledger.acquire(tokens(5, 6))
  ledger.commit(second, tokens(5, 6))
  ledger.release(second)
  ledger.release(first)
  assert ledger.acquire(tokens(8, 9))[0] == second


def test_no_slot_while_all_are_live():
  ledger = slots.SlotLedger(1, 16)
  ledger.acquire(tokens(1, 2))
  assert ledger.acquire(tokens(1, 2)) is None


def test_nothing_is_reused_after_forget():
  ledger = slots.SlotLedger(3, 16)
  idle, _, _ = ledger.acquire(tokens(1, 2, 3))
  ledger.commit(idle, tokens(1, 2, 3))
  ledger.release(idle)
  live, _, _ = ledger.acquire(tokens(4, 5, 6))
  ledger.commit(live, tokens(4, 5, 6))
  ledger.forget()
  assert ledger.acquire(tokens(1, 2, 3, 9))[2] == 0
  assert ledger.shared(tokens(4, 5, 6))[live] == 0
  ledger.release(live)
  assert ledger.shared(tokens(4, 5, 6))[live] == 0
