"""What each addition to the model is worth: the same short run with it and without it, for several seeds.

    python tools/ablate.py --out nbs/ablations.json         about twenty seconds a run on one core, 48 runs

Reads the text and the tokenizer of `bash runs/tiny.sh --small`. Each finished run is written at once; run it again to go on.
At the end it measures how long a step of each variant takes against one of the whole model, in alternation, in one process.
"""
import argparse, json, time
from pathlib import Path
import torch
from nanochat.common import environment, read_json, run_dir, seed_everything, sha256_file, write_json
from nanochat.dataloader import PretrainLoader, val_batches
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import bits_per_byte
from nanochat.optim import make_optimizer
from nanochat.scaling import gpt_config, recipe, set_schedule
from nanochat.tokenizer import Tokenizer
from nanochat.train import train_step

ADDITIONS = {'value tables': 'value_embeds', 'layer scales': 'layer_scales', 'smear': 'smear', 'backout': 'backout'}
OFF = dict.fromkeys(ADDITIONS.values(), False)
VARIANTS = {'none of them': OFF, 'all of them': {},
            **{f'only {name}': {**OFF, field: True} for name, field in ADDITIONS.items()},
            **{f'all but {name}': {field: False} for name, field in ADDITIONS.items()},
            'all, and document masks': dict(mask_docs=True),
            'all, and short windows': dict(window_pattern='SL', short_window=64),
            'all, one key head for two': dict(n_kv_head=1),
            'all, queries and keys not sharpened': dict(qk_gain=1.),
            'all, a cap too high to bite': dict(softcap=80.),
            'all, a head that starts large': dict(head_std=0.02)}


def set_up(change, seed, depth, tokens, max_len, data):
    "Model, optimizer, recipe and loader of one run"
    source, tok = run_dir('data', data), Tokenizer.load(run_dir('tokenizer', data))
    r = recipe(depth, tok.n_vocab, max_len, tokens=tokens, batch_tokens=2048)
    seed_everything(seed)
    model = GPT(GPTConfig(**{**gpt_config(r).to_dict(), **change}))
    return model, make_optimizer(model, r), r, PretrainLoader(source, 'train', tok, r.device_batch, max_len, seed=seed)


def one_run(change, seed, depth, tokens, max_len, data):
    "Validation bits per byte, last losses and seconds of one training run"
    source, tok = run_dir('data', data), Tokenizer.load(run_dir('tokenizer', data))
    model, optimizer, r, loader = set_up(change, seed, depth, tokens, max_len, data)
    start, losses = time.perf_counter(), []
    for step in range(r.steps):
        set_schedule(optimizer, r, step)
        losses.append(train_step(model, optimizer, [next(loader) for _ in range(r.grad_accum)])[0])
    seconds = time.perf_counter() - start
    out = bits_per_byte(model, val_batches(source, tok, 8, max_len, 60_000), torch.as_tensor(tok.token_bytes()))
    return dict(bpb=out['bpb'], train_loss=sum(losses[-10:]) / 10, seconds=seconds, params=model.num_params()['total'])


def step_ratios(change, pairs, depth, tokens, max_len, data):
    """Processor time of a step of a variant over that of the whole model: `pairs` ratios, measured in the order A B, B A, A B, ...
    Not the clock on the wall: there is one thread, and what other programs take is not ours."""
    sides = [set_up(c, 0, depth, tokens, max_len, data) for c in ({}, change)]
    model, optimizer, r, loader = sides[0]
    batches = [next(loader) for _ in range(r.grad_accum)]
    def seconds(side):
        start = time.process_time()
        train_step(side[0], side[1], batches)
        return time.process_time() - start
    for side in sides * 2: seconds(side)                            # warm up
    ratios = []
    for i in range(pairs):
        took = {k: seconds(sides[k]) for k in ((0, 1) if i % 2 == 0 else (1, 0))}
        ratios.append(took[1] / took[0])
    return ratios


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='ablations.json', help='where to write, and what to go on from')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--data', default='small', help='name of the data folder and of the tokenizer')
    p.add_argument('--depth', type=int, default=2)
    p.add_argument('--tokens', type=int, default=240_000, help='length of each run')
    p.add_argument('--max-len', type=int, default=256)
    p.add_argument('--pairs', type=int, default=24, help='steps of each side in the measurement of time')
    a = p.parse_args()
    torch.set_num_threads(1)
    settings = dict(depth=a.depth, tokens=a.tokens, max_len=a.max_len, batch_tokens=2048, data=a.data, variants=VARIANTS)
    text = dict(data_sha256=sha256_file(run_dir('data', a.data)/'manifest.json'), tokenizer=Tokenizer.load(run_dir('tokenizer', a.data)).hash)
    done = read_json(a.out) if Path(a.out).exists() else dict(settings=settings, text=text, runs=[], environment=environment())
    if (done['settings'], done.get('text')) != (settings, text):
        raise SystemExit(f'error: {a.out} holds runs with other settings or another text: move it away, or give another --out')
    for seed in range(a.seeds):
        for name, change in VARIANTS.items():
            if any(r['name'] == name and r['seed'] == seed for r in done['runs']): continue
            out = one_run(change, seed, a.depth, a.tokens, a.max_len, a.data)
            done['runs'].append(dict(name=name, seed=seed, **out))
            write_json(a.out, done)
            print(json.dumps(done['runs'][-1]), flush=True)
    for name, change in VARIANTS.items():
        if name in done.setdefault('step_ratios', {}): continue
        done['step_ratios'][name] = step_ratios(change, a.pairs, a.depth, a.tokens, a.max_len, a.data)
        write_json(a.out, done)


if __name__ == '__main__': main()
