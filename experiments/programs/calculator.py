"""A black-box agent: it answers a word problem, and keeps its history short.

It stands alone (the standard library only) and is run as a program: the problem
is its argument, the model is behind OPENAI_BASE_URL. It asks for a calculation,
does it, and then compacts: the turns so far are dropped, and a line of notes
with the result takes their place. So its second request extends nothing that
was asked before. It prints the number that the model then answers, if any.
"""

import json
import os
import re
import sys
import urllib.request

SYSTEM = (
  "Use CALC(a + b), CALC(a - b) or CALC(a * b) for one step. "
  "When you know the result write ANSWER(number)."
)
EXAMPLE = "Kim has 5 cats and gets 8 more. How many cats does Kim have?"
CALL = re.compile(r"CALC\( ?(-?[0-9]{1,6}) ?([-+*]) ?(-?[0-9]{1,6}) ?\)")
ANSWER = re.compile(r"ANSWER\( ?(-?[0-9]{1,8}) ?\)")
OPERATIONS = {
  "+": lambda a, b: a + b,
  "-": lambda a, b: a - b,
  "*": lambda a, b: a * b,
}


def main():
  """Two requests at most; prints the answer or nothing."""
  problem, model, max_tokens = sys.argv[1:]
  said = ask(
    [turn(EXAMPLE), reply("CALC(5 + 8)"), turn(problem)], model, max_tokens
  )
  called = CALL.fullmatch(said)
  if called is None:
    return
  first, operator, second = called.groups()
  result = OPERATIONS[operator](int(first), int(second))
  notes = f"Notes: {said} = {result}"
  said = ask(
    [
      turn(f"{EXAMPLE}\nNotes: CALC(5 + 8) = 13"),
      reply("ANSWER(13)"),
      turn(f"{problem}\n{notes}"),
    ],
    model,
    max_tokens,
  )
  answered = ANSWER.fullmatch(said)
  if answered is not None:
    print(answered[1])


def turn(text):
  """What a user says."""
  return {"role": "user", "content": text}


def reply(text):
  """What the model is shown to have said."""
  return {"role": "assistant", "content": text}


def ask(messages, model, max_tokens):
  """The model's reply to a conversation."""
  body = {
    "model": model,
    "max_tokens": int(max_tokens),
    "messages": [{"role": "system", "content": SYSTEM}, *messages],
  }
  request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps(body).encode(),
    {
      "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
      "Content-Type": "application/json",
    },
  )
  with urllib.request.urlopen(request) as response:
    message = json.load(response)["choices"][0]["message"]
  return (message.get("content") or "").strip()


if __name__ == "__main__":
  main()
