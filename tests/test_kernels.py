"Every attention kernel that this machine has equals the slices, forward and backward; the slices equal the loop on their page"
import functools, os
from itertools import product
import pytest, torch
from nanochat.attention import attention, attention_loop
from nanochat.kernels import kernels, pick_kernel

def inputs(B=2, T=192, H=4, G=2, D=64, **kw):
    torch.manual_seed(0)
    return [torch.randn(B, T, n, D, **kw) for n in (H, G, G)], torch.randint(0, 7, (B, T), device=kw.get('device')).sort(1).values

def with_gradients(f, qkv, **kw):
    leaves = [z.detach().clone().requires_grad_() for z in qkv]
    out = f(*leaves, **kw)
    return out, *torch.autograd.grad(out.float().square().sum(), leaves)

@pytest.mark.parametrize('window,packed,rows', list(product((None, 0, 20, 150), (False, True), (32, 128, 512))))
def test_slices_and_their_gradients(window, packed, rows):
    "Against one dense mask, which the slices exist to avoid"
    qkv, docs = inputs(D=16, dtype=torch.float64)
    kw = dict(window=window, docs=docs if packed else None)
    for got, want in zip(with_gradients(attention, qkv, rows=rows, **kw), with_gradients(attention, qkv, rows=10**6, **kw)):
        torch.testing.assert_close(got, want)

def test_the_table_names_every_kernel_with_a_reason():
    table = kernels('cpu')
    assert table['slices'] == '' and all(reason for name, reason in table.items() if name != 'slices')

# Each kernel of this machine against float64. A case is (T, key heads, window, documents): short odd rows against the loop of the page
# on attention, and rows that cross the tiles of a kernel against one dense mask. `runs/gpu_check.sh` runs these on a GPU.
DEVICE = os.environ.get('NANOCHAT_GPU_CHECK_DEVICE', 'cuda')
CASES = [*product((21,), (4, 2), (None, 0, 3), (False, True)), *product((333,), (2, 1), (None, 64, 150), (False, True))]
ERROR = {torch.bfloat16: .02, torch.float16: .004, torch.float32: 2e-5}     # of the worst vector, in typical lengths; five times that for gradients
gpu = lambda f: pytest.mark.cuda(pytest.mark.skipif(DEVICE.startswith('cuda') and not torch.cuda.is_available(), reason='needs a GPU')(f))

def case_inputs(case):
    "Numbers that every type holds, so that float64 and the kernel see the same ones"
    T, G, window, packed = case
    torch.manual_seed(0)
    qkv = [torch.randn(2, T, n, 64).bfloat16() for n in (4, G, G)]
    return qkv, window, torch.randint(0, 5, (2, T)).sort(1).values if packed else None

@functools.lru_cache(None)
def truth(case):
    qkv, window, docs = case_inputs(case)
    f = attention_loop if case[0] < 50 else functools.partial(attention, rows=10**9)
    return with_gradients(f, [z.double() for z in qkv], window=window, docs=docs)

@gpu
@pytest.mark.parametrize('dtype', list(ERROR), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize('name', list(kernels('cpu')))
def test_every_kernel_equals_float64(name, dtype):
    reason, wrong = kernels(DEVICE, dtype)[name], []
    if reason: pytest.skip(f'{name}: {reason}')
    for case in CASES:
        torch.compiler.reset()                       # past a few shapes a compiled kernel silently becomes an uncompiled one
        qkv, window, docs = case_inputs(case)
        attend = pick_kernel(name, DEVICE, dtype)[1]
        found = with_gradients(attend, [z.to(DEVICE, dtype) for z in qkv], window=window, docs=None if docs is None else docs.to(DEVICE))
        for i, (got, want) in enumerate(zip(found, truth(case))):
            length = want.square().sum(-1).mean().sqrt().clamp(min=1)            # a query that sees one key has no gradient
            error = ((got.cpu().double() - want).norm(dim=-1).max()/length).item()
            if not error < ERROR[dtype]*(1 if i == 0 else 5): wrong.append((case, 'output query key value'.split()[i], error))
    assert not wrong, wrong

@gpu
@pytest.mark.parametrize('name', list(kernels('cpu')))
def test_a_window_of_w_keeps_w_keys_and_its_own(name):
    "Values are one-hot by place, so the output shows which keys were seen: a kernel that counts from one is off by one here"
    T, reason = 64, kernels(DEVICE, torch.bfloat16)[name]
    if reason: pytest.skip(f'{name}: {reason}')
    q, v = torch.zeros(1, T, 1, T), torch.eye(T).view(1, T, 1, T)
    for window in (1, 5):
        out = pick_kernel(name, DEVICE, torch.bfloat16)[1](*(z.to(DEVICE, torch.bfloat16) for z in (q, q, v)), window=window)[0, :, 0].cpu()
        seen = [row.nonzero().flatten().tolist() for row in out]
        assert seen == [list(range(max(0, t - window), t + 1)) for t in range(T)], (window, seen[:8])
        assert (out.float().sum(1) - 1).abs().max() < .02

def peak(f):
    for _ in range(2): f()                           # once to compile and to fill caches
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return torch.cuda.max_memory_allocated() - before

@gpu
@pytest.mark.parametrize('name', list(kernels('cpu')))
def test_a_window_takes_no_memory(name):
    "No more than full attention by the same kernel, a slack for the slices' copies of keys; and far less than a dense mask"
    reason = kernels(DEVICE, torch.bfloat16)[name]
    if reason or DEVICE == 'cpu': pytest.skip(f'{name}: {reason or "the memory of a GPU"}')
    T, attend = 8192, pick_kernel(name, DEVICE, torch.bfloat16)[1]
    qkv = [torch.randn(1, T, 4, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    full, window = (peak(lambda: with_gradients(attend, qkv, window=w)) for w in (None, 256))
    dense = peak(lambda: with_gradients(functools.partial(attention, rows=10**9), qkv, window=256))
    assert window < (5 if name == 'slices' else 1.1)*full and window < dense/2, [x >> 20 for x in (full, window, dense)]
