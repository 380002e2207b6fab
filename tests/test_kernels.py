"Every attention kernel that this machine has equals the slices, forward and backward; the slices equal the loop on their page"
from itertools import product
import pytest, torch
from nanochat.attention import attention
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

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('name', list(kernels('cpu')))
def test_kernels_agree_on_a_gpu(name):
    reason = kernels('cuda', torch.bfloat16)[name]
    if reason: pytest.skip(f'{name}: {reason}')
    qkv, docs = inputs(device='cuda', dtype=torch.bfloat16)
    attend = pick_kernel(name, 'cuda', torch.bfloat16)[1]
    for window, d in product((None, 3, 64), (None, docs)):
        truth = with_gradients(attention, [z.float() for z in qkv], window=window, docs=d)
        for got, want in zip(with_gradients(attend, qkv, window=window, docs=d), truth):
            assert (got.float() - want).norm() < .02 * want.norm(), (window, d is not None)
