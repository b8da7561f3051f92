"""Runs any program as an agent: in a sandbox, with nothing but its gateway.

An episode: the task's files go into a fresh sandbox, the program is started
with the address and the key of its session and with the task as its prompt,
its files come out, the environment scores them. What the program does between
its requests is nobody's business.
"""

from collections.abc import Mapping
import dataclasses
import urllib.parse

from forge_jax import errors, types
from forge_jax.agents import base, profiles
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.tasks import base as tasks_base

_MOST_TEXT = 20_000  # characters of a program's output in the transcript
_MOST_WORDS = 500  # of its last ones in an error


@dataclasses.dataclass(frozen=True, slots=True)
class BlackBoxConfig:
  """How long a program may take, and what is taken of its files."""

  # Wall-clock. Less than the rollout's deadline, which takes no files out.
  seconds: float = 540.0
  limits: sandbox_base.Limits | None = None  # None: the defaults
  harvest: tuple[str, ...] = ("*",)  # patterns of paths in the work directory
  most_files: int = 1000
  most_bytes: int = 64 * sandbox_base.MIB


class BlackBoxAgent:
  """Plays episodes, any number at a time, each in a sandbox of its own."""

  def __init__(
    self,
    profile: profiles.Profile,
    backend: sandbox_base.Backend,
    config: BlackBoxConfig | None = None,
  ):
    """Runs the program of a profile in sandboxes of a backend."""
    self._profile = profile
    self._backend = backend
    self._config = config or BlackBoxConfig()

  async def run(
    self, environment: tasks_base.Environment, endpoint: base.Endpoint
  ) -> types.Messages:
    """Plays one episode; returns the prompt and what the program printed.

    An environment that is a `tasks.base.Workspace` gives the files that the
    program finds and gets those that it leaves, however the program ended. To
    any other what the program printed is the reply.

    Raises:
      SandboxError: the sandbox cannot be made, died, or holds too many files.
      AgentError: the program ended badly; the message has its last words.
    """
    messages = list(environment.reset())
    parts = urllib.parse.urlsplit(endpoint.base_url)
    opened = await self._backend.open(
      self._config.limits, gateway=f"{parts.scheme}://{parts.netloc}"
    )
    async with opened as box:
      if isinstance(environment, tasks_base.Workspace):
        await box.put(environment.files())
      filled = _Filled(box, endpoint, _prompt(messages), parts.path)
      result = await self._start(box, filled)
      if isinstance(environment, tasks_base.Workspace):
        environment.collect(await self._harvest(box))
    printed = result.stdout.decode(errors="replace").strip()
    messages.append({"role": "assistant", "content": printed[-_MOST_TEXT:]})
    if result.failure is not None:
      words = (result.stderr or result.stdout).decode(errors="replace").strip()
      raise errors.AgentError(
        f"{self._profile.name}: {result.failure}: {words[-_MOST_WORDS:]}"
      )
    if not isinstance(environment, tasks_base.Workspace):
      environment.respond(messages[-1])
    return messages

  async def _start(
    self, box: sandbox_base.Sandbox, filled: "_Filled"
  ) -> sandbox_base.Result:
    files = {
      path.replace("~", box.home, 1): filled(text).encode()
      for path, text in self._profile.files.items()
    }
    await box.put(files)
    variables = filled.session() | {
      name: filled(value) for name, value in self._profile.env.items()
    }
    command = [filled(word) for word in self._profile.command]
    try:
      return await box.run(command, seconds=self._config.seconds, env=variables)
    except errors.SandboxError as error:
      if repr(command[0]) not in str(error):
        raise
      raise errors.AgentError(
        f"{self._profile.name}: {error}. {self._profile.install}"
      ) from error

  async def _harvest(self, box: sandbox_base.Sandbox) -> Mapping[str, bytes]:
    return await box.get(
      self._config.harvest,
      most_files=self._config.most_files,
      most_bytes=self._config.most_bytes,
    )


class _Filled:
  """Puts an episode's values in the place of their names."""

  def __init__(
    self,
    box: sandbox_base.Sandbox,
    endpoint: base.Endpoint,
    prompt: str,
    path: str,
  ):
    self._base_url = box.gateway + path
    self._values = {
      "{model}": endpoint.model,
      "{max_tokens}": str(endpoint.max_tokens),
      "{origin}": box.gateway + path.removesuffix("/v1"),
      "{api_key}": endpoint.api_key,
      "{home}": box.home,
      "{prompt}": prompt,  # last: it may hold what looks like a name
    }

  def __call__(self, text: str) -> str:
    for name, value in self._values.items():
      text = text.replace(name, value)
    return text

  def session(self) -> dict[str, str]:
    """The variables that OpenAI's and Anthropic's clients read."""
    return {
      "OPENAI_BASE_URL": self._base_url,
      "OPENAI_API_KEY": self._values["{api_key}"],
      "ANTHROPIC_BASE_URL": self._values["{origin}"],
      "ANTHROPIC_API_KEY": self._values["{api_key}"],
    }


def _prompt(messages: types.Messages) -> str:
  """The opening as one text; an image or the like has no place in it."""
  texts = []
  for message in messages:
    content = message["content"]
    if isinstance(content, str):
      texts.append(content)
    else:
      texts += [part["text"] for part in content if part["type"] == "text"]
  return "\n\n".join(texts)
