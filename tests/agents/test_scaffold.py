"""One environment in many scaffolds, which it never sees."""

import json

import pytest

from forge_jax import errors, types
from forge_jax.agents import (
  base,
  call_formats,
  react,
  scaffold,
  toolbox,
  workspace,
)
from forge_jax.agents.sandbox import unsafe
from forge_jax.gateway import client, scripted

FORMATS = (scaffold.NATIVE, *call_formats.FORMATS)
ODD = 'a "quoted" <b>\n{x}\\n\n'  # a value that any syntax could trip over


class Recorder:
  """Keeps the calls that reach it."""

  def __init__(self, number=0, system=True):
    self.calls, self.texts = [], []
    self.opening = [{"role": "user", "content": f"Task {number}"}]
    if system:
      self.opening.insert(0, {"role": "system", "content": "Be good."})
    self.tools = [
      toolbox._specification(name) for name in (*toolbox.CODE, "bash")
    ]
    open_page = {
      "name": "open_page",
      "description": "Opens.",
      "parameters": {
        "type": "object",
        "properties": {
          "title": {"type": "string"},
          "part": {"type": "integer"},
        },
        "required": ["title"],
      },
    }
    self.tools.append({"type": "function", "function": open_page})

  def reset(self):
    return self.opening

  def respond(self, reply):
    self.texts.append(reply["content"])
    calls = reply.get("tool_calls")
    if not calls:
      return None
    self.calls += [
      (call["function"]["name"], call["function"]["arguments"])
      for call in calls
    ]
    return [
      {"role": "tool", "tool_call_id": c["id"], "content": f"result {n}"}
      for n, c in enumerate(calls)
    ]

  def rewards(self):
    return [types.Reward("r", types.Component.PERF, 1.0)]


def write(form, *calls, words="So:"):
  """A reply with calls, as a model writes it in a format."""
  if form == scaffold.NATIVE:
    made = [
      {
        "id": str(n),
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
      }
      for n, (name, arguments) in enumerate(calls)
    ]
    return {"role": "assistant", "content": words, "tool_calls": made}
  parts = [words]
  for name, arguments in calls:
    values = arguments.items()
    if form == "json":
      call = json.dumps({"tool": name, "arguments": arguments})
      parts.append(f"```tool\n{call}\n```")
    elif form == "xml":
      inner = "".join(f'<arg name="{k}">{v}</arg>' for k, v in values)
      parts.append(f'<call tool="{name}">{inner}</call>')
    elif form == "python":
      inner = ", ".join(f"{k}={v!r}" for k, v in values)
      parts.append(f"```python\n{name}({inner})\n```")
    else:
      parts.append(f"Action: {name}\nAction Input: {json.dumps(arguments)}")
  return {"role": "assistant", "content": "\n".join(parts)}


def shown_tools(scaffolded):
  """By own name: the shown one and the arguments', in their own order."""
  return {
    alias.own: (shown, list(alias.arguments))
    for shown, alias in scaffolded._aliases.items()
  }


@pytest.mark.parametrize("form", FORMATS)
async def test_calls_reach_the_environment_by_their_own_names(form):
  config = scaffold.ScaffoldConfig(formats=(form,))
  for number in range(20):
    recorder = Recorder(number)
    scaffolded = scaffold.Scaffolded(recorder, config)
    shown = shown_tools(scaffolded)
    edit, (path, old, new) = shown["edit_file"]
    opened, (title, part) = shown["open_page"]
    reply = write(
      form,
      (edit, {path: "a.txt", old: ODD, new: "ä"}),
      (opened, {title: "p", part: 2}),
      (shown["run_tests"][0], {}),
    )
    observations = await scaffolded.respond(reply)
    assert [(n, json.loads(a)) for n, a in recorder.calls] == [
      ("edit_file", {"path": "a.txt", "old": ODD, "new": "ä"}),
      ("open_page", {"title": "p", "part": 2}),
      ("run_tests", {}),
    ]
    assert recorder.texts == ["So:"]
    if form == scaffold.NATIVE:
      assert [m["content"] for m in observations] == [
        f"result {n}" for n in range(3)
      ]
    else:
      (told,) = observations
      assert told["role"] == "user" and scaffolded.tools == []
      assert all(f"result {n}" in told["content"] for n in range(3))
    assert await scaffolded.respond({"content": "Done."}) is None
  assert scaffolded.rewards() == recorder.rewards()


async def test_scaffolds_differ_from_task_to_task_and_not_within_one():
  config = scaffold.ScaffoldConfig()
  names, orders, openings, forms = set(), set(), set(), set()
  for number in range(60):
    one = scaffold.Scaffolded(Recorder(number), config)
    again = scaffold.Scaffolded(Recorder(number), config)
    assert (one.reset(), one.tools) == (again.reset(), again.tools)
    shown = shown_tools(one)
    assert len({name for name, _ in shown.values()}) == len(shown)
    for _, arguments in shown.values():
      assert len(set(arguments)) == len(arguments)
    names |= {name for name, _ in shown.values()}
    orders.add(tuple(shown))
    forms.add(one._format)
    opening = one.reset()
    text = "\n".join(m["content"] for m in opening)
    assert "Be good." in text and opening[-1]["content"].endswith(
      f"Task {number}"
    )
    openings.add((len(opening), text.partition("Tools:")[0][:20]))
    if one._format is not None:
      for name, arguments in shown.values():
        assert f"- {name}: " in text
        assert all(f"    {a} (" in text for a in arguments)
  assert len(names) > 20 and len(orders) > 20
  assert len(forms) == len(FORMATS) and len(openings) > 6
  other = scaffold.Scaffolded(Recorder(0), scaffold.ScaffoldConfig(seed=1))
  plain = scaffold.ScaffoldConfig(
    names=False, order=False, prompts=False, formats=(scaffold.NATIVE,)
  )
  same = scaffold.Scaffolded(Recorder(0), plain)
  assert (same.reset(), same.tools) == (
    Recorder(0).opening,
    Recorder(0).tools,
  )
  assert other.tools != same.tools


@pytest.mark.parametrize("system", [True, False])
def test_instructions_go_before_any_opening(system):
  config = scaffold.ScaffoldConfig(formats=("xml",))
  for number in range(10):
    opening = scaffold.Scaffolded(Recorder(number, system), config).reset()
    assert "Tools:" in opening[0]["content"]
    assert opening[-1]["content"].endswith(f"Task {number}")
  image = Recorder()
  image.opening = [{"role": "user", "content": [{"type": "image_url"}]}]
  for number in range(10):
    config = scaffold.ScaffoldConfig(seed=number, formats=("json",))
    opening = scaffold.Scaffolded(image, config).reset()
    assert [m["role"] for m in opening] == ["system", "user"]


BROKEN = {
  "json": "```tool\n{not json\n```",
  "xml": '<call tool="bash">ls</call>',
  "python": "```python\nbash('ls')\n```",
  "action": "Action: bash\nAction Input: ls",
}


@pytest.mark.parametrize("form", BROKEN)
async def test_what_cannot_be_read_is_told(form):
  plain = {"names": False, "order": False, "prompts": False}
  config = scaffold.ScaffoldConfig(formats=(form,), **plain)
  recorder = Recorder()
  scaffolded = scaffold.Scaffolded(recorder, config)
  (told,) = await scaffolded.respond({"content": BROKEN[form]})
  assert "error: " in told["content"] and "result 0" not in told["content"]
  ((name, arguments),) = recorder.calls
  assert name in ("", "bash")
  with pytest.raises(ValueError, match=r"Expecting|Extra"):
    json.loads(arguments)
  # One that is cut off is one, too.
  await scaffolded.respond({"content": BROKEN[form][:-4]})
  assert len(recorder.calls) == 2
  (told,) = await scaffolded.respond(write(form, ("fly", {"to": "x"})))
  assert "result 0" in told["content"]  # whose tool it is not, says so
  (told,) = await scaffolded.respond(write(form, ("bash", {"cmd": "x"})))
  assert told["content"].count("error: expected the arguments command") == 1
  assert recorder.calls[-1] == ("bash", '{"cmd": "x"}')


async def test_arguments_are_expected_by_the_names_that_are_shown():
  config = scaffold.ScaffoldConfig(formats=(scaffold.NATIVE,))
  for number in range(30):
    scaffolded = scaffold.Scaffolded(Recorder(number), config)
    name, (path,) = shown_tools(scaffolded)["read_file"]
    if path == "path":
      continue
    reply = write(scaffold.NATIVE, (name, {"path": "x"}))
    (told,) = await scaffolded.respond(reply)
    assert told["content"] == f"error: expected the arguments {path}"


async def test_a_code_agent_works_in_text():
  class Fix(Recorder):
    left = None
    tools = ()

    def files(self):
      return {"a.txt": b"one two"}

    def collect(self, files):
      self.left = files

  plain = {"names": False, "order": False, "prompts": False}
  replies = [
    write("xml", ("read_file", {"path": "a.txt"}))["content"],
    write("xml", ("edit_file", {"path": "a.txt", "old": "two", "new": "2"}))[
      "content"
    ],
    "Done.",
  ]
  with scripted.serve(replies) as gateway:
    admin = client.GatewayClient(gateway.url, gateway.admin_token)
    keys = await admin.open_session("s", seed=0)
    inner = react.ReactAgent()
    agent = workspace.WorkspaceAgent(
      scaffold.ScaffoldAgent(
        inner, scaffold.ScaffoldConfig(formats=("xml",), **plain)
      ),
      unsafe.UnsafeProcess(),
      workspace.WorkspaceConfig(toolbox.ToolboxConfig(tools=toolbox.CODE)),
    )
    environment = Fix()
    endpoint = base.Endpoint(keys.base_url, keys.api_key, "policy", 2000)
    messages = await agent.run(environment, endpoint)
    completions, _ = await admin.close_session("s")
    await inner.aclose()
    await admin.aclose()
  assert environment.left == {"a.txt": b"one 2"}
  told = [m["content"] for m in messages if m["role"] == "user"]
  assert told[1:] == [
    '<result tool="read_file">one two</result>',
    '<result tool="edit_file">edited</result>',
  ]
  assert [c.parent is None for c in completions] == [True, False, False]


def test_a_format_that_is_not_known_is_refused():
  with pytest.raises(errors.ConfigError, match="expected of native, json"):
    scaffold.ScaffoldConfig(formats=("yaml",))
