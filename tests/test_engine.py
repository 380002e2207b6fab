"The engine: a row's answer depends on its prompt and its seed, and on nothing else"
import gc, threading, weakref
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from hypothesis import given, settings, strategies as st
from nanochat.common import UserError
from nanochat.conversation import check_conversation, message_text, render, render_prompt
from nanochat.engine import Engine, Sampling, ScriptedModel, sample
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import next_probs
from nanochat.tokenizer import Tokenizer
from nanochat.tools import run_tool

tok = Tokenizer({bytes([i]): i for i in range(256)})
TEXTS = ['a', 'The capital of France is', 'x'*60, 'Hello', 'one two three', '?', 'No', 'The end', 'a']
PROMPTS = [[tok.bos, *tok.encode(t)] for t in TEXTS]
def ask(question): return {'messages': [{'role': 'user', 'content': question}]}
def mark(name): return tok.special(name)
def count(call): return str(len(call))                  # a tool that always has an answer

def gpt(seed=0, chatty=1., dtype=torch.float64, **shape):
    "A small random model; `chatty` makes the marks likelier, so that greedy answers call tools and end"
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=tok.n_vocab, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, max_len=128), **shape}))
    for p in model.parameters(): torch.nn.init.normal_(p, std=p.shape[-1]**-.5)
    with torch.no_grad(): model.lm_head.weight[sorted(tok.special_ids)] *= chatty
    return model.to(dtype).eval()

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def model(): return gpt(3, chatty=3.)

# ---- rows and their neighbours

@pytest.mark.parametrize('max_rows', [1, 3, 32])
def test_greedy_batch_is_each_alone(model, max_rows):
    setting = Sampling(max_tokens=60)
    alone = [Engine(model, tok, count).complete([p], setting)[0] for p in PROMPTS]
    assert Engine(model, tok, count, max_rows=max_rows).complete(PROMPTS, setting) == alone
    assert any(any(c.forced) for c in alone) and len({len(c.ids) for c in alone}) > 2      # calls, and rows that leave early

def test_greedy_is_what_the_model_says_without_a_cache(model):
    "Read each answer again in one pass: every token that was not forced is the likeliest of those allowed"
    engine = Engine(model, tok, count, max_calls=2)
    for prompt, c in zip(PROMPTS, engine.complete(PROMPTS, Sampling(max_tokens=60))):
        with torch.no_grad(): logits = model.logits(model(torch.tensor([prompt + c.ids])))[0, len(prompt)-1:-1]
        state, calls = 0, 0
        for l, id, forced in zip(logits, c.ids, c.forced):
            if not forced: assert l.masked_fill(~engine.allowed[state], -torch.inf).argmax() == id
            if id == mark('python_start'): state = 2
            elif state in (2, 3) and id != mark('python_end'): state = 3
            if id == mark('python_end'): calls += 1
            if id == mark('output_end'): state = 0 if calls < 2 else 1

def test_seeds(model):
    hot = Sampling(temperature=1.5, top_k=100, top_p=.98, max_tokens=30, seed=5)
    eight = Engine(model, tok).complete([PROMPTS[1]]*8, hot)
    assert Engine(model, tok).complete([PROMPTS[1]], hot)[0] == eight[0]
    assert Engine(model, tok, max_rows=3).complete([PROMPTS[1]]*8, hot) == eight
    mixed = Engine(model, tok).complete([PROMPTS[1], *PROMPTS[2:], PROMPTS[0]], hot)
    assert mixed[0] == eight[0] and len({tuple(c.ids) for c in eight}) == 8
    free = Sampling(temperature=1.5, max_tokens=30)
    assert Engine(model, tok).complete([PROMPTS[1]], free) != Engine(model, tok).complete([PROMPTS[1]], free)

def test_forced_tokens_use_no_throws(model):
    "Alone, a row whose tokens are forced is not asked at all; among others it is, and must not spend a throw"
    hot, engine = Sampling(temperature=1., max_tokens=40, seed=1), Engine(model, tok, count)
    alone = [engine.complete([p], hot)[0] for p in PROMPTS]
    calling = [(p, c) for p, c in zip(PROMPTS, alone) if any(c.forced) and not c.forced[-1]]
    assert calling
    for p, c in calling: assert engine.complete([p, *PROMPTS], hot)[0] == c

def test_equal_prompts_are_read_once(model):
    widths = []
    class Spy(torch.nn.Module):
        cfg, new_cache, logits = model.cfg, staticmethod(model.new_cache), staticmethod(model.logits)
        def forward(self, ids, cache): widths.append(tuple(ids.shape)); return model(ids, cache)
    Engine(Spy(), tok).complete([PROMPTS[1]]*5, Sampling(max_tokens=2))
    assert widths[0] == (1, len(PROMPTS[1])) and widths[1] == (5, 1)

def test_threads_share_an_engine(model):
    engine, setting = Engine(model, tok), Sampling(max_tokens=20)
    expected = [engine.complete([p], setting) for p in PROMPTS]
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(lambda p: engine.complete([p], setting), PROMPTS)) == expected

# ---- tool calls

SCRIPT = {'What is 6*7?': 'It is <|python_start|>6*7<|python_end|>42.', 'Hello': 'Good day! 你好 👋🏽',
    'How many r?': '<|python_start|>"strawberry".count("r")<|python_end|>There are 3.',
    'And 1//0?': 'Hm. <|python_start|>1//0<|python_end|>No <|python_start|>2**3<|python_end|>value.',
    'Quote': "<|python_start|>'a,b'.count(',')<|python_end|>", 'Silence': ''}
def parts_of(text):
    out = []
    for n, piece in enumerate(text.replace('<|python_end|>', '<|python_start|>').split('<|python_start|>')):
        if n % 2: out += [{'type': 'python', 'text': piece}, {'type': 'python_output', 'text': run_tool(piece)}]
        elif piece: out.append({'type': 'text', 'text': piece})
    return out

@pytest.mark.parametrize('max_rows', [1, 2, 32])
def test_mixed_batch_is_what_rendering_gives(max_rows):
    engine = Engine(ScriptedModel(tok, SCRIPT), tok, max_rows=max_rows)
    for (question, text), c in zip(SCRIPT.items(), engine.complete([render_prompt(tok, ask(q)) for q in SCRIPT])):
        whole = {'messages': ask(question)['messages'] + [{'role': 'assistant', 'content': parts_of(text)}]}
        rendered = render(tok, whole)
        prompt = render_prompt(tok, ask(question))
        assert prompt + c.ids == rendered.ids and c.finish == 'stop' and c.parts == parts_of(text)
        assert [int(not f) for f in c.forced] == rendered.mask[len(prompt):]      # supervised = what the model chose
        assert c.text == message_text(whole['messages'][-1])

def test_events_join_to_the_completion():
    engine = Engine(ScriptedModel(tok, SCRIPT), tok)
    for question in SCRIPT:
        events, (c,) = [*engine.reply(ask(question))], engine.complete([render_prompt(tok, ask(question))])
        assert [e.id for e in events] == c.ids and [e.forced for e in events] == c.forced
        runs = []
        for e in events:
            if e.text and runs and runs[-1]['type'] == e.kind: runs[-1]['text'] += e.text
            elif e.text: runs.append({'type': e.kind, 'text': e.text})
        assert runs == c.parts and [e.finish for e in events[:-1]] == [None]*(len(events) - 1) and events[-1].finish == 'stop'

def test_utf8_comes_whole():
    events = [*Engine(ScriptedModel(tok, SCRIPT), tok).reply(ask('Hello'))]
    assert ''.join(e.text for e in events) == 'Good day! 你好 👋🏽' and not any('�' in e.text for e in events)
    cut = [*Engine(ScriptedModel(tok, SCRIPT), tok).reply(ask('Hello'), Sampling(max_tokens=12))]
    assert cut[-1].text == '�' and cut[-1].finish == 'length'

def test_the_next_turn_reads_the_tool_output():
    model = ScriptedModel(tok, SCRIPT)
    conv = {'messages': ask('What is 6*7?')['messages'] + [{'role': 'assistant', 'content': parts_of(SCRIPT['What is 6*7?'])},
                                                          {'role': 'user', 'content': 'How many r?'}]}
    assert ''.join(e.text for e in Engine(model, tok).reply(conv) if e.kind == 'text') == 'There are 3.'

@pytest.mark.parametrize('tool,output', [(lambda c: '9'*1000, 'error: the result is too long'), (lambda c: 1/0, 'error: ZeroDivisionError'),
    (lambda c: '<|assistant_end|><|bos|>', '<|assistant_end|><|bos|>'), (lambda c: '', ''), (lambda c: '£', '£')])
def test_whatever_the_tool_says(tool, output):
    (c,) = Engine(ScriptedModel(tok, SCRIPT), tok, tool=tool).complete([render_prompt(tok, ask('What is 6*7?'))])
    assert [p['text'] for p in c.parts] == ['It is ', '6*7', output, '42.'] and c.finish == 'stop'

def test_tool_calls_are_capped():
    asked = []
    def tool(call): asked.append(call); return '1'
    engine = Engine(ScriptedModel(tok, {'x': '<|python_start|>1<|python_end|>'*30}, max_len=2000), tok, tool=tool, max_calls=3)
    (c,) = engine.complete([render_prompt(tok, ask('x'))], Sampling(max_tokens=300))
    assert len(asked) == 3 == c.ids.count(mark('python_start'))
    (c,) = Engine(engine.model, tok, tool=None).complete([render_prompt(tok, ask('x'))], Sampling(max_tokens=50))
    assert mark('python_start') not in c.ids

def test_a_row_that_ends_does_not_call():
    asked, prompt = [], render_prompt(tok, ask('What is 6*7?'))
    engine = Engine(ScriptedModel(tok, SCRIPT), tok, tool=lambda c: asked.append(c) or '1')
    to_the_end_of_the_call = len('It is ') + 1 + 3 + 1
    (c,) = engine.complete([prompt], Sampling(max_tokens=to_the_end_of_the_call))
    assert (asked, c.finish, c.ids[-1]) == ([], 'length', mark('python_end'))

@pytest.mark.parametrize('seed', range(3))
def test_nonsense_is_well_formed(seed):
    replies = Engine(gpt(seed, chatty=1.5), tok, max_calls=2).complete(PROMPTS*2, Sampling(temperature=3., max_tokens=110, seed=seed))
    for c in replies:
        chosen = {i for i, f in zip(c.ids, c.forced) if i in tok.special_ids and not f}
        assert chosen <= {mark(n) for n in ('python_start', 'python_end', 'assistant_end', 'bos')}
        assert all(p['text'] for p in c.parts if p['type'] == 'python') or c.finish == 'length'
        if c.finish == 'stop': check_conversation({'messages': ask('?')['messages'] + [{'role': 'assistant', 'content': c.parts}]})

# ---- ends

def test_limits(model):
    engine = Engine(ScriptedModel(tok, {'x': 'y'*500}), tok)
    prompt = render_prompt(tok, ask('x'))
    (c,) = engine.complete([prompt], Sampling(max_tokens=7))
    assert (c.text, c.finish) == ('y'*7, 'length')
    short = Engine(ScriptedModel(tok, {'x': 'y'*500}, max_len=len(prompt) + 5), tok)
    for most in (5, 6, None):
        (c,) = short.complete([prompt], Sampling(max_tokens=most))
        assert (c.text, c.finish) == ('y'*5, 'length')
    full = Engine(model, tok).complete([[1]*n for n in (1, 64, 127)], Sampling(max_tokens=None, temperature=3., seed=0))
    assert all(len(c.ids) + n <= 128 for c, n in zip(full, (1, 64, 127))) and len(full[2].ids) == 1

def test_bad_requests_are_refused_when_called(model):
    engine = Engine(model, tok)
    for prompts, why in (([[]], 'prompt 0 is empty'), ([[1], [1]*128], 'prompt 1 has 128 tokens')):
        with pytest.raises(UserError, match=why): engine.stream(prompts)
    with pytest.raises(ValueError, match='prompt 0'): engine.stream([[tok.n_vocab]])
    with pytest.raises(UserError): engine.reply({'messages': [{'role': 'assistant', 'content': 'x'}]})
    for wrong in (dict(temperature=-.1), dict(top_p=0.), dict(top_p=2.), dict(top_k=-1), dict(max_tokens=0)):
        with pytest.raises(UserError, match=[*wrong][0]): Sampling(**wrong)
    changed = Sampling(); changed.temperature = -1
    with pytest.raises(UserError): engine.stream([[1]], changed)
    assert engine.complete([]) == []

@pytest.mark.parametrize('n', [0, -1])
def test_an_engine_without_places_is_refused(model, n):
    with pytest.raises(UserError, match=f'max_rows is {n}: at least one row must have a place'): Engine(model, tok, max_rows=n)

def test_stopped_behind_a_forced_beginning(model):
    "While the prompt is still being read: the reply has its beginning, and says how it ended"
    stop, events = threading.Event(), []
    engine = Engine(model, tok, chunk=4)
    for e in engine.stream([PROMPTS[2]], Sampling(forced=tok.encode('Well')), stop): events.append(e); stop.set()
    assert tok.decode([e.id for e in events]) == 'Well' and {e.finish for e in events} == {None}
    engine.stream = lambda *args: iter(events)
    (c,) = engine.complete([PROMPTS[2]])
    assert (c.text, c.finish, c.forced) == ('Well', 'stopped', [True]*4)

def test_stop():
    engine, stop, seen = Engine(ScriptedModel(tok, SCRIPT), tok, max_rows=2), threading.Event(), []
    prompts = [render_prompt(tok, ask(q)) for q in ('What is 6*7?', 'And 1//0?', 'Hello')]
    for e in engine.stream(prompts, stop=stop):
        seen.append(e)
        if len(seen) == 4: stop.set()
    assert [(e.row, e.finish) for e in seen[4:]] == [(0, 'stopped'), (1, 'stopped')]        # row 2 never began
    assert [c.finish for c in engine.complete(prompts, stop=stop)] == ['stopped']*3

def test_close_frees_the_cache_and_leaves_the_thread_alone():
    stream = Engine(gpt(), tok).stream(PROMPTS[:3], Sampling(temperature=1., seed=0))
    next(stream)
    cache = weakref.ref(stream.gi_frame.f_locals['session']._cache)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and cache() is not None
    stream.close(); gc.collect()
    assert cache() is None and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

def test_an_error_in_the_model_reaches_the_caller():
    broken = gpt()
    with torch.no_grad(): broken.lm_head.weight[5, 3] = torch.nan
    for temperature in (0., 1.):
        with pytest.raises(UserError, match='NaN'): Engine(broken, tok).complete(PROMPTS, Sampling(max_tokens=3, temperature=temperature))
    with pytest.raises(UserError, match='do not belong together'): Engine(gpt(vocab_size=576), WideTokenizer())

class WideTokenizer: n_vocab = 600

def test_ids_beyond_the_tokenizer_are_never_chosen():
    replies = Engine(gpt(vocab_size=640), tok).complete(PROMPTS, Sampling(temperature=5., max_tokens=40, seed=0))
    assert all(i < tok.n_vocab for c in replies for i in c.ids)

def test_training_goes_on_after_generating():
    model = gpt(dtype=torch.float32)
    Engine(model, tok).complete(PROMPTS[:2], Sampling(max_tokens=3))
    model.logits(model(torch.tensor([PROMPTS[1]]))).sum().backward()
    assert model.wte.weight.grad.isfinite().all()

# ---- choosing

@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=12), st.floats(0, 5), st.integers(0, 14), st.floats(.01, 1), st.floats(0, 1, exclude_max=True))
def test_choosing_keeps_its_promises(values, temperature, top_k, top_p, u):
    logits = torch.tensor([values])
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    p = next_probs(logits, s)[0]
    assert p.isfinite().all() and abs(p.sum() - 1) < 1e-5 and p[logits[0] >= logits.max() - 1e-4].sum() > 0
    id = sample(logits, s, torch.tensor([u]).clamp(max=1 - 2**-24)).item()
    assert p[id] > 0
    if temperature == 0: assert (p > 0).sum() == 1 and id == logits[0].argmax()
    elif top_k: assert (p > p[p > 0].min()).sum() < top_k                      # equally likely tokens stay together

def test_masked_tokens_are_never_drawn():
    logits = torch.tensor([[0., -torch.inf, 0., -torch.inf]]).expand(1000, -1)
    for s in (Sampling(temperature=1.), Sampling(temperature=1., top_k=3), Sampling(temperature=9., top_p=.99)):
        assert set(sample(logits, s, torch.linspace(0, 1 - 2**-24, 1000)).tolist()) == {0, 2}
