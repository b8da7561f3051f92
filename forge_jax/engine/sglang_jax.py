"""sglang-jax in this process: its engine, with weights that can be updated.

sglang-jax has no route that updates weights, so its engine is run here, in its
single-process mode, and new ones are assigned to its model runner. Behind
`EngineServer` it is then a server like ours. It runs in an environment of
sglang-jax's own: docs/engines.md says with which versions.

An update reads the folder with sglang-jax's own loader while requests run; then
it holds back new requests, waits until those that run are finished, flushes the
cache, and assigns.

Invariants:
  1. All tokens of a completion are of one version, and no cached prefix is of
     an older one than the tokens after it.
  2. Every request asks for log-probabilities: a batch where some do and some do
     not ends the engine.
  3. Log-probabilities are from before top-k, top-p and min-p, so that requests
     which set these are refused.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
import contextlib
import copy
import dataclasses
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from sgl_jax.srt.entrypoints import engine as sgl_engine
from sgl_jax.srt.managers import io_struct

from forge_jax import errors, types
from forge_jax.engine import api, generate_reply, generate_request, sglang
from forge_jax.model import published

_POLL = 0.02  # seconds between looks at whether the requests are finished


class SGLangJaxEngine:
  """An `engine.api.LocalEngine`; made and used on one asyncio loop.

  Controls block, and may be called from any thread but the loop's.
  """

  def __init__(self, config: sglang.SGLangJaxConfig):
    """Loads the model and starts sglang-jax's threads."""
    self._config = config
    self._loop = asyncio.get_running_loop()
    self._engine = sgl_engine.Engine(
      model_path=config.model_path,
      enable_single_process=True,
      skip_server_warmup=True,
      **config.arguments,
    )
    self._manager = self._engine.tokenizer_manager
    # It takes the process's signals when it first runs; better now than later.
    self._manager.auto_create_handle_loop()
    worker = self._engine.scheduler_info["scheduler"].tp_worker
    self._runner = getattr(worker, "worker", worker).model_runner
    self._version = config.version
    self._running: set[str] = set()
    self._open = asyncio.Event()  # whether requests may begin
    self._open.set()
    self._counts = {"requests": 0, "sampled_tokens": 0, "updates": 0}

  @property
  def max_context(self) -> int:
    """sglang-jax wants prompt and response to stay below its own."""
    return self._manager.context_len - 1

  async def generate(
    self, request: api.GenerateRequest
  ) -> AsyncIterator[api.TokenChunk]:
    """See `engine.api.Engine.generate`."""
    api.refuse(request, "top_k", "top_p", "min_p")
    if len(request.prompt_ids) >= self.max_context:
      raise errors.ContextOverflowError(
        f"the prompt has {len(request.prompt_ids)} tokens; the context holds "
        f"{self.max_context}, prompt and response together"
      )
    await self._open.wait()
    self._counts["requests"] += 1
    self._running.add(request.id)
    reader = generate_reply.Reader("sglang-jax", self._version)
    finished = False
    try:
      parts = self._manager.generate_request(self._input(request), None)
      async with contextlib.aclosing(parts):
        async for part in parts:
          chunk = reader.read(part)
          self._counts["sampled_tokens"] += len(chunk.token_ids)
          finished = chunk.stop_reason is not None
          yield chunk
    except ValueError as error:  # as it refuses requests
      raise errors.EngineError(f"request {request.id}: {error}") from error
    finally:
      if not finished:
        self.abort(request.id)
      self._running.discard(request.id)

  def abort(self, request_id: str) -> None:
    """See `engine.api.Engine.abort`."""
    self._manager.abort_request(rid=request_id)

  def update_weights(self, weights: types.WeightsVersion) -> None:
    """See `engine.api.Engine.update_weights`; takes a published folder."""
    refused = f"weights version {weights.version} are refused"
    if weights.path is None:
      raise errors.EngineError(f"{refused}: they carry no path")
    try:
      published.verify(weights.path, weights.version)
    except errors.CheckpointError as error:
      raise errors.EngineError(f"{refused}: {error}") from error
    leaves = self._load(weights.path, refused)
    self._call(self._swap(leaves, weights.version))

  def flush_cache(self) -> None:
    """See `engine.api.Engine.flush_cache`; waits until nothing runs."""
    self._call(self._swap(None, self._version))

  def pause(self) -> None:
    """See `engine.api.Engine.pause`."""
    self._call(self._engine.async_pause_generation("in_place"))

  def resume(self) -> None:
    """See `engine.api.Engine.resume`."""
    self._call(self._engine.async_continue_generation())

  def settle(self, timeout: float) -> None:
    """See `engine.api.LocalEngine.settle`."""
    self._call(self._manager.get_internal_state(), timeout)

  def stats(self) -> Mapping[str, float]:
    """Totals since the start."""
    return {
      **self._counts,
      "running": len(self._running),
      "version": self._version,
    }

  def _input(self, request: api.GenerateRequest) -> io_struct.GenerateReqInput:
    sampling = request.sampling
    room = self.max_context - len(request.prompt_ids)
    sampling = dataclasses.replace(
      sampling, max_tokens=min(sampling.max_tokens, room)
    )
    return io_struct.GenerateReqInput(
      rid=request.id,
      input_ids=request.prompt_ids.tolist(),
      sampling_params=generate_request.sampling_to_json(sampling),
      return_logprob=True,
      top_logprobs_num=sampling.top_logprobs,
      stream=True,
    )

  def _load(self, path: str, refused: str) -> list[jax.Array]:
    """A folder's weights in the order of the model runner's own."""
    config = copy.copy(self._runner.model_config)
    config.model_path = path
    try:
      with jax.set_mesh(self._runner.mesh):
        model = self._runner.model_loader.load_model(model_config=config)
    except Exception as error:  # boundary: sglang-jax's loader
      raise errors.EngineError(
        f"{refused}: sglang-jax cannot load {path}: {error}"
      ) from error
    leaves = jax.tree.leaves(nnx.split(model)[1])
    shapes = [leaf.shape for leaf in leaves]
    if shapes != [leaf.shape for leaf in self._runner.model_state_leaves]:
      raise errors.EngineError(f"{refused}: another model's weights: {path}")
    finite = [jnp.isfinite(leaf).all() for leaf in leaves]
    if not all(map(bool, finite)):
      raise errors.EngineError(f"{refused}: a tensor holds NaN or infinity")
    return leaves

  async def _swap(self, leaves: list[jax.Array] | None, version: int) -> None:
    """Flushes between two requests, and takes new weights if there are any."""
    deadline = time.monotonic() + self._config.update_seconds
    self._open.clear()
    try:
      while True:
        if not self._running and (await self._manager.flush_cache()).success:
          break
        if time.monotonic() > deadline:
          raise errors.EngineUnavailableError(
            f"{len(self._running)} requests did not finish in "
            f"{self._config.update_seconds:g} s; the cache is not flushed and "
            f"the weights are still of version {self._version}"
          )
        await asyncio.sleep(_POLL)
      if leaves is not None:
        self._runner.model_state_leaves = leaves
        self._version = version
        self._counts["updates"] += 1
    finally:
      self._open.set()

  def _call(self, coroutine: Coroutine, timeout: float | None = None) -> Any:
    """Runs a coroutine on the loop from another thread."""
    future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
    try:
      return future.result(timeout)
    except TimeoutError as error:
      future.cancel()
      raise errors.EngineUnavailableError(
        f"sglang-jax did not answer in {timeout:g} s"
      ) from error
