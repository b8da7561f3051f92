"""A corpus that every machine has: the standard library's documentation.

A page is a module, a class or a function, as pydoc knows it. It shows what
belongs to itself and names the pages next to it, so that a question about what
is two pages away takes two pages to answer:

  module    what it is about; its classes; its functions
  class     its signature, base classes and module; what it is about; its methods
  function  its signature and module; what it is about

Which pages there are depends on the Python that reads them, and on nothing
else: objects without a stable form are written without their address.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import importlib
import inspect
import pydoc
import re
import sqlite3
from typing import Any

# Modules that import at once, do nothing when imported, and are everywhere.
_NAMES = """
abc argparse array ast asyncio base64 bisect calendar cmd codecs collections
collections.abc concurrent.futures configparser contextlib copy csv dataclasses
datetime decimal difflib dis email.message enum filecmp fileinput fnmatch
fractions functools getopt getpass glob graphlib gzip hashlib heapq hmac html
html.parser http.client http.cookies imaplib inspect io ipaddress itertools
json json.decoder json.encoder linecache locale logging logging.handlers
mailbox math mimetypes netrc numbers operator optparse os os.path pathlib
pickle pickletools plistlib poplib pprint queue quopri random re reprlib sched
secrets selectors shelve shlex shutil smtplib socket socketserver sqlite3 stat
statistics string stringprep struct subprocess symtable tarfile tempfile
textwrap threading timeit token tokenize trace traceback types typing unittest
urllib.parse urllib.request uuid wave weakref webbrowser xml.dom.minidom
xml.etree.ElementTree xml.sax xmlrpc.client zipapp zipfile zoneinfo builtins
"""
_MODULES = tuple(_NAMES.split())
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
  """What is said of one thing."""

  title: str  # its full name, unique: "json.decoder.JSONDecodeError"
  kind: str  # "module", "class" or "function"
  summary: str  # the first line of its documentation; "": it has none
  text: str
  # Titles of pages, by what they are to this one: "module", "base" (where there
  # is one), "first class", "last class", "first function", "last function".
  links: Mapping[str, str]
  parameters: tuple[str, ...] = ()  # names, of a function


class Corpus:
  """The pages, and a search over them. Read-only; any thread may use it."""

  def __init__(self):
    """Reads the documentation; takes about three seconds."""
    self.pages = {page.title: page for page in _read()}
    self._index = sqlite3.connect(":memory:", check_same_thread=False)
    self._index.execute(
      "CREATE VIRTUAL TABLE pages USING fts5(title, text, tokenize=porter)"
    )
    self._index.executemany(
      "INSERT INTO pages VALUES (?, ?)",
      [(page.title, page.text) for page in self.pages.values()],
    )

  def search(self, query: str, most: int) -> list[str]:
    """Titles of the pages that match any word, best first by BM25.

    BM25 is that of SQLite's FTS5 (k1 = 1.2, b = 0.75); a word in the title
    counts as much as four in the text.
    """
    words = dict.fromkeys(_WORD.findall(query.lower()))
    if not words:
      return []
    found = self._index.execute(
      "SELECT title FROM pages WHERE pages MATCH ? "
      "ORDER BY bm25(pages, 4.0, 1.0), title LIMIT ?",
      (" OR ".join(f'"{word}"' for word in words), most),
    )
    return [title for (title,) in found]


@functools.cache
def load() -> Corpus:
  """The corpus of this process."""
  return Corpus()


def _read() -> Iterator[Page]:
  members: dict[str, dict[str, Any]] = {"class": {}, "function": {}}
  for name in _MODULES:
    module = importlib.import_module(name)
    for member in _public(module):
      value = getattr(module, member, None)
      if inspect.isclass(value):
        title = f"{value.__module__}.{value.__qualname__}"
        members["class"].setdefault(title, value)
      elif inspect.isroutine(value) and value.__module__ == name:
        members["function"].setdefault(f"{name}.{member}", value)
  for name in _MODULES:
    yield _module_page(name, members)
  for title, value in members["class"].items():
    yield _class_page(title, value, members["class"])
  for title, value in members["function"].items():
    yield _function_page(title, value)


def _public(module: Any) -> Sequence[str]:
  names = getattr(module, "__all__", None) or sorted(vars(module))
  return [name for name in names if not name.startswith("_")]


def _module_page(name: str, members: Mapping[str, Mapping[str, Any]]) -> Page:
  doc = _doc(importlib.import_module(name))
  parts, links = [f"module {name}", doc], {}
  for kind, titles in members.items():
    own = sorted(t for t in titles if t.rpartition(".")[0] == name)
    plural = "classes" if kind == "class" else "functions"
    parts.append(f"Its {plural}: {', '.join(own) or 'none'}")
    if len(own) > 1:
      links |= {f"first {kind}": own[0], f"last {kind}": own[-1]}
  return Page(name, "module", _summary(doc), _join(parts), links)


def _class_page(title: str, value: type, classes: Mapping[str, Any]) -> Page:
  doc, module = _doc(value), value.__module__
  bases = [f"{b.__module__}.{b.__qualname__}" for b in value.__bases__]
  methods = [
    name
    for name, member in vars(value).items()
    if callable(member) and not name.startswith("_")
  ]
  links = {"module": module} if module in _MODULES else {}
  if len(bases) == 1 and bases[0] in classes and bases[0] != "builtins.object":
    links["base"] = bases[0]
  parts = [
    f"class {title}{_signature(value)}",
    f"Base classes: {', '.join(bases) or 'none'}\nModule: {module}",
    doc,
    f"Its methods: {', '.join(methods) or 'none'}",
  ]
  return Page(title, "class", _summary(doc), _join(parts), links)


def _function_page(title: str, value: Any) -> Page:
  doc, module = _doc(value), title.rpartition(".")[0]
  try:
    parameters = tuple(inspect.signature(value).parameters)
  except (ValueError, TypeError):  # written in C, and not said
    parameters = ()
  return Page(
    title,
    "function",
    _summary(doc),
    _join([f"function {title}{_signature(value)}", f"Module: {module}", doc]),
    {"module": module},
    parameters,
  )


def _signature(value: Any) -> str:
  try:
    return _ADDRESS.sub("", str(inspect.signature(value)))
  except (ValueError, TypeError):
    return ""


def _doc(value: Any) -> str:
  return _ADDRESS.sub("", pydoc.getdoc(value)).strip()


def _summary(doc: str) -> str:
  return pydoc.splitdoc(doc)[0].strip() or doc.partition("\n")[0].strip()


def _join(parts: Sequence[str]) -> str:
  return "\n\n".join(part for part in parts if part)
