"""One request: from a session, through the engine, into the session.

    turn -> Session.begin -> Engine.generate -> deltas -> Session.record

A dialect reads the deltas and, at the end, the reply. Whatever ends a request
early, a client that went away, a session being closed, an engine's error, what
was sampled until then is recorded, marked ABORT.
"""

from collections.abc import AsyncGenerator, AsyncIterator
import dataclasses
import time
from typing import Any

from forge_jax import errors, types
from forge_jax.engine import api
from forge_jax.gateway import (
  attempts,
  call_ids,
  raw_prompts,
  refusal,
  render,
  sessions,
  stream,
)
from forge_jax.gateway import constraint as constraint_lib


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
  """What a request asks for; None leaves it to the session or the context.

  A turn is a conversation, or with `prompt` a raw prompt, text or token ids,
  which no template touches and whose reply is taken as text. Tools that the
  conversation itself introduces are in `hidden_tools`: they may be called like
  the others, but the prompt does not list them.
  """

  messages: types.Messages = ()
  tools: types.Messages = ()
  max_tokens: int | None = None
  temperature: float | None = None
  top_p: float | None = None
  top_k: int | None = None
  min_p: float | None = None
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  repetition_penalty: float = 1.0
  logit_bias: tuple[tuple[int, float], ...] = ()
  top_logprobs: int = 0  # alternatives to report beside each token
  constraint: constraint_lib.Constraint = constraint_lib.FREE
  seed: int | None = None
  stop: tuple[str, ...] = ()
  hidden_tools: types.Messages = ()
  prompt: raw_prompts.Prompt | None = None
  parallel_tool_calls: bool = True  # False: only the first call is delivered
  reasoning_effort: str | None = None  # see render.Renderer.with_effort


# For each token the likeliest in its place, with their log-probabilities.
Tops = tuple[tuple[tuple[int, float], ...], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Delta:
  """What a chunk of tokens adds; the fields of tokens align."""

  token_ids: tuple[int, ...] = ()
  logprobs: tuple[float, ...] = ()
  top_logprobs: Tops = ()  # empty if none were asked for
  reasoning: str = ""
  content: str = ""


class Generation:
  """A request in flight; enter it, read its deltas, then its reply."""

  def __init__(
    self,
    engine: api.Engine,
    renderer: render.Renderer,
    session: sessions.Session,
    turn: Turn,
    attempt: attempts.Attempt | None = None,
    choice: int = 0,
  ):
    """Plans the request, a choice of an `attempt` at the gateway.

    Raises:
      Refusal: the messages or the tools cannot be rendered, or the model cannot
        be constrained as the request asks.
    """
    self._renderer = renderer = renderer.with_effort(turn.reasoning_effort)
    self._session = session
    self._turn = turn
    self._tools = (*turn.tools, *turn.hidden_tools)  # that may be called
    self._recorded = False
    constraint_lib.check(turn.constraint, renderer, self._tools)
    for token, _ in turn.logit_bias:
      if token >= renderer.vocabulary_size:
        raise refusal.Refusal(
          f"logit_bias: token {token} is outside the vocabulary of "
          f"{renderer.vocabulary_size}",
          param="logit_bias",
        )
    if turn.prompt is None:
      self.plan = session.begin(
        renderer, turn.messages, turn.tools, renderer.effort, attempt, choice
      )
    else:
      self.plan = session.begin_raw(renderer, turn.prompt, attempt, choice)
    self._grammar: constraint_lib.Grammar | None = None
    self._engine = engine
    self._chunks: AsyncGenerator[api.TokenChunk] | None = None
    self.token_ids: list[int] = []
    self.logprobs: list[float] = []
    self.top_logprobs: list[tuple[tuple[int, float], ...]] = []
    self._versions: list[int] = []
    self._first_token: float | None = None  # time.monotonic()
    self.stop_reason = types.StopReason.ABORT
    self.stop_string: str | None = None  # which of the turn's ended the reply
    self.reply = render.Reply("")

  async def __aenter__(self) -> "Generation":
    """Encodes the prompt.

    Raises:
      Refusal: the session was closed meanwhile, or the model cannot be
        constrained as the request asks.
    """
    try:
      await self.plan.added.ready()
      self._session.check_open()
      self._grammar = constraint_lib.grammar(
        self._turn.constraint,
        self._renderer,
        self.plan.prompt_ids,
        self._tools,
      )
    except BaseException:  # nobody leaves what was not entered
      self._session.drop(self.plan)
      raise
    return self

  async def __aexit__(self, *exc_info: object) -> None:
    try:
      if self._chunks is not None:
        await self._chunks.aclose()
    finally:
      if not self._recorded:
        self._record(None)

  async def deltas(self, incremental: bool) -> AsyncIterator[Delta]:
    """Samples the reply; with `incremental`, its text as it arrives.

    Raises:
      Refusal: the session was closed meanwhile, or the engine cannot follow
        what the request demands of its reply.
      ContextOverflowError: the prompt leaves no room for a token.
      EngineError: the engine refuses or fails.
    """
    plan, turn = self.plan, self._turn
    text = (
      stream.TextStream(
        self._renderer,
        plan.prompt_ids,
        self._tools,
        turn.stop,
        raw=turn.prompt is not None,
      )
      if incremental
      else None
    )
    self._chunks = self._engine.generate(
      api.GenerateRequest(
        id=plan.request_id,
        prompt_ids=plan.prompt_ids,
        sampling=self._sampling(self._engine.max_context),
        session=self._session.id,
      )
    )
    try:
      async for chunk in self._chunks:
        yield self._take(chunk, text)
    except errors.GrammarError as error:
      raise self._grammar.refuse(error) from error
    if self.stop_reason == types.StopReason.ABORT:
      raise refusal.Refusal(
        f"the request of session {self._session.id!r} was aborted",
        status=503,
        code="aborted",
      )
    self._finish()
    if text:
      rest = Delta((), (), (), *text.finish(self.reply))
      self.reply = dataclasses.replace(self.reply, content=text.content)
    said = self.reply.content
    self._record(self._recorded_message() if turn.prompt is None else said)
    if text:
      yield rest

  def _take(
    self, chunk: api.TokenChunk, text: stream.TextStream | None
  ) -> Delta:
    if chunk.token_ids and self._first_token is None:
      self._first_token = time.monotonic()
    self.token_ids += chunk.token_ids
    self.logprobs += chunk.logprobs
    self.top_logprobs += chunk.top_logprobs
    self._versions += chunk.versions
    reasoning, content = text.feed(chunk.token_ids) if text else ("", "")
    if chunk.stop_reason is not None:
      self.stop_reason = chunk.stop_reason
    return Delta(
      chunk.token_ids, chunk.logprobs, chunk.top_logprobs, reasoning, content
    )

  def message(self) -> dict[str, Any]:
    """The reply as a message in the OpenAI wire format."""
    reply = self.reply
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.reasoning is not None:
      message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
      message["content"] = reply.content or None
      message["tool_calls"] = [
        {
          "id": f"call_{self.plan.number}_{n}",
          "type": "function",
          "function": {"name": call.name, "arguments": call.arguments},
        }
        for n, call in enumerate(reply.tool_calls)
      ]
    return message

  def _recorded_message(self) -> dict[str, Any]:
    """The reply with the ids that the model wrote beside those it was given."""
    message = self.message()
    calls = zip(
      message.get("tool_calls", ()), self.reply.tool_calls, strict=True
    )
    for call, sampled in calls:
      if sampled.id:
        call[call_ids.NATIVE] = sampled.id
    return message

  @property
  def finished(self) -> bool:
    """Whether the reply was sampled to its end."""
    return self.stop_reason != types.StopReason.ABORT

  @property
  def cached_tokens(self) -> int:
    """Tokens of the prompt that come, as they are, from a recorded parent."""
    return len(self.plan.prompt_ids) - len(self.plan.added_ids)

  def _finish(self) -> None:
    turn, renderer = self._turn, self._renderer
    if turn.prompt is None:
      reply = renderer.parse(self.plan.prompt_ids, self.token_ids, self._tools)
    else:
      reply = render.Reply(
        renderer.decode(renderer.before_stop(self.token_ids))
      )
    if not turn.parallel_tool_calls:
      reply = dataclasses.replace(reply, tool_calls=reply.tool_calls[:1])
    if turn.stop:
      content = stream.cut(reply.content, turn.stop)
      reply = dataclasses.replace(reply, content=content)
      said = renderer.before_stop(self.token_ids)
      if (
        self.stop_reason == types.StopReason.STOP
        and len(said) == len(self.token_ids)  # no stop token ended it
      ):
        self.stop_string = stream.first_stop(renderer.decode(said), turn.stop)
    self.reply = reply

  def _record(self, reply: types.Message | str | None) -> None:
    self._recorded = True
    if not self.token_ids:
      self._session.drop(self.plan)
      return
    self._session.record(
      self.plan,
      response_ids=self.token_ids,
      logprobs=self.logprobs,
      versions=self._versions,
      stop_reason=self.stop_reason,
      reply=reply,
      first_token=self._first_token,
      malformed=self.reply.malformed,
      plain=self._sampling(self._engine.max_context).plain,
    )

  def _sampling(self, max_context: int) -> api.SamplingParams:
    turn, defaults = self._turn, self._session.sampling
    room = max(1, max_context - len(self.plan.prompt_ids))

    def pick(asked: float | None, name: str, neutral: float = 1.0) -> float:
      return defaults.get(name, neutral) if asked is None else asked

    return api.SamplingParams(
      max_tokens=turn.max_tokens or room,
      temperature=pick(turn.temperature, "temperature"),
      top_k=int(pick(turn.top_k, "top_k", 0)),
      top_p=pick(turn.top_p, "top_p"),
      min_p=pick(turn.min_p, "min_p", 0.0),
      presence_penalty=turn.presence_penalty,
      frequency_penalty=turn.frequency_penalty,
      repetition_penalty=turn.repetition_penalty,
      logit_bias=turn.logit_bias,
      grammar=None if self._grammar is None else self._grammar.text,
      seed=self.plan.seed if turn.seed is None else turn.seed % 2**31,
      stop_token_ids=self._renderer.stop_token_ids,
      stop_strings=turn.stop,
      top_logprobs=turn.top_logprobs,
    )
