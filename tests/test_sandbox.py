"Programs that want out of the jail, and programs that want to pass without an answer. Each has a number, and a verdict that is expected"
import json, os, re, secrets, shutil, signal, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from nanochat import jail, sandbox
from nanochat.common import UserError
from nanochat.sandbox import JailError, Limits, Outcome, canary, check, judge, level, python_tool, read_literal, run
from nanochat.tools import ToolError, run_tool

MACHINE = os.uname().machine
HERE = level()                                                         # what this machine can do: higher expectations are skipped
L2 = ('limits', 'landlock', 'seccomp')
needs = lambda n: pytest.mark.skipif(HERE.number < n, reason=f'needs level {n}; this machine reaches {HERE.number}: {HERE.why}')
QUICK = Limits(seconds=.6)

# --- attacks: id → (program, verdicts that are right, the level that stops it). Each is harmless where it succeeds.

RAW = f"""
import ctypes, os, signal, sys
N = {jail.syscalls(MACHINE, jail._DENIED + jail._WITH_CARE) if MACHINE in jail.MACHINES else {}!r}
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *args):
    number = N[name] if isinstance(name, str) else name
    r = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if r < 0: e = ctypes.get_errno(); raise OSError(e, os.strerror(e))
    return r
def child(pid):
    if pid == 0: os._exit(0)
"""
SOCKET = 'import socket\n'
ATTACKS = {
    # the clock
    '01-loop': ('while True: pass', 'timeout', 1),
    '02-power-tower': ('x = 9\nx**x**x', 'timeout', 1),
    '03-regex': ("import re; re.match('(a+)+$', 'a'*40 + 'b')", 'timeout', 1),
    '04-digits': ('import sys; sys.set_int_max_str_digits(0)\nstr(10**10**7)', 'timeout', 1),
    '05-sleep': ('import time; time.sleep(99)', 'timeout', 1),
    '06-ignore-signals': ('import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass', 'timeout', 1),
    # memory
    '07-bytearray': ('bytearray(4 << 30)', 'memory', 1),
    '08-string': ("'a' * 10**10", 'memory', 1),
    '09-creep': ('kept = []\nwhile True: kept.append(bytearray(1 << 20))', 'memory', 1),
    '31-zlib-bomb': ('import zlib\nc = zlib.compressobj(1)\nb = b"".join(c.compress(bytes(1 << 20)) for _ in range(700)) + c.flush()\n'
                     'zlib.decompress(b)', 'memory timeout', 1),
    # the interpreter
    '10-recursion': ('import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()', 'crashed timeout memory', 1),
    '10b-recursion-in-c': ('import sys; sys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)', 'crashed timeout memory error', 1),
    '11-parentheses': ('(' * 100_000 + ')' * 100_000, 'crashed error memory', 1),
    '11b-nested-in-eval': ("eval('('*100_000)", 'crashed error memory', 1),
    '12-segfault': ('import ctypes; ctypes.string_at(0)', 'crashed', 1),
    # processes and programs
    '13-thread-bomb': ('import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()', 'forbidden memory', 1),
    '13b-small-stacks': ('import threading, time\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()',
                         'forbidden memory timeout', 1),
    '14-fork': (RAW + 'child(os.fork())', 'forbidden', 2),
    '15-posix-fork': (RAW + 'import posix; child(posix.fork())', 'forbidden', 2),
    '16-reload-fork': (RAW + 'import importlib\ndel os.fork\nchild(importlib.reload(os).fork())', 'forbidden', 2),
    '17-raw-clone': (RAW + "child(raw('clone', 17, 0, 0, 0, 0))", 'forbidden', 2),
    '17b-raw-clone3': (RAW + "raw('clone3', (ctypes.c_uint64 * 8)(0, 0, 0, 0, 17), 64)", 'error', 2),
    '18-multiprocessing': ('import multiprocessing as m\nm.get_context("fork").Process(target=print).start()', 'forbidden', 2),
    '19-subprocess': ("import subprocess; subprocess.run(['true'])", 'forbidden', 2),
    '20-system': ("import os\nif os.system('true') != 0: raise PermissionError", 'forbidden', 2),
    '21-posix-spawn': ("import os; os.posix_spawn('/bin/true', ['true'], {})", 'forbidden', 2),
    '22-execv': ("import os; os.execv('/bin/true', ['true'])", 'forbidden', 2),
    '23-fork-exec': ("import subprocess; subprocess.Popen(['true'], preexec_fn=lambda: None)", 'forbidden', 2),
    '24-ctypes-execve': (RAW + "raw('execve', ctypes.c_char_p(b'/bin/true'), None, None)", 'forbidden', 2),
    '24b-execveat-memfd': (RAW + "raw('memfd_create', ctypes.c_char_p(b'x'), 0)", 'forbidden', 2),
    '25-daemon': (RAW + 'if os.fork() == 0: os.setsid(); os._exit(0)', 'forbidden', 2),
    '25b-setsid': ('import os; os.setsid()', 'forbidden', 2),
    '25c-clear-pdeathsig': (RAW + "raw('prctl', 1, 0, 0, 0, 0)", 'forbidden', 2),
    '51-setuid-file': ("import os; open('x', 'w').close(); os.chmod('x', 0o4755); os.execv('./x', ['x'])", 'forbidden', 2),
    '51b-exec-own-file': ("import os; f = os.open('x', os.O_CREAT | os.O_WRONLY, 0o755); os.write(f, b'#!/bin/true'); os.close(f); os.execv('./x', ['x'])", 'forbidden', 2),
    '53-subclasses': ("import subprocess\n[c for c in object.__subclasses__() if c.__name__ == 'Popen'][0](['true'])", 'forbidden', 2),
    # files
    '32-passwd': ("open('/etc/passwd').read()", 'forbidden', 2),
    '32b-secret': ("open('SECRET/key').read()", 'forbidden', 2),
    '33-dots': ("open('../' * 20 + 'etc/passwd').read()", 'forbidden', 2),
    '34-symlink': ("import os; os.symlink('/etc/passwd', 'x'); open('x').read()", 'forbidden', 2),
    '35-hard-link': ("import os; os.link('SECRET/key', 'x'); open('x').read()", 'forbidden', 2),
    '36-write-outside': ("open('SECRET/new', 'w')", 'forbidden', 2),
    '36b-append-outside': ("open('SECRET/key', 'a').write('x')", 'forbidden', 2),
    '36c-standard-library': ("import os; open(os.path.dirname(os.__file__) + '/nanochat_was_here.py', 'w')", 'forbidden', 2),
    '36d-truncate': ("import os; os.truncate('SECRET/key', 0)", 'forbidden', 2),
    '36e-open-truncate': ("import os; os.open('SECRET/key', os.O_RDONLY | os.O_TRUNC)", 'forbidden', 2),
    '36f-rename': ("import os; os.rename('SECRET/key', 'SECRET/new')", 'forbidden', 2),
    '37-delete': ("import os; os.remove('SECRET/key')", 'forbidden', 2),
    '37b-delete-folder': ("import os; os.rmdir('SECRET/empty')", 'forbidden', 2),
    '38-list-temp': ("import os; os.listdir('SECRET/..')", 'forbidden', 2),
    '38b-list-root': ("import os; os.listdir('/')", 'forbidden', 2),
    '40-environ-of-parent': ("open('/proc/PARENT/environ').read()", 'forbidden error', 2),
    '41-proc-mem': ("open('/proc/self/mem', 'rb')", 'forbidden', 2),
    '55-chmod': ("import os; os.chmod('SECRET/key', 0o777)", 'forbidden', 2),
    '56-utime': ("import os; os.utime('SECRET/key', (0, 0))", 'forbidden', 2),
    '56b-xattr': ("import os; os.setxattr('SECRET/key', 'user.x', b'1')", 'forbidden', 2),
    '56c-chown': ("import os; os.chown('SECRET/key', os.getuid(), os.getgid())", 'forbidden', 2),
    # the kernel
    '42-ptrace': (RAW + "raw('ptrace', 16, PARENT, 0, 0)", 'forbidden', 2),
    '42b-process-vm-readv': (RAW + "raw('process_vm_readv', PARENT, 0, 0, 0, 0, 0)", 'forbidden', 2),
    **{f'50-{name}': (RAW + f"raw('{name}', 0, 0, 0, 0, 0)", 'forbidden', 2) for name in
       ('unshare', 'mount', 'io_uring_setup', 'bpf', 'keyctl', 'setns', 'perf_event_open', 'userfaultfd', 'add_key', 'pidfd_open', 'chroot')},
    '50b-unknown-call': (RAW + 'raw(jail_newest + 1, 0)'.replace('jail_newest', str(jail.NEWEST)), 'error', 2),
    '50c-x32-call': (RAW + 'raw(0x40000000 + 39)', 'error', 2),
    '57-int-0x80': (RAW + "import mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))        # mov eax, 20; int 0x80\n"
                    'ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()', 'forbidden crashed', 2),
    '52-posix-shm': ('from multiprocessing import shared_memory as s\ns.SharedMemory(create=True, size=9)', 'forbidden', 2),
    '52b-sysv-shm': (RAW + "raw('shmget', 0, 4096, 0o1600)", 'forbidden', 2),
    '52c-sysv-by-number': (RAW + "raw('msgctl', 2**31 - 1, 2, 0)", 'forbidden', 2),        # no queue has that number
    '48-kill-parent': ('import os; os.kill(PARENT, 0)', 'forbidden', 2),
    '48b-kill-all': ('import os; os.kill(-1, 0)', 'forbidden', 2),
    '48c-ctypes-kill': (RAW + "raw('kill', PARENT, 0)", 'forbidden', 2),
    '48d-limits-of-parent': (RAW + 'import resource; resource.prlimit(PARENT, resource.RLIMIT_CORE, (0, 0))', 'forbidden error', 2),
    '48e-slow-down-parent': ('import os; os.setpriority(os.PRIO_PROCESS, PARENT, 19)', 'forbidden', 2),
    '48f-signal-by-pipe': ("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, PARENT)", 'forbidden', 2),
    '48g-which-signal': ("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, 10, 9)        # F_SETSIG, SIGKILL", 'forbidden', 2),
    # the network
    '43-tcp': (SOCKET + "socket.create_connection(('127.0.0.1', PORT), timeout=.3)", 'forbidden', 2),
    '44-udp': (SOCKET + "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))", 'forbidden', 2),
    '45-dns': (SOCKET + "socket.getaddrinfo('example.com', 80)", 'forbidden', 2),
    '46-abstract-unix': (SOCKET + "socket.socket(socket.AF_UNIX).bind('\\0nanochat-test')", 'forbidden', 2),
    '47-listen': (SOCKET + "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()", 'forbidden', 2),
    '47b-socketpair': (SOCKET + 'socket.socketpair()', 'forbidden', 2),
    # output
    '26-stdout-flood': ("while True: print('x' * 1000)", 'output_limit', 1),
    '27-stderr-flood': ("import sys\nwhile True: sys.stderr.write('x' * 1000)", 'output_limit', 1),
    # contained: nothing is forbidden, and nothing is gained
    '28-descriptors': ("import os\nwhile True: os.open('/dev/null', 0)", 'error', 1),
    '29-huge-file': ("f = open('x', 'wb')\nfor _ in range(100): f.write(bytes(1 << 20))", 'error', 1),
    '30-small-files': ("for i in range(10**9): open(f'{i}', 'w').write('x')", 'error', 3),
    '30b-many-megabytes': ("for i in range(10**9): open(f'{i}', 'wb').write(bytes(8 << 20))", 'error', 3),
    '49-raise-limits': ("import sys, resource\ndel sys.modules['resource']\nimport resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", 'error', 1),
    '54-stdin': ('input()', 'error', 1),
    '58-close-everything': ('import os; os.closerange(0, 100)', 'crashed', 1),
    '59-deep-folders': ("import os\nfor _ in range(600): os.mkdir('d'); os.chdir('d')", 'done error', 1),
    '60-folder-without-reading': ("import os; os.mkdir('d', 0o300); open('d/x', 'w').close()", 'done', 1),
    '61-odd-names': ("for n in ('-rf', ' ', '\\n', '*', '\\udcff'): open(n, 'w').close()", 'done', 1),
}

@pytest.fixture
def world(tmp_path, monkeypatch):
    "What an attack reaches for, and a place for temporary folders that must be empty again at the end"
    import socket
    secret, temp = tmp_path/'secret', tmp_path/'temp'
    (secret/'empty').mkdir(parents=True); temp.mkdir(); (secret/'key').write_text('hunter2')
    monkeypatch.setattr(tempfile, 'tempdir', str(temp))
    monkeypatch.setenv('NANOCHAT_SECRET', 'hunter2')
    state = lambda: [(p.name, p.stat().st_mode, p.stat().st_mtime, p.stat().st_uid, p.read_text() if p.is_file() else '') for p in sorted(secret.iterdir())]
    before, listener = state(), socket.create_server(('127.0.0.1', 0))
    port = listener.getsockname()[1]
    yield lambda code: code.replace('SECRET', str(secret)).replace('PARENT', str(os.getpid())).replace('PORT', str(port))
    listener.close()
    assert state() == before and not list(temp.iterdir())
    assert not survivors(tmp_path)

def survivors(mark):
    "Processes whose command line names a folder of ours"
    found = []
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try: words = p.read_bytes()
        except OSError: continue
        if b'nanochat_jail_' in words and str(mark).encode() in words: found.append(int(p.parent.name))
    return found

def stopped(world, name, layers):
    code, right, _ = ATTACKS[name]
    limits = QUICK if 'timeout' in right else Limits(seconds=30)
    found = run(world(code), limits, layers=layers, accept_unsafe=HERE.number < 2)
    assert found.verdict in right.split(), found
    assert len(found.stdout) <= QUICK.output and len(found.stderr) <= QUICK.output and found.seconds < 30
    assert 'hunter2' not in found.stdout + found.stderr + found.detail

@pytest.mark.parametrize('name', ATTACKS)
def test_attack(world, name):
    least = ATTACKS[name][2]
    if HERE.number < least: pytest.skip(f'needs level {least}; this machine reaches {HERE.number}: {HERE.why}')
    if name == '57-int-0x80' and MACHINE != 'x86_64': pytest.skip('a trick of x86_64')
    stopped(world, name, HERE.layers)

@needs(3)
@pytest.mark.parametrize('name', [n for n, (_, _, least) in ATTACKS.items() if least == 2] + ['59-deep-folders', '60-folder-without-reading', '61-odd-names'])
def test_attack_without_namespaces(world, name):
    "Level 2: what Ubuntu, Docker and Colab often leave us. Clock, memory and output do not depend on it"
    if name == '57-int-0x80' and MACHINE != 'x86_64': pytest.skip('a trick of x86_64')
    stopped(world, name, L2)

def test_there_are_enough_of_them(): assert len(ATTACKS) >= 57 and len(VERDICT_ATTACKS) >= 17

def test_secrets_do_not_come_along(world):
    found = run('import os, sys\nprint(dict(os.environ), sys.argv, sys.orig_argv, sys.path, os.getcwd())', accept_unsafe=HERE.number < 2)
    assert found.verdict == 'done' and 'hunter2' not in found.stdout
    assert set(eval(found.stdout.split('}')[0] + '}')) <= {'LC_CTYPE'}

@needs(2)
def test_ordinary_uses_of_fcntl_pass(world):
    code = ("import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_NONBLOCK)\n"
            "fcntl.fcntl(r, fcntl.F_SETFD, fcntl.FD_CLOEXEC); fcntl.fcntl(r, fcntl.F_GETOWN)\n"
            "print(fcntl.fcntl(r, fcntl.F_DUPFD_CLOEXEC, 20))\nwith open('x', 'w') as f: fcntl.lockf(f, fcntl.LOCK_EX)")
    for layers in {HERE.layers, L2}: assert run(code, layers=layers)[:3] == ('done', '', '20\n')

@needs(3)
def test_threads_are_counted_only_where_no_others_are(world):
    "Without namespaces the kernel counts all threads of this user, and a program that makes one would fail for the reader's own"
    import resource
    code, ours = 'import resource; print(resource.getrlimit(resource.RLIMIT_NPROC))', resource.getrlimit(resource.RLIMIT_NPROC)
    assert run(code, Limits(threads=9), HERE.layers).stdout == '(9, 9)\n' and run(code, Limits(threads=9), L2).stdout == f'{ours}\n'

def test_open_descriptors_do_not_come_along(world):
    "The child has its three streams, two pipes, and nothing of ours"
    with open(os.devnull) as f:
        os.set_inheritable(f.fileno(), True)
        code = 'import os\ndef there(n):\n    try: os.fstat(n); return True\n    except OSError: return False\nprint(sum(map(there, range(1000))))'
        assert run(code, accept_unsafe=HERE.number < 2).stdout == '5\n'

# --- each layer, switched off: what comes back

OFF = {                                                                # layer → an attack that is harmless, and succeeds without it
    'limits': ('kept = bytearray(700 << 20); print("back")', 1),
    'seccomp': (RAW + 'child(os.fork()); print("back")', 2),
    'landlock': ("print(open('SECRET/key').read().replace('hunter2', 'back'))", 2),
    'namespaces': ("import os\nfor i in range(2000): open(f'{i}', 'w').close()\nprint('back')", 3)}

@pytest.mark.parametrize('layer', OFF)
def test_an_attack_returns_with_its_layer_off(world, layer):
    code, least = OFF[layer]
    if HERE.number < least: pytest.skip(f'needs level {least}; this machine reaches {HERE.number}: {HERE.why}')
    on = run(world(code), layers=HERE.layers, accept_unsafe=HERE.number < 2)
    off = run(world(code), layers=tuple(n for n in HERE.layers if n != layer), accept_unsafe=True)
    assert 'back' not in on.stdout and off.stdout == 'back\n', (on, off)

HOLE = RAW + """
os.setsid()
libc.prctl(1, 0, 0, 0, 0)                                              # forget to die with the parent
print('ready', flush=True)
import time; time.sleep(120)
"""
DAEMON = RAW + """
import time
if os.fork() == 0: os.setsid(); libc.prctl(1, 0, 0, 0, 0); print('ready', flush=True)
time.sleep(120)
"""

@needs(3)
@pytest.mark.parametrize('code', [HOLE, DAEMON], ids=['25b-init-leaves-its-group', '25-daemon'])
def test_the_hole(world, tmp_path, code):
    "Without seccomp a program can leave its process group and forget its parent. It dies all the same: process 1 is killed by its descriptor"
    start = time.monotonic()
    found = run(code, Limits(seconds=3), layers=('limits', 'namespaces', 'landlock'), accept_unsafe=True)
    assert found.verdict == 'timeout' and 'ready' in found.stdout and not survivors(tmp_path)
    assert time.monotonic() - start < 100                              # not the 120 s that it would have slept

@needs(3)
def test_killing_the_group_alone_would_leave_the_hole_open(world, tmp_path):
    "The test above can fail: without the descriptor the program survives"
    with sandbox._Jail(Limits(seconds=3), ('limits', 'namespaces', 'landlock')) as jailed:
        os.close(jailed.pidfd); jailed.pidfd = None
        found = jailed.outcome(lambda: jailed.ask('run', HOLE))
    left = survivors(tmp_path)
    for pid in left: os.kill(pid, signal.SIGKILL)
    assert left and found.verdict == 'timeout'
    until = time.monotonic() + 60
    while survivors(tmp_path) and time.monotonic() < until: time.sleep(.02)

# --- many at once, root and nobody, the parent's death

def test_two_hundred_at_once_leave_nothing_behind(world, tmp_path, monkeypatch):
    import gc, resource
    monkeypatch.setattr(sandbox, '_PATIENCE', 300.)
    gc.collect()                                                        # what earlier tests left open does not count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard > 0 else 4096, hard))
    programs = [('print(6*7)', 'done'), ("open('x', 'w').write('left')", 'done'), ('1/0', 'error'), ('import os; os._exit(0)', 'crashed')]
    if HERE.number >= 2: programs.append(('import os; os.fork()', 'forbidden'))
    fds, threads, start = len(os.listdir('/proc/self/fd')) if sys.platform == 'linux' else 0, threading.active_count(), threading.Barrier(200)
    def one(n):
        start.wait(300)
        code, right = programs[n % len(programs)]
        found = run(code, Limits(seconds=60), accept_unsafe=HERE.number < 2)
        return found.verdict == right and (right != 'done' or n % len(programs) or found.stdout == '42\n')
    try:
        with ThreadPoolExecutor(200) as pool: assert all(pool.map(one, range(200)))
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert threading.active_count() <= threads
    if sys.platform == 'linux': assert len(os.listdir('/proc/self/fd')) <= fds and not survivors(tmp_path)

def readable_python():
    "A Python that everybody may run, or None"
    for path in (sys.executable, '/usr/bin/python3', '/usr/local/bin/python3'):
        ask = [path, '-I', '-S', '-c', 'import ctypes, os, sys; print(sys.version_info >= (3, 10))']
        try: r = subprocess.run(ask, capture_output=True, text=True, user=65534, group=65534, extra_groups=[], cwd='/', timeout=120)
        except (OSError, subprocess.SubprocessError): continue
        if r.stdout == 'True\n': return path

@needs(2)
@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() != 0, reason='only root can become nobody; the other tests have run as this user')
def test_nobody_is_held_as_well():
    "The tests above ran as root. Here a child of this process becomes nobody, and runs some of them with limits that root escapes"
    python = readable_python()
    if not python or subprocess.run(['test', '-r', jail.__file__], user=65534, group=65534, extra_groups=[]).returncode:
        pytest.skip('nobody may not read the Python or the package of this machine')
    names = ['01-loop', '07-bytearray', '12-segfault', '13-thread-bomb', '14-fork', '26-stdout-flood', '32-passwd', '43-tcp', '48-kill-parent', '55-chmod',
             '59-deep-folders', '60-folder-without-reading']
    own = tempfile.mkdtemp(prefix='nanochat_nobody_')                  # pytest's own folders are closed to others
    os.chown(own, 65534, 65534)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
            sys.executable, tempfile.tempdir, out = python, str(own), {}
            for layers in {HERE.layers, L2}:
                for n in names:
                    limits = QUICK if 'timeout' in ATTACKS[n][1] else Limits(seconds=30)
                    out[f'{n} {len(layers)}'] = run(ATTACKS[n][0].replace('PARENT', str(os.getpid())).replace('PORT', '1'), limits, layers=layers).verdict
            out['left'] = os.listdir(own)
        except BaseException as e: out = dict(failed=repr(e))
        os.write(writer, json.dumps(out).encode()); os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as f: out = json.loads(f.read())
    os.waitpid(child, 0)
    shutil.rmtree(own)
    assert out.pop('left', None) == [], out
    for key, verdict in out.items(): assert verdict in ATTACKS[key.split()[0]][1].split(), (key, verdict)
    assert len(out) >= len(names) and not survivors(own)

@needs(2)
def test_a_jail_dies_with_its_parent(tmp_path):
    "A notebook's kernel is killed in the middle of a run"
    script = ("import os, sys, tempfile, threading; tempfile.tempdir = sys.argv[1]\nfrom nanochat import sandbox\n"
              "with sandbox._Jail(sandbox.Limits(seconds=60), sandbox.level().layers) as j:\n    j.ask('load', 'def f(): import time; time.sleep(60)')\n"
              "    print('up', flush=True)\n    j.ask('call', 'f', ())")
    p = subprocess.Popen([sys.executable, '-c', script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=Path(jail.__file__).parent.parent)
    assert p.stdout.readline() == 'up\n' and survivors(tmp_path)
    p.kill(); p.wait()
    until = time.monotonic() + 10
    while survivors(tmp_path) and time.monotonic() < until: time.sleep(.02)
    assert not survivors(tmp_path)

# --- verdicts

A, B = secrets.token_hex(16), secrets.token_hex(16)                    # nobody can know these
CASES = [((1,), A), ((2,), B)]
HUNT = """
import gc, os, re, sys
def texts():
    frame = sys._getframe()
    while frame:
        yield from map(repr, [frame.f_locals, frame.f_globals, frame.f_code.co_consts]); frame = frame.f_back
    yield from (repr(o) for o in gc.get_objects() if type(o) in (list, dict, tuple) and len(o) < 1000)
    yield from map(repr, [sys.argv, sys.orig_argv, dict(os.environ)])
"""
FORGE = """
import os
def tell(text):
    for fd in range(3, 64):
        try: os.write(fd, text)
        except OSError: pass
"""
LIAR = "class Liar(BASE):\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n" \
       "    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__\n    def __len__(self): return 2\n    __hash__ = BASE.__hash__\ndef f(x): return Liar()"
VERDICT_ATTACKS = {                                                    # id → (program, verdicts that are right)
    'V01-exit': ('import sys; sys.exit(0)', 'error'),
    'V02-hard-exit': ('import os; os._exit(0)', 'crashed'),
    'V02b-hard-exit-in-f': ('import os\ndef f(x): os._exit(0)', 'crashed'),
    'V03-system-exit': ('def f(x): raise SystemExit(0)', 'error'),
    'V04-atexit': ('import atexit, os; atexit.register(lambda: os._exit(0))\ndef f(x): return 0', 'fail'),
    'V05-excepthook': ('import sys; sys.excepthook = lambda *a: None\ndef f(x): 1/0', 'error'),
    **{f'V06-equal-{base}': (LIAR.replace('BASE', base), 'error fail') for base in ('object', 'str', 'int', 'float', 'list', 'dict')},
    'V06b-repr': ('class X:\n    def __repr__(self): return "__import__(\'os\')._exit(0)"\ndef f(x): return X()', 'error'),
    'V06c-equal-in-a-list': (LIAR.replace('BASE', 'str').replace('return Liar()', 'return [Liar()]'), 'error fail'),
    'V07-frames-and-objects': (HUNT + 'def f(x):\n    return next((m for t in texts() for m in re.findall("[0-9a-f]{32}", t)), None)', 'fail'),
    'V07b-locals-of-the-caller': ('import sys\ndef f(x):\n    g = sys._getframe(1)\n    g.f_globals.update(answer=lambda *a: "pass"); g.f_locals.update(kind="pass", reply="pass")', 'fail error'),
    'V08-collect': ('import gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict): o.update(want=x, got=x) if "want" in o else 0\n    return x', 'fail'),
    'V09-settrace': ('import sys\nsys.settrace(lambda *a: None); sys.setprofile(lambda *a: None)\ndef f(x): return None', 'fail'),
    'V10-redefine': ('def check(candidate): pass\ndef judge(*a): return "pass"\n__debug__2 = False\ndef f(x): return None', 'fail'),
    'V11-patch-builtins': ('import builtins, math\nfor n in ("abs", "isinstance", "sorted", "len", "repr", "ascii", "eval", "str", "type"): setattr(builtins, n, lambda *a: 0)\n'
                           'math.isclose = lambda *a, **k: True\ndef f(x): return None', 'fail error crashed'),
    'V11b-patch-eq': ('import ctypes, operator\noperator.eq = lambda a, b: True\ndef f(x): return None', 'fail'),
    'V12-files': ('for n in ("conftest", "sitecustomize", "usercustomize", "json", "ast"): open(n + ".py", "w").write("import os; os._exit(0)")\ndef f(x): return None', 'fail'),
    'V14-print-and-exit': ('print("pass\\nok\\n42 passed")\nimport sys; sys.stdout.flush()\nimport os; os._exit(0)', 'crashed'),
    'V14b-forge-done': (FORGE + 'tell(b"done\\npass\\npass\\n")\ndef f(x): return None', 'error fail'),
    'V14c-forge-value': (FORGE + 'tell(b"done\\nvalue None\\nvalue None\\n")\ndef f(x): return None', 'error fail'),
    'V14d-forge-failure': (FORGE + 'tell(b"failed the jail\\n")\nos._exit(0)', 'error'),
    'V14e-forge-ready': (FORGE + 'tell(b"ready 1\\nready 1\\n")', 'error'),
    'V14f-forge-a-long-line': (FORGE + 'while True: tell(b"x" * 65536)', 'error'),
    'V14g-forge-bytes': (FORGE + 'tell(bytes(range(256)) * 9 + b"\\n")', 'error'),
    'V15-first-only': (f'def f(x): return {A!r}', 'fail'),
    'V16-visible-only': (f'def f(x): return {{1: {A!r}}}[x]', 'error'),
    'V17-lazy': ('def f(x): return (i for i in range(9))', 'error'),
    'V17b-huge': ('def f(x): return "x" * 10**7', 'error'),
    'V17c-itself': ('def f(x):\n    y = []\n    y.append(y)\n    return y', 'error'),
    'V17d-nan': ('def f(x): return float("nan")', 'error'),
    'V17e-deep': ('def f(x):\n    y = 0\n    for _ in range(400): y = [y]\n    return y', 'error'),
    'V17f-function': ('def f(x): return f', 'error'),
    'V17g-repr-never-ends': ('class X:\n    def __repr__(self):\n        while True: pass\ndef f(x): return X()', 'timeout'),
    'V18-no-function': ('pass', 'error'),
    'V19-syntax': ('def f(x) return x', 'error'),
    'V20-surrogate': ('"\ud800"\ndef f(x): return "\\ud800"', 'error fail'),
    'V21-nul': ('\0', 'error'),
}

@pytest.mark.parametrize('name', VERDICT_ATTACKS)
def test_never_passes(world, name):
    code, right = VERDICT_ATTACKS[name]
    unsafe = dict(accept_unsafe=HERE.number < 2)
    limits = QUICK if 'timeout' in right else Limits(seconds=30)
    found = judge(code, 'f', CASES, limits, **unsafe)
    assert found.verdict in right.split(), found
    test = f'def check(candidate):\n    assert candidate(1) == {A!r}\n    assert candidate(2) == {B!r}\n'
    assert check(code, test, 'f', limits=limits, **unsafe).verdict == found.verdict
    assert canary(code, limits=limits, **unsafe).verdict != 'pass'

def test_what_one_run_leaves_the_next_does_not_find(world):
    "V13: a file, a module, a variable of the environment"
    unsafe = dict(accept_unsafe=HERE.number < 2)
    leave = 'import os; open("answer.py", "w").write("x = 1"); os.environ["ANSWER"] = "1"\ndef f(): return 1'
    look = 'import os\ndef f(): return [os.path.exists("answer.py"), "ANSWER" in os.environ]'
    assert judge(leave, 'f', [((), 1)], **unsafe).verdict == 'pass'
    assert judge(look, 'f', [((), [False, False])], **unsafe).verdict == 'pass'

RIGHT = {'add': ('def add(a, b): return a + b', 'add', [((1, 2), 3), (('a', 'b'), 'ab'), (([1], [2]), [1, 2]), ((1.5, 2), 3.5)]),
         'types': ('def f(x): return x', 'f', [((v,), v) for v in (None, True, -3, 2.5, 1e-300, 'é\n\'"\\', b'\x00\xff', [], (1,), {}, {'a': (1, 2)}, {1, 2}, set(), 10**50)]),
         'prints': ('print("noise")\ndef f(): print("more"); return 1', 'f', [((), 1)]),
         'dataclass': ('from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P: x: int\ndef f(x): return P(x).x', 'f', [((4,), 4)]),
         'state': ('n = 0\ndef f():\n    global n\n    n += 1\n    return n', 'f', [((), 1), ((), 2)]),
         'library': ('import math, re, json, collections, itertools, functools, datetime, decimal, hashlib, random, heapq, statistics\n'
                     'def f(x): return json.loads(json.dumps(collections.Counter(x)))', 'f', [(('aab',), {'a': 2, 'b': 1})]),
         'large': ('def f(x): return len(x)', 'f', [(('x' * 300_000,), 300_000)])}

@pytest.mark.parametrize('name', RIGHT)
def test_right_answers_pass(world, name):
    code, entry, cases = RIGHT[name]
    assert judge(code, entry, cases, accept_unsafe=HERE.number < 2).verdict == 'pass'

def test_a_test_of_the_humaneval_kind(world):
    unsafe = dict(accept_unsafe=HERE.number < 2)
    prompt = 'def double(x):\n    return 2 * x\n\ndef f(x):\n    """twice, and one more"""\n'
    test = 'def check(candidate):\n    for x in range(5): assert candidate(x) == double(x) + 1, "wrong"\n    assert abs(candidate(.1) - 1.2) < 1e-6\n'
    right = 'def f(x): return 2*x + 1'
    assert check(right, test, 'f', prompt, **unsafe)[:2] == ('pass', '6 calls')
    assert check('def f(x): return 2*x', test, 'f', prompt, **unsafe)[:2] == ('fail', 'call 1: wrong')
    assert check('def f(x): return None', test.replace('== double(x) + 1', '> 0'), 'f', prompt, **unsafe).verdict == 'error'
    raises = 'def check(candidate):\n    try: candidate(1)\n    except Exception: return\n    assert False'
    assert check('def f(x): raise ValueError', raises, 'f', **unsafe).verdict == 'pass'
    assert check('import os\ndef f(x): os._exit(0)', raises, 'f', **unsafe).verdict == 'crashed'      # an end is no exception
    assert check('def f(x):\n    while True: pass', raises, 'f', limits=QUICK, **unsafe).verdict == 'timeout'
    with pytest.raises(UserError, match='never calls'): check(right, 'def check(candidate): pass', 'f', **unsafe)
    with pytest.raises(UserError, match='cannot cross'): check(right, 'def check(candidate): candidate(object())', 'f', **unsafe)

def test_a_test_may_call_the_function_by_its_name(world):
    named = 'def check(candidate):\n    assert candidate(2) == 4 and f(3) == 6'
    assert check('def f(x): return 2 * x', named, 'f', 'def f(x):\n    """twice"""\n', accept_unsafe=HERE.number < 2)[:2] == ('pass', '2 calls')

@pytest.mark.slow
@pytest.mark.skipif('NANOCHAT_SHARED_DATA' not in os.environ, reason='NANOCHAT_SHARED_DATA names no folder with HumanEval')
def test_humaneval():
    "All 164 reference solutions pass; the prompt alone, an early exit and an object that is equal to everything never do"
    import gzip
    rows = gzip.decompress((Path(os.environ['NANOCHAT_SHARED_DATA'])/'humaneval/HumanEval.jsonl.gz').read_bytes()).decode().splitlines()
    tasks, equal = [json.loads(r) for r in rows], 'class Y:\n    def __eq__(self, other): return True\ndef {}(*a): return Y()'
    def verdicts(program):
        one = lambda t: check(program(t), t['test'], t['entry_point'], t['prompt'], Limits(seconds=60), accept_unsafe=HERE.number < 2).verdict
        with ThreadPoolExecutor(2) as pool: return list(pool.map(one, tasks))
    assert verdicts(lambda t: t['prompt'] + t['canonical_solution']) == ['pass'] * 164
    for cheat in (lambda t: t['prompt'] + '    pass', lambda t: 'import sys; sys.exit(0)', lambda t: equal.format(t['entry_point'])):
        assert 'pass' not in verdicts(cheat)

@pytest.mark.slow
def test_asserts_count_under_python_O(world):
    script = f"from nanochat.sandbox import check\nprint(check('def f(x): return 0', 'def check(c):\\n    assert c(1) == 5', 'f', accept_unsafe={HERE.number < 2})[0])"
    r = subprocess.run([sys.executable, '-O', '-c', script], capture_output=True, text=True, cwd=Path(jail.__file__).parent.parent)
    assert r.stdout == 'fail\n', r.stderr

def test_the_canary_dies_where_something_passes(world, monkeypatch):
    monkeypatch.setattr(secrets, 'token_hex', lambda n: 'known')
    with pytest.raises(JailError, match='nothing can pass'): canary('def f(): return "known"', accept_unsafe=HERE.number < 2)

WORDS = st.sampled_from(['done', 'value', 'raised', 'ready', 'failed', 'pass', '', 'value None', 'value True', 'raised X', "value 'x'"])

@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(WORDS, st.text(max_size=20)).map(' '.join) | st.text(), min_size=3, max_size=3))
def test_no_line_from_the_jail_passes_or_escapes(lines):
    "Whatever three lines a program writes into its pipe: a verdict, and never pass"
    jailed = sandbox._Jail(QUICK, ())
    jailed.begun, told = 0., iter(lines)
    jailed._line, jailed._drain = lambda request: next(told), lambda: None
    def work():
        jailed.ask('load', 'code')
        return 'pass' if all(jailed.ask('call', 'f', (n,)) == want for (n,), want in CASES) else 'fail', ''
    found = jailed.outcome(work)
    assert found.verdict in set(sandbox.VERDICTS) - {'pass'} and found.detail.isprintable() and len(found.detail) <= 300

# --- what comes out of the jail

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.binary(),
                     lambda kids: st.lists(kids) | st.tuples(kids, kids) | st.dictionaries(st.text(), kids) | st.tuples(kids), max_leaves=12)

@settings(max_examples=300, deadline=None)
@given(plain | st.sets(st.integers()))
def test_values_cross_unchanged(value):
    got = read_literal(ascii(value))
    assert got == value and type(got) is type(value)

@settings(max_examples=500, deadline=None)
@given(st.text() | st.text(alphabet='0123456789()[]{},:\'"-+. ebNoneTrusa\\x\n', max_size=60))
def test_any_text_is_a_plain_value_or_refused(text):
    try: value = read_literal(text)
    except ValueError: return
    def exact(v):
        assert type(v) in (type(None), bool, int, float, str, bytes, list, tuple, dict, set)
        for x in (list(v.items()) if type(v) is dict else v if type(v) in (list, tuple, set) else ()): exact(x)
    exact(value)

@pytest.mark.parametrize('text', ['f()', '1+1', '1-1', '-' * 60_000 + '1', '1' + '-1' * 30_000, '(' * 30_000 + ')' * 30_000, '[' * 51 + ']' * 51, '()()', '(1)(2)', '[1][0]',
    'x', '...', 'nan', 'inf', '1j', "f'{1}'", "'a' 'b'", '[x for x in y]', '{1: 2, **a}', '*a', '1 if 1 else 2', 'set([1])', 'True.x', "'a'.b", '', ' ', '1\n', '1;1',
    '[1, 2', '9' * 5000, '{[]: 1}', '{{}}', '\u0661', "'\\N{DASH}", "b'é'"], ids=lambda t: ascii(t)[:30])
def test_refused_literals(text):
    with pytest.raises(ValueError): read_literal(text)

# --- levels, refusals, failures

def test_a_weak_jail_is_refused(monkeypatch):
    with pytest.raises(UserError, match='accept_unsafe'): run('1', layers=('limits',))
    with pytest.raises(UserError, match='no layer'): run('1', layers=('wall',), accept_unsafe=True)
    monkeypatch.setattr(sandbox, 'level', lambda: sandbox.Level(1, ('limits',), 'no Landlock'))
    for start in (lambda: run('1'), lambda: judge('1', 'f', [((), 1)]), lambda: check('1', '', 'f'), python_tool):
        with pytest.raises(UserError, match='level 1 of 3 .no Landlock.*--i-accept-unsafe-code'): start()
    assert run('print(1)', accept_unsafe=True).stdout == '1\n'

@pytest.mark.parametrize('platform, number', [('win32', 0), ('darwin', 1)])
def test_other_systems_say_their_level(monkeypatch, platform, number):
    monkeypatch.setattr(sys, 'platform', platform)
    monkeypatch.setattr(sandbox, '_run', lambda code, limits, layers, kind='run': Outcome('done'))
    found = level.__wrapped__()
    assert found.number == number and found.layers == (('limits',) if number else ())
    monkeypatch.setattr(sandbox, 'level', lambda: found)
    with pytest.raises(UserError, match=f'level {number} of 3'): run('1')
    if number == 0:
        with pytest.raises(UserError): run('1', accept_unsafe=True)    # nothing there could be accepted

def test_the_ladder_goes_down_where_a_layer_fails(monkeypatch):
    real = sandbox._run
    def without(missing):
        def _run(code, limits, layers, kind='run'):
            if missing & set(layers): raise JailError(f'{sorted(missing)} is missing here')
            return Outcome('done')
        return _run
    for missing, number in (({'namespaces'}, 2), ({'landlock'}, 1), ({'seccomp'}, 1), ({'limits'}, 0)):
        monkeypatch.setattr(sandbox, '_run', without(missing))
        found = level.__wrapped__()
        assert found.number == number and 'is missing here' in found.why

def test_a_layer_that_stops_nothing_is_no_level(monkeypatch):
    monkeypatch.setattr(sandbox, '_run', lambda code, limits, layers, kind='run': Outcome('done', stdout='fork ' if 'seccomp' in layers else ''))
    assert level.__wrapped__().number == 1

@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
@pytest.mark.parametrize('break_it', ['jail', 'python', 'machine'])
def test_a_jail_that_cannot_be_built_is_no_verdict(world, monkeypatch, tmp_path, break_it):
    if break_it == 'jail': monkeypatch.setattr(jail, '__file__', str(tmp_path/'missing.py'))
    if break_it == 'python': monkeypatch.setattr(sys, 'executable', '/bin/false')
    if break_it == 'machine':
        (tmp_path/'jail.py').write_text(Path(jail.__file__).read_text().replace("'x86_64'", "'vax'").replace("'aarch64'", "'pdp11'"))
        monkeypatch.setattr(jail, '__file__', str(tmp_path/'jail.py'))
    with pytest.raises(JailError): run('1', layers=('seccomp', 'limits'), accept_unsafe=True)

def test_an_interrupt_leaves_nothing(world, tmp_path, monkeypatch):
    "Ctrl-C while the program runs"
    real, calls = sandbox._Jail._step, []
    def step(self, todo=b''):
        calls.append(1)
        if len(calls) > 3: raise KeyboardInterrupt
        return real(self, todo)
    monkeypatch.setattr(sandbox._Jail, '_step', step)
    with pytest.raises(KeyboardInterrupt): run('while True: print(1)', accept_unsafe=HERE.number < 2)

# --- the filter, by a machine that is not this one

def answer(code, machine, number, args=(), pid=1):
    "What a seccomp program says about a call: a little interpreter of its instructions"
    words = {0: number, 4: machine, **{16 + 8*i: a & 0xFFFFFFFF for i, a in enumerate(args)}, **{20 + 8*i: a >> 32 & 0xFFFFFFFF for i, a in enumerate(args)}}
    at = value = 0
    while True:
        op, true, false, k = code[at]
        at += 1
        if op == 0x20: value = words.get(k, 0)
        elif op == 0x54: value &= k
        elif op == 0x06: return k
        else: at += true if {0x15: value == k, 0x25: value > k, 0x45: bool(value & k)}[op] else false

@pytest.mark.parametrize('machine', jail.MACHINES)
def test_the_filter_decides_every_call(machine):
    code, audit = jail.filter_program(machine, 77), jail.MACHINES[machine]
    denied, careful = jail.syscalls(machine), jail.syscalls(machine, jail._WITH_CARE)
    say = lambda number, *args: answer(code, audit, number, args)
    assert len(code) < 4096 and all(max(true, false) < 256 for _, true, false, _ in code)
    assert all(say(n) == jail.DENY for n in denied.values()) and not set(denied.values()) & set(careful.values())
    for n in range(2000):
        if n in denied.values() or n in careful.values(): continue
        assert say(n) == (jail.ALLOW if n <= jail.NEWEST else jail.ABSENT)
    assert say(0x40000000) == jail.ABSENT and answer(code, 0x40000003, 1) == jail.KILL
    assert say(careful['clone'], 0x3D0F00) == jail.ALLOW and say(careful['clone'], 17) == say(careful['clone'], 0x10000000) == jail.DENY
    assert say(careful['kill'], 77, 9) == jail.ALLOW and all(say(careful['kill'], p, 0) == jail.DENY for p in (0, 1, 78, 2**32 - 1))
    assert say(careful['prlimit64'], 0, 9, 0) == jail.ALLOW and say(careful['prlimit64'], 0, 9, 1 << 32) == say(careful['prlimit64'], 0, 9, 5) == jail.DENY
    for name, i in (('open', 1), ('openat', 2)):
        if name not in careful: continue
        flags = lambda f: say(careful[name], *[0]*i, f)
        assert flags(0) == flags(0o1101) == flags(0o1002) == jail.ALLOW and flags(0o1000) == flags(3) == flags(0o1003) == jail.DENY
    assert say(careful['prctl'], 15) == jail.ALLOW and say(careful['prctl'], 1) == jail.DENY
    assert all(say(careful['fcntl'], 3, c) == (jail.DENY if c in (8, 10, 15) else jail.ALLOW) for c in (*range(20), *range(1024, 1040)))
    assert say(careful['clone3']) == say(careful['openat2']) == jail.ABSENT

HEADERS = {'x86_64': '/usr/include/x86_64-linux-gnu/asm/unistd_64.h', 'aarch64': '/usr/include/asm-generic/unistd.h'}

@pytest.mark.parametrize('machine', jail.MACHINES)
def test_the_numbers_are_those_of_the_kernel(machine):
    if not os.path.exists(HEADERS[machine]): pytest.skip('no kernel headers here')
    real = dict(re.findall(r'#define __NR(?:3264)?_(\w+)\s+(\d+)', Path(HEADERS[machine]).read_text()))
    ours = jail.syscalls(machine, jail._DENIED + jail._WITH_CARE)
    wrong = {n: (v, real[n]) for n, v in ours.items() if n in real and int(real[n]) != v}
    assert not wrong and len(ours.keys() & real.keys()) > 90
    gone = [n for n in jail.syscalls('x86_64') if n not in jail.syscalls('aarch64') and n in real]
    assert machine == 'x86_64' or not gone, 'calls that exist there, and that the table leaves out'

# --- the tool

def test_the_tool(world):
    python = python_tool(Limits(seconds=2), most=100, accept_unsafe=HERE.number < 2)
    assert python('2**10') == '1024' and python('x = 6\nprint("x is", x)\nx * 7') == 'x is 6\n42' and python('x = 1') == '' and python('') == ''
    assert python("'naïve 日本'") == "'naïve 日本'" and len(python('print("x" * 500)')) == 101
    assert python('1;2') == '2' and python('None') == '' and python('x = 5\nx  # a comment') == '5'
    for code, words in {'1/0': 'ZeroDivisionError: division by zero', '2 +': 'SyntaxError', 'import time; time.sleep(9)': 'timeout',
                        'bytearray(9 << 30)': 'memory', 'raise ValueError("a\\nb\\x1b[31m")': 'ValueError: a'}.items():
        with pytest.raises(ToolError) as e: python(code)
        assert str(e.value).startswith(words) and str(e.value).isprintable() and len(str(e.value)) <= 200
        assert run_tool(code, python) == f'error: {e.value}'
