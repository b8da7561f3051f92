"""The replies of SGLang's `/generate`, from and to an engine's chunks.

Names are SGLang's, of its `meta_info`. One is ours, beside them:
`weight_versions` has the version of each token in `output_ids`, where SGLang's
`weight_version` has one for all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from forge_jax import errors, types
from forge_jax.engine import api

_MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
_KINDS = {
  kind.__name__: kind
  for kind in (errors.ContextOverflowError, errors.GrammarError)
}


def reply(
  request: api.GenerateRequest,
  chunk: api.TokenChunk,
  completion_tokens: int,
  *,
  logprobs: bool,
  version: int,
) -> dict[str, Any]:
  """A reply, or a part of one, as `/generate` gives it.

  Args:
    request: what it answers.
    chunk: the tokens to report, and why they end or None.
    completion_tokens: sampled so far, these included.
    logprobs: whether to report log-probabilities.
    version: of the engine's weights, where no token says it.
  """
  meta = {
    "id": request.id,
    "finish_reason": _finish_reason(request, chunk, completion_tokens),
    "prompt_tokens": len(request.prompt_ids),
    "completion_tokens": completion_tokens,
    "weight_version": str(chunk.versions[-1] if chunk.versions else version),
    "weight_versions": list(chunk.versions),
  }
  if logprobs:
    meta["output_token_logprobs"] = [
      [logprob, token, None]
      for logprob, token in zip(chunk.logprobs, chunk.token_ids, strict=True)
    ]
  if chunk.top_logprobs:
    meta["output_top_logprobs"] = [
      [[logprob, token, None] for token, logprob in likely]
      for likely in chunk.top_logprobs
    ]
  return {"output_ids": list(chunk.token_ids), "meta_info": meta}


def _finish_reason(
  request: api.GenerateRequest, chunk: api.TokenChunk, count: int
) -> dict[str, Any] | None:
  match chunk.stop_reason:
    case None:
      return None
    case types.StopReason.LENGTH:
      return {"type": "length", "length": count}
    case types.StopReason.ABORT:
      return {"type": "abort", "message": "Aborted"}
  last = chunk.token_ids[-1] if chunk.token_ids else None
  matched = last if last in request.sampling.stop_token_ids else None
  return {"type": "stop", "matched": matched}


class Reader:
  """Reads the replies of a stream, one completion's, in order.

  A server sends either all tokens so far or only the new ones, by a flag of its
  own; lists of log-probabilities do likewise, not always by the same rule. So
  the count in `completion_tokens` says how many are new, and each list's last
  ones are they.
  """

  def __init__(self, where: str, version: int):
    """Reads replies of the server at `where`.

    Args:
      where: for messages.
      version: of tokens whose version the server does not tell.
    """
    self._where = where
    self._version = version
    self.count = 0  # tokens read

  def read(self, value: Any) -> api.TokenChunk:
    """The new tokens of a reply.

    Raises:
      EngineError: the reply reports an error, is malformed, or its lists
        disagree; so is one without log-probabilities.
      EngineUnavailableError: the server reports that it cannot serve now.
    """
    if isinstance(value, Mapping) and "error" in value:
      raise failure(self._where, value)
    try:
      return self._chunk(value.get("output_ids") or [], value["meta_info"])
    except _MALFORMED as error:
      raise errors.EngineError(
        f"{self._where}: a reply is malformed: {error!r} in {value!r:.300}"
      ) from error

  def _chunk(
    self, ids: Sequence[int], meta: Mapping[str, Any]
  ) -> api.TokenChunk:
    reason = meta["finish_reason"]
    stop_reason = None if reason is None else types.StopReason(reason["type"])
    aborted = stop_reason == types.StopReason.ABORT
    if aborted and reason.get("status_code") is not None:
      raise failure(self._where, {"error": reason}, reason["status_code"])
    # What was aborted before it ran reports nothing else.
    new = 0 if aborted and not ids else meta["completion_tokens"] - self.count
    ids = tuple(_last(ids, new, "output_ids"))
    pairs = _last(
      meta.get("output_token_logprobs"), new, "output_token_logprobs"
    )
    if tuple(pair[1] for pair in pairs) != ids:
      raise ValueError("output_token_logprobs are of other tokens")
    likely = meta.get("output_top_logprobs")
    if likely is not None:
      likely = _last(likely, new, "output_top_logprobs")
    self.count += new
    return api.TokenChunk(
      ids,
      tuple(float(pair[0]) for pair in pairs),
      self._versions(meta, new),
      stop_reason,
      tuple(
        tuple((pair[1], float(pair[0])) for pair in one or ())
        for one in likely or ()
      ),
    )

  def _versions(self, meta: Mapping[str, Any], new: int) -> tuple[int, ...]:
    each = meta.get("weight_versions")
    if each is not None:
      return tuple(_last(each, new, "weight_versions"))
    said = str(meta.get("weight_version"))
    return (int(said) if said.isdigit() else self._version,) * new


def failure(
  where: str, value: Any, status: int | None = None
) -> errors.EngineError:
  """The error that a server's JSON tells of.

  Args:
    where: the server, for the message.
    value: the JSON, {"error": {"message", "type", "code"}} at best.
    status: the HTTP status; None: what the JSON says, if it says one.
  """
  said = value.get("error", value) if isinstance(value, Mapping) else value
  about = said if isinstance(said, Mapping) else {"message": said}
  kind = _KINDS.get(about.get("type"), errors.EngineError)
  status = about.get("code") if status is None else status
  if isinstance(status, int) and status >= 500:
    kind = errors.EngineUnavailableError
  return kind(f"{where}: {about.get('message', about)}")


def _last(items: Any, count: int, name: str) -> Any:
  """The last `count` items of a list that must have as many."""
  found = len(items or ())
  if count < 0 or found < count:
    raise ValueError(f"{count} new tokens, but {found} {name}")
  return items[found - count :] if count else []
