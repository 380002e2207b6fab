"""Peak memory of `tok_train` on text that is never on a disk: `python tools/measure_tok_memory.py --bytes 2_000_000_000`

A second process writes made-up web-like text into a pipe: 10,000 frequent words by Zipf's law, then a tail with exponent 1.65,
which brings forth about three million distinct words in 2 GB. The measured process runs the real `tok_train` and reads its
documents from the pipe. The last line is JSON: bytes, seconds, distinct words, memory before, after reading, and at the peak.
"""
import argparse, json, math, os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FREQUENT, TAIL = 10_000, 1.65
SYLLABLES = [c + v for c in 'bcdfghjklmnprstvw' for v in 'aeiou']


def word(rank):
    "A word for each number: the frequent ones are short"
    out = ''
    while True:
        out += SYLLABLES[rank % len(SYLLABLES)]
        rank = rank // len(SYLLABLES) - 1
        if rank < 0: return out

def words(rng, n):
    "Ranks of `n` words: 1/r up to FREQUENT, then r**-TAIL"
    import numpy as np
    head, tail = math.log(FREQUENT) + .58, 1 / (TAIL - 1)
    in_head = rng.random(n) < head / (head + tail)
    u = 1 - rng.random(n)
    return np.where(in_head, FREQUENT**u - 1, FREQUENT * u**(-1 / (TAIL - 1))).clip(0, 2**50).astype(np.int64)

def generate(n_bytes, seed):
    "Write documents, a line each, to standard output; the number of distinct words to standard error"
    import numpy as np
    rng, known, distinct, out = np.random.default_rng(seed), [word(r) for r in range(200_000)], set(), sys.stdout
    while n_bytes > 0:
        ranks = words(rng, 500_000).tolist()
        distinct.update(ranks)
        text = [known[r] if r < 200_000 else word(r) for r in ranks]
        for i in range(0, len(text), 500):
            line = ' '.join(text[i:i+500])[:n_bytes - 1]
            out.write(line + '\n')
            n_bytes -= len(line) + 1
            if n_bytes <= 1: break
        if n_bytes <= 1: break
    out.flush()
    print(len(distinct), file=sys.stderr)

def memory():
    "Resident bytes of this process now, and at its peak"
    status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('Vm'))
    return tuple(int(status[k].split()[0]) * 1024 for k in ('VmRSS', 'VmHWM'))

def measure(n_bytes, vocab_size, seed=0):
    "Run `tok_train` on generated text; returns the figures"
    os.environ['NANOCHAT_BASE_DIR'] = tempfile.mkdtemp()
    sys.path.insert(0, str(ROOT))
    from nanochat.common import run_dir
    from nanochat.dataset import write_shards
    from nanochat.scripts import tok_train as script
    write_shards(run_dir('data', 'made'), ['x'], ['some text to measure on'])            # the manifest; the text comes from the pipe
    maker = subprocess.Popen([sys.executable, __file__, '--generate', '--bytes', str(n_bytes), '--seed', str(seed)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    real, at = script.documents, {}
    def documents(folder, split, *args, **kw):
        if split != 'train':
            yield from real(folder, split, *args, **kw)
            return
        yield from maker.stdout
        at['read'], at['read_s'] = memory()[0], time.perf_counter() - start
    script.documents, script.read_manifest = documents, lambda folder: dict(splits=dict(train=dict(bytes=n_bytes)))
    before, start = memory()[0], time.perf_counter()
    result = script.tok_train(data='made', vocab_size=vocab_size, tag='made', max_bytes=n_bytes + 1000)
    return dict(bytes=result['bytes'], seconds=round(time.perf_counter() - start, 1), reading_s=round(at['read_s'], 1),
                distinct_words=int(maker.stderr.read()), n_vocab=result['n_vocab'], before_mb=before // 10**6,
                after_reading_mb=at['read'] // 10**6, peak_mb=memory()[1] // 10**6)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--bytes', type=int, default=100_000_000, help='how much text')
    p.add_argument('--vocab-size', type=int, default=32_768)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--generate', action='store_true', help='only write the text')
    a = p.parse_args()
    if a.generate: generate(a.bytes, a.seed)
    else: print(json.dumps(measure(a.bytes, a.vocab_size, a.seed)))
