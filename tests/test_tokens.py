"Token shards: equal to the text, refused when stale or damaged, written whole or not at all"
import json, os, random, shutil
import pytest
from nanochat import tinyworld, tokens
from nanochat.common import UserError
from nanochat.dataset import documents, write_shards
from nanochat.tokenizer import Tokenizer, train_bpe
from nanochat.tokens import StoredTokens, TextTokens, open_tokens, read_token_manifest, token_folder, tokenize_shards, verify_tokens

TEXTS = [d.text for d in tinyworld.documents(500)] + ['', '🙂 naïve', 'long '*5000]
TOK = train_bpe(TEXTS, 400)

@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path/'d', TEXTS[60:], TEXTS[:60], rows_per_group=50, rows_per_shard=170)
    return tmp_path/'d'

def test_ids_are_those_of_the_tokenizer(folder):
    tokenize_shards(folder, TOK); verify_tokens(folder, TOK)
    for split in ('train', 'val'):
        stored, text, want = open_tokens(folder, split, TOK), TextTokens(folder, split, TOK), [TOK.encode(t) for t in documents(folder, split)]
        assert isinstance(stored, StoredTokens)
        for g in random.Random(0).sample(stored.groups, len(stored.groups)):
            assert stored.lengths(g) == text.lengths(g) == [len(w) for w in want[g.start:g.start + g.rows]]
        for doc, ids in enumerate(want):
            for a, b in ((0, len(ids)), (len(ids)//3, len(ids)//2)): assert stored.ids(doc, a, b).tolist() == text.ids(doc, a, b).tolist() == ids[a:b]

def test_a_large_vocabulary_takes_four_bytes(folder):
    words = {bytes([b]): b for b in range(256)}
    for i in range(66_000): words[b'\xff\xfe' + str(i).encode()] = 256 + i
    tok = Tokenizer(words)
    m = tokenize_shards(folder, tok)
    assert m['dtype'] == 'uint32' and tokenize_shards(folder, TOK)['dtype'] == 'uint16'
    assert len(list(folder.glob('tokens-*'))) == 2                           # one folder for each tokenizer

def test_a_second_call_finds_the_work_done_and_force_does_it_again(folder, monkeypatch):
    first = tokenize_shards(folder, TOK)
    before = (token_folder(folder, TOK)/'train-00000.bin').stat().st_mtime_ns
    assert tokenize_shards(folder, TOK) == first == tokenize_shards(folder, TOK, force=True)
    assert (token_folder(folder, TOK)/'train-00000.bin').stat().st_mtime_ns > before

def test_an_interrupted_run_leaves_nothing(folder, monkeypatch):
    read, seen = tokens.read_group, []
    def breaks(g):
        seen.append(g)
        if len(seen) == 4: raise KeyboardInterrupt
        return read(g)
    monkeypatch.setattr(tokens, 'read_group', breaks)
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(KeyboardInterrupt): tokenize_shards(folder, TOK)
    assert sorted(p.name for p in folder.iterdir()) == before and isinstance(open_tokens(folder, 'train', TOK), TextTokens)

def test_memory_is_a_group_not_the_data(folder, monkeypatch):
    "No more than one group of texts is alive while another is read"
    import weakref
    class Texts(list): pass
    read, alive = tokens.read_group, []
    def watched(g):
        assert sum(r() is not None for r in alive) <= 1
        texts = Texts(read(g)); alive.append(weakref.ref(texts))
        return texts
    monkeypatch.setattr(tokens, 'read_group', watched)
    tokenize_shards(folder, TOK)

def damage(path, how):
    raw = bytearray(path.read_bytes())
    if how == 'cut': raw = raw[:-2]
    elif how == 'flip': raw[len(raw)//2] ^= 1
    path.write_bytes(raw)

@pytest.mark.parametrize('kind', ['bin', 'idx'])
def test_damage_is_named(folder, kind):
    tokenize_shards(folder, TOK)
    path = token_folder(folder, TOK)/f'train-00001.{kind}'
    whole = path.read_bytes()
    damage(path, 'flip')
    with pytest.raises(UserError, match=f'train-00001.{kind} is damaged'): verify_tokens(folder, TOK)
    source = open_tokens(folder, 'train', TOK)
    with pytest.raises(UserError, match='train-00001.bin or .idx, group'):
        for g in source.groups: source.lengths(g)
    path.write_bytes(whole); damage(path, 'cut')
    with pytest.raises(UserError, match=f'train-00001.{kind} has .* bytes instead of'): open_tokens(folder, 'train', TOK)
    path.unlink()
    with pytest.raises(UserError, match=f'train-00001.{kind} has no bytes'): open_tokens(folder, 'train', TOK)

def test_shards_of_other_text_or_another_tokenizer_are_refused(folder, tmp_path):
    tokenize_shards(folder, TOK)
    write_shards(tmp_path/'e', TEXTS[61:], TEXTS[:60], rows_per_group=50, rows_per_shard=170)
    shutil.copytree(token_folder(folder, TOK), token_folder(tmp_path/'e', TOK))
    with pytest.raises(UserError, match='made from other text'): open_tokens(tmp_path/'e', 'train', TOK)
    other = train_bpe(TEXTS, 350)
    shutil.copytree(token_folder(folder, TOK), token_folder(folder, other))
    with pytest.raises(UserError, match='another tokenizer'): open_tokens(folder, 'train', other)

@pytest.mark.parametrize('edit, says', [(lambda m: m.pop('shards'), 'damaged'), (lambda m: m.update(version=2), 'version 2'), (lambda m: m.update(dtype='soup'), 'damaged')])
def test_a_manifest_must_make_sense(folder, edit, says):
    tokenize_shards(folder, TOK)
    path = token_folder(folder, TOK)/'manifest.json'
    m = json.loads(path.read_text()); edit(m); path.write_text(json.dumps(m))
    with pytest.raises(UserError, match=says): read_token_manifest(folder, TOK)

@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='root may write anywhere')
def test_a_folder_that_cannot_be_written_is_named(folder):
    folder.chmod(0o500)
    try:
        with pytest.raises(UserError, match='cannot write'): tokenize_shards(folder, TOK)
    finally: folder.chmod(0o700)
