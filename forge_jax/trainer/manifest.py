"""A folder's manifest: the SHA-256 of every file in it, and of itself.

The file is what `sha256sum --check manifest.sha256` reads: a line per file,
sorted by name. Its first line, a comment to that program, has the checksum of
the lines below, so that a damaged manifest shows too. Written last and synced,
it also says that the folder is complete.
"""

import hashlib
import os
import pathlib

NAME = "manifest.sha256"
_SELF = "# sha256 of the lines below: "


def write(folder: pathlib.Path) -> None:
  """Syncs everything in a folder, then writes its manifest, durably.

  Raises:
    OSError: a file cannot be read or written.
  """
  (folder / NAME).unlink(missing_ok=True)
  lines = []
  for name in sorted(_files(folder)):
    _sync(folder / name)
    lines.append(f"{_checksum(folder / name)}  {name}\n")
  for path in (folder, *folder.rglob("*")):
    if path.is_dir():
      _sync(path)
  body = "".join(lines)
  partial = folder / f"{NAME}.partial"
  head = f"{_SELF}{hashlib.sha256(body.encode()).hexdigest()}\n"
  partial.write_text(head + body, encoding="utf-8")
  _sync(partial)
  partial.rename(folder / NAME)
  _sync(folder)
  _sync(folder.parent)


def faults(folder: pathlib.Path) -> list[str]:
  """What is wrong with a folder, a line each; empty: nothing is.

  Raises:
    OSError: a file cannot be read.
  """
  path = folder / NAME
  if not path.exists():
    return [f"{NAME} is missing: the folder is not complete"]
  head, _, body = path.read_bytes().partition(b"\n")
  expected = f"{_SELF}{hashlib.sha256(body).hexdigest()}"
  if head != expected.encode():
    return [f"{NAME} is damaged"]
  known = {}
  for line in body.decode().splitlines():
    checksum, _, name = line.partition("  ")
    known[name] = checksum
  present = _files(folder) - {NAME}
  found = [f"{name} is missing" for name in sorted(known.keys() - present)]
  found += [f"{name} is not listed" for name in sorted(present - known.keys())]
  for name in sorted(present & known.keys()):
    if _checksum(folder / name) != known[name]:
      found.append(f"{name} is damaged: its SHA-256 is not that of {NAME}")
  return found


def _files(folder: pathlib.Path) -> set[str]:
  return {
    path.relative_to(folder).as_posix()
    for path in folder.rglob("*")
    if path.is_file()
  }


def _checksum(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
