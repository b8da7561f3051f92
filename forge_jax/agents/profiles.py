"""How known black-box agents are started in a sandbox, as they are published.

In commands, variables and files, `{prompt}`, `{model}`, `{max_tokens}`,
`{origin}`, `{api_key}` and `{home}` stand for the task, the model's name, the
budget of a completion, the gateway's address as seen from inside
(http://host:port, without /v1), the session's key and the program's home. `~/`
in front of a file's name is the home, too.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib

_NPM = (
  "Install it with `npm install --prefix /opt/agents {package}`, and show it to "
  "the sandbox: BubblewrapConfig(show=('/opt/agents',), "
  "path=('/opt/agents/node_modules/.bin',)). Node must lie in /usr, or be shown "
  "likewise."
)
_PIP = (
  "Install it with `python -m venv /opt/{name}` and `/opt/{name}/bin/pip install "
  "{package}`, and show it to the sandbox: BubblewrapConfig(show=('/opt/{name}',"
  "), path=('/opt/{name}/bin',))."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
  """A program that is an agent, and what it needs."""

  name: str
  command: tuple[str, ...]
  install: str = ""  # what to do if the sandbox does not have it
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)


PI = Profile(
  name="pi",
  command=(
    *("pi", "--offline", "--no-session", "--provider", "forge"),
    *("--model", "{model}", "-p", "{prompt}"),
  ),
  install=_NPM.format(package="@mariozechner/pi-coding-agent@0.73.1"),
  files={
    "~/.pi/agent/models.json": json.dumps(
      {
        "providers": {
          "forge": {
            "baseUrl": "{origin}/v1",
            "api": "openai-completions",
            "apiKey": "{api_key}",
            "models": [{"id": "{model}", "reasoning": True}],
          }
        }
      }
    )
  },
)

OPENCODE = Profile(
  name="opencode",
  command=("opencode", "run", "-m", "forge/{model}", "{prompt}"),
  install=_NPM.format(package="opencode-ai@1.18.33"),
  env={
    "OPENCODE_DISABLE_AUTOUPDATE": "1",
    "OPENCODE_DISABLE_MODELS_FETCH": "1",
  },
  files={
    "~/.config/opencode/opencode.json": json.dumps(
      {
        "provider": {
          "forge": {
            "npm": "@ai-sdk/openai-compatible",
            "options": {"baseURL": "{origin}/v1", "apiKey": "{api_key}"},
            "models": {"{model}": {"tool_call": True}},
          }
        },
        "model": "forge/{model}",
        "small_model": "forge/{model}",
        "share": "disabled",
        "autoupdate": False,
      }
    )
  },
)

CLAUDE_CODE = Profile(
  name="claude-code",
  command=(
    *("claude", "-p", "{prompt}", "--permission-mode", "acceptEdits"),
    *("--allowedTools", "Bash,Edit,Write,Read"),
  ),
  install=_NPM.format(package="@anthropic-ai/claude-code@2.1.197"),
  env={
    "ANTHROPIC_MODEL": "{model}",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
  },
)

CODEX = Profile(
  name="codex",
  # Its own sandbox needs what ours takes away; ours holds.
  command=(
    *("codex", "exec", "--skip-git-repo-check"),
    *("--dangerously-bypass-approvals-and-sandbox", "{prompt}"),
  ),
  install=_NPM.format(package="@openai/codex@0.169.0"),
  files={
    "~/.codex/config.toml": (
      'model = "{model}"\n'
      'model_provider = "forge"\n'
      "[model_providers.forge]\n"
      'name = "forge"\n'
      'base_url = "{origin}/v1"\n'
      'env_key = "OPENAI_API_KEY"\n'
    )
  },
)

MINI_SWE_AGENT = Profile(
  name="mini-swe-agent",
  command=(
    *("mini", "--yolo", "--exit-immediately", "--model", "openai/{model}"),
    *("--output", "/tmp/trajectory.json", "--task", "{prompt}"),
  ),
  install=_PIP.format(name="mini-swe-agent", package="mini-swe-agent==2.4.6"),
  env={
    "MSWEA_CONFIGURED": "true",  # else it asks for a key
    "MSWEA_COST_TRACKING": "ignore_errors",  # the model has no price
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",  # else it fetches prices
  },
)

TRUNCATE_BC = Profile(
  name="truncate-bc",
  command=(
    "python3",
    "{home}/truncate_bc.py",
    "--model={model}",
    "--max-tokens={max_tokens}",
    "{prompt}",
  ),
  files={
    "~/truncate_bc.py": pathlib.Path(__file__)
    .with_name("truncate_bc.py")
    .read_text("utf-8")
  },
)

# For tasks of `tasks/verifiers.py`: verifiers' own agents play.
VERIFIERS = Profile(
  name="verifiers",
  command=("python", "{home}/verifiers_episode.py", "{model}", "{max_tokens}"),
  install=_PIP.format(name="verifiers", package="verifiers==0.4.0")
  + " The taskset's package is installed likewise.",
  files={
    "~/verifiers_episode.py": pathlib.Path(__file__)
    .with_name("verifiers_episode.py")
    .read_text("utf-8")
  },
)

# By name.
KNOWN = {
  profile.name: profile
  for profile in (
    PI,
    OPENCODE,
    CLAUDE_CODE,
    CODEX,
    MINI_SWE_AGENT,
    TRUNCATE_BC,
    VERIFIERS,
  )
}
