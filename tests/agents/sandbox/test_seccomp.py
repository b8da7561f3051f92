"""The filter of system calls, run by an interpreter of its instructions.

The kernel runs it in test_escape.py, but only for the machine at hand.
"""

import struct

import pytest

from forge_jax import errors
from forge_jax.agents.sandbox import seccomp

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386, ARM = 0x40000003, 0x40000028
ALLOW, KILL, EPERM, ENOSYS, EAFNOSUPPORT = "allow", "kill", 1, 38, 97


def decide(program, arch, number, *arguments):
  """What a filter says of a call: `allow`, `kill` or an errno."""
  padded = [*arguments, *[0] * (6 - len(arguments))]
  data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
  code = list(struct.iter_unpack("=HBBI", program))
  at, accumulator = 0, None
  while True:
    operation, if_true, if_false, value = code[at]
    at += 1
    if operation == 0x20:
      (accumulator,) = struct.unpack_from("=I", data, value)
    elif operation == 0x06:
      if value == 0x7FFF0000:
        return ALLOW
      return KILL if value == 0x80000000 else value & 0xFFFF
    else:
      holds = {
        0x15: accumulator == value,
        0x35: accumulator >= value,
        0x45: bool(accumulator & value),
      }[operation]
      at += if_true if holds else if_false


# Numbers on x86_64 and aarch64, arguments, and what is said of the call.
CALLS = {
  "read": ((0, 63), (), ALLOW),
  "openat": ((257, 56), (), ALLOW),
  "execve": ((59, 221), (), ALLOW),
  "mount": ((165, 40), (), EPERM),
  "unshare": ((272, 97), (), EPERM),
  "ptrace": ((101, 117), (), EPERM),
  "bpf": ((321, 280), (), EPERM),
  "io_uring_setup": ((425, 425), (), EPERM),
  "keyctl": ((250, 219), (), EPERM),
  "clone3": ((435, 435), (), ENOSYS),
  "fork by clone": ((56, 220), (17,), ALLOW),
  "thread by clone": ((56, 220), (0x3D0F00,), ALLOW),
  "clone, new user": ((56, 220), (0x10000011,), EPERM),
  "clone, new network": ((56, 220), (0x40000011,), EPERM),
  "clone, new time": ((56, 220), (0x00000080,), EPERM),
  "ioctl TCGETS": ((16, 29), (0, 0x5401), ALLOW),
  "ioctl TIOCSTI": ((16, 29), (0, 0x5412), EPERM),
  # The kernel reads the low half only.
  "ioctl TIOCSTI, disguised": ((16, 29), (0, 0x1_0000_5412), EPERM),
  "ioctl TIOCLINUX": ((16, 29), (0, 0x541C), EPERM),
  "socket unix": ((41, 198), (1, 1, 0), ALLOW),
  "socket inet": ((41, 198), (2, 1, 6), ALLOW),
  "socket inet6": ((41, 198), (10, 1, 6), ALLOW),
  "socket netlink route": ((41, 198), (16, 3, 0), ALLOW),
  "socket netlink netfilter": ((41, 198), (16, 3, 12), EAFNOSUPPORT),
  "socket vsock": ((41, 198), (40, 1, 0), EAFNOSUPPORT),
  "socket packet": ((41, 198), (17, 3, 0), EAFNOSUPPORT),
  "memfd_create": ((319, 279), (), ALLOW),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("machine", ARCHES)
def test_a_call_is_decided(machine, name):
  numbers, arguments, expected = CALLS[name]
  number = numbers[list(ARCHES).index(machine)]
  program = seccomp.program(machine)
  assert decide(program, ARCHES[machine], number, *arguments) == expected


@pytest.mark.parametrize("machine", ARCHES)
def test_memory_of_no_process_can_be_denied(machine):
  program = seccomp.program(machine, hidden_memory=False)
  number = CALLS["memfd_create"][0][list(ARCHES).index(machine)]
  assert decide(program, ARCHES[machine], number) == ENOSYS


def test_foreign_conventions_end_the_program():
  program = seccomp.program("x86_64")
  assert decide(program, I386, 0) == KILL
  assert decide(program, ARCHES["aarch64"], 63) == KILL
  assert decide(program, ARCHES["x86_64"], 0x40000000) == KILL  # x32's read
  assert decide(program, ARCHES["x86_64"], 0x40000000 | 165) == KILL
  assert decide(seccomp.program("aarch64"), ARM, 3) == KILL


def test_every_denied_call_has_its_own_number():
  for column in range(2):
    numbers = [
      pair[column]
      for table in (seccomp._DENIED, seccomp._ABSENT, seccomp._HIDDEN_MEMORY)
      for pair in table.values()
      if pair[column] is not None
    ]
    assert len(numbers) == len(set(numbers))


def test_another_machine_is_refused():
  with pytest.raises(errors.SandboxError, match="no system call filter"):
    seccomp.program("riscv64")
