"""From an experiment's configuration to the components of a run."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import nnx
import jax.numpy as jnp

from forge_jax import errors, paths, settings, types
from forge_jax.engine import config as engine_config
from forge_jax.engine import engine as engine_lib
from forge_jax.engine import grammar
from forge_jax.gateway import server
from forge_jax.gateway import tokenizer as tokenizer_lib
from forge_jax.model import decoder as decoder_lib
from forge_jax.model import files, mtp, sharding
from forge_jax.observe import metrics as metrics_lib
from forge_jax.observe import stability
from forge_jax.pool import chain, curation, drift, replay
from forge_jax.pool import queue as queue_lib
from forge_jax.pool import store as store_lib
from forge_jax.pool import tickets as tickets_lib
from forge_jax.rollout import evaluation
from forge_jax.trainer import checkpoint, credit, trainer, update
from forge_jax.tree import pack
from launch import keys, pool_side, rollout_side, services
from launch import teacher as teacher_lib

_SECTIONS = {
  "checkpoint": checkpoint.CheckpointConfig,
  "credit": credit.CreditConfig,
  "curation": curation.CurationConfig,
  "drift": drift.DriftConfig,
  "engine": engine_config.EngineConfig,
  "eval": evaluation.EvalConfig,
  "gateway": server.GatewayConfig,
  "mesh": sharding.MeshConfig,
  "observe": metrics_lib.ObserveConfig,
  "pack": pack.PackConfig,
  "stability": stability.StabilityConfig,
}
# These are not, or not only, one component's.
_TOP = {"name", "question", "seed", "steps", "model"} | {
  "imitate",  # policies of the domains' scripts that reply in the model's place
  *("agent", "context", "domains", "rollout"),  # see RolloutSide
  *("process", "sandbox", "tools"),  # likewise
  "pool",  # see PoolSide
  "trainer",  # TrainerConfig and UpdateConfig
}


class Blueprint:
  """Every component's dataclass, checked, and how to build the components."""

  def __init__(self, values: Mapping[str, Any]):
    """Reads a resolved configuration.

    Raises:
      ConfigError: an unknown section or key, or a value that cannot work.
    """
    settings.check_keys(values, _TOP | _SECTIONS.keys())
    self.values = values
    self.name, self.question = values["name"], values["question"]
    self.seed, self.steps = values["seed"], values["steps"]
    self.imitate: tuple[str, ...] = tuple(values["imitate"])
    if self.steps < 1:
      raise errors.ConfigError(
        f"config.steps={self.steps}; expected at least 1"
      )
    self.parts = {
      name: settings.section(cls, values[name], name)
      for name, cls in _SECTIONS.items()
    }
    self.eval: evaluation.EvalConfig = self.parts["eval"]
    packs: pack.PackConfig = self.parts["pack"]
    self._step, self._update = settings.shared_section(
      values["trainer"],
      "trainer",
      (trainer.TrainerConfig, {}),
      (update.UpdateConfig, {"block": packs.block}),
    )
    self.side = rollout_side.RolloutSide(values)
    self.pool = pool_side.PoolSide(values)

  def load_decoder(self) -> decoder_lib.Decoder:
    """Reads the model; gives it modules that draft, if it lacks those asked for.

    Raises:
      CheckpointError: it is missing or malformed.
    """
    model = self.values["model"]
    config, params = files.read_model(model["path"])
    decoder = decoder_lib.Decoder.from_params(
      config, params, dtype=jnp.dtype(model["dtype"])
    )
    modules = model["mtp_modules"]
    if modules in (0, config.mtp_modules):  # as in the file
      return decoder
    return mtp.grow(
      decoder,
      modules,
      init=model["mtp_init"],
      rngs=nnx.Rngs(params=self.seed),
    )

  def load_tokenizer(self) -> Any:
    """The model's tokenizer."""
    return tokenizer_lib.load_tokenizer(
      paths.resolve_model_path(self.values["model"]["path"])
    )

  def updater(self, decoder: decoder_lib.Decoder) -> update.Updater:
    """The jitted functions of a step, on the configured mesh."""
    mesh = sharding.make_mesh(self.parts["mesh"])
    packs, ways = self.parts["pack"].packs, sharding.batch_ways(mesh)
    if packs % ways:
      raise errors.ConfigError(
        f"config.pack.packs={packs} is not a multiple of the {ways} ways in "
        f"which the mesh axes {sharding.BATCH_AXES} split a batch"
      )
    return update.Updater(decoder, self._update, mesh)

  def queue(self, store: store_lib.DataPool) -> queue_lib.GroupQueue:
    """The queue over a pool, with its curation."""
    config: curation.CurationConfig = self.parts["curation"]

    def trains(group: types.Group) -> bool:
      return bool(credit.assign_credit([group], self.parts["credit"])[0])

    old = config.replayed(self._step.groups_per_step)
    return queue_lib.GroupQueue(
      store,
      self.side.window,
      chain.build(config, store, trains),
      replay.Replay(store, old, config.replay_steps, self.seed)
      if old
      else None,
      self.parts["drift"],
    )

  def trainer(
    self, updater: update.Updater, vocab_size: int
  ) -> trainer.Trainer:
    """A trainer at step 0."""
    return trainer.Trainer(
      updater,
      self._step,
      self.parts["credit"],
      self.parts["pack"],
      vocab_size=vocab_size,
    )

  def teacher(
    self, tokenizer: Any, max_context: int
  ) -> teacher_lib.TeacherEngine:
    """The domains' scripts in an engine's place."""
    return teacher_lib.TeacherEngine(
      self.side.domains,
      self.side.mixture,
      self.imitate,
      tokenizer,
      max_context,
    )

  def services(
    self,
    decoder: decoder_lib.Decoder,
    version: int,
    tickets: tickets_lib.Tickets | None = None,
    *,
    imitate: bool = False,
  ) -> services.Services:
    """Engine, gateway and agent around a decoder's weights.

    Args:
      decoder: of the engine.
      version: of its weights.
      tickets: of a shared pool that hosts of other processes fill.
      imitate: the domains' scripts reply in its place.

    Raises:
      ConfigError: those hosts' key to the gateway is not in the environment.
    """
    gateway: server.GatewayConfig = self.parts["gateway"]
    if tickets is not None:  # those hosts open sessions, too
      gateway = dataclasses.replace(gateway, admin_token=keys.admin_token())
    tokenizer = self.load_tokenizer()
    engine: engine_lib.JaxEngine | teacher_lib.TeacherEngine
    if imitate:
      engine = self.teacher(tokenizer, self.parts["engine"].context)
    else:
      engine = engine_lib.JaxEngine(
        decoder,
        self.parts["engine"],
        decode_text=tokenizer.decode,
        grammars=grammar.Grammars(tokenizer, decoder.config.vocab_size),
        version=version,
      )
    return services.Services(
      engine,
      tokenizer,
      gateway,
      self.side,
      tickets,
    )
