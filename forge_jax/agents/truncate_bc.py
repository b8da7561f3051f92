"""Truncate BC: a black-box agent that forgets nearly everything, all the time.

It stands alone (the standard library only) and is run as a program. It works
with one tool, `bash`, in the directory it is started in. Before every request
it rewrites its history: of the turns, only the last `--keep` stay, each result
cut to its first and last `--chars` characters; what came before is one line that
counts it. So hardly a request extends the one before it. To the trainer that is
nobody's business: each request is trained on what the model really saw.

  OPENAI_BASE_URL=... OPENAI_API_KEY=... python truncate_bc.py TASK
"""

import argparse
import json
import os
import subprocess
import urllib.error
import urllib.request

_SYSTEM = (
  "You work in a directory of files. Use the tool to look and to change things;"
  " of the results you see only the last few. When the work is done, say so"
  " without calling the tool."
)
_BASH = {
  "type": "function",
  "function": {
    "name": "bash",
    "description": "Runs a command in a new shell; returns what it prints.",
    "parameters": {
      "type": "object",
      "properties": {"command": {"type": "string"}},
      "required": ["command"],
    },
  },
}


def main():
  """Works on the task until the model calls no tool, or turns run out."""
  options = _options()
  turns = []  # of lists: a reply and the results of its calls
  for _ in range(options.turns):
    reply = _complete(_visible(options, turns), options)
    calls = reply.get("tool_calls") or []
    if not calls:
      print(reply.get("content") or "")
      return
    turns.append([reply, *(_run(call, options.seconds) for call in calls)])
  raise SystemExit(f"not done after {options.turns} turns")


def _options():
  parser = argparse.ArgumentParser()
  parser.add_argument("task")
  parser.add_argument("--model", default="policy")
  parser.add_argument("--turns", type=int, default=20)
  parser.add_argument("--keep", type=int, default=2, help="turns")
  parser.add_argument("--chars", type=int, default=400, help="of a result")
  parser.add_argument("--max-tokens", type=int, default=512)
  parser.add_argument("--seconds", type=float, default=30.0, help="a command")
  return parser.parse_args()


def _visible(options, turns):
  """The history that the next request shows."""
  task = options.task
  forgotten = len(turns) - options.keep
  if forgotten > 0:
    task += f"\n\n({forgotten} earlier turns are forgotten.)"
  messages = [
    {"role": "system", "content": _SYSTEM},
    {"role": "user", "content": task},
  ]
  for reply, *results in turns[max(0, forgotten) :]:
    messages.append(reply)
    for result in results:
      content = _cut(result["content"], options.chars)
      messages.append({**result, "content": content})
  return messages


def _cut(text, chars):
  if len(text) <= 2 * chars:
    return text
  return f"{text[:chars]}\n[...]\n{text[-chars:]}"


def _complete(messages, options):
  """One chat completion's message."""
  body = {
    "model": options.model,
    "messages": messages,
    "tools": [_BASH],
    "max_tokens": options.max_tokens,
  }
  request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps(body).encode(),
    {
      "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
      "Content-Type": "application/json",
    },
  )
  try:
    with urllib.request.urlopen(request) as response:
      return json.load(response)["choices"][0]["message"]
  except urllib.error.HTTPError as error:
    raise SystemExit(f"{error}: {error.read(500).decode()}") from error


def _run(call, seconds):
  """A call's result, as a message; whatever goes wrong is the result."""
  try:
    command = json.loads(call["function"]["arguments"])["command"]
    done = subprocess.run(
      ["sh", "-c", command],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      timeout=seconds,
    )
    said = done.stdout.decode(errors="replace")
    if done.returncode:
      said += f"\n[exit status {done.returncode}]"
  except (ValueError, KeyError, TypeError) as error:
    said = f"malformed call: {type(error).__name__}: {error}"
  except (OSError, subprocess.SubprocessError) as error:
    said = f"{type(error).__name__}: {error}"
  return {"role": "tool", "tool_call_id": call["id"], "content": said}


if __name__ == "__main__":
  main()
