"The tokenizer beyond its page: other processes, the command line, hostile files, the corpus of the tiny world."
import gc, hashlib, heapq, json, os, pickle, random, subprocess, sys, weakref
from concurrent.futures import ThreadPoolExecutor
import pytest
import regex
from hypothesis import given, settings, strategies as st
from nanochat import tinyworld, tokenizer
from nanochat.common import UserError, run_dir
from nanochat.dataset import write_shards
from nanochat.scripts import tok_train as script_module
from nanochat.scripts.tok_train import tok_train
from nanochat.tokenizer import (PATTERN, SPECIALS, StreamDecoder, Tokenizer, encode_naive, from_hf, merge_parts, show_tokens, to_hf,
                                train_bpe, train_bpe_naive, vocab_for_depth)

ALPHABETS = ['ab', 'aab ', "it's ", 'né 1', '12 3', 'a\n \t', '日本 ']

@pytest.fixture(scope='module')
def texts(): return [d.text for d in tinyworld.documents(400)]

@pytest.fixture(scope='module')
def tok(texts): return train_bpe(texts, 1024)

@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path))
    write_shards(run_dir('data', 'world'), (d.text for d in tinyworld.documents(300)), (d.text for d in tinyworld.documents(30, seed=1)))
    return tmp_path


# --- training

@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(ALPHABETS).flatmap(lambda a: st.text(a, max_size=40)), min_size=1, max_size=5).filter(any),
       st.integers(267, 300))
def test_rust_learns_what_the_naive_version_learns(texts, v):
    assert train_bpe(texts, v).ranks == train_bpe_naive(texts, v).ranks

def test_training_is_the_same_in_every_process(texts, tok):
    "Threads and the order of hashing must not decide a tie"
    code = ("from nanochat import tinyworld; from nanochat.tokenizer import train_bpe;"
            "print(train_bpe([d.text for d in tinyworld.documents(400)], 1024).hash)")
    env = {**os.environ, 'PYTHONHASHSEED': '1', 'RAYON_NUM_THREADS': '5'}
    assert subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True).stdout.strip() == tok.hash

def test_a_token_never_crosses_a_piece(tok):
    for token in tok.ranks: assert b' ' not in token.lstrip(b' ').rstrip(b'\r\n'), token

def test_strange_documents_can_be_trained_on():
    odd = ['half \ud83d pair', ' ' * 1_000_000, '', '\x00', 'a' * 100_000]
    tok = train_bpe(odd, 300)
    for text in odd[1:]: assert tok.decode(tok.encode(text)) == text


def test_the_record_says_what_was_read(texts, tok):
    raw = ''.join(texts).encode()
    assert tok.meta['text_sha256'] == hashlib.sha256(raw).hexdigest()
    assert (tok.meta['docs'], tok.meta['bytes']) == (len(texts), len(raw))

@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=12) | st.sampled_from(["don't stop", 'a b', 'é a', "it's so", 'x  y', '\na b', '日 本 c d'])).map(''.join),
       st.integers(0, 9))
def test_cutting_a_long_document_changes_no_piece(text, size):
    parts = list(tokenizer._chunks(text, size))
    assert ''.join(parts) == text
    assert [p for part in parts for p in regex.findall(PATTERN, part)] == regex.findall(PATTERN, text)

def test_a_huge_document_goes_in_small_parts():
    parts = list(tokenizer._Stream(['one two three ' * 400_000], PATTERN))
    assert max(map(len, parts)) < 70_000 and sum(map(len, parts)) == 5_600_000
    other = list(tokenizer._Stream(['one two three ' * 10_000], r'[^a]+|a'))
    assert len(other) == 1                                                # where this pattern may be cut, we do not know

def test_a_vocabulary_for_every_depth():
    sizes = [vocab_for_depth(d) for d in range(1, 101)]
    assert sizes == sorted(sizes) and {*sizes} == {2**k for k in range(11, 17)}
    assert sizes[:3] == [2048] * 3 and sizes[11] == 32768 and sizes[-1] == 65536
    with pytest.raises(UserError, match='depth is 0'): vocab_for_depth(0)


# --- encoding

def encode_by_heap(tok, piece):
    "BPE of one piece with a heap, a third way beside tiktoken's and ours: fast enough for 100 kB"
    parts, left, right = [bytes([b]) for b in piece], list(range(-1, len(piece) - 1)), list(range(1, len(piece) + 1))
    heap = []
    def offer(i):
        if 0 <= i and right[i] < len(parts) and (both := parts[i] + parts[right[i]]) in tok.ranks:
            heapq.heappush(heap, (tok.ranks[both], i, both))
    for i in range(len(parts)): offer(i)
    while heap:
        _, i, both = heapq.heappop(heap)
        j = right[i]
        if parts[i] is None or j >= len(parts) or parts[i] + parts[j] != both: continue
        parts[i], parts[j], right[i] = both, None, right[j]
        if right[j] < len(parts): left[right[j]] = i
        offer(left[i]); offer(i)
    return [tok.ranks[p] for p in parts if p is not None]

awkward = st.lists(st.text(max_size=8) | st.sampled_from(['👩‍👩‍👧', '🇫🇷', 'e\u0301', ' ' * 7, '\t\t', '\r\n', '\n\n\n', '\u00a0', "'S", "'ſ", '\ud83d',
                   'x = {"a": [1, 22, 333]}', '\\frac{1}{2}', '<|bos|>', 'שלום', '日本語', '\x00', '½Ⅳ３', 'İstanbul', 'theththe'])).map(''.join)

@settings(max_examples=150, deadline=None)
@given(text=awkward)
def test_tiktoken_does_what_the_definition_says(tok, text):
    assert tok.encode(text) == encode_naive(tok, text)

@pytest.mark.parametrize('word', ['a' * 100_000, 'abc' * 33_334, 'the' * 33_334, 'é' * 50_000, '日本' * 17_000, '!?' * 50_000, '12' * 50_000,
                                  ''.join(random.Random(0).choices('etaoinsrhl', k=100_000))], ids=lambda w: w[:3])
def test_words_of_100_kb(tok, word):
    ids = tok.encode(word)
    assert tok.decode(ids) == word
    assert ids == [i for p in regex.findall(PATTERN, word) for i in encode_by_heap(tok, p.encode())]

def test_the_third_way_is_the_first(tok, texts):
    for text in texts[:50]: assert encode_by_heap(tok, text.encode()) == [tok.ranks[t] for t in merge_parts(tok.ranks, text.encode())]

@settings(max_examples=200, deadline=None)
@given(data=st.binary() | st.lists(st.binary(max_size=3) | st.text(max_size=5).map(str.encode)).map(b''.join))
def test_every_byte_string_comes_back(tok, data):
    ids = tok.encode_bytes(data)
    assert tok.decode_bytes(ids) == data and not tok.special_ids & {*ids}
    assert tok.token_bytes()[ids].sum() == len(data)
    try: assert ids == tok.encode(data.decode())
    except UnicodeDecodeError: pass

def test_bytes_between_characters(tok):
    assert tok.encode_bytes(b'') == [] and tok.encode_bytes(b'\xff\xfe') == [tok.ranks[b'\xff'], tok.ranks[b'\xfe']]
    whole = tok.encode_bytes(b'the cat\xe2\x82 the cat')                  # most of a euro sign
    assert whole == tok.encode('the cat') + [tok.ranks[b'\xe2'], tok.ranks[b'\x82']] + tok.encode(' the cat')
    assert tok.encode_bytes(b'\xed\xa0\xbd') == [tok.ranks[bytes([b])] for b in b'\xed\xa0\xbd']    # a surrogate, as some programs write it

def test_nothing_keeps_a_tokenizer_alive(texts, tmp_path):
    tok = train_bpe(texts, 400)
    tok.save(tmp_path); to_hf(tok, tmp_path/'t.json'); show_tokens(tok, tok.encode_batch(texts)[0])
    stream = StreamDecoder(tok); stream.push(65); tok.encode_bytes(b'x\xff'); encode_naive(tok, 'x'); hash(tok)
    watch = weakref.ref(tok)
    del tok, stream; gc.collect()
    assert watch() is None

@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_round_trip(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text and not tok.special_ids & {*ids}
    assert tok.token_bytes()[ids].sum() == len(text.encode())

def test_every_text_of_the_world(tok, texts):
    ids = tok.encode_batch(texts)
    assert ids == [tok.encode(t) for t in texts] and [tok.decode(i) for i in ids] == texts
    long = ['\n'.join(texts)] * 3
    assert tok.encode_batch(long) == [tok.encode(long[0])] * 3            # this length goes to threads
    assert tok.encode_batch([]) == []

@pytest.mark.parametrize('blank, n', [(' ', 49_999), (' ', 50_000), (' ', 100_001), (' ', 1_000_000), ('\n', 100_001), ('\u3000', 60_000)])
def test_long_runs_of_white_space(tok, blank, n):
    text = 'a' + blank*n + 'b'
    assert tok.decode(tok.encode(text)) == text

@pytest.mark.parametrize('name', SPECIALS)
def test_special_names_are_text(tok, name):
    for text in (name, f'a{name}b', name*3, name[:-1] + name):
        ids = tok.encode(text)
        assert not tok.special_ids & {*ids} and tok.decode(ids) == text
        assert tok.encode_batch([text]) == [ids]
    assert tok.decode([tok.special(name)]) == name

def test_threads_share_a_tokenizer(tok, texts):
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(tok.encode, texts)) == [tok.encode(t) for t in texts]

def test_numbers_of_other_libraries_are_ids(tok):
    torch, np = pytest.importorskip('torch'), pytest.importorskip('numpy')
    ids = tok.encode('Hi there')
    assert tok.decode(torch.tensor(ids)) == tok.decode(np.array(ids)) == 'Hi there'

@pytest.mark.parametrize('ids', [[-1], [10**6]])
def test_an_id_that_does_not_exist_is_refused(tok, ids):
    with pytest.raises(ValueError, match='this tokenizer has 0 to 1023'): tok.decode(ids)

def test_stream_of_split_characters():
    tok = Tokenizer({bytes([i]): i for i in range(256)})
    text = 'naïve 👩‍👩‍👧 日本 Ж'
    d = StreamDecoder(tok)
    pieces = [d.push(i) for i in tok.encode(text)]
    assert ''.join(pieces) + d.finish() == text and '�' not in ''.join(pieces)


# --- files

class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, 'w'))

def test_a_pickle_is_never_opened(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path/'gone-off'))
    (tmp_path/'tokenizer.pkl').write_bytes(bomb)
    with pytest.raises(UserError, match='is a pickle'): Tokenizer.load(tmp_path)
    (tmp_path/'nanochat_tokenizer.json').write_bytes(bomb)
    with pytest.raises(UserError, match='nanochat_tokenizer.json'): Tokenizer.load(tmp_path)
    assert not (tmp_path/'gone-off').exists()
    pickle.loads(bomb).close()
    assert (tmp_path/'gone-off').exists()                                 # it would have worked

def damaged(data):
    "Each with one thing wrong"
    yield {**data, 'tokens': data['tokens'][:-1]}
    yield {**data, 'tokens': data['tokens'][1:]}
    yield {**data, 'tokens': data['tokens'] + ['\u4e00']}                 # no byte has this number
    yield {**data, 'tokens': data['tokens'] + data['tokens'][-1:]}
    yield {**data, 'pattern': '((('}
    yield {**data, 'specials': data['specials'][1:]}
    yield {**data, 'hash': '0' * 64}
    yield {**data, 'version': 2}
    yield {k: v for k, v in data.items() if k != 'hash'}
    yield {k: v for k, v in data.items() if k != 'tokens'}
    yield []
    yield None

def test_damaged_files_get_a_sentence(tok, tmp_path):
    tok.save(tmp_path)
    path = tmp_path/'nanochat_tokenizer.json'
    data = json.loads(path.read_text())
    assert Tokenizer.load(tmp_path).hash == tok.hash
    for bad in damaged(data):
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match='nanochat_tokenizer.json'): Tokenizer.load(tmp_path)


# --- Hugging Face files

@pytest.fixture(scope='module')
def hf(tok, tmp_path_factory):
    tokenizers = pytest.importorskip('tokenizers', reason='the package tokenizers is not installed')
    path = tmp_path_factory.mktemp('hf')/'tokenizer.json'
    to_hf(tok, path)
    return tokenizers.Tokenizer.from_file(str(path))

@settings(max_examples=150, deadline=None)
@given(text=awkward)
def test_hugging_face_gives_our_ids(tok, hf, text):
    text = tokenizer._clean(text)
    hf.encode_special_tokens = True                                       # otherwise it obeys names in a text
    ids = hf.encode(text).ids
    assert ids == tok.encode(text) and hf.decode(ids) == text

def test_hugging_face_knows_the_marks(tok, hf, texts):
    assert {s: hf.token_to_id(s) for s in SPECIALS} == tok._special and hf.get_vocab_size() == tok.n_vocab
    hf.encode_special_tokens = True
    assert [e.ids for e in hf.encode_batch(texts)] == tok.encode_batch(texts)
    assert hf.encode('abc' * 33_334).ids == tok.encode('abc' * 33_334)
    hf.encode_special_tokens = False
    assert hf.encode('<|bos|>').ids == [tok.bos]                          # the danger, and why we say so

@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(ALPHABETS).flatmap(lambda a: st.text(a, max_size=40)), min_size=1, max_size=5).filter(any), st.integers(267, 300))
def test_there_and_back_keeps_the_hash(tmp_path_factory, texts, v):
    path = tmp_path_factory.mktemp('hf')/'tokenizer.json'
    tok = train_bpe(texts, v)
    to_hf(tok, path)
    assert from_hf(path).hash == tok.hash

def test_a_tokenizer_of_somebody_else(texts, tmp_path):
    t = pytest.importorskip('tokenizers', reason='the package tokenizers is not installed')
    theirs = t.Tokenizer(t.models.BPE())
    theirs.pre_tokenizer, theirs.decoder = t.pre_tokenizers.ByteLevel(add_prefix_space=False), t.decoders.ByteLevel()
    theirs.train_from_iterator(texts, t.trainers.BpeTrainer(vocab_size=500, initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    theirs.save(str(tmp_path/'tokenizer.json'))
    with pytest.raises(UserError, match='no <|bos|>'): from_hf(tmp_path/'tokenizer.json')
    ours = from_hf(tmp_path/'tokenizer.json', specials=SPECIALS)
    assert ours.n_vocab == 500 + len(SPECIALS) and ours.bos == 500
    for text in [*texts, 'naïve 日本  \n x', "it's 1998"]: assert ours.encode(text) == theirs.encode(text).ids

def broken(data):
    "Each with one thing that we cannot represent or that is damaged, and the words of the refusal"
    model = data['model']
    yield {**data, 'model': {**model, 'type': 'Unigram'}}, 'not BPE'
    yield {**data, 'model': {**model, 'merges': model['merges'][::-1]}}, 'order of the ids'
    yield {**data, 'model': {**model, 'merges': model['merges'][:-1]}}, 'order of the ids'
    yield {**data, 'model': {**model, 'merges': [*model['merges'], 'q q']}}, 'damaged'
    yield {**data, 'model': {**model, 'end_of_word_suffix': '</w>'}}, 'suffix'
    yield {**data, 'model': {k: v for k, v in model.items() if k != 'vocab'}}, 'damaged'
    yield {**data, 'normalizer': {'type': 'NFC'}}, 'normalizer'
    yield {**data, 'pre_tokenizer': {'type': 'Whitespace'}}, 'byte-level'
    yield {**data, 'pre_tokenizer': None}, 'byte-level'
    yield {**data, 'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True}}, 'adds a space'
    yield {**data, 'added_tokens': data['added_tokens'][1:]}, 'do not follow'
    yield {**data, 'added_tokens': []}, 'no <|bos|>'
    yield [], 'no tokenizer.json'
    yield {}, 'no tokenizer.json'

def test_what_is_not_ours_gets_a_sentence(tok, tmp_path):
    path = tmp_path/'tokenizer.json'
    to_hf(tok, path)
    for bad, words in broken(json.loads(path.read_text())):
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=words) as e: from_hf(path)
        assert 'tokenizer.json' in str(e.value)
    with pytest.raises(UserError, match='missing'): from_hf(tmp_path/'nothing.json')

def test_lists_of_merges_are_read_too(tok, tmp_path):
    path = tmp_path/'tokenizer.json'
    to_hf(tok, path)
    data = json.loads(path.read_text())
    data['model']['merges'] = [m.split(' ') for m in data['model']['merges']]
    path.write_text(json.dumps(data))
    assert from_hf(path).hash == tok.hash

def test_a_token_that_is_no_merge_cannot_be_exported(tmp_path):
    tok = Tokenizer({**{bytes([i]): i for i in range(256)}, b'abc': 256})
    with pytest.raises(UserError, match='no merge of two'): to_hf(tok, tmp_path/'t.json')


# --- the script

def script(*args):
    return subprocess.run([sys.executable, '-m', 'nanochat.scripts.tok_train', *args], capture_output=True, text=True)

def test_the_command_line(base):
    r = script('--data=world', '--vocab-size=400', '--tag=cli')
    assert r.returncode == 0, r.stderr
    result = json.loads(r.stdout.splitlines()[-1])
    assert result == json.loads((base/'tokenizer/cli/result.json').read_text())
    assert Tokenizer.load(base/'tokenizer/cli').hash == result['hash'] and result['n_vocab'] == 400
    r = script('--data=nowhere')
    assert r.returncode == 1 and r.stderr.startswith('error: ') and 'nowhere' in r.stderr and len(r.stderr.splitlines()) == 1
    assert script('--vocab-size=many').returncode == 2

def test_new_data_under_an_old_name_are_noticed(base):
    tok_train(data='world', vocab_size=400, tag='t')
    write_shards(run_dir('data', 'world'), ['other text'] * 3, ['other'], overwrite=True)
    with pytest.raises(UserError, match='data_sha256'): tok_train(data='world', vocab_size=400, tag='t')

def test_a_killed_run_starts_again(base):
    first = tok_train(data='world', vocab_size=400, tag='t')
    (base/'tokenizer/t/result.json').unlink()
    again = tok_train(data='world', vocab_size=400, tag='t')
    assert {**first, 'seconds': 0} == {**again, 'seconds': 0}

def test_a_swapped_tokenizer_is_noticed(base, tok):
    tok_train(data='world', vocab_size=400, tag='t')
    tok.save(base/'tokenizer/t')
    with pytest.raises(UserError, match='not the one of result.json'): tok_train(data='world', vocab_size=400, tag='t')

def test_one_process_only(base, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(UserError): tok_train(data='world', vocab_size=400, tag='t')

def test_the_dial_and_the_flag(base):
    assert tok_train(data='world', tag='a', depth=1)['config']['vocab_size'] == 2048
    assert tok_train(data='world', tag='b', depth=6)['config']['vocab_size'] == 8192
    assert tok_train(data='world', tag='c', depth=6, vocab_size=300)['n_vocab'] == 300          # said outright, it wins
    with pytest.raises(UserError, match='depth is 0'): tok_train(data='world', tag='d', depth=0)

@pytest.mark.parametrize('n', [0, -1, 2**31])
def test_amounts_that_cannot_be(base, n):
    with pytest.raises(UserError, match=f'max_bytes is {n}: it must be at least 1 and below'): tok_train(data='world', tag='t', max_bytes=n)

def test_too_many_different_words_are_refused_in_time(monkeypatch):
    monkeypatch.setattr(script_module, '_resident', iter([10**8, 10**8, 5 * 10**8]).__next__)
    texts = ['x' * 2**20] * 40
    seen = []
    with pytest.raises(UserError, match='pass a smaller --max-bytes than 33554432'):
        for text in script_module._watched(texts, 40 * 2**20, 2 * 10**9): seen.append(text)
    assert len(seen) == 32
    monkeypatch.setattr(script_module, '_resident', lambda: 0)            # a system that does not say
    assert len(list(script_module._watched(texts, 40 * 2**20, 1))) == 40

def test_long_reading_shows_a_bar_in_bytes(monkeypatch, capsys):
    bars = []
    class Bar:
        def __init__(self, **kw): self.kw, self.n, self.closed = kw, 0, False; bars.append(self)
        def update(self, n): self.n += n
        def close(self): self.closed = True
    monkeypatch.setattr(script_module, 'progress', Bar)
    list(script_module._watched(['é' * 500_000] * 6, 6_000_000, 2**60))
    assert bars[0].kw == dict(total=6_000_000, desc='reading', unit='B') and bars[0].n == 6_000_000 and bars[0].closed
    assert 'merging: about' in capsys.readouterr().out
    list(script_module._watched(['x'], 1, 2**60))
    assert len(bars) == 1                                                 # short work needs none

def test_the_memory_tool_measures_what_it_says():
    "A little of the stream that the lead runs at 2 GB: the amount is exact, and nothing but the tokenizer lands on the disk"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists('/proc/self/status'): pytest.skip('this system does not tell the memory of a process')
    r = subprocess.run([sys.executable, os.path.join(root, 'tools/measure_tok_memory.py'), '--bytes', '2000000', '--vocab-size', '2048'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    seen = json.loads(r.stdout.splitlines()[-1])
    assert abs(seen['bytes'] - 2_000_000) < 100 and seen['n_vocab'] == 2048 and seen['distinct_words'] > 10_000
    assert seen['before_mb'] <= seen['after_reading_mb'] <= seen['peak_mb'] < 2000
