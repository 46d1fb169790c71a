"""Runs a program that nobody has read in a process that can compute, read files, and nothing else.

Started by sandbox.py as a script of its own, never imported. The program comes on standard input after a line with a
token; the token goes to standard output only when the program ran to its end, so that an exit() in it proves nothing.

What the kernel lets it do is a list (seccomp): memory, clocks, reading. Anything else fails with "Operation not
permitted": writing, creating or removing files, sockets, new processes and threads, signals, raising its limits.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

# System calls that are allowed, by name -> number, for the machines whose numbers are written here.
_ALLOWED = {
    "x86_64": {
        "read": 0,
        "write": 1,
        "close": 3,
        "stat": 4,
        "fstat": 5,
        "lstat": 6,
        "lseek": 8,
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "brk": 12,
        "rt_sigaction": 13,
        "rt_sigprocmask": 14,
        "rt_sigreturn": 15,
        "pread64": 17,
        "readv": 19,
        "writev": 20,
        "access": 21,
        "sched_yield": 24,
        "mremap": 25,
        "madvise": 28,
        "dup": 32,
        "nanosleep": 35,
        "getpid": 39,
        "exit": 60,
        "uname": 63,
        "getcwd": 79,
        "readlink": 89,
        "gettimeofday": 96,
        "getrusage": 98,
        "sysinfo": 99,
        "times": 100,
        "getuid": 102,
        "getgid": 104,
        "geteuid": 107,
        "getegid": 108,
        "getppid": 110,
        "sigaltstack": 131,
        "gettid": 186,
        "futex": 202,
        "sched_getaffinity": 204,
        "getdents64": 217,
        "clock_gettime": 228,
        "clock_getres": 229,
        "clock_nanosleep": 230,
        "exit_group": 231,
        "newfstatat": 262,
        "readlinkat": 267,
        "faccessat": 269,
        "set_robust_list": 273,
        "getrandom": 318,
        "statx": 332,
        "rseq": 334,
        "faccessat2": 439,
    },
    "aarch64": {
        "read": 63,
        "write": 64,
        "close": 57,
        "fstat": 80,
        "lseek": 62,
        "mmap": 222,
        "mprotect": 226,
        "munmap": 215,
        "brk": 214,
        "rt_sigaction": 134,
        "rt_sigprocmask": 135,
        "rt_sigreturn": 139,
        "pread64": 67,
        "readv": 65,
        "writev": 66,
        "sched_yield": 124,
        "mremap": 216,
        "madvise": 233,
        "dup": 23,
        "nanosleep": 101,
        "getpid": 172,
        "exit": 93,
        "uname": 160,
        "getcwd": 17,
        "gettimeofday": 169,
        "getrusage": 165,
        "sysinfo": 179,
        "times": 153,
        "getuid": 174,
        "geteuid": 175,
        "getgid": 176,
        "getegid": 177,
        "getppid": 173,
        "sigaltstack": 132,
        "gettid": 178,
        "futex": 98,
        "sched_getaffinity": 123,
        "getdents64": 61,
        "clock_gettime": 113,
        "clock_getres": 114,
        "clock_nanosleep": 115,
        "exit_group": 94,
        "newfstatat": 79,
        "readlinkat": 78,
        "faccessat": 48,
        "set_robust_list": 99,
        "getrandom": 278,
        "statx": 291,
        "rseq": 293,
        "faccessat2": 439,
    },
}
# Opening is allowed only where its flags ask for reading: (number, index of the flags among the arguments).
_OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_TMPFILE & ~os.O_DIRECTORY

# Berkeley packet filter, as linux/filter.h and linux/seccomp.h name it.
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _DENY = 0x7FFF0000, 0x00050001  # the second: fail with errno 1, EPERM
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENTS = 0, 4, 16
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2


def main() -> None:
    """Limit this process, run the program, and hand the token back if it ended by itself."""
    memory_bytes, cpu_seconds = int(sys.argv[1]), int(sys.argv[2])
    token, _, program = sys.stdin.buffer.read().decode().partition("\n")
    answer = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, 0),  # the token goes through a pipe
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    _allow_only(platform.machine())
    exec(compile(program, "<program>", "exec"), {"__name__": "program"})
    os.write(answer, token.encode())
    os._exit(0)


def _allow_only(machine: str) -> None:
    """Install the filter; it holds until the process ends. Raises KeyError on a machine it is not written for."""
    steps = [(_LOAD, 0, 0, _AT_ARCH), (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _DENY)]
    steps.append((_LOAD, 0, 0, _AT_NUMBER))
    for number in _ALLOWED[machine].values():
        steps += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for number, flags_index in _OPEN[machine]:
        steps += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _AT_ARGUMENTS + 8 * flags_index),  # the low half of a 64-bit argument
            (_JUMP_ANY_BIT, 0, 1, _WRITING),
            (_RETURN, 0, 0, _DENY),
            (_RETURN, 0, 0, _ALLOW),
        ]
    steps.append((_RETURN, 0, 0, _DENY))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    head = struct.pack("@HP", len(steps), ctypes.addressof(code))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head, 0, 0)):
        if libc.prctl(*call) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({call[0]}) failed")


if __name__ == "__main__":
    main()
