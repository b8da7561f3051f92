"""The rivals' side of engine.py: runs in an environment of its own.

  python engine_rivals.py {transformers,llamacpp} MODEL BATCH PROMPT NEW THREADS
  python engine_rivals.py convert GGUF GGUF    to float32

MODEL is a Hugging Face folder or a GGUF file. The prompts are of PROMPT random
tokens each, NEW tokens are decoded for each of BATCH rows. Prints one JSON line:
tokens per second of prefill and of decode, the best of two runs each.
transformers: `generate`, greedy, on torch. llama.cpp: `llama_decode` on batches
of 512 prompt tokens, then of one token a sequence, whose tokens are given, so
that nothing is spent on sampling.
"""

import ctypes
import json
import random
import sys
import time

RUNS = 2


def seconds(run):
  started = time.perf_counter()
  run()
  return time.perf_counter() - started


def random_prompts(batch, length, vocab):
  draw = random.Random(0)
  return [
    [draw.randrange(100, vocab) for _ in range(length)] for _ in range(batch)
  ]


def transformers(folder, batch, prompt, new, threads):
  """(seconds of prefill, seconds of decode), the best of each."""
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(threads)
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  model.generation_config.eos_token_id = None
  ids = torch.tensor(random_prompts(batch, prompt, model.config.vocab_size))

  def generate(count):
    out = model.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      do_sample=False,
      max_new_tokens=count,
      min_new_tokens=count,
      pad_token_id=0,
    )
    assert out.shape[1] == prompt + count

  with torch.inference_mode():
    generate(2)
    prefill = min(seconds(lambda: generate(1)) for _ in range(RUNS))
    whole = min(seconds(lambda: generate(new + 1)) for _ in range(RUNS))
  return prefill, whole - prefill


def llamacpp(path, batch, prompt, new, threads):
  """(seconds of prefill, seconds of decode), the best of each."""
  import llama_cpp as lib

  silent = lib.llama_log_callback(lambda *_: None)
  lib.llama_log_set(silent, ctypes.c_void_p(0))
  lib.llama_backend_init()
  model = lib.llama_model_load_from_file(
    path.encode(), lib.llama_model_default_params()
  )
  assert model, f"{path} cannot be loaded"
  options = lib.llama_context_default_params()
  options.n_seq_max = batch
  options.n_ctx = batch * (prompt + new + 8)
  options.n_batch = options.n_ubatch = 512
  options.n_threads = options.n_threads_batch = threads
  options.type_k = options.type_v = lib.GGML_TYPE_F32
  options.kv_unified = False
  context = lib.llama_init_from_model(model, options)
  assert context, "no context"
  vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
  rows = random_prompts(batch, prompt, vocab)
  some = lib.llama_batch_init(512, 0, 1)

  def decode(entries):
    some.n_tokens = len(entries)
    for i, (token, position, sequence, wanted) in enumerate(entries):
      some.token[i], some.pos[i], some.logits[i] = token, position, wanted
      some.n_seq_id[i], some.seq_id[i][0] = 1, sequence
    assert lib.llama_decode(context, some) == 0
    lib.llama_synchronize(context)

  def prefill():
    lib.llama_memory_clear(lib.llama_get_memory(context), True)
    entries = [
      (token, position, sequence, position == prompt - 1)
      for sequence, row in enumerate(rows)
      for position, token in enumerate(row)
    ]
    for first in range(0, len(entries), 512):
      decode(entries[first : first + 512])

  def steps():
    for step in range(new):
      decode([(rows[s][step], prompt + step, s, True) for s in range(batch)])

  prefill()
  runs = [(seconds(prefill), seconds(steps)) for _ in range(RUNS)]
  return min(run[0] for run in runs), min(run[1] for run in runs)


def convert(source, target):
  """Writes a GGUF file with every tensor in float32."""
  import gguf
  from gguf import quants
  import numpy as np

  reader = gguf.GGUFReader(source)
  writer = gguf.GGUFWriter(
    target, reader.fields["general.architecture"].contents()
  )
  skipped = ("GGUF.", "general.architecture", "general.file_type")
  for field in reader.fields.values():
    if not field.name.startswith((*skipped, "general.quantization")):
      kind, *rest = field.types
      inner = rest[-1] if rest else None
      writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
  for tensor in reader.tensors:
    values = quants.dequantize(tensor.data, tensor.tensor_type)
    writer.add_tensor(tensor.name, values.astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def main(kind, model, *sizes):
  if kind == "convert":
    convert(model, *sizes)
    return
  batch, prompt, new, threads = map(int, sizes)
  run = {"transformers": transformers, "llamacpp": llamacpp}[kind]
  prefill, decode = run(model, batch, prompt, new, threads)
  figures = {
    "prefill": batch * prompt / prefill,
    "decode": batch * new / decode,
  }
  print(json.dumps(figures))


if __name__ == "__main__":
  main(*sys.argv[1:])
