"""Real text, equal work: nine public-domain books, depth 4, V = 4,096, T = 512, 150 steps of 8,192 tokens.

    python tools/bench_books.py --out books.json --seeds 3        reads $NANOCHAT_SHARED_DATA/text; 7 to 15 minutes a seed on two cores
    python tools/bench_books.py --dial clip_norm=0.3              the same with another number of the dial

Training documents are pieces of about 3,000 characters, cut at paragraph ends and shuffled; validation is five other books, all of them,
in bits per byte. Each finished run is written at once; run it again to go on. For comparison, measured on another day on a like machine: the
reference system with its own recipe reached 1.967 after 100 steps and 1.922 after 150, at about 2,850 tokens/s (one run each).

Speed is worth what the machine is worth at that moment, so a product of matrices is timed beside every step: `products` is its rate in
GFLOP/s, `share` the median of (the step's FLOPs / its seconds / that rate). The reference's machine had AVX2 and gave 145-155 GFLOP/s;
MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 before the command makes a newer chip such a machine (with a
TORCHINDUCTOR_CACHE_DIR of its own: compiled code for one instruction set gives NaN under another).
"""
import argparse, gzip, json, os, random, statistics, tempfile, time
from collections import Counter
from pathlib import Path
import torch
from nanochat.common import environment, read_json, seed_everything, write_json
from nanochat.dataloader import PretrainLoader, val_batches
from nanochat.dataset import write_shards
from nanochat.gpt import GPT
from nanochat.head import bits_per_byte
from nanochat.optim import make_optimizer
from nanochat.scaling import dial_settings, gpt_config, recipe, set_schedule
from nanochat.tokenizer import train_bpe
from nanochat.train import train_step


def pieces(text, size=3000):
    "Paragraphs joined until they reach `size` characters"
    piece = ''
    for paragraph in text.split('\n\n'):
        piece += paragraph + '\n\n'
        if len(piece) >= size:
            yield piece
            piece = ''
    if piece.strip(): yield piece

def books(name):
    path = Path(os.environ.get('NANOCHAT_SHARED_DATA', '../shared/data'))/'text'/name
    if not path.exists(): raise SystemExit(f'error: {path} is missing: set NANOCHAT_SHARED_DATA to the folder of real files')
    with gzip.open(path, 'rt', encoding='utf-8') as f: return [p for line in f for p in pieces(json.loads(line)['text'])]

def timed(f, spent, name):
    "`f`, its seconds added to `spent`"
    def g(*args):
        t = time.perf_counter()
        out = f(*args)
        spent[name] += time.perf_counter() - t
        return out
    return g

def products_rate(n=6, shape=(4096, 256, 1024)):
    "FLOP/s of `n` products, a layer's own size: what the machine gives at this moment"
    m, k, c = shape
    a, b, out = torch.ones(m, k), torch.ones(c, k), torch.empty(m, c)
    torch.mm(a, b.T, out=out)
    t = time.perf_counter()
    for _ in range(n): torch.mm(a, b.T, out=out)
    return 2 * m * k * c * n / (time.perf_counter() - t)

def one_run(folder, tok, seed, steps, at, dial, compiled):
    "Bits per byte on all of the validation text after the steps of `at`, tokens a second, shares of a step, and seconds until the first update"
    start, r = time.perf_counter(), recipe(4, tok.n_vocab, 512, **{**dict(steps=steps, batch_tokens=8192, device_batch=8), **dial})
    seed_everything(seed)
    model = GPT(gpt_config(r))
    if compiled:
        for block in model.blocks: block.compile()
    optimizer, sizes = make_optimizer(model, r), torch.as_tensor(tok.token_bytes())
    loader, bpb, first = PretrainLoader(folder, 'train', tok, r.device_batch, r.max_len, seed=seed), {}, None
    spent, took, rates = Counter(), [], []
    optimizer.step, fetch = timed(optimizer.step, spent, 'optimizer'), timed(lambda: [next(loader) for _ in range(r.grad_accum)], spent, 'loader')
    for step in range(steps):
        rates.append(products_rate())
        t = time.perf_counter()
        set_schedule(optimizer, r, step)
        train_step(model, optimizer, fetch())
        took.append(time.perf_counter() - t)
        first = first or time.perf_counter() - start
        if step + 1 in at: bpb[step + 1] = bits_per_byte(model, val_batches(folder, tok, 8, r.max_len), sizes)['bpb']
    later, flops = slice(min(3, steps - 1), None), model.flops_per_token(r.max_len) * 8192               # the first steps compile and warm up
    return dict(bpb=bpb, tokens_per_s=8192 / statistics.median(took[later]), tokens_per_s_mean=8192 / statistics.mean(took[later]), products=statistics.median(rates) / 1e9,
                share=statistics.median(flops / s / rate for s, rate in zip(took[later], rates[later])), seconds=sum(took),
                shares={name: s / sum(took) for name, s in spent.items()}, seconds_to_first_update=first, params=model.num_params()['total'])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='books.json', help='where to write, and what to go on from')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--steps', type=int, default=150)
    p.add_argument('--dial', default='', help='other numbers of the recipe, as name=value,name=value')
    p.add_argument('--compiled', action='store_true', help='compile the blocks, as base_train --compiled does')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    train, val = books('books_small.jsonl.gz'), books('books_val.jsonl.gz')
    random.Random(0).shuffle(train)
    tok = train_bpe(train, 4096)
    done = read_json(a.out) if Path(a.out).exists() else dict(environment=environment(), runs=[])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)/'books'
        write_shards(folder, train, val, source='books')
        for seed in range(a.seeds):
            if any((r['seed'], r['steps'], r['dial'], r['compiled']) == (seed, a.steps, a.dial, a.compiled) for r in done['runs']): continue
            done['runs'].append(dict(seed=seed, steps=a.steps, dial=a.dial, compiled=a.compiled, threads=a.threads,
                                     **one_run(folder, tok, seed, a.steps, {100, a.steps}, dial_settings(a.dial), a.compiled)))
            write_json(a.out, done)
            print(json.dumps(done['runs'][-1]), flush=True)


if __name__ == '__main__': main()
