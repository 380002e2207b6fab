"The loaders beyond their page: any lengths, any stop, any number of ranks, bad states, real books."
import hashlib, itertools, json, os, random, shutil, time
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from nanochat import tinyworld
from nanochat.common import UserError
from nanochat.conversation import Rendered, render
from nanochat.dataloader import (ChatLoader, Packer, Piece, Pool, PretrainLoader, best_fit_crop, best_fit_split, concatenate,
                                 fill_row, greedy, pack, to_batch, val_batches, waste)
from nanochat.dataset import documents, split_documents, write_shards
from nanochat.tokenizer import Tokenizer, train_bpe
from nanochat.tokens import tokenize_shards, token_folder

TOK = Tokenizer({bytes([b]): b for b in range(256)})

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Tokenized on the fly"
    d = tmp_path_factory.mktemp('data')/'world'
    texts = [d.text for d in tinyworld.documents(700)]
    texts[150:150] = ['a long document about nothing. '*200, 'another one, a little shorter. '*90, 'x']
    write_shards(d, texts[100:], texts[:100], rows_per_group=64, rows_per_shard=200)
    return d

@pytest.fixture(scope='module')
def stored(folder, tmp_path_factory):
    "The same text, tokenized before"
    d = tmp_path_factory.mktemp('stored')/'world'
    shutil.copytree(folder, d)
    tokenize_shards(d, TOK)
    return d

def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b))
def counts(batches): return Counter(t for b in batches for t in b.targets[b.targets >= 0].tolist())
def text_counts(texts, tok=TOK): return Counter(t for text in texts for t in tok.encode(text))
def balanced(l, row_len):
    return l['read'] + l['split'] == l['emitted'] + l['dropped'] + l['waiting'] and l['emitted'] + l['padded'] == l['rows']*row_len
def digest(batches):
    h = hashlib.sha256()
    for b in batches:
        for t in b: h.update(t.numpy().tobytes())
    return h.hexdigest()


# --- packing

lengths = st.lists(st.integers(0, 90), max_size=40)

@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(2, 40), st.integers(1, 50), st.booleans())
def test_pack_loses_nothing(tokens, row_len, buffer, split):
    rows, ledger = pack([n + 1 for n in tokens], row_len, buffer, split)
    got = {}
    for p in (p for r in rows for p in r): got.setdefault(p.doc, []).append((p.start, p.stop))
    for doc, n in enumerate(tokens):                               # the pieces of a document lie behind each other, without gap or overlap
        cuts = sorted(set(got.get(doc, [])) - {(0, 0)})            # (0, 0) is a lone BOS at the end of a row
        assert [a for a, _ in cuts] == [0, *(b for _, b in cuts)][:len(cuts)] and (not n or cuts[-1][1] == n)
    assert all(1 < sum(p.size for p in r) <= row_len for r in rows)
    if split: assert all(sum(p.size for p in r) == row_len for r in rows[:-1])
    else: assert ledger['split'] == sum((n - 1)//(row_len - 1) for n in tokens if n)     # only what is longer than a row is cut
    assert balanced(ledger, row_len) and ledger['waiting'] == ledger['dropped'] == 0

@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(2, 90), max_size=40), st.integers(2, 40), st.integers(1, 50))
def test_production_packs_what_the_naive_packer_packs(sizes, row_len, buffer):
    pool, todo, rows = Pool(row_len), iter(enumerate(sizes)), []
    while True:
        for doc, n in itertools.islice(todo, max(0, buffer - len(pool))): pool.add(Piece(doc, 0, n))
        if not len(pool): break
        rows.append(fill_row(pool, row_len))
    assert rows == best_fit_split(sizes, row_len, buffer)

@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=40), st.integers(2, 40), st.integers(1, 50))
def test_every_packer_ends_and_is_billed_right(sizes, row_len, buffer):
    for f in (concatenate, greedy, best_fit_crop, best_fit_split):
        rows = f(sizes, row_len, buffer)
        assert all(r and sum(p.size for p in r) <= row_len for r in rows)
        w = waste(rows, sizes, row_len, headless=f is concatenate)
        assert -1e-9 < w['dropped'] < (1e-9 if f in (concatenate, best_fit_split) else 100)
        assert (w['no_bos'] == 0) or f is concatenate
        if f in (concatenate, greedy): assert all(sum(p.size for p in r) == row_len for r in rows[:-1])

def test_a_cut_is_the_end_of_its_row():
    "So a BOS in the middle of a row always means that the document before it has ended"
    rng = random.Random(0)
    sizes = [rng.choice((rng.randrange(2, 60), rng.randrange(100, 900))) for _ in range(2000)]
    rows, ledger = pack(sizes, 100, buffer=50)
    assert all(p.stop == sizes[p.doc] - 1 for r in rows for p in r[:-1])
    assert ledger['split'] <= ledger['rows'] and ledger['padded'] < 100

def test_nothing_waits_for_ever():
    "A piece begins a row at the latest when all that stood before it have"
    rng, packer, added, worst = random.Random(0), Packer(101), {}, 0
    for doc in range(4000):
        packer.add((doc, rng.choice((3, 30, 99, 100, 250))))
        added[doc] = packer.counts['rows'], len(packer.pool)
        while packer.ready(200):
            for p in packer.row():
                if p.doc in added: worst = max(worst, packer.counts['rows'] - sum(added.pop(p.doc)))
    assert worst <= 0 and len(added) <= 200

WEB = np.maximum(2, np.random.default_rng(0).lognormal(6.44, 1, 12_000)).astype(int).tolist()

def test_the_default_loses_next_to_nothing_on_web_lengths():
    rows, ledger = pack(WEB, 2049)
    w = waste(rows, WEB, 2049)
    assert w['dropped'] == 0 and w['padded'] + w['extra_bos'] < .1 and w['no_bos'] == 0
    assert waste(greedy(WEB, 2049), WEB, 2049)['dropped'] > 30

def test_a_row_costs_microseconds():
    "Throughput floor: far below the linear scan, whatever else the machine does"
    def us(f):
        t = time.process_time(); n = len(f())
        return 1e6*(time.process_time() - t)/n
    fast, slow = (min(us(f) for _ in range(2)) for f in (lambda: pack(WEB, 2049)[0], lambda: best_fit_split(WEB[:2500], 2049)))
    assert fast < 100 and fast < slow/4, (fast, slow)

def test_crop_clogs_and_split_does_not():
    rng = random.Random(0)
    sizes = [n for _ in range(3000) for n in (rng.randrange(10, 100), rng.randrange(400, 700))]
    late = best_fit_crop(sizes, 101, 100)[500:2000]
    assert all(len(r) == 1 or r[0].size < 101 for r in late)
    assert waste(best_fit_crop(sizes, 101, 100), sizes, 101)['dropped'] > 50 and waste(best_fit_split(sizes, 101, 100), sizes, 101)['dropped'] == 0


# --- tensors

@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=20), st.integers(2, 25), st.booleans(), st.booleans())
def test_to_batch_is_what_a_loop_makes(sizes, row_len, split, grade_bos):
    rows, _ = pack(sizes, row_len, 5, split)
    docs = [[100*d + i + 1 for i in range(n - 1)] for d, n in enumerate(sizes)]
    b = to_batch(rows, row_len, 7, lambda d, start, stop: docs[d][start:stop], grade_bos=grade_bos)
    for row, inputs, targets, numbers, fragments in zip(rows, *(t.tolist() for t in b)):
        want = [(i, n, p.start > 0, i if k or grade_bos else -1) for n, p in enumerate(row) for k, i in enumerate([7, *docs[p.doc][p.start:p.stop]])]
        want += [(7, len(row), False, -1)]*(row_len - len(want))
        assert inputs == [w[0] for w in want[:-1]] and targets == [w[3] for w in want[1:]]
        assert numbers == [w[1] for w in want[:-1]] and fragments == [w[2] for w in want[:-1]]
    assert b.inputs.dtype == b.targets.dtype == b.docs.dtype == torch.long and b.fragments.dtype == torch.bool
    assert all(t.is_contiguous() for t in b)


# --- pretraining

@pytest.mark.parametrize('B, T, buffer', [(64, 1, 1), (3, 16, 1), (2, 100, 5), (4, 2048, 1000)])
def test_an_epoch_is_every_token_once(folder, B, T, buffer):
    loader = PretrainLoader(folder, 'train', TOK, B, T, buffer=buffer, epochs=1)
    batches = list(loader)
    got = counts(batches); got.pop(TOK.bos, 0)
    assert got == text_counts(documents(folder, 'train')) and balanced(loader.ledger, T + 1)
    for b in batches:
        assert b.inputs.shape == b.targets.shape == b.docs.shape == b.fragments.shape and b.inputs.shape[1] == T
        assert (b.inputs[:, 0] == TOK.bos).all() and ((b.targets >= 0).sum(1) > 0).all()
        assert ((b.inputs[:, 1:] == b.targets[:, :-1]) | (b.targets[:, :-1] < 0)).all()
        assert ((b.docs.diff(dim=1) == 1) == (b.inputs[:, 1:] == TOK.bos)).all() or b is batches[-1]
    assert all(b.inputs.shape[0] == B for b in batches[:-1])
    with pytest.raises(StopIteration): next(loader)

def test_fragments_are_the_pieces_that_begin_in_the_middle(folder):
    starts = {tuple(TOK.encode(t)[:20]) for t in documents(folder, 'train')}
    seen = Counter()
    for b in itertools.islice(PretrainLoader(folder, 'train', TOK, 4, 200), 40):
        for ids, docs, fragments in zip(b.inputs, b.docs, b.fragments):
            for d in docs.unique():
                piece = ids[docs == d].tolist()[1:21]
                if len(piece) == 20: seen[tuple(piece) in starts, fragments[docs == d].unique().item()] += 1
    assert seen[True, False] > 50 and seen[False, True] > 20 and not seen[True, True] and not seen[False, False]

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
    loader = PretrainLoader(folder, 'val', TOK, 1, 64, buffer=1)
    first, second = [], []
    while loader.epoch < 3: (first if loader.epoch == 0 else second).append(next(loader).inputs)
    assert not torch.equal(torch.cat(first[:10]), torch.cat(second[:10]))

@settings(max_examples=20, deadline=None)
@given(B=st.integers(1, 5), T=st.sampled_from([1, 7, 64, 333]), buffer=st.integers(1, 300), seed=st.integers(0, 3), epochs=st.sampled_from([1, 2]),
       split=st.sampled_from(['train', 'val']))
def test_token_shards_give_the_same_batches(folder, stored, B, T, buffer, seed, epochs, split):
    a, b = (PretrainLoader(d, split, TOK, B, T, buffer=buffer, seed=seed, epochs=epochs) for d in (folder, stored))
    assert b.source.stored and not a.source.stored
    assert all(same(x, y) for x, y in itertools.zip_longest(itertools.islice(a, 60), itertools.islice(b, 60))) and a.state_dict() == b.state_dict()

def test_tokens_on_the_fly_are_let_go(folder):
    loader = PretrainLoader(folder, 'train', TOK, 2, 100, buffer=20)
    for _ in range(200):
        next(loader)
        assert set(loader.source.held) == {p.doc for p in loader.packer.pool}


# --- many processes

@pytest.mark.parametrize('world_size', [2, 3, 100])
def test_ranks_share_the_rows_of_one(folder, world_size):
    "A step of N processes is N micro-batches of one process; 100 processes are more than row groups and documents of val"
    alone = PretrainLoader(folder, 'val', TOK, 2, 64)
    ranks = [PretrainLoader(folder, 'val', TOK, 2, 64, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(3 if world_size < 100 else 1):
        assert all(same(next(alone), next(r)) for r in ranks)
        assert all(r.state_dict() == alone.state_dict() and r.ledger == alone.ledger for r in ranks)

@pytest.mark.parametrize('world_size', [2, 3, 7])
def test_an_epoch_of_many_ranks_is_every_token_once(stored, world_size):
    got = sum((counts(PretrainLoader(stored, 'val', TOK, 2, 64, rank=r, world_size=world_size, epochs=1)) for r in range(world_size)), Counter())
    got.pop(TOK.bos)
    assert got == text_counts(documents(stored, 'val'))

def test_two_then_three_then_one_process(folder, stored):
    "The rows go on in one order, whoever takes them, with any batch size; text and token shards may change places"
    alone = PretrainLoader(folder, 'train', TOK, 1, 64, buffer=30)
    state = None
    for data, world_size, B, steps in ((folder, 2, 3, 4), (stored, 3, 1, 5), (folder, 1, 4, 6), (stored, 3, 2, 2)):
        ranks = [PretrainLoader(data, 'train', TOK, B, 64, buffer=30, rank=r, world_size=world_size) for r in range(world_size)]
        if state:
            for r in ranks: r.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            for r in ranks: assert torch.equal(next(r).inputs, torch.cat([next(alone).inputs for _ in range(B)]))
        state = ranks[-1].state_dict()
    assert state == alone.state_dict()

def test_one_document_feeds_any_number_of_processes(tmp_path):
    write_shards(tmp_path/'d', ['a small document'], ['b'])
    for r in range(5): assert (next(PretrainLoader(tmp_path/'d', 'train', TOK, 4, 200, buffer=100, rank=r, world_size=5)).targets >= 0).all()

def test_a_rank_outside_the_world_is_refused(folder):
    for rank in (2, -1):
        with pytest.raises(UserError, match=f'no process {rank} among 2'): PretrainLoader(folder, 'train', TOK, 1, 8, rank=rank, world_size=2)
        with pytest.raises(UserError, match=f'no process {rank} among 2'): next(val_batches(folder, TOK, 1, 8, rank=rank, world_size=2))

def test_documents_without_tokens_end_in_a_sentence(tmp_path):
    write_shards(tmp_path/'d', ['', ''], ['b'])
    with pytest.raises(UserError, match='train: no document has a token'): next(PretrainLoader(tmp_path/'d', 'train', TOK, 1, 8))


# --- exact resume

@settings(max_examples=25, deadline=None)
@given(stop=st.integers(0, 80), B=st.integers(1, 5), T=st.sampled_from([7, 64, 333]), buffer=st.integers(1, 300), world_size=st.integers(1, 3),
       text=st.booleans())
def test_resume_is_exact_anywhere(folder, stored, stop, B, T, buffer, world_size, text):
    def make(): return PretrainLoader(folder if text else stored, 'val', TOK, B, T, buffer=buffer, rank=world_size-1, world_size=world_size, seed=3)
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

def test_the_state_is_small_and_quick(stored):
    loader = PretrainLoader(stored, 'train', TOK, 4, 64)
    for _ in range(10): next(loader)
    t = time.process_time(); text = json.dumps(loader.state_dict())
    assert time.process_time() - t < .2 and len(text) < 60_000 and len(loader.packer.pool) > 200

@pytest.mark.parametrize('other, says', [(dict(T=51), 'T was 50, now 51'), (dict(seed=1), 'seed was 0, now 1'), (dict(buffer=7), 'buffer was 1000, now 7'),
    (dict(split='train'), 'data was'), (dict(tok=train_bpe(['abc abc'], 300)), 'tokenizer was')])
def test_a_foreign_state_is_refused(folder, other, says):
    make = lambda tok=TOK, split='val', T=50, **kw: PretrainLoader(folder, split, tok, 2, T, **kw)
    with pytest.raises(UserError, match=f'settings or data .{says}'): make(**other).load_state_dict(make().state_dict())

@pytest.mark.parametrize('bad', [dict(B=0), dict(T=0), dict(buffer=0), dict(epochs=0)])
def test_bad_sizes(folder, bad):
    with pytest.raises(UserError, match=f'{next(iter(bad))} must be at least 1'): PretrainLoader(folder, 'val', TOK, **{**dict(B=1, T=8), **bad})
    with pytest.raises(UserError, match='no split'): PretrainLoader(folder, 'dev', TOK, 1, 8)

def test_a_damaged_shard_stops_the_loader(folder, tmp_path):
    shutil.copytree(folder, tmp_path/'d')
    shard = tmp_path/'d/train-00001.parquet'; raw = bytearray(shard.read_bytes()); raw[len(raw)//2] ^= 1; shard.write_bytes(raw)
    with pytest.raises(UserError, match='train-00001.parquet, row group'): list(PretrainLoader(tmp_path/'d', 'train', TOK, 4, 64, epochs=1))

def test_a_damaged_token_shard_stops_the_loader(stored, tmp_path):
    shutil.copytree(stored, tmp_path/'d')
    path = token_folder(tmp_path/'d', TOK)/'train-00001.bin'; raw = bytearray(path.read_bytes()); raw[len(raw)//2] ^= 1; path.write_bytes(raw)
    with pytest.raises(UserError, match='train-00001.bin or .idx, group'): list(PretrainLoader(tmp_path/'d', 'train', TOK, 4, 64, epochs=1))


# --- validation

def test_validation_is_the_same_for_any_shape(folder):
    want = text_counts(documents(folder, 'val'))
    for B, T in ((64, 1), (3, 50), (8, 300), (100, 5000)): assert counts(val_batches(folder, TOK, B, T)) == want
    rows = {B: torch.cat([torch.stack([*b]) for b in val_batches(folder, TOK, B, 128)], dim=1) for B in (1, 5, 64)}
    assert torch.equal(rows[1], rows[5]) and torch.equal(rows[1], rows[64])

def test_one_hash_of_validation(folder, stored):
    "Which tokens are targets, as one hash, for batch sizes, lengths, ranks, text and token shards; and it is a known one"
    def targets(d, B, T, world_size):
        got = Counter()
        for r in range(world_size): got += counts(val_batches(d, TOK, B, T, 7000, rank=r, world_size=world_size))
        return hashlib.sha256(json.dumps(sorted(got.items())).encode()).hexdigest()
    want = hashlib.sha256(json.dumps(sorted(Counter(list(itertools.chain.from_iterable(TOK.encode(t) for t in documents(folder, 'val')))[:7000]).items())).encode()).hexdigest()
    for d, B, T, world_size in itertools.product((folder, stored), (1, 8), (33, 512), (1, 3)): assert targets(d, B, T, world_size) == want

@pytest.mark.parametrize('world_size', [1, 2, 3, 50])
def test_ranks_share_validation(folder, stored, world_size):
    "Row by row in turns of B; the union is what one process has"
    alone = torch.cat([torch.stack([*b]) for b in val_batches(folder, TOK, 4, 100)], dim=1)
    parts = [list(val_batches(stored, TOK, 4, 100, rank=r, world_size=world_size)) for r in range(world_size)]
    rows = [b for step in itertools.zip_longest(*parts) for b in step if b is not None]
    assert torch.equal(alone, torch.cat([torch.stack([*b]) for b in rows], dim=1))

def test_validation_counts_every_byte(folder):
    tok = train_bpe(documents(folder, 'train'), 600)
    n = torch.tensor(tok.token_bytes())
    got = sum(int(n[b.targets[b.targets >= 0]].sum()) for b in val_batches(folder, tok, 4, 100))
    assert got == sum(len(t.encode()) for t in documents(folder, 'val'))

@pytest.mark.parametrize('max_tokens', [1, 63, 64, 65, 5000, 10**9])
def test_max_tokens_is_exact(folder, stored, max_tokens):
    total = sum(text_counts(documents(folder, 'val')).values())
    got = [counts(val_batches(d, TOK, B, T, max_tokens)) for d, B, T in ((folder, 1, 64), (stored, 7, 33), (folder, 64, 1000))]
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

def test_the_reference_systems_clog(): # T = 512, conversations cut at 2048, 100 slots: its packer stops by the third batch
    rng = random.Random(0)
    rendered = [chat([rng.randrange(2) for _ in range(n - 1)] + [1]) for n in (min(2048, int(rng.lognormvariate(6.5, 1)) + 2) for _ in range(600))]
    loader = ChatLoader(rendered, TOK, 8, 512, buffer=100, epochs=3)
    batches = list(loader)
    assert all((b.targets >= 0).any(1).all() for b in batches) and loader.left_out['longer than a row'] > 200
    assert sum(counts(batches).values()) == 3*sum(sum(r.mask) for r in rendered if len(r.ids) <= 513) and balanced(loader.ledger, 513)

@pytest.mark.parametrize('world_size', [2, 3])
def test_ranks_share_conversations(world_size):
    rendered = [render(TOK, c) for c in tinyworld.conversations(60)]
    alone, ranks = ChatLoader(rendered, TOK, 2, 700), [ChatLoader(rendered, TOK, 2, 700, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(20): assert all(same(next(alone), next(r)) for r in ranks)
    assert all(r.state_dict() == alone.state_dict() for r in ranks)

def test_chat_rows_are_cheap_in_a_large_set():
    "One shuffle an epoch, not one a row"
    loader = ChatLoader([chat([1]*30)]*40_000, TOK, 8, 100, epochs=1)
    next(loader); t = time.process_time()
    for _ in range(200): next(loader)
    assert time.process_time() - t < 2

def test_a_state_of_other_conversations_is_refused():
    one, other = (ChatLoader([chat([1, m, 1])], TOK, 1, 9) for m in (0, 1))
    with pytest.raises(UserError, match='data .conversations was'): other.load_state_dict(one.state_dict())


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
