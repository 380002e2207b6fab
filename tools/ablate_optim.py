"""What each part of the optimizer is worth: the same short run with it and without it, for several seeds.

    python tools/ablate_optim.py --out nbs/ablations_optim.json         about fifteen seconds a run on one core, 21 runs

Text and tokenizer are those of tools/ablate.py. Each finished run is written at once; run it again to go on.
A variant changes fields of the group of the matrices, or the clipping; start and batches of a seed are the same for all.
"""
import argparse, json, statistics, sys, time
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ablate import set_up
from nanochat.common import environment, read_json, run_dir, sha256_file, write_json
from nanochat.dataloader import val_batches
from nanochat.head import bits_per_byte
from nanochat.optim import MuonAdamW
from nanochat.scaling import set_schedule
from nanochat.tokenizer import Tokenizer
from nanochat.train import train_step

VARIANTS = {'the recipe': {},
            'rows evened before': dict(group=dict(equilibrate=True)),
            'neurons evened after': dict(group=dict(neuron_beta=.95)),
            'both evened': dict(group=dict(equilibrate=True, neuron_beta=.95)),
            'decay of all entries': dict(group=dict(cautious=False)),
            'gradients clipped to 0.3': dict(clip=.3),
            'AdamW for the matrices too': dict(group=dict(kind='adamw', lr=.005, betas=(.9, .95)))}


def changed(optimizer, change):
    "The same parameters under an optimizer in which the group of the matrices, or the clipping, is changed"
    groups = []
    for g in optimizer.param_groups:
        fields = {k: v for k, v in g.items() if k not in ('params', 'param_names') and not k.startswith('initial_')}
        if g['role'] == 'matrix': fields.update(change.get('group', {}))
        groups.append(dict(params=list(zip(g['param_names'], g['params'])), **fields))
    return MuonAdamW(groups, clip=change.get('clip', 0.))


def one_run(change, seed, depth, tokens, max_len, data):
    "Validation bits per byte, losses, norms and seconds of one training run"
    source, tok = run_dir('data', data), Tokenizer.load(run_dir('tokenizer', data))
    model, optimizer, r, loader = set_up({}, seed, depth, tokens, max_len, data)
    optimizer = changed(optimizer, change)
    start, losses, norms = time.perf_counter(), [], []
    for step in range(r.steps):
        set_schedule(optimizer, r, step)
        losses.append(train_step(model, optimizer, [next(loader) for _ in range(r.grad_accum)])[0])
        norms.append(optimizer.grad_norm)
    seconds = time.perf_counter() - start
    out = bits_per_byte(model, val_batches(source, tok, 8, max_len, 60_000), torch.as_tensor(tok.token_bytes()))
    return dict(bpb=out['bpb'], train_loss=sum(losses[-10:]) / 10, norm=statistics.median(norms), steps=r.steps, seconds=seconds,
                losses=[round(x, 4) for x in losses] if seed == 0 else [])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='ablations_optim.json', help='where to write, and what to go on from')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--data', default='small', help='name of the data folder and of the tokenizer')
    p.add_argument('--depth', type=int, default=2)
    p.add_argument('--tokens', type=int, default=160_000, help='length of each run')
    p.add_argument('--max-len', type=int, default=256)
    a = p.parse_args()
    torch.set_num_threads(1)
    settings = json.loads(json.dumps(dict(depth=a.depth, tokens=a.tokens, max_len=a.max_len, batch_tokens=2048, data=a.data, variants=VARIANTS)))
    text = dict(data_sha256=sha256_file(run_dir('data', a.data)/'manifest.json'), tokenizer=Tokenizer.load(run_dir('tokenizer', a.data)).hash)
    done = read_json(a.out) if Path(a.out).exists() else dict(settings=settings, text=text, runs=[], environment=environment())
    if (done['settings'], done['text']) != (settings, text):
        raise SystemExit(f'error: {a.out} holds runs with other settings or another text: move it away, or give another --out')
    for seed in range(a.seeds):
        for name, change in VARIANTS.items():
            if any(r['name'] == name and r['seed'] == seed for r in done['runs']): continue
            done['runs'].append(dict(name=name, seed=seed, **one_run(change, seed, a.depth, a.tokens, a.max_len, a.data)))
            write_json(a.out, done)
            print(json.dumps({**done['runs'][-1], 'losses': ...}, default=str), flush=True)


if __name__ == '__main__': main()
