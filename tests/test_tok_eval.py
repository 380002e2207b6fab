"Measuring a tokenizer: what is counted, references that are there, cut short or missing, the command line"
import base64, hashlib, json, socket
import pytest, tiktoken
from conftest import result, script
from hypothesis import given, settings, strategies as st
from nanochat import tinyworld
from nanochat.common import UserError, run_dir
from nanochat.dataset import write_shards
from nanochat.scripts import tok_eval as module
from nanochat.scripts.tok_eval import REFERENCES, SAMPLES, STORY, measure_text, prices, reference, tok_eval
from nanochat.scripts.tok_train import tok_train
from nanochat.tokenizer import PATTERN, Tokenizer

@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'base'))
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path/'cache'))
    (tmp_path/'cache').mkdir()
    for name, seed in (('world', 0), ('other', 7)):
        write_shards(run_dir('data', name), (d.text for d in tinyworld.documents(200, seed=seed)), (d.text for d in tinyworld.documents(30, seed=seed + 1)))
    tok_train(data='world', vocab_size=400, tag='t')
    return tmp_path

@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kw): raise AssertionError('the network was used')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)

@settings(max_examples=50, deadline=None)
@given(st.lists(st.text()).filter(lambda ts: any(t.strip() for t in ts)))
def test_counts(texts):
    m = measure_text(lambda t: list(t.encode()), texts)
    assert m['bytes'] == m['tokens'] == sum(len(t.encode()) for t in texts) and m['bytes_per_token'] == 1
    assert m['tokens_per_char'] == m['bytes'] / sum(map(len, texts))

def test_samples_are_texts():
    texts = [t for s in SAMPLES.values() for t in s.values()]
    assert len({*texts}) == len(texts) >= 18 and all(len(t) > 50 or len(t.encode()) > 100 for t in texts)
    assert 'English' not in SAMPLES['other languages'] and len(STORY) == 11

def test_bytes_have_no_favourite():
    p = prices(lambda t: list(t.encode()))
    assert p == {k: len(t.encode()) / len(STORY['English'].encode()) for k, t in STORY.items()}

def test_missing_references_are_skipped_aloud_and_offline(base, no_network, capsys):
    r = tok_eval('t')
    said = capsys.readouterr().out
    assert r['skipped'] == ['GPT-2', 'GPT-4'] and 'skipped: GPT-2' in said and 'skipped: GPT-4' in said
    assert {*r['domains']} == {*SAMPLES} and all({*v} == {'t'} for v in r['domains'].values())
    assert {*r['data']} == {'world'}                                      # the folder that it was trained on
    assert json.loads((base/'base/tokenizer/t/eval.json').read_text()) == r

def fake_reference(base, monkeypatch, raw):
    "A reference with its file in tiktoken's cache; tiktoken is taught the name"
    url = 'https://example.com/fake.tiktoken'
    (base/'cache'/hashlib.sha1(url.encode()).hexdigest()).write_bytes(raw)
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in raw.splitlines())}
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}))
    monkeypatch.setitem(REFERENCES, 'GPT-2', ('fake', url, hashlib.sha256(raw).hexdigest()))

def test_a_reference_that_is_there_is_measured(base, no_network, monkeypatch):
    raw = b'\n'.join(base64.b64encode(bytes([b])) + b' %d' % b for b in range(256))
    fake_reference(base, monkeypatch, raw)
    r = tok_eval('t', data='world,other')
    assert r['skipped'] == ['GPT-4'] and r['domains']['code']['GPT-2']['bytes_per_token'] == 1
    assert {*r['data']} == {'world', 'other'} and r['data']['other']['GPT-2']['bytes_per_token'] == 1 < r['data']['other']['t']['bytes_per_token']

@pytest.mark.parametrize('damage', [lambda raw: raw[:-1], lambda raw: b'', lambda raw: raw + b'\n'])
def test_a_damaged_reference_counts_as_missing(base, no_network, monkeypatch, damage):
    raw = b'\n'.join(base64.b64encode(bytes([b])) + b' %d' % b for b in range(256))
    fake_reference(base, monkeypatch, raw)
    file = module._cache_file(REFERENCES['GPT-2'][1])
    assert reference('GPT-2') is not None
    file.write_bytes(damage(raw))
    assert reference('GPT-2') is None and file.exists()

@pytest.mark.parametrize('env, folder', [({'TIKTOKEN_CACHE_DIR': '/a', 'DATA_GYM_CACHE_DIR': '/b'}, '/a'), ({'DATA_GYM_CACHE_DIR': '/b'}, '/b'),
                                         ({'TIKTOKEN_CACHE_DIR': '', 'DATA_GYM_CACHE_DIR': '/b'}, None)])
def test_where_tiktoken_looks(monkeypatch, env, folder):
    for k in ('TIKTOKEN_CACHE_DIR', 'DATA_GYM_CACHE_DIR'): monkeypatch.delenv(k, raising=False)
    for k, v in env.items(): monkeypatch.setenv(k, v)
    file = module._cache_file('https://example.com/x')
    assert (file is None) if folder is None else str(file.parent) == folder

def test_the_tokenizer_stays_finished(base, capsys):
    before = Tokenizer.load(run_dir('tokenizer', 't')).hash
    tok_eval('t', data='')
    again = tok_train(data='world', vocab_size=400, tag='t')
    assert again['hash'] == before and 'already finished' in capsys.readouterr().out

@pytest.mark.parametrize('args, words', [(('nowhere',), 'no tokenizer in'), (('t', 'nothing'), 'nothing'), (('t', '', 0), 'max_bytes is 0'), (('../t',), '--tag')])
def test_bad_arguments_get_a_sentence(base, args, words):
    with pytest.raises(UserError, match=words): tok_eval(*args)

def test_data_that_is_gone_is_no_error(base):
    for f in run_dir('data', 'world').iterdir(): f.unlink()
    assert tok_eval('t')['data'] == {}
    with pytest.raises(UserError, match='world'): tok_eval('t', data='world')

def test_the_command_line(base):
    r = script('tok_eval', '--tag', 't', '--data', 'other', base=base/'base')
    assert r.returncode == 0, r.stderr
    assert result(r) == json.loads((base/'base/tokenizer/t/eval.json').read_text()) and 'bytes per token' in r.stdout
    r = script('tok_eval', '--tag', 'nowhere', base=base/'base')
    assert r.returncode == 1 and r.stderr.startswith('error: ') and len(r.stderr.splitlines()) == 1
