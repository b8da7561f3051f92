"""A tiny random decoder and requests to it, shared by the engine's tests."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from forge_jax.engine import api
from forge_jax.model import config as model_config
from forge_jax.model import decoder as decoder_lib

MODEL = model_config.ModelConfig(
  vocab_size=97,
  width=32,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_width=48,
  max_context=128,
)


def decoder(seed=0):
  made = decoder_lib.Decoder(MODEL, rngs=nnx.Rngs(params=seed))
  # Small random logits sample almost uniformly; larger ones tell models apart.
  made.head.embedding.set_value(made.head.embedding.get_value() * 30)
  return made


def request(name, prompt, **sampling):
  sampling = {"max_tokens": 10, "seed": 3} | sampling
  return api.GenerateRequest(
    name, tuple(prompt), api.SamplingParams(**sampling)
  )


async def collect(made, req):
  chunks = [chunk async for chunk in made.generate(req)]
  assert all(c.stop_reason is None for c in chunks[:-1])
  join = lambda name: [x for c in chunks for x in getattr(c, name)]
  return (
    join("token_ids"),
    join("logprobs"),
    join("versions"),
    chunks[-1].stop_reason,
  )


def dense_logprobs(model, prompt, response):
  logits = decoder_lib.causal_logits(model, jnp.asarray([prompt + response]))
  logprobs = jax.nn.log_softmax(logits[0])
  rows = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
  return np.asarray(logprobs)[rows, response]


def prompts(count, length=23, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, 97, length).tolist() for _ in range(count)]
