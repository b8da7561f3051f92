"""The drafts' loss against a NumPy oracle, and what its gradient leaves."""

import jax
import numpy as np
import pytest

from forge_jax.algo import mtp


def logits(seed, size=50):
  return np.random.default_rng(seed).normal(0, 2, (7, size))


@pytest.mark.parametrize("top_k", [1, 8, 50, 99])
def test_loss_and_acceptance_equal_the_oracle(top_k):
  policy, draft = logits(0), logits(1)
  with jax.enable_x64(True):
    loss, accepted = mtp.draft_loss(policy, draft, top_k)
  for row, (a, b) in enumerate(zip(policy, draft, strict=True)):
    p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
    best = np.argsort(-p)[:top_k]
    renormalised = p[best] / p[best].sum()
    want = (renormalised * np.log(renormalised / q[best])).sum()
    assert loss[row] == pytest.approx(want, rel=1e-10, abs=1e-12)
    assert accepted[row] == pytest.approx(np.minimum(p, q).sum(), rel=1e-10)


def test_a_draft_that_is_the_policy_loses_nothing_and_is_always_accepted():
  policy = logits(0)
  with jax.enable_x64(True):
    loss, accepted = mtp.draft_loss(policy, policy + 3.0, 50)
  np.testing.assert_allclose(loss, 0, atol=1e-12)
  np.testing.assert_allclose(accepted, 1, rtol=1e-12)


def test_the_policy_gets_no_gradient_and_the_draft_does():
  loss = lambda a, b: mtp.draft_loss(a, b, 8)[0].sum()
  of_policy, of_draft = jax.grad(loss, (0, 1))(logits(0), logits(1))
  assert not of_policy.any()
  assert np.abs(of_draft).max() > 0.01
