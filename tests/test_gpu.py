"""What a GPU computes is what a CPU computes: the low precisions, the head, the cache. `runs/gpu_check.sh` runs these, and those of test_kernels.py.

NANOCHAT_GPU_CHECK_DEVICE=cpu runs them without a GPU, against itself: that says whether the tests work, not whether a GPU does."""
import os
import pytest, torch
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.head import bits_per_byte, lm_loss, softcap_cross_entropy
from nanochat.kernels import kernels
from nanochat.optim import make_optimizer
from nanochat.precision import (FORMATS, PRECISIONS, LossScaler, capable, emulated_matmul, fp8_blocks_linear, fp8_linear, for_inference, quantize,
                                scaled_matmul, set_precision)
from nanochat.scaling import gpt_config, recipe
from nanochat.train import train_step

DEVICE = os.environ.get('NANOCHAT_GPU_CHECK_DEVICE', 'cuda')
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE.startswith('cuda') and not torch.cuda.is_available(), reason='needs a GPU')]
V = 320
FEATURES = dict(window_pattern='SSL', short_window=5, value_embeds=True, layer_scales=True, smear=True, backout=True, mask_docs=True)

def shaken(**kw):
    "A small float32 model on the CPU in which every matrix matters"
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=V, n_layer=3, n_head=4, n_kv_head=2, head_dim=64, max_len=64), **kw}))
    for p in model.parameters(): torch.nn.init.normal_(p, std=p.shape[-1]**-0.5)
    return model

def copy_of(model, device):
    other = GPT(model.cfg)
    other.load_state_dict(model.state_dict())
    return other.to(device)

def far(a, b):
    "Distance of two tensors in lengths of the second"
    b = b.detach().cpu().double()
    return ((a.detach().cpu().double() - b).norm()/b.norm()).item()

def skip_unless_native(name):
    have = PRECISIONS if DEVICE == 'cpu' else capable(DEVICE)                     # a CPU emulates them all
    if name not in have: pytest.skip(f'{name} is not native on {torch.cuda.get_device_name(DEVICE)}: it has {", ".join(have)}')

# ---------------------------------------------------------------- 8 bits

def small_ints(*shape):
    "Whole numbers whose largest is 7, so that the scales are powers of two and every sum is exact, in whatever order"
    x = torch.randint(-7, 8, shape).float()
    x.view(-1)[::16] = 7.                                                          # in every block, too
    return x

@pytest.mark.parametrize('fmt,block', [('e4m3', None), ('e5m2', None), ('e4m3', (1, 128)), ('e4m3', (128, 128)), ('e5m2', (1, 128))])
def test_codes_are_those_of_the_cpu_bit_for_bit(fmt, block):
    torch.manual_seed(0)
    for x in (torch.randn(256, 256), 1e-6*torch.randn(256, 256), torch.randn(256, 256)*torch.randn(256, 256).exp()*1e4, torch.zeros(128, 128)):
        codes, scale = (z.cpu() for z in quantize(x.to(DEVICE), fmt, block))
        _, expected = quantize(x, fmt, block)
        torch.testing.assert_close(scale, expected, rtol=2**-23, atol=0)           # a GPU may divide by a constant by multiplying
        grown = scale if block is None else scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        again = (x/grown).clamp(-FORMATS[fmt].max, FORMATS[fmt].max).to(FORMATS[fmt].dtype)
        assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))

@pytest.mark.parametrize('linear,dtype', [(fp8_linear, torch.float32), (fp8_linear, torch.bfloat16), (fp8_blocks_linear, torch.bfloat16)],
                         ids=lambda x: getattr(x, '__name__', str(x)[6:]))
def test_8_bit_products_are_exact_where_they_can_be(linear, dtype):
    "Forward and both gradients, bit for bit: the true product, rounded once"
    skip_unless_native('fp8_blocks' if linear is fp8_blocks_linear else 'fp8')
    torch.manual_seed(0)
    M, K, N = 256, 384, 128
    x, w, g = small_ints(M, K), small_ints(N, K), small_ints(M, N)
    leaves = [z.to(DEVICE, dtype).requires_grad_() for z in (x, w)]
    out = linear(*leaves)
    found = out, *torch.autograd.grad(out, leaves, g.to(DEVICE, dtype))
    for name, got, want in zip(('output', 'input', 'weight'), found, (x @ w.T, g @ w, g.T @ x)):
        assert torch.equal(got.cpu(), want.to(dtype)), (name, (got.cpu().float() - want).abs().max())

def test_a_scaled_product_is_near_its_emulation():
    "On numbers whose sums round: a Hopper adds 8-bit products with fewer bits than float32"
    skip_unless_native('fp8')
    torch.manual_seed(0)
    (a, sa), (b, sb) = (quantize(torch.randn(n, 1024)) for n in (256, 128))
    got = scaled_matmul(*(z.to(DEVICE) for z in (a, sa, b, sb)))
    assert far(got, emulated_matmul(a, sa, b, sb)) < 1e-3

# ---------------------------------------------------------------- training steps

LOSS, GRAD = {'bf16': .01, 'fp16': .002, 'fp8': .03, 'fp8_blocks': .03, 'nvfp4': .1}, {'bf16': .06, 'fp16': .01, 'fp8': .35, 'fp8_blocks': .35, 'nvfp4': .9}

@pytest.mark.parametrize('name', list(LOSS))
def test_a_training_step_is_near_that_of_fp32(name):
    "Loss, and the gradients of all parameters together, with all features of the model on"
    skip_unless_native(name)
    model = shaken(**FEATURES).to(DEVICE)
    ids = torch.randint(0, V, (4, 64), device=DEVICE)
    docs = torch.randint(0, 3, (4, 64), device=DEVICE).sort(1).values
    def step():
        loss = lm_loss(model, ids, ids.roll(-1, 1), docs=docs)
        grads = torch.autograd.grad(256.*loss, list(model.parameters()))           # as with a loss scale
        return loss, torch.cat([g.flatten() for g in grads])/256
    loss, grad = step()
    set_precision(model, name)
    low, low_grad = step()
    assert low.dtype == low_grad.dtype == torch.float32 and low_grad.isfinite().all()
    assert far(low, loss) < LOSS[name] and far(low_grad, grad) < GRAD[name], (far(low, loss), far(low_grad, grad))

@pytest.mark.parametrize('name', list(LOSS))
def test_a_model_learns_as_in_fp32(name):
    "Thirty steps on four rows; the last loss within a tenth of what has been learnt"
    skip_unless_native(name)
    r = recipe(2, V, 64, steps=30, device_batch=4, batch_tokens=256, n_head=2, head_dim=64)
    ids = torch.randint(0, V, (4, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.zeros(4, 64, dtype=torch.long))
    def train(name):
        torch.manual_seed(0)
        model = GPT(gpt_config(r)).to(DEVICE)
        set_precision(model, name)
        optimizer, scaler = make_optimizer(model, r), LossScaler(every=10) if name == 'fp16' else None
        return [train_step(model, optimizer, [batch], scaler)[0] for _ in range(30)]
    full, low = train('fp32'), train(name)
    assert full[-1] < full[0] - 1, full
    assert abs(low[-1] - full[-1]) < .1*(full[0] - full[-1]), (full[-1], low[-1])

# ---------------------------------------------------------------- the head

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('dtype,error', [(torch.float32, 1e-5), (torch.bfloat16, .02), (torch.float16, .004)], ids=str)
def test_the_head_equals_float64_on_the_cpu(dtype, error, reduction):
    torch.manual_seed(0)
    h, W = (4*torch.randn(700, 96)).bfloat16(), torch.randn(1024, 96).bfloat16()
    y, weights = torch.randint(0, 1000, (700,)).masked_fill(torch.rand(700) < .2, -1), torch.rand(700)
    def run(device, dtype):
        leaves = [z.to(device, dtype).requires_grad_() for z in (h, W)]
        loss = softcap_cross_entropy(*leaves, y.to(device), 15., 1000, reduction)
        total = (loss*weights.to(loss) if reduction == 'none' else loss).sum()
        return loss, *torch.autograd.grad(total, leaves)
    for name, got, want in zip(('loss', 'hidden', 'weight'), run(DEVICE, dtype), run('cpu', torch.float64)):
        assert far(got, want) < error, (name, far(got, want))

def test_bits_per_byte_are_those_of_the_cpu():
    model = shaken(**FEATURES)
    ids, docs = torch.randint(0, V, (6, 33)), torch.randint(0, 3, (6, 32)).sort(1).values
    batches, sizes = [(ids[:, :-1], ids[:, 1:], docs)], torch.randint(0, 5, (V,))
    here, there = (bits_per_byte(m, batches, sizes) for m in (model, copy_of(model, DEVICE)))
    assert here['bytes'] == there['bytes'] and there['bpb'] == pytest.approx(here['bpb'], rel=1e-5)

# ---------------------------------------------------------------- the cache

def generate(model, ids, lengths, steps):
    "Logits of the last token of ragged prompts, read in two pieces, and of `steps` decoding steps"
    ids, lengths = ids.to(model.device), torch.tensor(lengths)
    cache, rows, outs = model.new_cache(len(ids)), torch.arange(len(ids)), []
    with torch.inference_mode():
        model(ids[:, :4], cache); cache.advance(4)
        rest = model(ids[:, 4:int(lengths.max())], cache)
        cache.advance(lengths - 4)
        outs.append(model.logits(rest[rows, lengths - 5]))
        for i in range(steps):
            now = ids[rows, lengths + i][:, None]
            outs.append(model.logits(model(now, cache))[:, 0])
            cache.advance(1)
    return torch.stack(outs, 1)

@pytest.mark.parametrize('features', [{}, FEATURES], ids=['plain', 'all features'])
@pytest.mark.parametrize('name,error', [('fp32', 1e-4), ('bf16', .05), ('fp16', .008)])
def test_cached_decoding_equals_the_cpu(name, error, features):
    "Ragged prompts in two pieces, then a token at a time, against float64 on the CPU without a cache"
    model, ids, lengths = shaken(**features), torch.randint(0, V, (3, 30)), [7, 16, 11]
    there = copy_of(model, DEVICE)
    if name != 'fp32':
        if DEVICE == 'cpu': there.to({'bf16': torch.bfloat16, 'fp16': torch.float16}[name])
        else: skip_unless_native(name); there = for_inference(there, name)
    found, model = generate(there, ids, lengths, 10), model.double()
    with torch.inference_mode():
        for row, n, got in zip(ids, lengths, found):
            want = model.logits(model(row[None, :n + 10]))[0, n - 1:]
            assert far(got, want) < error, (n, far(got, want))

def test_the_kernel_of_the_model_is_the_best_there_is():
    model = shaken().to(DEVICE)
    for name in ('fp32', 'bf16'):
        set_precision(model, name)
        assert model.kernel_name == next(k for k, why in kernels(DEVICE, model.dtype).items() if not why)
