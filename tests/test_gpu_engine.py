"""The engine on a GPU: what recorded steps write is what plain steps write, and a step waits once. See test_gpu.py for how to run it without a GPU."""
import os
import pytest, torch
from nanochat.engine import Engine, Sampling
from nanochat.gpt import GPT, GPTConfig
from nanochat.static import StaticStep
from nanochat.tokenizer import Tokenizer

DEVICE = os.environ.get('NANOCHAT_GPU_CHECK_DEVICE', 'cuda')
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE.startswith('cuda') and not torch.cuda.is_available(), reason='needs a GPU')]
tok = Tokenizer({bytes([i]): i for i in range(256)})
FEATURES = dict(window_pattern='SSL', short_window=5, value_embeds=True, layer_scales=True, smear=True, backout=True)

def shaken(dtype=torch.float64, **shape):
    "A small model in which every matrix matters; in float64, so that rounding decides nothing"
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(vocab_size=tok.n_vocab, n_layer=3, n_head=4, n_kv_head=2, head_dim=32, max_len=128), **shape}))
    for p in model.parameters(): torch.nn.init.normal_(p, std=p.shape[-1]**-.5)
    return model.to(DEVICE, dtype).eval()

PROMPTS = [[tok.bos, *tok.encode(t)] for t in ('a', 'The capital of France is', 'x'*60, 'Hello', 'one two three', '?', 'No', 'a')]
SETTINGS = [Sampling(max_tokens=10 + 7*n, temperature=n % 2, top_p=.9, seed=n) for n in range(8)]

@pytest.mark.parametrize('features', [{}, FEATURES], ids=['plain', 'all features'])
def test_recorded_steps_write_what_plain_steps_write(features):
    model = shaken(**features)
    plain = Engine(model, tok, max_rows=5, chunk=16).complete(PROMPTS, SETTINGS)
    assert Engine(model, tok, max_rows=5, chunk=16, static=True).complete(PROMPTS, SETTINGS) == plain
    assert Engine(shaken(**features).cpu(), tok).complete(PROMPTS, SETTINGS) == plain

@torch.inference_mode()
def test_a_step_is_recorded_on_a_gpu():
    model = shaken()
    step, rows = StaticStep(model, 2, 64), model.new_cache(1, 64)
    assert (step.graph is not None) == DEVICE.startswith('cuda')
    step.load(rows)
    for i in range(5):
        expected = model(torch.tensor([[i]], device=DEVICE), rows)[:, -1]
        rows.advance(1)
        torch.testing.assert_close(step(torch.tensor([[i]], device=DEVICE)), expected)

def test_a_static_step_waits_once():
    "torch says so itself: all waits but the one for the table are errors"
    if not DEVICE.startswith('cuda'): pytest.skip('a CPU never waits')
    session = Engine(shaken(), tok, static=True).session()
    for prompt in PROMPTS: session.add(prompt, Sampling(max_tokens=60, temperature=1., bias={i: -99. for i in tok.special_ids}))
    for _ in range(3): session.step()
    tolist, waits = torch.Tensor.tolist, []
    def counted(x):
        if not x.is_cuda: return tolist(x)
        torch.cuda.set_sync_debug_mode('default'); waits.append(1)
        try: return tolist(x)
        finally: torch.cuda.set_sync_debug_mode('error')
    torch.Tensor.tolist = counted
    torch.cuda.set_sync_debug_mode('error')
    try: session.step()
    finally: torch.Tensor.tolist = tolist; torch.cuda.set_sync_debug_mode('default')
    assert len(waits) == 1
