"The loaders beyond their page: any lengths, any stop, any number of ranks, bad states, real books."
import json, os, random, shutil, time
from collections import Counter
from pathlib import Path
import pytest
import torch
from hypothesis import given, settings, strategies as st
from nanochat import tinyworld
from nanochat.common import UserError
from nanochat.conversation import Rendered, render
from nanochat.dataloader import ChatLoader, PretrainLoader, pack, val_batches
from nanochat.dataset import documents, split_documents, write_shards
from nanochat.tokenizer import Tokenizer, train_bpe

TOK = Tokenizer({bytes([b]): b for b in range(256)})

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('data')/'world'
    texts = [d.text for d in tinyworld.documents(700)]
    write_shards(d, texts[100:], texts[:100], rows_per_group=64, rows_per_shard=200)
    return d

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b))
def counts(batches): return Counter(t for b in batches for t in b.targets[b.targets >= 0].tolist())
def text_counts(texts, tok=TOK): return Counter(t for text in texts for t in tok.encode(text))
def balanced(l, row_len):
    return l['read'] + l['split'] == l['emitted'] + l['dropped'] + l['waiting'] and l['emitted'] + l['padded'] == l['rows']*row_len


# --- packing

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 90), max_size=40), st.integers(2, 40), st.integers(1, 50), st.booleans(), st.integers(0, 9))
def test_pack_loses_nothing(sizes, row_len, buffer, split, seed):
    docs = [[100*i + j for j in range(n)] for i, n in enumerate(sizes)]
    rows, ledger = pack(docs, row_len, buffer, split, seed)
    assert sorted(t for r in rows for p in r for t in p.ids) == sorted(sum(docs, []))
    assert all(p.ids == docs[p.doc][p.start:p.start+len(p.ids)] for r in rows for p in r)
    assert all(1 < sum(p.size for p in r) <= row_len for r in rows)
    if split: assert all(sum(p.size for p in r) == row_len for r in rows[:-1])
    else: assert ledger['split'] == sum((n - 1)//(row_len - 1) for n in sizes if n)      # only what is longer than a row is cut
    assert balanced(ledger, row_len) and ledger['waiting'] == ledger['dropped'] == 0

def test_at_most_one_cut_a_row():
    rng = random.Random(0)
    rows, ledger = pack([[0]*rng.randrange(1, 60) for _ in range(3000)], 100)
    assert ledger['split'] <= ledger['rows'] and ledger['padded'] < 100


# --- pretraining

@pytest.mark.parametrize('B, T, buffer', [(64, 1, 1), (3, 16, 1), (2, 100, 5), (4, 2048, 1000)])
def test_an_epoch_is_every_token_once(folder, B, T, buffer):
    loader = PretrainLoader(folder, 'val', TOK, B, T, buffer=buffer, epochs=1)
    batches = list(loader)
    got = counts(batches); got.pop(TOK.bos, 0)
    assert got == text_counts(documents(folder, 'val')) and balanced(loader.ledger, T + 1)
    for b in batches:
        assert b.inputs.shape == b.targets.shape == b.docs.shape and b.inputs.shape[1] == T and b.inputs.dtype == b.targets.dtype == torch.long
        assert (b.inputs[:, 0] == TOK.bos).all() and ((b.targets >= 0).sum(1) > 0).all()
        assert ((b.inputs[:, 1:] == b.targets[:, :-1]) | (b.targets[:, :-1] < 0)).all()
        assert ((b.docs.diff(dim=1) == 1) == (b.inputs[:, 1:] == TOK.bos)).all() or b is batches[-1]
    assert all(b.inputs.shape[0] == B for b in batches[:-1])
    with pytest.raises(StopIteration): next(loader)

def test_endless_rows_are_full_and_epochs_pass(folder):
    loader = PretrainLoader(folder, 'val', TOK, 8, 300)
    for _ in range(60): assert (next(loader).targets >= 0).all()
    assert loader.epoch > 3 and loader.ledger['padded'] == 0 and balanced(loader.ledger, 301)

def test_rows_do_not_depend_on_the_batch_size(folder):
    one, six = (PretrainLoader(folder, 'train', TOK, B, 64) for B in (1, 6))
    assert torch.equal(torch.cat([next(one).inputs for _ in range(12)]), torch.cat([next(six).inputs for _ in range(2)]))

def test_seeds_and_epochs_have_orders_of_their_own(folder):
    a, b, c = (next(PretrainLoader(folder, 'train', TOK, 2, 64, seed=s)) for s in (0, 0, 1))
    assert same(a, b) and not same(a, c)

@pytest.mark.parametrize('world_size', [2, 3, 100])
def test_ranks_share_the_tokens(folder, world_size):
    parts = [counts(PretrainLoader(folder, 'val', TOK, 2, 64, rank=r, world_size=world_size, epochs=1)) for r in range(world_size)]
    got = sum(parts, Counter()); got.pop(TOK.bos)
    assert got == text_counts(documents(folder, 'val'))

def test_one_document_feeds_one_process(tmp_path):
    write_shards(tmp_path/'d', ['a small document'], ['b'])
    loader = PretrainLoader(tmp_path/'d', 'train', TOK, 4, 200, buffer=100)
    assert (next(loader).targets >= 0).all()
    with pytest.raises(UserError, match='1 documents in train cannot feed process 1 of 2'): PretrainLoader(tmp_path/'d', 'train', TOK, 1, 8, rank=1, world_size=2)

@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 80), B=st.integers(1, 5), T=st.sampled_from([7, 64, 333]), buffer=st.integers(1, 300), world_size=st.integers(1, 3))
def test_resume_is_exact_anywhere(folder, stop, B, T, buffer, world_size):
    def make(B=B): return PretrainLoader(folder, 'val', TOK, B, T, buffer=buffer, rank=world_size-1, world_size=world_size, seed=3)
    loader, other = make(), make()
    for _ in range(stop): next(loader)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert other.state_dict() == loader.state_dict()
    assert all(same(next(loader), next(other)) for _ in range(15)) and loader.ledger == other.ledger

def test_resume_of_a_finite_loader_ends_at_the_same_place(folder):
    def make(): return PretrainLoader(folder, 'val', TOK, 3, 50, epochs=2, buffer=20)
    total = sum(1 for _ in make())
    for stop in (0, 1, total//2, total - 1, total):
        loader, other = make(), make()
        for _ in range(stop): next(loader)
        other.load_state_dict(loader.state_dict())
        rest = list(other)
        assert len(rest) == total - stop and all(same(a, b) for a, b in zip(loader, rest))

def test_the_state_is_not_shared_with_the_loader(folder):
    loader = PretrainLoader(folder, 'val', TOK, 3, 50)
    state = loader.state_dict(); before = json.dumps(state)
    other = PretrainLoader(folder, 'val', TOK, 3, 50); other.load_state_dict(state); next(other); next(loader)
    assert json.dumps(state) == before

@pytest.mark.parametrize('other, says', [(dict(T=51), 'T'), (dict(seed=1), 'seed'), (dict(buffer=7), 'buffer'), (dict(split='train'), 'data'),
    (dict(rank=1, world_size=2), 'rank, world_size'), (dict(tok=train_bpe(['abc abc'], 300)), 'tokenizer')])
def test_a_foreign_state_is_refused(folder, other, says):
    make = lambda tok=TOK, split='val', T=50, **kw: PretrainLoader(folder, split, tok, 2, T, **kw)
    with pytest.raises(UserError, match=f'settings or data .{says}.:'): make(**other).load_state_dict(make().state_dict())

@pytest.mark.parametrize('bad', [dict(B=0), dict(T=0), dict(buffer=0), dict(epochs=0)])
def test_bad_sizes(folder, bad):
    with pytest.raises(UserError, match=f'{next(iter(bad))} must be at least 1'): PretrainLoader(folder, 'val', TOK, **{**dict(B=1, T=8), **bad})
    with pytest.raises(UserError, match='no split'): PretrainLoader(folder, 'dev', TOK, 1, 8)

def test_a_damaged_shard_stops_the_loader(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'d')
    shard = tmp_path/'d/train-00001.parquet'; raw = bytearray(shard.read_bytes()); raw[len(raw)//2] ^= 1; shard.write_bytes(raw)
    with pytest.raises(UserError, match='train-00001.parquet, row group'): list(PretrainLoader(tmp_path/'d', 'train', TOK, 4, 64, epochs=1))


def test_a_rank_outside_the_world_is_refused(folder):
    with pytest.raises(UserError, match='cannot feed process 2 of 2'): PretrainLoader(folder, 'train', TOK, 1, 8, rank=2, world_size=2)


# --- validation

def test_validation_is_the_same_for_any_shape(folder):
    want = text_counts(documents(folder, 'val'))
    for B, T in ((64, 1), (3, 50), (8, 300), (100, 5000)): assert counts(val_batches(folder, TOK, B, T)) == want
    rows = {B: torch.cat([torch.stack([*b]) for b in val_batches(folder, TOK, B, 128)], dim=1) for B in (1, 5, 64)}
    assert torch.equal(rows[1], rows[5]) and torch.equal(rows[1], rows[64])

def test_validation_counts_every_byte(folder):
    tok = train_bpe(documents(folder, 'train'), 600)
    n = torch.tensor(tok.token_bytes())
    got = sum(int(n[b.targets[b.targets >= 0]].sum()) for b in val_batches(folder, tok, 4, 100))
    assert got == sum(len(t.encode()) for t in documents(folder, 'val'))

@pytest.mark.parametrize('max_tokens', [1, 63, 64, 65, 5000, 10**9])
def test_max_tokens_is_exact(folder, max_tokens):
    total = sum(text_counts(documents(folder, 'val')).values())
    got = [counts(val_batches(folder, TOK, B, T, max_tokens)) for B, T in ((1, 64), (7, 33), (64, 1000))]
    assert got[0] == got[1] == got[2] and sum(got[0].values()) == min(total, max_tokens)

def test_val_batches_refuses_bad_sizes(folder):
    for bad in (dict(B=0), dict(T=0), dict(max_tokens=0)):
        with pytest.raises(UserError, match='at least 1'): next(val_batches(folder, TOK, **{**dict(B=1, T=8), **bad}))


# --- conversations

def chat(mask): return Rendered([TOK.bos] + [m + 2*(i%100) for i, m in enumerate(mask)], [0] + list(mask))
chats = st.lists(st.lists(st.integers(0, 1), max_size=60).map(chat), min_size=1, max_size=30)

@settings(max_examples=150, deadline=None)
@given(chats, st.integers(1, 40), st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(1, 3))
def test_the_chat_packer_always_ends(rendered, T, B, buffer, shuffle, epochs):
    usable = [r for r in rendered if len(r.ids) <= T + 1 and any(r.mask[1:])]
    if not usable:
        with pytest.raises(UserError, match='none of'): ChatLoader(rendered, TOK, B, T)
        return
    loader = ChatLoader(rendered, TOK, B, T, buffer=buffer, shuffle=shuffle, epochs=epochs)
    batches = list(loader)
    assert all((b.targets >= 0).any(1).all() for b in batches)
    assert counts(batches) == Counter([i for r in usable for i, m in zip(r.ids, r.mask) if m]*epochs)
    l = loader.ledger
    assert balanced(l, T + 1) and l['waiting'] == l['split'] == 0
    assert l['read'] == epochs*sum(len(r.ids) for r in rendered) and l['emitted'] == epochs*sum(len(r.ids) for r in usable)
    assert sum(loader.left_out.values()) == len(rendered) - len(usable)

def test_conversations_stay_whole():
    rendered = [render(TOK, c) for c in tinyworld.conversations(80)]
    loader = ChatLoader(rendered, TOK, 2, 700, epochs=1)
    seen, whole = [], {tuple(r.ids) for r in rendered}
    for b in loader:
        for ids, targets, docs in zip(b.inputs.tolist(), b.targets.tolist(), b.docs.tolist()):
            full = ids + [targets[-1]] if targets[-1] >= 0 else ids         # the last token of a full row is only a target
            docs = docs + docs[-1:]*(len(full) - len(ids))
            for d in sorted(set(docs)): seen.append(tuple(t for t, x in zip(full, docs) if x == d))
    seen = [s for s in seen if set(s) != {TOK.bos}]                         # padding
    assert len(seen) == 80 and set(seen) == whole

def test_one_overlong_chat_does_not_clog():
    rendered = [chat([1]*500)]*50 + [chat([0, 1, 1])]*30
    loader = ChatLoader(rendered, TOK, 4, 100, buffer=10)
    for _ in range(100): assert (next(loader).targets >= 0).any(1).all()
    assert loader.left_out == {'longer than a row': 50, 'nothing graded': 0} and loader.epoch > 3 and balanced(loader.ledger, 101)

@settings(max_examples=25, deadline=None)
@given(chats, st.integers(0, 60), st.integers(1, 20), st.booleans())
def test_chat_resume_is_exact(rendered, stop, buffer, shuffle):
    rendered = rendered + [chat([1, 1])]
    def make(): return ChatLoader(rendered, TOK, 2, 30, buffer=buffer, shuffle=shuffle, seed=4)
    loader, other = make(), make()
    for _ in range(stop): next(loader)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert all(same(next(loader), next(other)) for _ in range(15)) and loader.ledger == other.ledger

def test_a_state_of_other_conversations_is_refused():
    one, other = (ChatLoader([chat([1, m, 1])], TOK, 1, 9) for m in (0, 1))
    with pytest.raises(UserError, match='data .conversations.:'): other.load_state_dict(one.state_dict())


# --- real text

def test_books_are_packed_without_waste(tmp_path):
    root = os.environ.get('NANOCHAT_SHARED_DATA')
    if not root: pytest.skip('NANOCHAT_SHARED_DATA is not set: no real text to try')
    path = Path(root)/'text/books_val.jsonl.gz'
    if not path.exists(): pytest.skip(f'{path} is not there')
    train, val = split_documents(path)
    write_shards(tmp_path/'d', train, val)
    tok = train_bpe(documents(tmp_path/'d', 'val'), 2048)
    loader = PretrainLoader(tmp_path/'d', 'train', tok, 8, 512, epochs=1)
    start, n = time.process_time(), 0
    for b in loader: n += b.inputs.numel()
    rate, l = n/(time.process_time() - start), loader.ledger
    assert balanced(l, 513) and l['padded'] < 513 and l['split']/l['emitted'] < .005 and l['waiting'] == l['dropped'] == 0
    assert rate > 100_000, f'{rate:.0f} tokens for each second of one core'
