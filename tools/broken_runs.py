"""Train one healthy run and several broken ones, for lesson 06: same text, same model, one fault each.

    python tools/broken_runs.py --out lessons/broken_runs.json         about ten seconds a run on one core, 15 runs

Reads the text and the tokenizer of `bash runs/tiny.sh --small`. The loop is the real one (nanochat.train), the faults are in what it is given.
The cases have numbers instead of names, in an order that a seed shuffles; `names(seed)` tells which is which. Each finished run is written at once.
Seconds are processor time of one thread: what other programs take is not ours.
"""
import argparse, json, random, tempfile, time, types
from dataclasses import replace
from pathlib import Path
import torch
import nanochat.train
from nanochat.common import read_json, run_dir, seed_everything
from nanochat.dataloader import PretrainLoader, val_batches
from nanochat.dataset import documents
from nanochat.gpt import GPT
from nanochat.head import lm_loss
from nanochat.optim import make_optimizer
from nanochat.record import Run, read_metrics
from nanochat.scaling import gpt_config, recipe
from nanochat.scripts.base_train import theory_marks
from nanochat.tokenizer import Tokenizer

DEPTH, T, STEPS, BATCH = 2, 128, 150, 1024
DATA = 'small'
CASES = ('healthy', 'rate too high', 'rate too low', 'repeated text', 'leak', 'gradient kept', 'slow loader')


def names(seed):
    "Case number → fault; seed 0 are the cases of the lesson, seed 1 those that its last grader keeps for itself"
    order = random.Random(f'cases {seed}').sample(CASES, len(CASES))
    return {str(i): name for i, name in enumerate(order, 1)}


class Loader:
    "Batches of the real loader, with a fault; `waited` is the processor time of the last one"
    def __init__(self, real, fault, tok, texts):
        self.real, self.fault, self.tok, self.texts, self.kept, self.n, self.waited = real, fault, tok, texts, [], 0, 0.
    def __next__(self):
        start = time.process_time()
        batch = self.next()
        self.waited, self.n = time.process_time() - start, self.n + 1
        return leaked(batch) if self.fault == 'leak' else batch
    def next(self):
        if self.fault == 'slow loader':
            for text in self.texts: self.tok.encode(text)                       # two thousand documents for each batch
        if self.fault != 'repeated text': return next(self.real)
        if len(self.kept) < 6: self.kept.append(next(self.real))
        return self.kept[self.n % 6]                                            # 6,144 tokens, twenty-five times over
    def state_dict(self): return {'n': self.n}


def leaked(batch):
    "Somebody forgot the shift by one: each token is asked to predict itself"
    return batch._replace(targets=torch.where(batch.targets >= 0, batch.inputs, batch.targets))


def one_run(fault, seed, folder):
    "The record of a run with one fault"
    source, tok = run_dir('data', DATA), Tokenizer.load(run_dir('tokenizer', DATA))
    r = recipe(DEPTH, tok.n_vocab, T, steps=STEPS, batch_tokens=BATCH, head_dim=32)
    scale = {'rate too high': 40., 'rate too low': 1 / 30}.get(fault, 1.)
    r = replace(r, **{k: getattr(r, k) * scale for k in ('matrix_lr', 'embedding_lr', 'head_lr', 'scalar_lr')})
    seed_everything(seed)
    model = GPT(gpt_config(r))
    optimizer = make_optimizer(model, r)
    if fault == 'gradient kept': optimizer.zero_grad = lambda **kw: None
    texts = [t for t, _ in zip(documents(source, 'train'), range(2000))]
    loader = Loader(PretrainLoader(source, 'train', tok, r.device_batch, T, seed=seed), fault, tok, texts)
    run = Run(folder, dict(recipe=r.to_dict()))
    nanochat.train.train(model, optimizer, loader, r, run, (DATA, tok.hash), lambda step: dict(val_loss=val_loss(model, source, tok, fault)),
                         eval_every=15, on_step=lambda step, m: 'data_seconds' in m or run.log(step, data_seconds=loader.waited))
    return run


@torch.inference_mode()
def val_loss(model, source, tok, fault):
    nats = n = 0
    for batch in val_batches(source, tok, 16, T, 4096):
        if fault == 'leak': batch = leaked(batch)                                # the same code makes both
        nats, n = nats + lm_loss(model, batch.inputs, batch.targets, 'sum').item(), n + int((batch.targets >= 0).sum())
    return nats / n


def compact(metrics):
    "One number of each kind for each step, with four digits"
    out = {}
    for name in ('loss', 'grad_norm', 'lr', 'tokens', 'tokens_per_s', 'data_seconds', 'val_loss'):
        values = {s: v for s, v in zip(metrics['step'], metrics[name]) if v is not None}
        out[name] = [None if (v := values.get(s)) is None else float(f'{v:.4g}') if name not in ('tokens', 'tokens_per_s') else round(v)
                     for s in range(1, STEPS + 1)]
    return dict(step=list(range(1, STEPS + 1)), **out)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default='lessons/broken_runs.json', help='where to write, and what to go on from')
    p.add_argument('--only', default='', help='faults whose runs are made again, with commas')
    a = p.parse_args()
    torch.set_num_threads(1)
    nanochat.train.time = types.SimpleNamespace(perf_counter=time.process_time)
    out = read_json(a.out) if Path(a.out).exists() else dict(cases={}, held_out={})
    source, tok = run_dir('data', DATA), Tokenizer.load(run_dir('tokenizer', DATA))
    out['marks'], out['vocab_size'] = theory_marks(source, tok), tok.n_vocab
    todo = [('reference', None, 'healthy', 7), *((part, i, name, seed) for seed, part in enumerate(('cases', 'held_out')) for i, name in names(seed).items())]
    for part, i, name, seed in todo:
        if (part in out and i is None or i in out.get(part, ())) and name not in a.only.split(','): continue
        start = time.time()
        with tempfile.TemporaryDirectory() as folder: record = compact(read_metrics(one_run(name, seed, Path(folder)/'run').folder))
        if i is None: out[part] = record
        else: out[part] = dict(sorted({**out[part], i: record}.items()))
        write(a.out, out)
        print(f"{part} {i} ({name}, seed {seed}): loss {record['loss'][-1]}, validation {record['val_loss'][-1]}, {time.time() - start:.0f} s", flush=True)


def write(path, out):
    "Lines of numbers, not one number a line"
    Path(path).write_text(json.dumps(out, separators=(',', ':')).replace('},"', '},\n"').replace('],"', '],\n"') + '\n')


if __name__ == '__main__': main()
