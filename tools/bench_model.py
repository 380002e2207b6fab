"""One table about the model's speed and memory: `python tools/bench_model.py [--quick] [--json] [--device auto] [--only PART ...] [--profile]`

attention  a window of T/4 against full attention, forward and backward, for each engine of this machine
head       the plain loss, all logits at once, against the chunked one, for three vocabularies
step       forward and backward of a whole model, eager and with compiled blocks, against the products of its matrices alone
decode     one cached step of one row against the time that it takes to read its weights

One process. Things that are compared take turns, A B B A, in blocks of steps after a warm-up; a ratio is the median of the ratios of such
rounds, and ± is half of the range of the middle half of them. `A/A` is what the same clock says about a thing against itself: a ratio
that is no further from 1 says nothing. Memory is the most that is held at one time above what was there before: on a GPU the allocator's,
elsewhere the tensors that operations give out. Speeds in GB/s and GFLOP/s are measured here, in the same rounds, not taken from a data sheet.

--profile prints where the time of a step goes, by operation.
"""
import argparse, json, os, shutil, statistics, sys, tempfile, time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch, torch.nn.functional as F
from nanochat.scripts.infer_bench import peak_mib, step_bytes

PARTS = ('attention', 'head', 'step', 'decode')

# ---------------------------------------------------------------- the clock

class Clock:
    "Times of work on one device: `steps` at least in a block, blocks of at least `seconds`, `rounds` of A B B A"
    def __init__(self, device, steps=5, rounds=5, seconds=.05):
        self.device, self.steps, self.rounds, self.seconds = torch.device(device), steps, rounds, seconds
        alone = self.device.type == 'cpu' and torch.get_num_threads() == 1       # then other programs need not count
        self.now = time.process_time if alone else time.perf_counter

    def wait(self):
        if self.device.type == 'cuda': torch.cuda.synchronize(self.device)
        elif self.device.type == 'mps': torch.mps.synchronize()

    def block(self, f, n):
        "Seconds of one call, from a block of n"
        self.wait(); start = self.now()
        for _ in range(n): f()
        self.wait()
        return (self.now() - start)/n

    def warm(self, f):
        "How many calls make a block, after a warm-up"
        f(); self.wait()
        return max(self.steps, min(10_000, round(self.seconds/self.block(f, 2))))

    def turns(self, *fs):
        "For each of the works its seconds in every round: A B C C B A"
        sizes, took = [self.warm(f) for f in fs], [[] for _ in fs]
        for _ in range(self.rounds):
            there = [self.block(f, n) for f, n in zip(fs, sizes)]
            back = [self.block(f, n) for f, n in zip(fs[::-1], sizes[::-1])][::-1]
            for out, x, y in zip(took, there, back): out.append((x + y)/2)
        return took

    def against(self, a, b):
        "Seconds of a and of b, the ratios a/b of all rounds"
        ta, tb = self.turns(a, b)
        return statistics.median(ta), statistics.median(tb), [x/y for x, y in zip(ta, tb)]

def half_range(xs):
    "Half of the range of the middle half"
    if len(xs) < 3: return (max(xs) - min(xs))/2
    q = statistics.quantiles(xs, n=4)
    return (q[2] - q[0])/2

def digits(x, n=3):
    "A number with n significant digits"
    return float(f'{x:.{n}g}') if x else 0.

def ratio(xs, scale=1.): return {'×': round(scale*statistics.median(xs), 2), '±': round(scale*half_range(xs), 2)}

def floor_row(clock, part, f):
    "A against A"
    ratios = clock.against(f, f)[2]
    return {'what': f'{part}: A/A, the noise', 'ratio': round(statistics.median(ratios), 3), '±': round(half_range(ratios), 3),
            'least': round(min(ratios), 3), 'most': round(max(ratios), 3)}

def skipped(what, why): return {'what': what, 'skipped': ' '.join(str(why).split())[:160]}

def tried(what, f):
    "The row of f, or one with the reason why there is none"
    try: return f()
    except torch.OutOfMemoryError: return skipped(what, 'out of memory')

# ---------------------------------------------------------------- attention

def attention_rows(clock, quick):
    from nanochat.attention import attention
    from nanochat.kernels import kernels, pick_kernel
    gpu = clock.device.type == 'cuda'
    dtype = torch.bfloat16 if gpu else torch.float32
    B, H, D = (4, 16, 64) if gpu else (1, 4, 64)
    lengths = [256, 512] if quick else [1024, 4096, 16_384] if gpu else [512, 1024, 2048, 4096]
    def gradients(attend, qkv, seed, window): torch.autograd.grad(attend(*qkv, window=window), qkv, seed)
    for engine, why in kernels(clock.device, dtype).items():
        if why: yield skipped(f'attention {engine}', why); continue
        attend = pick_kernel(engine, clock.device, dtype)[1]
        for T in lengths:
            qkv = [torch.randn(B, T, H, D, device=clock.device, dtype=dtype, requires_grad=True) for _ in range(3)]
            seed = torch.randn_like(qkv[0])
            full, short = (partial(gradients, attend, qkv, seed, w) for w in (None, T//4))
            dense = partial(gradients, partial(attention, rows=10**9), qkv, seed, T//4)
            def row():
                a, b, ratios = clock.against(full, short)
                fullest, least, most = (peak_mib(f, clock.device) for f in (full, short, dense))
                return {'what': f'attention {engine}, T={T}, window {T//4}', 'full ms': digits(1e3*a), 'window ms': digits(1e3*b), **ratio(ratios),
                        'full MiB': digits(fullest), 'window MiB': digits(least), 'dense mask MiB': digits(most)}
            yield tried(f'attention {engine}, T={T}', row)
            if engine == 'slices' and T == lengths[1]: yield floor_row(clock, 'attention', full)

# ---------------------------------------------------------------- head

def plain_loss(h, W, y, cap=15.):
    "Mean loss with all logits in memory, as autograd sees it"
    x = (h @ W.T).float()
    return F.cross_entropy(cap*torch.tanh(x/cap), y)

def head_rows(clock, quick):
    from nanochat.head import softcap_cross_entropy
    gpu = clock.device.type == 'cuda'
    N, C, dtype = (16_384, 1024, torch.bfloat16) if gpu else (256 if quick else 1024, 256, torch.float32)
    for V in ((1024, 4096) if quick else (4096, 32_768, 65_536)):
        h = torch.randn(N, C, device=clock.device, dtype=dtype, requires_grad=True)
        W = (torch.randn(V, C, device=clock.device)/C**.5).to(dtype).requires_grad_()
        y = torch.randint(0, V, (N,), device=clock.device)
        def plain(): torch.autograd.grad(plain_loss(h, W, y), (h, W))
        def ours(): torch.autograd.grad(softcap_cross_entropy(h, W, y, 15., V), (h, W))
        def row():
            a, b, ratios = clock.against(plain, ours)
            ma, mb = peak_mib(plain, clock.device), peak_mib(ours, clock.device)
            return {'what': f'head, V={V:,}, {N:,} tokens, C={C}', 'plain ms': digits(1e3*a), 'chunked ms': digits(1e3*b), **ratio(ratios),
                    'plain MiB': digits(ma), 'chunked MiB': digits(mb), '× MiB': round(ma/mb, 2)}
        yield tried(f'head, V={V:,}', row)
        if V == 4096: yield floor_row(clock, 'head', ours)

# ---------------------------------------------------------------- forward and backward

def build(depth, V, T, device, precision, **kw):
    "A model of the recipe on its device, in a precision"
    from nanochat.gpt import GPT
    from nanochat.scaling import gpt_config, recipe
    torch.manual_seed(0)
    model = GPT(gpt_config(recipe(depth, V, T, **kw))).to(device)
    for p in model.parameters():                                 # a GPU multiplies zeros faster
        if p.dim() == 2 and not p.any(): torch.nn.init.normal_(p, std=p.shape[1]**-.5)
    if precision != 'fp32':
        from nanochat.precision import set_precision
        set_precision(model, precision)
    return model

def step_sizes(clock, quick):
    "Depth, length of the rows, their number, precision, vocabularies"
    if clock.device.type == 'cuda': return 12, 2048, 8, 'bf16', (32_768,)
    return (2, 128, 1, 'fp32', (512,)) if quick else (4, 512, 2, 'fp32', (4096, 32_768))

def products(model, tokens):
    "(m, k, n, how often) of all matrix products of a forward pass, without those of attention"
    from nanochat.gpt import Linear
    shapes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, Linear)]
    return [(tokens, k, n, shapes.count((k, n))) for k, n in dict.fromkeys(shapes)]

def products_alone(model, tokens, dtype, device, chunk=512):
    "A call that does all matrix products of forward and backward and nothing else, and its FLOPs"
    work, flops = [], 0
    for m, k, n, times in products(model, tokens):
        rows = [m] if n <= 8*k else [min(chunk, m)]*max(1, m//chunk)           # the head takes its rows in chunks
        W = torch.randn(n, k, device=device, dtype=dtype)
        for r in rows[:1]: x, g = torch.randn(r, k, device=device, dtype=dtype), torch.randn(r, n, device=device, dtype=dtype)
        work += [(x, W, g)]*(times*len(rows))
        flops += 6*m*k*n*times
    def run():
        for x, W, g in work: x @ W.T; g @ W; g.T @ x
    return run, flops

def compiled_blocks(model):
    "The model with each block compiled by itself"
    for block in model.blocks: block.compile()
    return model

def step_rows(clock, quick):
    import copy
    from nanochat.head import lm_loss
    depth, T, B, precision, vocabularies = step_sizes(clock, quick)
    dtype = {'fp32': torch.float32, 'bf16': torch.bfloat16}[precision]
    for V in vocabularies:
        name, tokens = f'd{depth}, V={V:,}, {B}×{T} tokens', B*T
        model = build(depth, V, T, clock.device, precision)
        ids, targets = (torch.randint(0, V, (B, T), device=clock.device) for _ in range(2))
        def step(m): torch.autograd.grad(lm_loss(m, ids, targets), list(m.parameters()))
        eager = partial(step, model)
        alone, flops = products_alone(model, tokens, dtype, clock.device)
        total = model.flops_per_token(T)*tokens
        works, seconds = [alone, eager], None
        try:
            if quick: raise RuntimeError('--quick compiles nothing')
            fast = compiled_blocks(copy.deepcopy(model))
            start = time.perf_counter(); step(fast); clock.wait()
            seconds = time.perf_counter() - start
            works.append(partial(step, fast))
        except Exception as e: yield skipped(f'step compiled: {name}', str(e) if quick else f'{type(e).__name__}: {e}')
        times = clock.turns(*works)
        for kind, t, f in zip(('eager', 'compiled'), times[1:], works[1:]):
            shares = [100*(total/x)/(flops/y) for x, y in zip(t, times[0])]
            yield {'what': f'step {kind}: {name}', 'ms': digits(1e3*statistics.median(t)), 'tok/s': round(tokens/statistics.median(t)),
                   'GFLOP/s': digits(total/statistics.median(t)/1e9), 'products': digits(flops/statistics.median(times[0])/1e9),
                   'share %': round(statistics.median(shares), 1), '±': round(half_range(shares), 1),
                   '× eager': round(statistics.median(x/y for x, y in zip(times[1], t)), 2),
                   'MiB': digits(peak_mib(f, clock.device)) if kind == 'eager' or clock.device.type == 'cuda' else '-',
                   'first step s': digits(seconds) if kind == 'compiled' else '-'}
        if V == vocabularies[0]: yield floor_row(clock, 'step', eager)

# ---------------------------------------------------------------- decode

def decode_rows(clock, quick):
    gpu = clock.device.type == 'cuda'
    cases = ([(2, 512, 'fp32')] if quick else [(12, 32_768, 'fp32'), (12, 32_768, 'bf16'), (20, 32_768, 'bf16')] if gpu
             else [(4, 4096, 'fp32'), (4, 32_768, 'fp32')])
    context, mib = (64, 8) if quick else (1024, 1024) if gpu else (256, 256)
    for precision in dict.fromkeys(p for _, _, p in cases):
        dtype = {'fp32': torch.float32, 'bf16': torch.bfloat16}[precision]
        W = torch.randn(mib*2**20//dtype.itemsize//1024, 1024, device=clock.device).to(dtype)
        x, there = torch.randn(1, 1024, device=clock.device).to(dtype), torch.empty_like(W)
        a, b, _ = clock.against(lambda: F.linear(x, W), lambda: there.copy_(W))
        yield {'what': f'decode: {precision}, one row against {mib} MiB, and a copy of them', 'product GB/s': digits(W.nbytes/a/1e9), 'copy GB/s': digits(2*W.nbytes/b/1e9)}
        for depth, V, p in cases:
            if p == precision: yield tried(f'decode d{depth}', partial(one_decode, clock, depth, V, p, context, x, W))

@torch.inference_mode()
def one_decode(clock, depth, V, precision, context, x, W):
    from nanochat.precision import for_inference
    model = for_inference(build(depth, V, 2*context, clock.device, 'fp32'), precision)
    ids = torch.randint(0, V, (1, context), device=clock.device)
    full = model.new_cache(1)
    model(ids, full); full.advance(context)
    now = [full.select([0])]
    def step():
        if now[0].lengths[0] >= context + 32: now[0] = full.select([0])
        model.logits(model(ids[:, :1], now[0]))
        now[0].advance(1)
    n = step_bytes(model, [context + 1])
    a, b, ratios = clock.against(step, lambda: F.linear(x, W))
    share = [100*(n/W.nbytes)/r for r in ratios]
    return {'what': f'decode: d{depth}, V={V:,}, {precision}, {context} tokens back', 'ms': digits(1e3*a), 'tok/s': round(1/a), 'MB read': digits(n/1e6),
            'floor ms': digits(1e3*b*n/W.nbytes), '% of the floor': round(statistics.median(share), 1), '±': round(half_range(share), 1)}

# ---------------------------------------------------------------- where the time goes

def profile(clock, quick):
    "Time of a step by operation, in percent"
    from nanochat.head import lm_loss
    from torch.profiler import ProfilerActivity as A, profile as record
    gpu = clock.device.type == 'cuda'
    depth, T, B, precision, vocabularies = step_sizes(clock, quick)
    for V in vocabularies:
        model = build(depth, V, T, clock.device, precision)
        ids = torch.randint(0, V, (B, T), device=clock.device)
        def step(): torch.autograd.grad(lm_loss(model, ids, ids), list(model.parameters()))
        step()
        with record(activities=[A.CPU] + [A.CUDA]*gpu) as p:
            for _ in range(5): step()
            clock.wait()
        own = lambda e: e.self_device_time_total if gpu else e.self_cpu_time_total
        events = sorted(p.key_averages(), key=own, reverse=True)
        whole = sum(map(own, events))
        print(f'\nd{depth}, V={V:,}: share of the time, and calls, by operation')
        for e in events[:14]: print(f'{100*own(e)/whole:6.1f} %  {e.count//5:6}  {e.key[:80]}')

# ---------------------------------------------------------------- the table

def show(rows, wide=52):
    "Print rows as they come, those with equal columns under one head; return them"
    done = []
    for r in rows:
        keys = [k for k in r if k != 'what']
        if 'skipped' in r: print(f'{r["what"]:{wide}}  skipped: {r["skipped"]}', flush=True)
        else:
            if not done or keys != [k for k in done[-1] if k != 'what']: print('\n' + ' '*wide + ''.join(f'{k:>{max(8, len(k) + 2)}}' for k in keys))
            print(f'{r["what"]:{wide}}' + ''.join(f'{str(r[k]):>{max(8, len(k) + 2)}}' for k in keys), flush=True)
        done.append(r)
    return done

def rows_of(device, quick=False, parts=PARTS):
    "All rows, one after another"
    clock = Clock(device, *((1, 2, .002) if quick else (5, 5, .05)))
    for part in parts: yield from dict(attention=attention_rows, head=head_rows, step=step_rows, decode=decode_rows)[part](clock, quick)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='small sizes and few rounds: to see that it works')
    p.add_argument('--json', action='store_true', help='one JSON object: environment and rows')
    p.add_argument('--device', default='auto', help='auto, cpu, mps, cuda or cuda:1')
    p.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), help='these parts')
    p.add_argument('--threads', type=int, help='of the CPU; as many as it has cores, where this is not given')
    p.add_argument('--profile', action='store_true', help='also where the time of a step goes')
    a = p.parse_args()
    from nanochat.common import environment, pick_device
    if a.threads: torch.set_num_threads(a.threads)
    device = pick_device(a.device)
    cache = None
    if 'TORCHINDUCTOR_CACHE_DIR' not in os.environ: cache = os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp()      # a warm one would hide the time to compile
    env, rows = environment(device), rows_of(device, a.quick, a.only)
    try:
        if a.json: print(json.dumps(dict(environment=env, rows=list(rows))))
        else:
            print(f'{env["device_name"]}, torch {env["torch"]}, {env["threads"]} threads, commit {env["commit"]}')
            show(rows)
        if a.profile: profile(Clock(device), a.quick)
    finally: cache and shutil.rmtree(cache, ignore_errors=True)

if __name__ == '__main__': main()
