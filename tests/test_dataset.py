"The data folder beyond its page: killed and competing processes, damage anywhere, hostile files, the command line, real books."
import bz2, gzip, json, lzma, os, random, signal, subprocess, sys, time
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from nanochat.common import UserError, run_dir
from nanochat.dataset import Skipped, _batches, documents, groups, read_group, read_manifest, read_texts, split_documents, verify, write_shards
from nanochat.scripts.data import Distinct, guess_language, inspect, lasts, prepare, script_shares

DOCS = [f'Document {i}: ' + ' '.join(random.Random(i).choices('the cat sat on a mat and ran'.split(), k=i%40)) for i in range(500)]

@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path/'d', DOCS[50:], DOCS[:50], rows_per_group=64, rows_per_shard=200)
    return tmp_path/'d'

@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'base'))
    return tmp_path/'base'

def python(code, *args, **kw): return subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, timeout=600, **kw)
def command(*args): return subprocess.run([sys.executable, '-m', 'nanochat.scripts.data', *map(str, args)], capture_output=True, text=True, timeout=600)


# --- reading

@pytest.mark.parametrize('name, raw, says', [
    ('a.txt', b'', 'is empty'), ('a.txt', b' \n\t\n', 'nothing but empty documents'), ('a.jsonl', b'{"text": ""}\n\n', 'nothing but empty documents'),
    ('a.txt', b'caf\xe9', r'not UTF-8 \(byte 3\)'), ('a.jsonl', b'{"text": "a"}\n{"text": "caf\xe9"}\n', 'line 2 is not UTF-8'),
    ('a.jsonl', b'{"text": "a"}\n\n{"text": "b"\n', 'line 3 is not JSON'), ('a.jsonl', b'[' * 100_000, 'line 1 is not JSON'),
    ('a.jsonl', b'{"title": "a"}', 'line 1 has no text.*only title'), ('a.jsonl', b'{"text": null}', 'line 1 has no text'), ('a.jsonl', b'{}', 'an empty object'),
    ('a.json', b'[{"text": "a"}, 3]', 'row 2 has no text.*int'), ('a.json', b'{"text": "a"}', 'JSON list'), ('a.json', b'[1', 'is not JSON'),
    ('a.jsonl', b'{"text": "\\ud800"}', 'lone surrogate'), ('a.txt.gz', b'not gzip', 'not a whole .gz'),
    ('a.txt.gz', gzip.compress(b'text ' * 999, mtime=0)[:-20], 'not a whole .gz'), ('a.parquet', b'PAR1 and more, not parquet', 'not a whole parquet'),
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


PACK = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress, '.zst': lambda b: pa.compress(b, codec='zstd', asbytes=True)}

def parquet(docs, **kw):
    sink = pa.BufferOutputStream(); pq.write_table(pa.table({'text': docs}), sink, **kw)
    return sink.getvalue().to_pybytes()

@pytest.mark.parametrize('packed', PACK)
@pytest.mark.parametrize('name', ['a.txt', 'a.md', 'a.jsonl', 'a.json', 'a.parquet'])
def test_packed_files(tmp_path, name, packed):
    docs = ['One café.', 'Two.', 'x'*70_000]
    raw = {'txt': docs[0].encode(), 'md': docs[0].encode(), 'jsonl': ''.join(json.dumps({'text': d}) + '\n' for d in docs).encode(),
           'json': json.dumps(docs).encode(), 'parquet': parquet(docs)}[name.split('.')[1]]
    file = tmp_path/(name + packed)
    file.write_bytes(PACK[packed](raw))
    moved = []
    assert [t for _, t in read_texts(file, moved=moved.append)] == (docs[:1] if name[2] in 'tm' else docs)
    assert sum(moved) == file.stat().st_size                                              # what a progress bar counts
    file.write_bytes(PACK[packed](raw)[:-6])
    with pytest.raises(UserError, match=f'{name}{packed} is not a whole {packed} file'): list(read_texts(file))

def test_progress_counts_every_byte_of_plain_files(tmp_path):
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps({'text': d}) + '\n' for d in DOCS)); (tmp_path/'b.txt').write_text('text'*100_000)
    moved = []
    assert len(list(read_texts(tmp_path, moved=moved.append))) == len(DOCS) + 1
    assert sum(moved) == sum(p.stat().st_size for p in tmp_path.iterdir())


# --- bad shards: named, or skipped and counted

def bad_shards(d):
    "A folder of ten bad files, with what is good in them, and what is said of each"
    docs = DOCS[1:301]
    whole = parquet(docs, row_group_size=100, write_page_checksum=True, use_dictionary=False, compression='none')
    meta = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(1).column(0)
    page = bytearray(whole); page[meta.data_page_offset + meta.total_compressed_size//2] ^= 1
    latin = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(b'\0\0\0\0\1\0\0\0\5\0\0\0\6\0\0\0'), pa.py_buffer(b'acaf\xe9b')])
    big = 'x'*(50 << 20)
    cases = {
        '0_truncated.parquet': (whole[:-20], [], 'is not a whole parquet file', 'file'), '1_empty.parquet': (b'', [], 'is empty', 'file'),
        '2_no_rows.parquet': (parquet([]), [], 'has no text|nothing but empty', 'file'),
        '3_column.parquet': (parquet(['a']).replace(b'text', b'tixt'), [], 'has no column named text', 'file'),
        '4_null.parquet': (parquet(['a', None, 'b'], row_group_size=2), ['a', 'b'], 'row group 0, row 2 has no text.*null', 'row'),
        '5_latin.parquet': (parquet(latin), ['a', 'b'], 'row group 0, row 2 is not UTF-8', 'row'),
        '6_huge.parquet': (parquet(['a', big, 'b']), ['a', 'b'], 'row group 0, row 2 is one document of more than 32.0 MB', 'row'),
        '7_page.parquet': (bytes(page), docs[:100] + docs[200:], 'row group 1 is damaged', 'row group'),
        '8_huge.txt': (big.encode(), [], 'is one document of more than', 'file'),
        '9_lines.jsonl': (b'{"text": "a"}\n{"text": ' + b'"' + big.encode()*5 + b'"}\n[]\n{"text": "b"}\nnot json\n', ['a', 'b'], 'line 2 is one document of more', 'row')}
    for name, (raw, *_) in cases.items(): (d/name).write_bytes(raw)
    return cases

def test_bad_shards_are_named_or_counted(tmp_path):
    cases = bad_shards(tmp_path)
    for name, (_, good, says, kind) in cases.items():
        with pytest.raises(UserError, match=f'{name}.*({says})') as e: list(read_texts(tmp_path/name))
        assert '\n' not in str(e.value) and len(str(e.value)) < 500
        skipped = Skipped()
        assert [t for _, t in read_texts(tmp_path/name, skipped)] == good
        assert skipped.counts == {kind: 3 if name[0]=='9' else 1} and name in skipped.places[0]

def test_bad_shards_in_a_prepared_folder(base, tmp_path):
    d = tmp_path/'web'; d.mkdir()
    cases = bad_shards(d)
    (d/'web_val.jsonl').write_text('{"text": "held out"}\n')
    with pytest.raises(UserError, match='0_truncated.parquet'): prepare(d)
    assert not (base/'data/web').exists()
    r = prepare(d, skip_bad=True)
    assert list(documents(r['folder'], 'train')) == sum((good for _, good, *_ in cases.values()), [])
    assert r['meta']['skipped']['counts'] == {'file': 5, 'row': 6, 'row group': 1} and len(r['meta']['skipped']['places']) == 12
    assert read_manifest(r['folder'])['meta'] == r['meta']
    (d/'web_val.jsonl').unlink()                                                          # the hash decides: read three times, counted once
    assert prepare(d, name='hashed', skip_bad=True)['meta']['skipped']['counts'] == {'file': 5, 'row': 6, 'row group': 1}

def test_the_limit_of_a_document_can_be_raised(base, tmp_path):
    (tmp_path/'big.txt').write_text(('word '*20 + '\n')*400_000)
    with pytest.raises(UserError, match='big.txt is one document of more than 32.0 MB.*--max-doc-mb'): prepare(tmp_path/'big.txt')
    r = prepare(tmp_path/'big.txt', max_doc_mb=50)
    assert r['splits']['train']['docs'] == 1 and sum(s['bytes'] for s in r['splits'].values()) > 40e6 and r['config']['max_doc_mb'] == 50

def test_a_folder_of_nothing_good(base, tmp_path):
    (tmp_path/'a.jsonl').write_text('no\nno\n')
    with pytest.raises(UserError, match='no document that can be read'): prepare(tmp_path/'a.jsonl', skip_bad=True)

def test_verify_names_every_damaged_shard(folder):
    names = ['train-00000.parquet', 'train-00001.parquet', 'val-00000.parquet']
    for name in names[:2]: raw = bytearray((folder/name).read_bytes()); raw[60] ^= 1; (folder/name).write_bytes(raw)
    (folder/names[2]).unlink()
    with pytest.raises(UserError) as e: verify(folder)
    assert all(n in str(e.value) for n in names) and 'train-00002' not in str(e.value) and 'is missing' in str(e.value)


# --- inspecting

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=400))
def test_copies_are_counted_exactly_while_they_fit(ids):
    d = Distinct()
    for i in ids: d.add(f'{i} '.encode()*i)
    assert d.exact and d.copies() == (len(ids) - len(set(ids)))/len(ids) and sorted(d.lengths()) == sorted(len(f'{i} '.encode()*i) for i in ids)

def test_copies_in_bounded_memory():
    "40,000 documents, a quarter of them copies; at most 1,000 hashes are kept"
    d = Distinct(1000)
    for i in range(40_000): d.add(str(i % 30_000).encode()); assert len(d.seen) <= 1000
    assert not d.exact and abs(d.copies() - .25) < .06 and abs(d.lengths().mean() - 4.6) < .2

@pytest.mark.parametrize('language, text', [
    ('English', 'It was the best of times, it was the worst of times, and the people of the town knew that.'), ('German', 'Der Hund und die Katze sind nicht zu Hause, das ist ein Rätsel mit den Nachbarn.'),
    ('French', 'Les enfants qui jouent dans la rue ne sont pas une gêne pour le voisin que des gens plaignent.'), ('Spanish', 'Los perros y las gatas del barrio no son una molestia para el vecino, pero ladran con ganas.'),
    ('Italian', 'Il cane della vicina non è una bestia, ma gli abitanti sono per la pace di che parla con noi.'), ('Dutch', 'Het is niet een hond van de buren, maar ook voor de kat zijn dat goede dagen met zon aan zee.'),
    ('Portuguese', 'Os meninos do bairro não são uma ameaça para a senhora da esquina, mais dos dias em paz com todos.'), ('Korean', '안녕하세요 여러분'), ('Japanese', 'これは日本語の文章です'),
    ('Chinese', '这是一个中文句子'), ('Greek', 'Καλημέρα κόσμε'), ('some language in Cyrillic letters', 'Привет, мир'), ('no letters', '123 + 456 = 579'), ('no letters', '')])
def test_language_guess(language, text): assert guess_language(text)[0] == language

def test_scripts_add_up():
    shares = script_shares('abc абв 中文 12!')
    assert shares == {'Latin': 3/8, 'Cyrillic': 3/8, 'Han': 2/8}

def test_inspect_counts_what_is_there(base, tmp_path, capsys):
    docs = [f'Document {i} says the same as ever, and it is short.' for i in range(400)]
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps({'text': d}) + '\n' for d in docs + docs[:100])); (tmp_path/'a_val.jsonl').write_text('{"text": "held"}\n')
    prepare(tmp_path, name='x'); capsys.readouterr()
    r = inspect('x', depth=2)
    out = capsys.readouterr().out
    assert r['docs'] == 501 and abs(r['copies'] - 100/501) < 1e-9 and r['copies_exact'] and r['length_bytes']['p100'] == len(docs[-1]) and r['language'] == 'English'
    assert r['tokens'] == round(sum(map(len, docs + docs[:100]))/4) and r['epochs'] == lasts(r['tokens'], 2)['epochs'] > 1
    assert 'assumed' in out and '█' in out and '19.96% of the documents repeat' in out and 'depth 2 wants' in out
    q = inspect('x', quick=True)
    assert q['copies'] is None and 'not counted' in capsys.readouterr().out
    with pytest.raises(UserError): inspect('nothing')
    with pytest.raises(UserError): inspect('x', tokenizer='nothing')

def test_inspect_with_a_tokenizer(base, tmp_path):
    from nanochat.tokenizer import Tokenizer
    Tokenizer({bytes([i]): i for i in range(256)}).save(run_dir('tokenizer', 'bytes'))
    prepare(docs=50, val_docs=10, name='x')
    r = inspect('x', tokenizer='bytes')
    assert r['tokens'] == r['splits']['train']['bytes'] + 50 and r['tokens_are'] == 'counted'      # a byte each, and a mark for each document
    (tmp_path/'long.jsonl').write_text(''.join(json.dumps({'text': f'{i} ' + 'word '*(i%200)}) + '\n' for i in range(10_000)))
    prepare(tmp_path/'long.jsonl', name='y')
    r = inspect('y', tokenizer='bytes', quick=True)
    n = r['splits']['train']
    assert 'estimated' in r['tokens_are'] and abs(r['tokens']/(n['bytes'] + n['docs']) - 1) < .002

@pytest.mark.slow
def test_a_million_documents_without_growth(base, tmp_path):
    "The memory that `prepare` takes for 1,000,000 documents is that for 100,000, up to 64 MB"
    code = """if 1:
        import resource, sys; from nanochat.scripts.data import prepare
        prepare(sys.argv[1]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    line = json.dumps({'text': 'word '*40}) + '\n'
    peak = {}
    for n in (100_000, 1_000_000):
        with open(tmp_path/f'n{n}.jsonl', 'w') as f:
            for i in range(n): f.write(f'{line[:10]}{i} {line[10:]}')
        r = subprocess.run([sys.executable, '-c', code, str(tmp_path/f'n{n}.jsonl')], capture_output=True, text=True)
        assert r.returncode == 0, r.stderr
        peak[n] = int(r.stdout.split()[-1])/1024
    assert peak[1_000_000] < peak[100_000] + 64, peak


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
    r = command('prepare', '--docs', 40, '--val-docs', 10)
    assert r.returncode == 0 and json.loads(r.stdout.splitlines()[-1])['splits']['val']['docs'] == 10
    r = command('prepare', '--source', 'tinywrld')
    assert r.returncode == 1 and r.stdout == '' and r.stderr.strip() == 'error: --source tinywrld: there is no such file, folder or dataset; did you mean tinyworld?'
    assert command('prepare', '--docs', 'many').returncode == 2

def test_ctrl_c(base):
    p = subprocess.Popen([sys.executable, '-m', 'nanochat.scripts.data', '--docs', '10000000'], stderr=subprocess.PIPE, text=True)
    end = time.time() + 300
    while not list(base.glob('data/.tinyworld.partial/train*')): assert time.time() < end and p.poll() is None; time.sleep(.05)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=300)[1]
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
