"""What starts bubblewrap: it prepares what bubblewrap alone cannot do.

It stands alone: the standard library only, as little of it as can be, for every
sandbox waits for its imports; and it is run by path. Its argument, the plan, is
marshalled and in hexadecimal. In order:

  1. It joins the sandbox's control groups.
  2. In mount namespace of its own (and, unless it is root, in a user namespace)
     it mounts on the `stage` directory a small file system with everything that
     the sandbox shall see of the machine, and in it the sandbox's own files,
     limited in bytes and in number. So a path is shown that the sandbox's user
     could not reach, and nothing is left behind when the processes end.
  3. Root becomes another user, for good.
  4. It asks to be killed when its parent dies, which bubblewrap keeps so.
"""

import ctypes
import marshal
import os
import resource
import sys

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_NOSUID, _MS_NODEV = 2, 4
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)


def enter(plan):
  """Turns this process into the one that a plan describes."""
  os.umask(0o022)
  for path in plan["cgroups"]:
    with open(path, "w") as file:
      file.write("0")
  _new_namespaces(plan["user"])
  _stage(plan)
  if plan["user"] is not None:
    os.setgroups([])
    os.setresgid(*[plan["user"]] * 3)
    os.setresuid(*[plan["user"]] * 3)
  _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
  # Changing the user forgets this, so it comes last; and the parent may have
  # died before.
  _check(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "pdeathsig")
  if os.getppid() != plan["parent"]:
    sys.exit("the parent has died")
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  reader, writer = os.pipe()
  os.write(writer, bytes.fromhex(plan["seccomp"]))  # less than a pipe holds
  os.close(writer)
  os.set_inheritable(reader, True)
  command = [arg.replace("{seccomp}", str(reader)) for arg in plan["command"]]
  os.execve(command[0], command, {})


def _new_namespaces(user):
  """A mount namespace; for a non-root user in a user namespace."""
  flags = _CLONE_NEWNS if user is not None else _CLONE_NEWNS | _CLONE_NEWUSER
  uid, gid = os.getuid(), os.getgid()
  _check(_libc.unshare(flags), "new namespaces (unshare)")
  if user is None:
    for name, text in (
      ("setgroups", "deny"),
      ("uid_map", f"0 {uid} 1"),
      ("gid_map", f"0 {gid} 1"),
    ):
      with open("/proc/self/" + name, "w") as file:
        file.write(text)
  _mount("none", "/", None, _MS_REC | _MS_PRIVATE)


def _stage(plan):
  stage = plan["stage"]
  _tmpfs(stage, "size=16m,nr_inodes=4096,mode=0755")
  for name, text in plan["texts"].items():
    path = _parent(stage, name)
    with open(path, "wb") as file:
      file.write(text)
    os.chmod(path, 0o444)
  for name, source in plan["binds"].items():
    path = _parent(stage, name)
    if os.path.isdir(source):
      os.mkdir(path)
    else:
      open(path, "w").close()
    _mount(source, path, None, _MS_BIND | _MS_REC)
  size, inodes = plan["disk"]
  disk = os.path.join(stage, "disk")
  os.mkdir(disk)
  _tmpfs(disk, f"size={size},nr_inodes={inodes},mode=0755")
  for name in plan["directories"]:
    os.mkdir(os.path.join(disk, name), 0o700)
    if plan["user"] is not None:
      os.chown(os.path.join(disk, name), plan["user"], plan["user"])


def _parent(stage, name):
  path = os.path.join(stage, name)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  return path


def _tmpfs(path, options):
  _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def _mount(source, target, kind, flags, options=None):
  encode = lambda text: None if text is None else os.fsencode(text)
  _check(
    _libc.mount(
      encode(source),
      encode(target),
      encode(kind),
      ctypes.c_ulong(flags),
      encode(options),
    ),
    f"mounting {source} on {target}",
  )


def _check(result, what):
  if result != 0:
    sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
  try:
    enter(marshal.loads(bytes.fromhex(sys.argv[1])))
  except OSError as error:
    sys.exit(str(error))
