"""Looks at a pool from the shell, and cleans it up.

    python -m forge_jax.pool ls PATH               what it holds
    python -m forge_jax.pool show PATH GROUP       one group, without its tokens
    python -m forge_jax.pool verify PATH [--repair]
    python -m forge_jax.pool export PATH FILE --table=episodes
    python -m forge_jax.pool gc PATH --through=STEP [--keep-steps=N]

`verify` and `gc` need a pool that nobody writes to. The exit status is 0, 1
after an error, and 2 where `verify` found damage that it did not repair.
"""

import argparse
from collections.abc import Sequence
import datetime
import sys

from rich import console as console_lib
from rich import table as table_lib

from forge_jax import errors
from forge_jax.pool import compaction, export, records, store
from forge_jax.pool import verify as verify_lib


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs a command; returns the exit status."""
  options = _parser().parse_args(arguments)
  console = console_lib.Console(highlight=False)
  try:
    return options.run(options, console)
  except errors.ForgeError as error:
    print(error, file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m forge_jax.pool", description=__doc__.split("\n")[0]
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")

  def add(name, run, about):
    command = commands.add_parser(name, help=about, description=about)
    command.add_argument("path", metavar="PATH", help="folder of the pool")
    command.set_defaults(run=run)
    return command

  listing = add("ls", _list, "list the groups and what became of them")
  listing.add_argument("--last", type=int, default=20, help="0: all; 20")
  show = add("show", _show, "show one group, without its tokens")
  show.add_argument("group", type=int, metavar="GROUP")
  verify = add("verify", _verify, "compare every checksum")
  verify.add_argument(
    "--repair", action="store_true", help="set damage aside, keep what is good"
  )
  exporting = add("export", _export, "write a table as a Parquet file")
  exporting.add_argument("file", metavar="FILE")
  exporting.add_argument("--table", default="episodes", choices=export.TABLES)
  gc = add("gc", _gc, "drop groups that were trained, free their space")
  gc.add_argument(
    "--through",
    type=int,
    required=True,
    metavar="STEP",
    help="step of the oldest checkpoint that is kept",
  )
  gc.add_argument("--keep-steps", type=int, default=0, metavar="N")
  gc.add_argument("--keep-gb", type=float, default=0.0, metavar="GB")
  return parser


def _list(options: argparse.Namespace, console: console_lib.Console) -> int:
  with store.DataPool.open(options.path, readonly=True) as pool:
    infos, claims = pool.infos(), pool.claims()
  fates = _fates(claims)
  shown = infos[-options.last :] if options.last else infos
  table = table_lib.Table(box=None, pad_edge=False)
  for name in ("group", "task", "fate"):
    table.add_column(name, overflow="fold")
  for name in ("perf", "episodes", "requests", "tokens", "seconds", "MB"):
    table.add_column(name, justify="right")
  table.add_column("stored")
  for info in shown:
    table.add_row(
      str(info.index),
      info.task,
      fates.get(info.index, "waits"),
      f"{info.perf:.3f}",
      f"{info.completed}/{info.episodes}",
      str(info.completions),
      f"{info.request_tokens:,}",
      f"{info.seconds:.1f}",
      f"{info.bytes / 1e6:.2f}",
      f"{datetime.datetime.fromtimestamp(info.stored):%Y-%m-%d %H:%M:%S}",
    )
  console.print(table)
  console.print(
    f"{len(infos)} groups, {sum(i.bytes for i in infos) / 1e6:,.1f} MB; "
    f"{len(claims)} steps claimed; "
    f"{sum(i.index not in fates for i in infos)} groups wait"
  )
  return 0


def _fates(claims: Sequence[records.Claim]) -> dict[int, str]:
  fates = {}
  for claim in claims:
    for index in claim.dropped + claim.again:
      fates[index] = f"dropped, step {claim.step}"
    for index in claim.trained:
      fates[index] = f"step {claim.step}"
  return fates


def _show(options: argparse.Namespace, console: console_lib.Console) -> int:
  with store.DataPool.open(options.path, readonly=True) as pool:
    group = pool.get(options.group)
    info = pool.info(options.group)
    fate = _fates(pool.claims()).get(options.group, "waits")
    notes = [n.record for n in pool.notes() if n.group == options.group]
  console.print(
    f"group {info.index}, task {info.task}, attempt {info.attempt}: {fate}",
    markup=False,
  )
  console.print(f"payload {dict(group.task.payload)}", markup=False)
  for note in notes:
    console.print(f"note {dict(note)}", markup=False)
  table = table_lib.Table(box=None, pad_edge=False)
  for name in ("episode", "status", "rewards"):
    table.add_column(name, overflow="fold")
  for name in ("requests", "prompt", "response", "versions", "seconds"):
    table.add_column(name, justify="right")
  table.add_column("error", overflow="fold")
  for episode in group.episodes:
    completions = episode.completions
    versions = [v for c in completions for v in c.versions.tolist()]
    table.add_row(
      episode.id,
      episode.status.value,
      ", ".join(f"{r.name} {r.value:g}" for r in episode.rewards),
      str(len(completions)),
      f"{sum(len(c.prompt_ids) for c in completions):,}",
      f"{len(versions):,}",
      f"{min(versions)}-{max(versions)}" if versions else "",
      f"{episode.seconds:.1f}",
      episode.error or "",
    )
  console.print(table)
  return 0


def _verify(options: argparse.Namespace, console: console_lib.Console) -> int:
  report = verify_lib.verify(options.path, repair=options.repair)
  counts = ", ".join(f"{count} {name}" for name, count in report.counts.items())
  console.print(f"{counts}, {report.bytes / 1e6:,.1f} MB are good")
  if report.torn:
    console.print(f"torn tail: {report.torn}", markup=False)
  for line in report.damage:
    console.print(f"damaged: {line}", markup=False)
  for name in report.lost:
    console.print(f"lost: {name}", markup=False)
  if report.damage and options.repair:
    console.print(
      "what is good is kept; a run that continues makes up the rest"
    )
  return 2 if report.damage and not options.repair else 0


def _export(options: argparse.Namespace, console: console_lib.Console) -> int:
  with store.DataPool.open(options.path, readonly=True) as pool:
    count = export.write_parquet(pool, options.table, options.file)
  console.print(f"{count} {options.table} in {options.file}", markup=False)
  return 0


def _gc(options: argparse.Namespace, console: console_lib.Console) -> int:
  retention = compaction.Retention(
    keep_steps=options.keep_steps, keep_gb=options.keep_gb
  )
  with store.DataPool.open(options.path) as pool:
    done = compaction.collect(pool, retention, options.through)
  console.print(
    f"dropped {done.groups} groups, emptied {done.segments} segments, freed "
    f"{done.bytes / 1e6:,.1f} MB"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
