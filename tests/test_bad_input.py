"Bad input: one clear sentence, a non-zero exit, and nothing that was there before is touched"
import hashlib, os, shutil, subprocess
import pytest
from conftest import MICRO, script

def snapshot(base): return {p.relative_to(base): hashlib.sha256(p.read_bytes()).hexdigest() for p in base.rglob('*') if p.is_file() and not p.name.endswith('.lock')}

def refused(r, *words):
    "The run ended with one sentence on stderr that holds all `words`"
    lines = [l for l in r.stderr.splitlines() if l.startswith('error: ')]
    assert r.returncode not in (0, None) and len(lines) == 1 and 'Traceback' not in r.stderr, (r.returncode, r.stderr[-2000:])
    for w in words: assert str(w) in lines[0], lines[0]

@pytest.fixture(scope='module')
def trained(micro):
    "A finished micro run: base and sft"
    for r in (script('base_train', *MICRO, '--tag', 'micro', base=micro),
              script('chat_sft', '--tag', 'micro', '--n', 60, '--batch-tokens', 512, base=micro)):
        assert r.returncode == 0, r.stderr
    return micro

def test_missing_data(micro): refused(script('base_train', '--data', 'nowhere', '--tokenizer', 'micro', base=micro), 'nowhere')
def test_missing_source(micro): refused(script('data', 'prepare', '--source', 'no/such/folder', base=micro), 'no/such/folder')
def test_missing_tokenizer(micro): refused(script('base_train', '--data', 'micro', '--tokenizer', 'nobody', base=micro), 'nobody')
def test_missing_model(micro): refused(script('chat_cli', '--tag', 'nobody', '-p', 'Hi', base=micro), 'nobody')
def test_unknown_tag_form(micro): refused(script('base_train', '--tag', '../up', base=micro), '../up')

def test_empty_file(micro, tmp_path):
    (tmp_path/'empty.txt').write_text('')
    refused(script('data', 'prepare', '--source', tmp_path, '--name', 'empty', base=micro), 'empty.txt')
    assert not (micro/'data/empty/manifest.json').exists()

def test_bad_json_line(micro, tmp_path):
    (tmp_path/'bad.jsonl').write_text('{"text": "fine, and long enough"}\n{"text": \n')
    refused(script('data', 'prepare', '--source', tmp_path, '--name', 'bad', base=micro), 'bad.jsonl', '2')

@pytest.mark.parametrize('args', [['--depth', 'four'], ['--depth', '-1'], ['--no-such-flag', '1'], ['--steps', '0'], ['--device', 'quantum']])
def test_bad_flags(micro, args):
    before = snapshot(micro)
    r = script('base_train', '--data', 'micro', '--tokenizer', 'micro', '--tag', 'flags', *args, base=micro)
    assert r.returncode != 0 and 'Traceback' not in r.stderr and args[0].strip('-').replace('-', '_') in r.stderr.replace('-', '_'), r.stderr
    assert snapshot(micro) == before

def test_other_settings_are_refused(trained):
    before = snapshot(trained)
    refused(script('base_train', *MICRO, '--tag', 'micro', '--seed', 5, base=trained), 'seed', '--force')
    assert snapshot(trained) == before

def test_wrong_tokenizer(trained, tmp_path):
    base = tmp_path/'base'
    shutil.copytree(trained, base)
    r = script('tok_train', '--data', 'micro', '--tag', 'micro', '--vocab-size', 400, '--force', base=base)
    assert r.returncode == 0, r.stderr
    refused(script('chat_cli', '--tag', 'micro', '-p', 'Hi', base=base), 'tokenizer')
    refused(script('chat_eval', '--tag', 'micro', '--share', .02, base=base), 'tokenizer')

def test_damaged_checkpoint(trained, tmp_path):
    base = tmp_path/'base'
    shutil.copytree(trained, base)
    for path in (base/'sft/micro/checkpoints').rglob('model.safetensors'):
        data = bytearray(path.read_bytes()); data[len(data)//2] ^= 1; path.write_bytes(data)
    before = snapshot(base)
    refused(script('chat_cli', '--tag', 'micro', '-p', 'Hi', base=base), 'sft')
    assert snapshot(base) == before

def test_full_disk(trained, tmp_path):
    "A real one: a tmpfs of three megabytes"
    disk = tmp_path/'disk'; disk.mkdir()
    if os.name != 'posix' or os.geteuid() != 0 or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('needs root and mount, to make a small disk')
    try:
        for name in ('data/micro', 'tokenizer/micro'): shutil.copytree(trained/name, disk/name)
        kept = snapshot(disk)
        refused(script('base_train', *MICRO, '--tag', 'micro', '--save-every', 5, base=disk), 'full')
        assert {k: v for k, v in snapshot(disk).items() if k in kept} == kept
    finally: subprocess.run(['umount', disk], check=True)
