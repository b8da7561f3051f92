"""Compiled programs that are kept from one process to the next."""

import pathlib

import jax


def keep() -> None:
  """Keeps compiled programs in .jax_cache, unless JAX is told otherwise."""
  if jax.config.jax_compilation_cache_dir is None:
    folder = str(pathlib.Path(".jax_cache").absolute())
    jax.config.update("jax_compilation_cache_dir", folder)
