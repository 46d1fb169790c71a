"""Programs that try to pass without computing, or to read what is not theirs."""

# ruff: noqa: E501

# Each defines answer(), whose right value, 40923, it does not compute. It is in the tests alone.
SECRET = 40923

FORGERIES = {
    "exit-0": "import os\nos._exit(0)\ndef answer(): pass",
    "exit-0-when-called": "import os\ndef answer(): os._exit(0)",
    "system-exit": "def answer(): raise SystemExit(0)",
    "equal-to-everything": "class E(int):\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n"
    "    __hash__ = int.__hash__\ndef answer(): return E(1)",
    "equal-object": "class E:\n    def __eq__(s, o): return True\ndef answer(): return E()",
    "str-subclass": "class E(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef answer(): return E('x')",
    "list-subclass": "class E(list):\n    def __eq__(s, o): return True\ndef answer(): return E([1])",
    "float-subclass": "class E(float):\n    def __eq__(s, o): return True\n    __sub__ = __rsub__ = lambda s, o: 0.0\n"
    "    __hash__ = float.__hash__\ndef answer(): return E(1)",
    "nan": "def answer(): return float('nan')",
    "bool": "def answer(): return True",
    "frames": "import sys\ndef answer():\n    frame = sys._getframe()\n    while frame:\n        for value in "
    "[*frame.f_locals.values(), *frame.f_globals.values()]:\n            if value == 40923.0: return value\n"
    "        frame = frame.f_back",
    "garbage-collector": "import gc, re\ndef answer():\n    for o in gc.get_objects():\n        for t in (o.values() if "
    "isinstance(o, dict) else o if isinstance(o, (list, tuple)) else ()):\n            if isinstance(t, str) and 'check' in t "
    "and 'assert' in t:\n                found = re.search(r'\\d{5}', t)\n                if found: return int(found[0])",
    "builtins": "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.eval = builtins.exec = lambda *a: None\n"
    "def answer(): return 1",
    "json-patched": "import json\njson.dumps = lambda *a, **k: '[true, [\"int\", \"0x9fdb\"]]'.replace('9fdb', '0')\n"
    "def answer(): return 1",
    "wire-patched": "import sys\nfor m in list(sys.modules.values()):\n    for n in ('encode', 'send'):\n        if hasattr(m, n) "
    "and 'wire' in getattr(m, '__name__', ''): setattr(m, n, lambda *a: ['int', '0x1'])\ndef answer(): return 1",
    "raw-answers": "import os\nfor d in range(3, 20):\n    try: os.write(d, b'[true, true]\\n' * 50)\n    except OSError: pass\n"
    "def answer(): return 1",
    "raw-ready": "import os\nfor d in range(3, 20):\n    try: os.write(d, b'\"passed\"\\n')\n    except OSError: pass\n"
    "def answer(): return 1",
    "deep-answer": "import os\nfor d in range(3, 20):\n    try: os.write(d, b'[' * 100000 + b'\\n')\n    except OSError: pass\n"
    "def answer(): return 1",
    "endless-answer": "import os\nwhile True:\n    for d in range(3, 8):\n        try: os.write(d, b'x' * 65536)\n"
    "        except OSError: pass\ndef answer(): return 1",
    "ctypes-write": "import ctypes\nlibc = ctypes.CDLL(None)\nfor d in range(20):\n    libc.write(d, b'true\\n', 5)\n"
    "def answer(): return 1",
    "ctypes-exit": "import ctypes\ndef answer(): ctypes.CDLL(None)._exit(0)",
    "kill-the-judge": "import os\ndef answer(): os.kill(os.getppid(), 9)",
    "trace-the-judge": "import ctypes, os\ndef answer():\n    libc = ctypes.CDLL(None, use_errno=True)\n"
    "    return libc.ptrace(16, os.getppid(), 0, 0)",
    "write-into-the-judge": "import ctypes, os\ndef answer():\n    libc = ctypes.CDLL(None)\n    b = ctypes.create_string_buffer(8)\n"
    "    return libc.process_vm_readv(os.getppid(), b, 1, b, 1, 0)",
    "prints": "print('passed', flush=True)\ndef answer(): print(40922 + 1)",
    "generator": "def answer():\n    yield 1",
    "no-function": "result = 1",
    "not-a-function": "answer = 40924",
    "import-hook": "import sys\nsys.modules['wire'] = sys.modules['__main__']\ndef answer(): return 1",
    "other-open-calls": "import ctypes\nlibc = ctypes.CDLL(None)\ndef answer():\n    for n in (2, 257, 303, 304, 425, 428, 437, 0x40000002):\n"
    "        if libc.syscall(n, b'/etc/passwd', b'/etc/passwd', 0, 24) >= 0: return 40923\n    return 1",
    "machine-code-exit": "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b83c00000031ff0f05'))\n"
    "f = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\ndef answer(): f()",
    "filter-taken-off": "import ctypes\nlibc = ctypes.CDLL(None)\ndef answer():\n    undone = libc.prctl(22, 0, 0, 0, 0) == 0 or "
    "libc.prctl(1, 0, 0, 0, 0) == 0\n    return 40923 if undone else 1",
    "main-on-import": "import unittest.__main__\nimport numpy.f2py.__main__\ndef answer(): return 1",
    "send-replaced": "import gc, types\ndef answer():\n    for o in gc.get_objects():\n        if isinstance(o, types.FunctionType) "
    "and o.__name__ == 'send': o.__code__ = (lambda d, m: None).__code__\n    return 1",
    "answers-before-loaded": "import os\nfor d in range(3, 20):\n    try: os.write(d, b'[true, \"loaded\"]\\n[true, true]\\n')\n"
    "    except OSError: pass\ndef answer(): return True",
    "wire-scalars": "import sys\nfor m in list(sys.modules.values()):\n    if hasattr(m, '_SCALARS'): m._SCALARS['int'] = lambda t: 1\n"
    "    if hasattr(m, 'MAX_BYTES'): m.MAX_BYTES = 1 << 60\ndef answer(): return b'x' * (1 << 24)",
    "classes-lie": "import builtins\nclass M(type):\n    def __instancecheck__(c, o): return True\nclass A(metaclass=M): pass\n"
    "builtins.int = A\nbuiltins.isinstance = lambda o, t: True\ndef answer(): return object()",
    "dict-with-items": "class D(dict):\n    def items(s): return [(1, 40924)]\ndef answer(): return D()",
    "endless-list": "class L(list):\n    def __iter__(s):\n        while True: yield 1\ndef answer(): return L([1])",
    "machine-code-of-32-bits": "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
    "m.write(bytes.fromhex('b801000000bb00000000cd80c3'))\n"
    "f = ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\ndef answer(): f()",
    "descriptors-closed": "import os\ndef answer(): os.closerange(0, 64)",
    "fraction-subclass": "from fractions import Fraction\nclass F(Fraction):\n    def __eq__(s, o): return True\n"
    "    __hash__ = Fraction.__hash__\ndef answer(): return F(1, 2)",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef answer(): raise ValueError",
}

# Expressions that read or change what is not the program's; each has to raise.
READINGS = [
    "open('/etc/passwd').read()",
    "open('/etc/hostname', 'rb').read()",
    "open('/proc/self/environ').read()",
    "open(f'/proc/{os.getppid()}/environ').read()",
    "open('/proc/1/environ').read()",
    "open(f'/proc/{os.getppid()}/cmdline').read()",
    "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "open('/proc/self/maps').read()",
    "open(os.__file__).read()",
    "open({path!r}).read()",
    "os.listdir('/')",
    "list(os.scandir('/tmp'))",
    "os.stat('/etc/passwd')",
    "os.lstat({path!r})",
    "os.readlink('/proc/self/exe')",
    "os.getcwd()",
    "os.open('/', os.O_RDONLY | os.O_DIRECTORY)",
    "os.access({path!r}, os.R_OK) or 1 / 0",
    "pathlib.Path({path!r}).read_text()",
    "mmap.mmap(os.open({path!r}, os.O_RDONLY), 4, prot=mmap.PROT_READ)[:]",
    "open({path!r}, 'w').write('changed')",
    "open({path!r}, 'a').write('changed')",
    "os.remove({path!r})",
    "os.truncate({path!r}, 0)",
    "os.rename({path!r}, {path!r} + '2')",
    "os.chmod({path!r}, 0)",
    "os.symlink({path!r}, {path!r} + '2')",
    "os.mkdir({path!r} + '2')",
    "os.mknod({path!r} + '2')",
    "os.link({path!r}, {path!r} + '2')",
    "os.fork()",
    "os.execv('/bin/true', ['true'])",
    "os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess.run(['true'])",
    "threading.Thread(target=print).start()",
    "os.kill(os.getppid(), 0)",
    "os.killpg(0, 9)",
    "os.setuid(0)",
    "os.chroot('/')",
    "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "socket.socket()",
    "socket.create_connection(('127.0.0.1', {port}), 1)",
    "os.memfd_create('x')",
    "os.pidfd_open(os.getppid())",
    "os.nice(-5)",
    "os.sched_setaffinity(0, [0])",
    "os.setsid()",
    "os.pipe()",
    "os.dup(0)",
    "__import__('this' + 'module')",
    "os.uname()",
    "socket.gethostname()",
    "socket.getaddrinfo('localhost', 80)",
    "os.sched_getaffinity(os.getppid())",
    "os.getpriority(os.PRIO_PROCESS, os.getppid())",
    "resource.prlimit(os.getppid(), resource.RLIMIT_AS)",
    "os.sendfile(1, 0, 0, 10)",
    "__import__('linecache').getlines('/etc/passwd')[0]",
    "__import__('inspect').getsource(os)",
    "__import__('pkgutil').get_data('json', '__init__.py')",
]
