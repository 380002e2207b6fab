"The data folder beyond its page: killed and competing processes, damage anywhere, hostile files, the command line, real books."
import gzip, json, os, random, signal, subprocess, sys, time
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from nanochat.common import UserError, run_dir
from nanochat.dataset import _batches, documents, groups, read_group, read_manifest, read_texts, split_documents, verify, write_shards
from nanochat.scripts.data import prepare

DOCS = [f'Document {i}: ' + ' '.join(random.Random(i).choices('the cat sat on a mat and ran'.split(), k=i%40)) for i in range(500)]

@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path/'d', DOCS[50:], DOCS[:50], rows_per_group=64, rows_per_shard=200)
    return tmp_path/'d'

@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'base'))
    return tmp_path/'base'

def python(code, *args, **kw): return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=120, **kw)
def command(*args): return subprocess.run([sys.executable, '-m', 'nanochat.scripts.data', *map(str, args)], capture_output=True, text=True, timeout=120)


# --- reading

@pytest.mark.parametrize('name, raw, says', [
    ('a.txt', b'', 'is empty'), ('a.txt', b' \n\t\n', 'nothing but empty documents'), ('a.jsonl', b'{"text": ""}\n\n', 'nothing but empty documents'),
    ('a.txt', b'caf\xe9', r'not UTF-8 \(byte 3\)'), ('a.jsonl', b'{"text": "a"}\n{"text": "caf\xe9"}\n', 'line 2 is not UTF-8'),
    ('a.jsonl', b'{"text": "a"}\n\n{"text": "b"\n', 'line 3 is not JSON'), ('a.jsonl', b'[' * 100_000, 'line 1 is not JSON'),
    ('a.jsonl', b'{"title": "a"}', 'line 1 has no text.*only title'), ('a.jsonl', b'{"text": null}', 'line 1 has no text'), ('a.jsonl', b'{}', 'an empty object'),
    ('a.json', b'[{"text": "a"}, 3]', 'row 2 has no text.*int'), ('a.json', b'{"text": "a"}', 'JSON list'), ('a.json', b'[1', 'is not JSON'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'lone surrogate'), ('a.txt.gz', b'not gzip', 'not a whole .gz'),
    ('a.txt.gz', gzip.compress(b'text ' * 999)[:-20], 'not a whole .gz'), ('a.parquet', b'PAR1 and more, not parquet', 'not a whole parquet'),
    ('a.csv', b'text', 'holds nothing that we read')])
def test_bad_files_get_one_sentence(tmp_path, name, raw, says):
    (tmp_path/name).write_bytes(raw)
    with pytest.raises(UserError, match=says) as e: list(read_texts(tmp_path/name))
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

def test_missing_path_is_said_before_reading(tmp_path):
    with pytest.raises(UserError, match='does not exist'): read_texts(tmp_path/'gone')
    with pytest.raises(UserError, match='holds nothing that we read'): read_texts(tmp_path)

@pytest.mark.parametrize('columns, says', [({'title': ['a']}, 'has no column'), ({'text': ['a', None]}, 'row 2 has no text'), ({'text': [1, 2]}, 'row 1 has no text')])
def test_bad_parquet(tmp_path, columns, says):
    pq.write_table(pa.table(columns), tmp_path/'a.parquet')
    with pytest.raises(UserError, match=says): list(read_texts(tmp_path/'a.parquet'))

def test_damaged_source_parquet_is_named(tmp_path):
    pq.write_table(pa.table({'text': DOCS}), tmp_path/'a.parquet', write_page_checksum=True)
    raw = bytearray((tmp_path/'a.parquet').read_bytes()); raw[len(raw)//3] ^= 4; (tmp_path/'a.parquet').write_bytes(raw)
    with pytest.raises(UserError, match='a.parquet, row group 0 is damaged'): list(read_texts(tmp_path))

@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=['Cs'])).filter(str.strip), min_size=2, max_size=20))
def test_any_text_comes_back_equal(tmp_path_factory, texts):
    d = tmp_path_factory.mktemp('any')
    (d/'a.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    got = [t for _, t in read_texts(d/'a.jsonl')]
    assert got == texts
    write_shards(d/'out', got, got[:1], rows_per_group=3, rows_per_shard=7)
    assert list(documents(d/'out', 'train')) == texts


# --- writing

def test_groups_are_closed_by_size_too(tmp_path):
    m = write_shards(tmp_path/'d', ['x'*1000]*100, ['y'], bytes_per_group=10_000)
    train = next(s for s in m['shards'] if s['split']=='train')
    assert train['groups'] == [10]*10 and m['splits']['train'] == {'docs': 100, 'bytes': 100_000}

def test_an_empty_split_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match='val split has no document'): write_shards(tmp_path/'d', ['a'], [])
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError, UserError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    def texts():
        yield from DOCS
        raise error
    with pytest.raises(error): write_shards(tmp_path/'d', texts(), ['a'], rows_per_group=50)
    assert list(tmp_path.iterdir()) == []

def test_an_interrupted_overwrite_keeps_the_old_data(folder):
    def texts():
        yield from DOCS
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_shards(folder, texts(), ['a'], overwrite=True)
    assert list(documents(folder, 'train')) == DOCS[50:]
    write_shards(folder, ['new'], ['a'], overwrite=True)
    assert list(documents(folder, 'train')) == ['new'] and [p.name for p in folder.parent.iterdir()] == ['d']

def test_foreign_folders_are_never_overwritten(tmp_path):
    (tmp_path/'d').mkdir(); (tmp_path/'d/thesis.txt').write_text('precious')
    with pytest.raises(UserError, match='holds something already'): write_shards(tmp_path/'d', ['a'], ['b'], overwrite=True)
    assert (tmp_path/'d/thesis.txt').read_text() == 'precious'

def test_kill_in_the_middle_then_again(tmp_path):
    code = '''if 1:
        import os, sys; from nanochat.dataset import write_shards
        def texts():
            for i in range(9999):
                if i == 5000: os._exit(9)
                yield f'document {i}'
        write_shards(sys.argv[1], texts(), ['a'])'''
    assert python(code, tmp_path/'d').returncode == 9
    assert [p.name for p in tmp_path.iterdir()] == ['.d.partial']
    write_shards(tmp_path/'d', DOCS, ['a'])
    assert [p.name for p in tmp_path.iterdir()] == ['d'] and list(documents(tmp_path/'d', 'train')) == DOCS

def test_two_writers_at_once(tmp_path):
    said = []
    def texts():
        yield 'first'
        with pytest.raises(UserError, match='another process is writing'): write_shards(tmp_path/'d', ['second'], ['b'])
        said.append(True)
    write_shards(tmp_path/'d', texts(), ['a'])
    assert said and list(documents(tmp_path/'d', 'train')) == ['first']

def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot write.*No space left'): write_shards(tmp_path/'d', DOCS, ['a'])
    assert list(tmp_path.iterdir()) == []

def test_memory_is_bounded():
    taken = 0
    def stream():
        nonlocal taken
        for taken in range(1, 10**9): yield 'x'*1000
    batches = _batches(stream(), 1024, 50_000)
    for n in range(1, 20): assert len(next(batches)[0]) == 50 and taken == 50*n


# --- damage

def test_no_flipped_bit_becomes_text(folder):
    "600 places: an error, or the same documents"
    shard = next(folder.glob('train-00000*')); raw = shard.read_bytes()
    mine = [g for g in groups(folder, 'train') if g.path==shard]
    good = [read_group(g) for g in mine]
    for i in range(600):
        damaged = bytearray(raw); damaged[len(raw)*i//600] ^= 1 << i%8
        shard.write_bytes(damaged)
        for g, want in zip(mine, good):
            try: assert read_group(g) == want
            except UserError as e: assert shard.name in str(e) and f'row group {g.index}' in str(e)
        with pytest.raises(UserError, match=shard.name): verify(folder)
    shard.write_bytes(raw); verify(folder)

@pytest.mark.parametrize('damage, says', [
    (lambda m: m.pop('shards'), 'damaged'), (lambda m: m['shards'].pop(), 'damaged'), (lambda m: m['shards'][0].pop('sha256'), 'damaged'),
    (lambda m: m['splits']['train'].update(docs=3), 'damaged'), (lambda m: m.update(version=2), 'version 2'), (lambda m: m.update(shards=7), 'damaged')])
def test_a_damaged_manifest_is_refused(folder, damage, says):
    m = json.loads((folder/'manifest.json').read_text()); damage(m); (folder/'manifest.json').write_text(json.dumps(m))
    with pytest.raises(UserError, match=f'manifest.json.* {says}'): read_manifest(folder)

@pytest.mark.parametrize('raw', [b'', b'{', b'[]', b'null', b'\xff\xfe'])
def test_a_manifest_of_garbage_is_refused(folder, raw):
    (folder/'manifest.json').write_bytes(raw)
    with pytest.raises(UserError, match='manifest.json'): read_manifest(folder)

def test_foreign_parquet_is_ignored_missing_shard_is_not(folder):
    pq.write_table(pa.table({'text': ['foreign']}), folder/'train-99999.parquet')
    assert list(documents(folder, 'train')) == DOCS[50:]
    (folder/'val-00000.parquet').unlink()
    with pytest.raises(UserError, match='val-00000.parquet is missing'): next(documents(folder, 'train'))


# --- splits and ranks

@pytest.mark.parametrize('world_size', [1, 3, 8, 100])
def test_ranks_share_the_documents(folder, world_size):
    parts = [list(documents(folder, 'train', r, world_size, start=70)) for r in range(world_size)]
    assert sorted(sum(parts, [])) == sorted(DOCS[50:][70:])

@pytest.mark.parametrize('n', [2, 3, 10, 100])
def test_both_sides_get_something(tmp_path, n):
    (tmp_path/'a.json').write_text(json.dumps(DOCS[:n]))
    for fraction in (.001, .05, .5, .999):
        train, val = split_documents(tmp_path, fraction)
        for _ in range(2): assert list(train) and list(val) and sorted([*train, *val]) == sorted(DOCS[:n])

@pytest.mark.parametrize('name, held', [('books_val.jsonl', 1), ('val.jsonl', 1), ('a-test.jsonl.gz', 1), ('VALIDATION.jsonl', 1),
                                        ('contest.jsonl', 0), ('interval.jsonl', 0), ('values.jsonl', 0)])
def test_which_names_are_validation(tmp_path, name, held):
    (tmp_path/'zzz.json').write_text(json.dumps(DOCS[:9]))
    raw = b'{"text": "held out"}\n'
    (tmp_path/name).write_bytes(gzip.compress(raw) if name.endswith('.gz') else raw)
    train, val = split_documents(tmp_path)
    assert (list(val) == ['held out']) == bool(held) and len([*train, *val]) == 10


# --- the command

def test_command_is_idempotent_and_says_what_differs(base, capsys):
    a = prepare(docs=60, val_docs=20)
    stamp = (Path(a['folder'])/'manifest.json').stat().st_mtime_ns
    assert prepare(docs=60, val_docs=20) == a and 'already finished' in capsys.readouterr().out
    assert (Path(a['folder'])/'manifest.json').stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match='docs was 60, now 70'): prepare(docs=70, val_docs=20)
    assert prepare(docs=70, val_docs=20, force=True)['splits']['train']['docs'] == 70
    assert read_manifest(a['folder'])['meta']['entropy_bits_per_byte'] == a['meta']['entropy_bits_per_byte']      # of val alone

def test_floor_of_the_validation_split(base):
    from nanochat import tinyworld
    r = prepare(docs=30, val_docs=40, seed=5)
    docs = list(tinyworld.documents(40, seed=5))
    assert list(documents(r['folder'], 'val')) == [d.text for d in docs]
    assert r['meta']['entropy_bits_per_byte'] == sum(d.bits for d in docs)/sum(len(d.text.encode()) for d in docs) and r['meta']['seed'] == 5

def test_finished_but_a_shard_is_gone(base):
    r = prepare(docs=60, val_docs=20)
    next(Path(r['folder']).glob('train*')).unlink()
    with pytest.raises(UserError, match='missing.*--force'): prepare(docs=60, val_docs=20)
    prepare(docs=60, val_docs=20, force=True); verify(r['folder'])

def test_killed_between_shards_and_result(base):
    r = prepare(docs=60, val_docs=20)
    (Path(r['folder'])/'result.json').unlink()
    assert prepare(docs=60, val_docs=20)['splits'] == r['splits'] and (Path(r['folder'])/'result.json').exists()

def test_source_inside_the_target_is_refused(base):
    d = base/'data/mine'; d.mkdir(parents=True); (d/'a.txt').write_text('one\n\ntwo')
    for source in (d, d/'a.txt'):
        with pytest.raises(UserError, match='would be replaced'): prepare(source, name='mine', force=True)
    assert (d/'a.txt').exists()

def test_command_line(base):
    r = command('--docs', 40, '--val-docs', 10)
    assert r.returncode == 0 and json.loads(r.stdout.splitlines()[-1])['splits']['val']['docs'] == 10
    r = command('--source', 'tinywrld')
    assert r.returncode == 1 and r.stdout == '' and r.stderr.strip() == 'error: --source tinywrld: there is no such file or folder; the embedded corpus is called tinyworld'
    assert command('--docs', 'many').returncode == 2

def test_ctrl_c(base):
    p = subprocess.Popen([sys.executable, '-m', 'nanochat.scripts.data', '--docs', '10000000'], stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while not list(base.glob('data/.tinyworld.partial/train*')) and time.time() < end: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 130 and 'Traceback' not in err and list((base/'data').iterdir()) == []


# --- real text

def shared(name):
    root = os.environ.get('NANOCHAT_SHARED_DATA')
    if not root: pytest.skip('NANOCHAT_SHARED_DATA is not set: no real text to try')
    path = Path(root)/'text'/name
    if not path.exists(): pytest.skip(f'{path} is not there')
    return path

def test_books(base, tmp_path):
    for name in ('books_small.jsonl.gz', 'books_val.jsonl.gz'): (tmp_path/'books').mkdir(exist_ok=True); (tmp_path/'books'/name).symlink_to(shared(name))
    r = prepare(tmp_path/'books')
    assert (r['splits']['train']['docs'], r['splits']['val']['docs'], r['meta']['train_docs_in_val']) == (9, 5, 0)
    verify(r['folder'])
    want = [t for _, t in read_texts(shared('books_small.jsonl.gz'))]
    assert list(documents(r['folder'], 'train')) == want

def test_one_file_without_a_validation_split(base):
    r = prepare(shared('tinyshakespeare.txt.gz'))
    train, val = ([*documents(r['folder'], s)] for s in ('train', 'val'))
    assert r['name'] == 'tinyshakespeare' and len(train) == len(val) == 1
    assert .04 < len(val[0])/len(train[0] + val[0]) < .07
    whole = gzip.open(shared('tinyshakespeare.txt.gz'), 'rt').read()
    assert whole.startswith(train[0]) and whole.endswith(val[0])
