import gguf
import pytest

from forge_jax import errors
from forge_jax.gateway import tokenizer as gateway_tokenizer


def test_digits_are_single_tokens_and_text_survives(smollm2):
  assert smollm2.tokenize("12345") == list("12345")
  text = "CALC(41 * 12)\n  Naïve 日本語 🙂\t<|im_end|>"
  ids = smollm2.encode(text, add_special_tokens=False)
  assert smollm2.decode(ids, skip_special_tokens=False) == text
  assert ids[-1] == smollm2.eos_token_id == 2
  assert smollm2.chat_template.startswith("{% for message in messages %}")


def test_a_folder_gives_the_same_tokens(smollm2, tmp_path):
  smollm2.save_pretrained(tmp_path)
  again = gateway_tokenizer.load_tokenizer(tmp_path)
  text = "What is 41 * 12?<|im_end|>\n"
  assert again.encode(text) == smollm2.encode(text, add_special_tokens=False)
  assert again.chat_template == smollm2.chat_template


def test_a_folder_without_a_template(smollm2, tmp_path):
  smollm2.save_pretrained(tmp_path)
  (tmp_path / "chat_template.jinja").unlink()
  with pytest.raises(errors.CheckpointError, match="has no chat template"):
    gateway_tokenizer.load_tokenizer(tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
  with pytest.raises(errors.CheckpointError, match=r"none.*no such file"):
    gateway_tokenizer.load_tokenizer(tmp_path / "none")
  with pytest.raises(errors.CheckpointError, match="no tokenizer can be read"):
    gateway_tokenizer.load_tokenizer(tmp_path)
  (tmp_path / "model.gguf").write_bytes(b"not a model at all" * 10)
  with pytest.raises(errors.CheckpointError, match="not a GGUF file"):
    gateway_tokenizer.load_tokenizer(tmp_path / "model.gguf")


def tiny_gguf(path, *, model="gpt2", pre="smollm", template="{{ messages }}"):
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tokenizer_model(model)
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(["<end>", "a", "b", "ab"])
  writer.add_token_types([3, 1, 1, 1])
  writer.add_token_merges(["a b"])
  writer.add_eos_token_id(0)
  if template is not None:
    writer.add_chat_template(template)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_a_tiny_gguf(tmp_path):
  loaded = gateway_tokenizer.load_tokenizer(tiny_gguf(tmp_path / "t.gguf"))
  assert loaded.encode("ab<end>b", add_special_tokens=False) == [3, 0, 2]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model": "llama"}, "'llama'; only byte-level BPE"),
    ({"pre": "qwen9"}, r"'qwen9'; known are \['gpt-2', 'smollm'\]"),
    ({"template": None}, "the field 'tokenizer.chat_template' is missing"),
  ],
)
def test_a_gguf_that_lacks_something(tmp_path, change, message):
  path = tiny_gguf(tmp_path / "t.gguf", **change)
  with pytest.raises(errors.CheckpointError, match=message):
    gateway_tokenizer.load_tokenizer(path)
