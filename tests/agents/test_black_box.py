"""Black-box agents in sandboxes, against a real gateway that plays a script."""

import json
import math
import os

import pytest

from forge_jax import errors, types
from forge_jax.agents import base, black_box, profiles
from forge_jax.agents.sandbox import base as sandbox_base
from forge_jax.agents.sandbox import bubblewrap, unsafe
from forge_jax.gateway import client, scripted
from forge_jax.rollout import episode as episode_lib

Status = types.EpisodeStatus
LIMITS = sandbox_base.Limits(
  memory_bytes=256 * sandbox_base.MIB,
  processes=64,
  disk_bytes=32 * sandbox_base.MIB,
  files=1000,
)


class Greeting:
  """A file that greets the world, to be changed; paid by what it says then."""

  tools = ()

  def __init__(self):
    self.left = None

  def reset(self):
    task = "Change hello to goodbye in greeting.txt"
    return [{"role": "user", "content": task}]

  def respond(self, reply):
    raise AssertionError("its work is in files")

  def files(self):
    return {"greeting.txt": b"hello world\n"}

  def collect(self, files):
    self.left = files

  async def rewards(self):
    done = (self.left or {}).get("greeting.txt") == b"goodbye world\n"
    return [types.Reward("changed", types.Component.PERF, float(done))]


class Question:
  """Asks for a word; what the program prints is the answer."""

  tools = ()

  def __init__(self):
    self.answer = None

  def reset(self):
    return [{"role": "user", "content": "Say yes."}]

  def respond(self, reply):
    self.answer = reply["content"]

  def rewards(self):
    value = float(self.answer == "yes")
    return [types.Reward("answer", types.Component.PERF, value)]


@pytest.fixture
def backend():
  try:
    return bubblewrap.Bubblewrap()
  except errors.SandboxError as error:
    if "REQUIRE_SANDBOX" in os.environ:
      raise
    pytest.skip(str(error))


def call(name, **arguments):
  written = json.dumps({"name": name, "arguments": arguments})
  return f"<tool_call>\n{written}\n</tool_call>"


async def play(
  gateway, profile, backend, environment, *, deadline=120.0, **config
):
  """One episode; the sessions are those of a rollout host."""
  admin = client.GatewayClient(gateway.url, gateway.admin_token)
  agent = black_box.BlackBoxAgent(
    profile, backend, black_box.BlackBoxConfig(**{"limits": LIMITS} | config)
  )
  runner = episode_lib.EpisodeRunner(
    agent,
    admin,
    model_name="policy",
    permits=4,
    deadline_seconds=deadline,
    temperature=1.0,
  )
  task = types.Task("black/train/0", "black", 0, {})
  attempt = episode_lib.Attempt("e0", task, 0, 7, 256)
  try:
    return await runner.run(attempt, lambda task: environment)
  finally:
    await admin.aclose()


def shell(script, **fields):
  """An agent that is a few lines of shell."""
  return profiles.Profile("shell", ("sh", "-c", script), **fields)


# As much of a client as an agent in shell needs.
ASK = """python3 - "$@" <<'END'
import json, os, sys, urllib.request, urllib.error
def post(url, key, body):
  request = urllib.request.Request(url, json.dumps(body).encode(), {
    "Authorization": "Bearer " + key, "Content-Type": "application/json"})
  try:
    with urllib.request.urlopen(request) as response:
      return response.status, json.load(response)
  except urllib.error.HTTPError as error:
    return error.code, error.read().decode()
base, key = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
ask = lambda: post(base + "/chat/completions", key, {"model": "policy",
  "messages": [{"role": "user", "content": "hi"}]})
origin = base.removesuffix("/v1")
%s
END"""


@pytest.mark.parametrize("kind", ["sandboxed", "unsafe"])
async def test_truncate_bc_is_trained_on_what_its_model_saw(backend, kind):
  environment = Greeting()
  script = [
    "I look.\n" + call("bash", command="cat greeting.txt; seq 1000"),
    call("bash", command="sed -i s/hello/goodbye/ greeting.txt"),
    call("bash", command="cat greeting.txt"),
    "It says goodbye.",
  ]
  with scripted.serve(script) as gateway:
    episode = await play(
      gateway,
      profiles.TRUNCATE_BC,
      backend if kind == "sandboxed" else unsafe.UnsafeProcess(),
      environment,
    )
    prompts = [
      gateway.tokenizer.decode(list(r.prompt_ids)) for r in gateway.requests
    ]
    said = [
      gateway.tokenizer.decode(c.response_ids.tolist())
      for c in episode.completions
    ]
  assert (episode.status, episode.error, episode.perf) == (
    Status.COMPLETED,
    None,
    1.0,
  )
  assert [text.removesuffix("<|im_end|>") for text in said] == script
  for completion, prompt in zip(episode.completions, prompts, strict=True):
    ids = completion.prompt_ids.tolist()
    assert gateway.tokenizer.decode(ids) == prompt
    assert len(completion.logprobs) == len(completion.response_ids)
  # A result is cut, and a turn that is too old is gone.
  assert "hello world" in prompts[1] and "[...]" in prompts[1]
  assert "500" not in prompts[1]
  assert "I look." in prompts[2] and "I look." not in prompts[3]
  assert "(1 earlier turns are forgotten.)" in prompts[3]
  assert episode.completions[1].parent is not None
  assert episode.completions[3].parent is None
  assert episode.messages[-1]["content"] == "It says goodbye."
  assert set(environment.left) == {"greeting.txt"}


async def test_what_a_program_prints_can_be_its_answer(backend):
  code = 'print(ask()[1]["choices"][0]["message"]["content"])'
  with scripted.serve(["yes"]) as gateway:
    episode = await play(gateway, shell(ASK % code), backend, Question())
  assert (episode.status, episode.perf) == (Status.COMPLETED, 1.0)
  assert len(episode.completions) == 1


FAILURES = {
  "it exits badly": (
    'echo "no luck" >&2; exit 3',
    "AgentError: shell: exit status 3: no luck",
  ),
  "it is killed": ("kill -9 $$", "AgentError: shell: ended by signal 9: "),
  "it takes too long": ("sleep 600", "AgentError: shell: timed out after 5."),
  "it forks for ever": (
    "f() { f | f & f; }; f",
    "AgentError: shell: ",
  ),
  "it takes all memory": (
    "python3 -c 'b = [bytearray(2**20) for _ in range(2**12)]'",
    "AgentError: shell: ",
  ),
  "it writes 10 GB": (
    "head -c 10G /dev/zero >big",
    "AgentError: shell: exit status 1: head: error writing",
  ),
  "it writes many files": (
    "i=0; while : >f$i; do i=$((i+1)); done; exit 1",
    "AgentError: shell: exit status",
  ),
  "it prints for ever": ("yes", "AgentError: shell: timed out after 5."),
  "it is not installed": (
    None,
    "AgentError: absent: run: No such file or directory: 'absent'. Get it.",
  ),
  "it never asks": (
    "exit 0",
    "no completion: the agent never asked the model",
  ),
}


ENDLESS = ("it takes too long", "it forks for ever", "it prints for ever")


@pytest.mark.parametrize("name", FAILURES)
async def test_a_failure_is_data_with_what_was_captured(backend, name):
  script, error = FAILURES[name]
  asks = name not in ("it never asks", "it is not installed")
  if script is None:
    profile = profiles.Profile("absent", ("absent",), install="Get it.")
  else:
    first = ASK % "assert ask()[0] == 200" + "\n" if asks else ""
    profile = shell(first + script)
  with scripted.serve(["hello"]) as gateway:
    episode = await play(
      gateway,
      profile,
      backend,
      Greeting(),
      # Enough to ask, on a busy machine, where the deadline is not the point.
      seconds=5.0 if name in ENDLESS else 60.0,
      most_files=10_000,
    )
  assert episode.status == Status.FAILED
  assert episode.error.startswith(error)
  assert len(episode.completions) == asks
  assert [r.value for r in episode.rewards] == [0.0]


async def test_files_count_however_the_program_ended(backend):
  ask = ASK % "ask()"
  script = f"{ask}\nsed -i s/hello/goodbye/ greeting.txt; sleep 60"
  with scripted.serve(["hello"]) as gateway:
    profile = shell(script)
    episode = await play(gateway, profile, backend, Greeting(), seconds=3.0)
  assert episode.status == Status.FAILED and episode.perf == 1.0


async def test_too_many_files_to_take_are_a_failure(backend):
  script = ASK % "ask()" + "\nfor i in $(seq 99); do : >$i; done"
  with scripted.serve(["hello"]) as gateway:
    profile = shell(script)
    episode = await play(gateway, profile, backend, Greeting(), most_files=50)
  assert "more than 50 files" in episode.error
  assert len(episode.completions) == 1


async def test_the_hosts_deadline_ends_the_program_too(backend):
  with scripted.serve(["hello"]) as gateway:
    profile = shell(ASK % "ask()" + "\nsleep 600")
    episode = await play(gateway, profile, backend, Greeting(), deadline=3.0)
  assert episode.status == Status.TIMED_OUT
  assert len(episode.completions) == 1


async def test_an_agent_rewards_and_closes_nobody(backend):
  code = """
ask()
said = []
for session in ("other", os.environ["OWN"]):
  reward = {"name": "solved", "component": "perf", "value": 1.0}
  for path, body in (("reward", {"rewards": [reward]}), ("close", {}), ("close", {})):
    said.append(post(f"{origin}/sessions/{session}/{path}", key, body)[0])
said.append(post(f"{origin}/admin/sessions", key, {"id": "mine"})[0])
open("said", "w").write(json.dumps(said))
sys.exit(ask()[0] != 200)
"""
  environment = Greeting()
  with scripted.serve(["hello", "again"]) as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    await admin.open_session("other", seed=0)
    profile = shell(ASK % code, env={"OWN": "e0"})
    episode = await play(gateway, profile, backend, environment)
    _, rewards = await admin.close_session("other")
    await admin.aclose()
  assert json.loads(environment.left["said"]) == [401] * 7
  assert episode.status == Status.COMPLETED and len(episode.completions) == 2
  assert [r.name for r in episode.rewards] == ["changed"] and rewards == ()


async def test_a_reward_that_is_no_number_is_dropped(backend):
  class Unsure(Greeting):
    async def rewards(self):
      return [types.Reward("sure", types.Component.PERF, math.nan)]

  with scripted.serve(["hello"]) as gateway:
    profile = shell(ASK % "ask()")
    episode = await play(gateway, profile, backend, Unsure())
  assert episode.status == Status.FAILED and episode.rewards == ()
  assert episode.error == "reward 'sure' is nan and was dropped"


async def test_a_gateway_that_is_gone_is_the_programs_to_report(backend):
  with scripted.serve([]) as gateway:
    pass
  agent = black_box.BlackBoxAgent(profiles.TRUNCATE_BC, backend)
  endpoint = base.Endpoint(gateway.url + "/v1", "key", "policy", 16)
  with pytest.raises(errors.AgentError, match="truncate-bc: exit status 1"):
    await agent.run(Greeting(), endpoint)
