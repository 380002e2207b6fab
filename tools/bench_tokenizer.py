"""Our tokenizer beside rustbpe and tiktoken used directly, in one process: `python tools/bench_tokenizer.py [files ...]`

`tokenizer_rows(texts)` returns a row for each comparison: name, ours and direct in MB/s (medians of runs that take turns), ratio, and its
quartiles. The ratio is the median over pairs of neighbouring runs, ours over direct; on a shared machine single runs of the same work
differ by a third.
"""
import json, statistics, sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def clock(f):
    "Seconds that one call takes"
    start = time.perf_counter()
    f()
    return time.perf_counter() - start

def row(name, n_bytes, ours, direct, repeats):
    "One comparison; who goes first changes from pair to pair"
    ours(); direct()
    times = {ours: [], direct: []}
    for i in range(repeats):
        for f in (ours, direct) if i % 2 else (direct, ours): times[f].append(clock(f))
    o, d = (n_bytes / 1e6 / statistics.median(times[f]) for f in (ours, direct))
    ratios = sorted(b / a for a, b in zip(times[ours], times[direct]))
    low, mid, high = (ratios[round(q * (len(ratios) - 1))] for q in (.25, .5, .75))
    return dict(name=name, ours=round(o, 2), direct=round(d, 2), ratio=round(mid, 3), quartiles=f'{low:.2f}–{high:.2f}')

def tokenizer_rows(
    texts, # documents, some MB together
    vocab_size=8192,
    repeats=15, # pairs of runs for each row
):
    "Training against rustbpe, encoding one by one and in batches against tiktoken; whole documents and pieces of 500 characters"
    import rustbpe, tiktoken
    from nanochat.tokenizer import PATTERN, SPECIALS, train_bpe
    texts = list(texts)
    n_bytes, tok = sum(len(t.encode()) for t in texts), train_bpe(texts, vocab_size)
    direct = tiktoken.Encoding('direct', pat_str=PATTERN, mergeable_ranks=tok.ranks, special_tokens={})
    def train_direct():                            # until it can encode, as ours can
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIALS), pattern=PATTERN)
        ranks = {bytes(t): i for t, i in trainer.get_mergeable_ranks()}
        return tiktoken.Encoding('direct', pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    rows = [row('train, rustbpe', n_bytes, lambda: train_bpe(texts, vocab_size), train_direct, repeats)]
    short = [t[i:i+500] for t in texts for i in range(0, len(t), 500)]
    for kind, docs in (('documents', texts), ('500 characters', short)):
        rows.append(row(f'encode one by one, {kind}', n_bytes, lambda: [tok.encode(t) for t in docs],
                        lambda: [direct.encode_ordinary(t) for t in docs], repeats))
        rows.append(row(f'encode_batch, {kind}', n_bytes, lambda: tok.encode_batch(docs),
                        lambda: direct.encode_ordinary_batch(docs), repeats))
    return rows

if __name__ == '__main__':
    from nanochat.dataset import read_texts
    from nanochat.tinyworld import documents
    texts = [t for path in sys.argv[1:] for _, t in read_texts(path)] or [d.text for d in documents(10_000)]
    for r in tokenizer_rows(texts): print(json.dumps(r))
