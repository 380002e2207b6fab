"The tokenizer beyond its page: other processes, the command line, hostile files, the corpus of the tiny world."
import json, os, pickle, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
import pytest
from hypothesis import given, settings, strategies as st
from nanochat import tinyworld
from nanochat.common import UserError, run_dir
from nanochat.dataset import write_shards
from nanochat.scripts.tok_train import tok_train
from nanochat.tokenizer import SPECIALS, StreamDecoder, Tokenizer, train_bpe, train_bpe_naive

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


# --- encoding

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
