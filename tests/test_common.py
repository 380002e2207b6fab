"common, across processes: real kills, a really full disk, real scripts"
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from nanochat import common
from nanochat.common import atomic_write, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''
from fastcore.script import call_parse
from nanochat.common import *
@call_parse
def main(
    what:str='ok', # what to do
):
    "A script like ours."
    with as_command():
        if what == 'user': raise UserError('no such file:\\n  a.txt')
        if what == 'bug': raise ValueError('a mistake of ours')
        if what == 'wait':
            import time
            print('waiting', flush=True); time.sleep(60)
        for _ in progress(range(1000), desc='steps'): pass
        return print_result(dict(loss=float('nan'), name='caf\\u00e9'))
'''

@pytest.fixture
def script(tmp_path):
    (tmp_path/'s.py').write_text(SCRIPT)
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'NANOCHAT_COMMAND': '1', 'NANOCHAT_BASE_DIR': str(tmp_path/'base'), 'LC_ALL': 'C'}
    def run(*args, **kw):
        return subprocess.Popen([sys.executable, tmp_path/'s.py', *args], env=env, text=True,
                                **{**dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE), **kw})
    return run

def test_a_script_prints_its_result_last(script, tmp_path):
    p = script()
    out, err = p.communicate()
    assert p.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == dict(loss=None, name='café')
    assert 'Traceback' not in err
    assert not (tmp_path/'base').exists()

def test_a_user_error_is_one_line_and_exit_code_1(script):
    p = script('--what', 'user')
    out, err = p.communicate()
    assert (p.returncode, out, err) == (1, '', 'error: no such file: a.txt\n')

def test_a_mistake_of_ours_keeps_its_traceback(script):
    p = script('--what', 'bug')
    _, err = p.communicate()
    assert p.returncode == 1 and 'Traceback' in err and 'ValueError: a mistake of ours' in err

def test_an_unknown_flag_is_refused(script):
    p = script('--waht', 'user')
    _, err = p.communicate()
    assert p.returncode == 2 and '--waht' in err and 'Traceback' not in err

@pytest.mark.skipif(os.name == 'nt', reason='signals')
def test_ctrl_c_is_exit_code_130(script):
    p = script('--what', 'wait')
    assert p.stdout.readline() == 'waiting\n'
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=120)
    assert (p.returncode, err) == (130, 'error: stopped from the keyboard\n')

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
def test_a_full_disk_is_one_line(script):
    with open('/dev/full', 'w') as full: p = script(stdout=full); _, err = p.communicate()
    assert p.returncode == 1 and err.startswith('error: a disk is full') and err.count('\n') == 1

@pytest.mark.skipif(os.name == 'nt', reason='pipes')
def test_a_closed_output_is_one_line(script):
    read, write = os.pipe()
    os.close(read)
    p = script(stdout=write)
    os.close(write)
    _, err = p.communicate()
    assert (p.returncode, err) == (1, 'error: nobody reads the output any more\n')

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='SIGKILL')
def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path/'result.json'
    code = f"from nanochat.common import write_json\nfor i in range(10**9): write_json({str(path)!r}, dict(i=i, x=[i]*20000))"
    write_json(path, dict(i=-1, x=[-1]*20000))
    p = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)})
    try:
        deadline = time.monotonic() + 300
        while read_json(path)['i'] < 20:                        # a reader beside the writer never sees half a file either
            assert p.poll() is None and time.monotonic() < deadline
    finally: p.kill(); p.wait()
    seen = read_json(path)
    assert seen['x'] == [seen['i']]*20000

def test_two_writers_of_one_file(tmp_path):
    path = tmp_path/'a.txt'
    code = "import sys\nfrom nanochat.common import atomic_write\nfor _ in range(50): atomic_write(sys.argv[1], sys.argv[2]*100_000)"
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    both = [subprocess.Popen([sys.executable, '-c', code, path, c], env=env) for c in 'ab']
    assert [p.wait() for p in both] == [0, 0]
    assert path.read_text() in ('a'*100_000, 'b'*100_000)
    assert os.listdir(tmp_path) == ['a.txt']

@pytest.mark.skipif(os.name == 'nt', reason='modes')
def test_a_written_file_has_ordinary_rights(tmp_path):
    old = os.umask(0o022)
    try: atomic_write(tmp_path/'a', 'x')
    finally: os.umask(old)
    assert (tmp_path/'a').stat().st_mode & 0o777 == 0o644

def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch):
    import nanochat
    git = lambda *a: subprocess.run(['git', '-C', tmp_path, '-c', 'user.name=x', '-c', 'user.email=x@example.com', *a], check=True, capture_output=True)
    (tmp_path/'nanochat').mkdir()
    (tmp_path/'nanochat'/'__init__.py').write_text('')
    monkeypatch.setattr(nanochat, '__file__', str(tmp_path/'nanochat'/'__init__.py'))
    assert common._git_commit() is None                                       # no repository
    git('init', '-q'); git('add', '.'); git('commit', '-qm', 'first')
    clean = common._git_commit()
    assert clean and len(clean) == 12
    (tmp_path/'nanochat'/'__init__.py').write_text('edited')
    assert common._git_commit() == clean + '-dirty'
    inner = tmp_path/'venv'/'nanochat'
    inner.mkdir(parents=True)
    (inner/'__init__.py').write_text('')
    monkeypatch.setattr(nanochat, '__file__', str(inner/'__init__.py'))       # installed inside somebody else's checkout
    assert common._git_commit() is None
