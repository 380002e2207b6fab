"""One table about text on its way to the model: `python tools/bench_text.py [--quick] [--million] [--json]`

Packing waste and microseconds a row of the four packers, on real books and on web-like lengths; tokens a second of the loader from token
shards and on the fly, against what a d12 on one H100 eats; the tokenizer beside rustbpe and tiktoken. One process, one core. Things that are
compared take turns; a ratio is the median of the ratios of pairs, and ± is half of the range of the middle half of the runs.

Real books are read from $NANOCHAT_SHARED_DATA/text/books_small.jsonl.gz, chapters as documents; without them their rows are skipped, with the reason.
Web-like lengths are a lognormal with a mean near 1,030 tokens, that of filtered web text, and sigma 1: with these numbers best-fit crop
drops about what nanochat's log reports for it on the web (34.6 % at T = 2048).

--million makes a million short documents, prepares, tokenizes and packs all of them, and prints the memory along the way (about a minute).
"""
import argparse, gzip, json, os, re, shutil, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault('OMP_NUM_THREADS', '1')

D12_EATS = 1.1e6      # tokens a second that a d12 trains on with one H100 at the roof of its matrix units
T = 2048

def half_range(xs):
    "Half of the range of the middle half"
    if len(xs) < 3: return (max(xs) - min(xs))/2
    q = statistics.quantiles(xs, n=4)
    return (q[2] - q[0])/2

def web_sizes(n, seed=0):
    "Sizes of `n` web-like documents, BOS included"
    import numpy as np
    return np.maximum(2, np.random.default_rng(seed).lognormal(np.log(627), 1, n)).astype(int).tolist()

def chapters():
    "(chapters of the books, why there are none)"
    root = os.environ.get('NANOCHAT_SHARED_DATA')
    path = Path(root or '/')/'text/books_small.jsonl.gz'
    if not root: return [], 'NANOCHAT_SHARED_DATA is not set'
    if not path.exists(): return [], f'{path} is not there'
    books = [json.loads(line)['text'] for line in gzip.open(path, 'rt', encoding='utf-8')]
    return [c for book in books for c in re.split(r'(?m)^(?=## )', book) if c.strip()], ''

def packers():
    from nanochat.dataloader import best_fit_crop, best_fit_split, concatenate, greedy, pack
    return {'concatenate': concatenate, 'greedy': greedy, 'best-fit crop, linear scan': best_fit_crop,
            'best fit with splitting, linear scan': best_fit_split, 'ours: the same rows, queues': lambda sizes, n: pack(sizes, n)[0]}

def packing_rows(name, sizes, timed, repeats):
    "Waste over all sizes; time over the first `timed`, in turns"
    from nanochat.dataloader import waste
    took, out = {k: [] for k in packers()}, []
    for i in range(repeats):
        for k, f in list(packers().items())[::1 if i % 2 else -1]:
            t = time.process_time(); rows = f(sizes[:timed], T + 1); took[k].append(1e6*(time.process_time() - t)/len(rows))
    for k, f in packers().items():
        w = waste(f(sizes, T + 1), sizes, T + 1, headless=k == 'concatenate')
        ratio = statistics.median(a/b for a, b in zip(took[k], list(took.values())[-1]))
        out.append({'what': f'{name}: {k}', 'dropped %': round(w['dropped'], 2), 'padded %': round(w['padded'], 2), 'extra BOS %': round(w['extra_bos'], 2),
                    'rows without BOS %': round(w['no_bos'], 1), 'us/row': round(statistics.median(took[k]), 1), '±': round(half_range(took[k]), 1),
                    'best': round(min(took[k]), 1), 'x ours': round(ratio, 2)})
    return out

def loader_rows(name, texts, seconds, repeats):
    "Tokens a second of one core, from token shards and on the fly, in turns"
    from nanochat.dataloader import PretrainLoader
    from nanochat.dataset import write_shards
    from nanochat.tokenizer import train_bpe
    from nanochat.tokens import tokenize_shards
    here, out = Path(tempfile.mkdtemp()), []
    try:
        tok = train_bpe(texts[:2000], 32_768)
        n = max(1, len(texts)//20)
        write_shards(here/'fly', texts[n:], texts[:n], rows_per_group=256)
        shutil.copytree(here/'fly', here/'stored')
        tokenize_shards(here/'stored', tok)
        loaders = {'token shards': PretrainLoader(here/'stored', 'train', tok, 32, T), 'on the fly': PretrainLoader(here/'fly', 'train', tok, 32, T)}
        rates = {k: [] for k in loaders}
        for loader in loaders.values(): next(loader)
        for i in range(repeats):
            for k, loader in loaders.items():
                t, n = time.process_time(), 0
                while time.process_time() - t < seconds: n += next(loader).inputs.numel()
                rates[k].append(n/(time.process_time() - t))
        for k, r in rates.items():
            out.append({'what': f'loader, {name}: {k}', 'Mtok/s a core': round(statistics.median(r)/1e6, 2), '±': round(half_range(r)/1e6, 2),
                        'x a d12 on one H100': round(statistics.median(r)/D12_EATS, 2), 'cores it takes': round(D12_EATS/statistics.median(r), 3)})
    finally: shutil.rmtree(here, ignore_errors=True)
    return out

def memory_mb():
    "Memory of this process that is not a mapped file, in MB"
    status = Path('/proc/self/status')
    if status.exists(): return int(re.search(r'RssAnon:\s+(\d+)', status.read_text())[1])//1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//(2**20 if sys.platform == 'darwin' else 2**10)

def million_rows(docs=1_000_000):
    "Prepare, tokenize and pack a million short documents; memory when a tenth is done and at the end of each"
    from nanochat.dataloader import PretrainLoader
    from nanochat.dataset import write_shards
    from nanochat.tokenizer import train_bpe
    from nanochat.tokens import tokenize_shards
    here, out = Path(tempfile.mkdtemp()), []
    def text(i): return f'Document {i} says that {i % 97} times {i % 89} is {(i % 97)*(i % 89)}.'
    tok = train_bpe(map(text, range(5000)), 600)
    def stage(name, parts):
        "Run through `parts`; the memory after a tenth of them, at the end, and the most"
        t, marks = time.perf_counter(), [memory_mb() for _ in parts]
        out.append({'what': f'{docs:,} documents: {name}', 'MB at a tenth': marks[len(marks)//10], 'MB at the end': marks[-1], 'most': max(marks),
                    's': round(time.perf_counter() - t, 1)})
    try:
        marks, t = [], time.perf_counter()
        def flow():
            for i in range(docs):
                if i % 10_000 == 0: marks.append(memory_mb())
                yield text(i)
        write_shards(here/'d', flow(), map(text, range(docs, docs + 1000)))
        out.append({'what': f'{docs:,} documents: prepare', 'MB at a tenth': marks[len(marks)//10], 'MB at the end': marks[-1], 'most': max(marks),
                    's': round(time.perf_counter() - t, 1)})
        fly = PretrainLoader(here/'d', 'train', tok, 32, 512, epochs=1)
        stage('pack an epoch on the fly', fly)
        t, before = time.perf_counter(), memory_mb()
        tokenize_shards(here/'d', tok)
        out.append({'what': f'{docs:,} documents: tokenize', 'MB at a tenth': before, 'MB at the end': memory_mb(), 'most': '-', 's': round(time.perf_counter() - t, 1)})
        stored = PretrainLoader(here/'d', 'train', tok, 32, 512, epochs=1)
        stage('pack an epoch from token shards', stored)
        assert fly.ledger == stored.ledger and stored.ledger['waiting'] == stored.ledger['dropped'] == 0, 'the ledgers differ'
    finally: shutil.rmtree(here, ignore_errors=True)
    return out

def show(rows):
    "Rows with equal columns under one head"
    for i, r in enumerate(rows):
        keys = [k for k in r if k != 'what']
        if i == 0 or keys != [k for k in rows[i-1] if k != 'what']: print('\n' + ' '*54 + ''.join(f'{k:>{max(10, len(k) + 2)}}' for k in keys))
        print(f'{r["what"]:54}' + ''.join(f'{str(r[k]):>{max(10, len(k) + 2)}}' for k in keys), flush=True)

def tokenizer_table(texts):
    try: from bench_tokenizer import tokenizer_rows
    except ImportError as e: return [{'what': 'tokenizer', 'skipped': str(e)}]
    return [{'what': 'tokenizer: ' + r.pop('name'), **{f'{k} MB/s' if k in ('ours', 'direct') else k: v for k, v in r.items()}} for r in tokenizer_rows(texts)]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='fewer documents and repeats: to see that it works')
    p.add_argument('--million', action='store_true', help='also a million documents')
    p.add_argument('--json', action='store_true', help='one JSON object a line')
    a = p.parse_args()
    import torch
    from nanochat.common import environment
    from nanochat.tinyworld import documents
    torch.set_num_threads(1)
    n, timed, repeats, seconds = (3000, 1000, 2, .3) if a.quick else (24_000, 3000, 5, 1)
    books, why = chapters()
    world = ' '.join(d.text for d in documents(3000 if a.quick else 30_000))
    web, at = [], 0
    for size in web_sizes(400 if a.quick else 4000, 1):            # text of web-like lengths, at three and a half bytes a token
        if at + 3.5*size > len(world): at = 0
        web.append(world[at:at + int(3.5*size)]); at += int(3.5*size)
    rows = packing_rows('web-like', web_sizes(n), timed, repeats)
    if books:
        from nanochat.tokenizer import train_bpe
        tok = train_bpe(books, 32_768)
        sizes = [len(i) + 1 for i in tok.encode_batch(books)]
        rows += packing_rows('books', sizes, len(sizes), repeats)
    else: rows.append({'what': 'books', 'skipped': why})
    rows += loader_rows('web-like', web, seconds, repeats)
    rows += loader_rows('books', books, seconds, repeats) if books else []
    rows += tokenizer_table((books or web)[:60 if a.quick else 200])
    if a.million: rows += million_rows(20_000 if a.quick else 1_000_000)
    e = environment('cpu')
    if a.json: [print(json.dumps(r)) for r in rows]
    else:
        print(f'{e["device_name"]}, torch {e["torch"]}, T = {T}, times of one core; {len(books)} chapters of books')
        show(rows)

if __name__ == '__main__': main()
