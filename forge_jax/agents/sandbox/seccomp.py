"""The system calls that a sandboxed program is refused, as a BPF filter.

The filter is a deny-list: what a program needs in order to compute, to read
and write its files, to start processes and to talk to its gateway stays. What
only an administrator or an attacker of the kernel would call ends in an error;
a call through a foreign calling convention (i386 or x32 on x86_64, 32-bit ARM
on aarch64), in which numbers mean something else, ends the process.

seccomp(2) has the format; numbers are of the kernel's syscall tables.
"""

import platform
import struct

from forge_jax import errors

_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
# By name: the numbers on x86_64 and on aarch64; None: there is no such call.
_DENIED = {
  # File systems, mounts, roots; handles that lead past them.
  "mount": (165, 40),
  "umount2": (166, 39),
  "pivot_root": (155, 41),
  "chroot": (161, 51),
  "open_tree": (428, 428),
  "move_mount": (429, 429),
  "fsopen": (430, 430),
  "fsconfig": (431, 431),
  "fsmount": (432, 432),
  "fspick": (433, 433),
  "mount_setattr": (442, 442),
  "open_tree_attr": (467, 467),
  "statmount": (457, 457),
  "listmount": (458, 458),
  "name_to_handle_at": (303, 264),
  "open_by_handle_at": (304, 265),
  "quotactl": (179, 60),
  "quotactl_fd": (443, 443),
  "swapon": (167, 224),
  "swapoff": (168, 225),
  "fanotify_init": (300, 262),
  # Namespaces.
  "unshare": (272, 97),
  "setns": (308, 268),
  # Other processes.
  "ptrace": (101, 117),
  "process_vm_readv": (310, 270),
  "process_vm_writev": (311, 271),
  "process_madvise": (440, 440),
  "kcmp": (312, 272),
  "pidfd_getfd": (438, 438),
  "migrate_pages": (256, 238),
  "move_pages": (279, 239),
  # Large and young parts of the kernel.
  "bpf": (321, 280),
  "perf_event_open": (298, 241),
  "userfaultfd": (323, 282),
  "io_uring_setup": (425, 425),
  "io_uring_enter": (426, 426),
  "io_uring_register": (427, 427),
  "add_key": (248, 217),
  "request_key": (249, 218),
  "keyctl": (250, 219),
  # The machine.
  "init_module": (175, 105),
  "finit_module": (313, 273),
  "delete_module": (176, 106),
  "kexec_load": (246, 104),
  "kexec_file_load": (320, 294),
  "reboot": (169, 142),
  "acct": (163, 89),
  "syslog": (103, 116),
  "settimeofday": (164, 170),
  "clock_settime": (227, 112),
  "clock_adjtime": (305, 266),
  "adjtimex": (159, 171),
  "sethostname": (170, 161),
  "setdomainname": (171, 162),
  "vhangup": (153, 58),
  "iopl": (172, None),
  "ioperm": (173, None),
  "modify_ldt": (154, None),
  "uselib": (134, None),
  "_sysctl": (156, None),
  "lookup_dcookie": (212, 18),
  "nfsservctl": (180, 42),
}
# Calls that programs try first and do without.
_ABSENT = {"clone3": (435, 435)}
# Memory that belongs to no process, so that counting processes' memory, all
# there is without control groups, would miss it.
_HIDDEN_MEMORY = {
  "memfd_create": (319, 279),
  "memfd_secret": (447, 447),
  "shmget": (29, 194),
}
_CLONE, _IOCTL, _SOCKET = (56, 220), (16, 29), (41, 198)
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag
_TERMINAL_INJECTIONS = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_NETLINK = 16  # of which protocol 0, about interfaces and routes, stays
_X32 = 0x40000000  # the bit that marks its numbers

# struct seccomp_data: where its fields lie.
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

_Instruction = tuple[int, int, int, int]


def program(machine: str | None = None, *, hidden_memory: bool = True) -> bytes:
  """The filter, an array of `struct sock_filter`.

  Args:
    machine: "x86_64" or "aarch64"; None: this one.
    hidden_memory: whether memory that belongs to no process is allowed.

  Raises:
    SandboxError: the machine is another.
  """
  machine = machine or platform.machine()
  if machine not in _ARCHES:
    raise errors.SandboxError(
      f"no system call filter for {machine!r}; there is one for "
      f"{' and '.join(_ARCHES)}"
    )
  column = list(_ARCHES).index(machine)
  absent = _ABSENT if hidden_memory else _ABSENT | _HIDDEN_MEMORY
  code = [
    _load(_ARCH),
    (_EQUAL, 1, 0, _ARCHES[machine]),
    (_RETURN, 0, 0, _KILL),
    _load(_NUMBER),
  ]
  if machine == "x86_64":
    code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
  for calls, errno in ((_DENIED, _EPERM), (absent, _ENOSYS)):
    for numbers in calls.values():
      if numbers[column] is not None:
        code += _when(numbers[column], [_fail(errno)])
  code += _when(_CLONE[column], _refuse_namespaces())
  code += _when(_IOCTL[column], _refuse_injection())
  code += _when(_SOCKET[column], _refuse_families())
  code.append((_RETURN, 0, 0, _ALLOW))
  return b"".join(struct.pack("=HBBI", *one) for one in code)


def _load(offset: int) -> _Instruction:
  return _LOAD, 0, 0, offset


def _argument(n: int) -> _Instruction:
  """Loads the low 32 bits, which is all that the calls below read."""
  return _load(_ARGUMENTS + 8 * n)


def _fail(errno: int) -> _Instruction:
  return _RETURN, 0, 0, _ERRNO | errno


def _when(number: int, body: list[_Instruction]) -> list[_Instruction]:
  """Runs a body that returns, if the call loaded is the one of a number."""
  return [(_EQUAL, 0, len(body), number), *body]


def _refuse_namespaces() -> list[_Instruction]:
  return [
    _argument(0),
    (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
    _fail(_EPERM),
    (_RETURN, 0, 0, _ALLOW),
  ]


def _refuse_injection() -> list[_Instruction]:
  tests = []
  for request in _TERMINAL_INJECTIONS:
    tests += _when(request, [_fail(_EPERM)])
  return [_argument(1), *tests, (_RETURN, 0, 0, _ALLOW)]


def _refuse_families() -> list[_Instruction]:
  tests = []
  for family in _FAMILIES:
    tests += _when(family, [(_RETURN, 0, 0, _ALLOW)])
  routes = [
    _argument(2),
    *_when(0, [(_RETURN, 0, 0, _ALLOW)]),
    _fail(_EAFNOSUPPORT),
  ]
  tests += _when(_NETLINK, routes)
  return [_argument(0), *tests, _fail(_EAFNOSUPPORT)]
