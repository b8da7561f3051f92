"""mini-swe-agent's command line, in each of three protocols."""

import pytest

PROTOCOLS = {
  "chat": ("openai/policy", "litellm"),
  "responses": ("openai/policy", "litellm_response"),
  "messages": ("anthropic/policy", "litellm"),
}


async def run(stage, task, protocol):
  model, model_class = PROTOCOLS[protocol]
  await stage.run(
    *("mini", "--yolo", "--exit-immediately", "--task", task),
    *("--model", model, "--model-class", model_class),
    *("--output", stage.home / "trajectory.json"),
    OPENAI_API_KEY=stage.keys.api_key,
    OPENAI_BASE_URL=stage.keys.base_url,
    ANTHROPIC_API_KEY=stage.keys.api_key,
    ANTHROPIC_BASE_URL=stage.url,
    MSWEA_CONFIGURED="true",  # else it asks for a key
    MSWEA_COST_TRACKING="ignore_errors",  # the model has no price
    LITELLM_LOCAL_MODEL_COST_MAP="true",  # else it fetches prices
  )


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_it_edits_a_file(stage, call, task, protocol):
  """Its second reply calls nothing, and is left out of what it sends next."""
  stage.say(
    "I look first.\n" + call("bash", command="cat greeting.txt"),
    "I think about it.",
    call("bash", command="sed -i s/hello/goodbye/ greeting.txt"),
    call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"),
  )
  await run(stage, task, protocol)
  assert stage.greeting.read_text() == "goodbye world\n"
  assert await stage.forest() == [
    (None, None),
    (0, None),
    (0, "omitted"),
    (2, None),
  ]
  assert "hello world" in stage.prompt(1)
  assert "I think about it." not in stage.prompt(2)
