"Rows that come and go: the same text alone, in any company, after a prefix hit, in any pieces"
import gc, itertools, random, resource
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from hypothesis import example, given, settings, strategies as st
from torch.overrides import TorchFunctionMode
from nanochat.cache import KVCache
from nanochat.common import UserError
from nanochat.conversation import render_prompt
from nanochat.engine import Engine, Sampling, ScriptedModel, _Reply
from nanochat.gpt import GPT, GPTConfig
from nanochat.prefix import PrefixStore
from nanochat.sampling import sample
from nanochat.tokenizer import Tokenizer

tok = Tokenizer({bytes([i]): i for i in range(256)})
FEATURES = dict(plain={}, windows=dict(n_layer=3, window_pattern='S', short_window=9), smear=dict(smear=True, smear_channels=8),
    all=dict(n_layer=4, window_pattern='SSL', short_window=5, value_embeds=True, value_gate_channels=4, layer_scales=True,
             smear=True, smear_channels=8, backout=True))
def ids_of(text): return [tok.bos, *tok.encode(text)]
def count(call): return str(len(call))
def ask(question): return render_prompt(tok, {'messages': [{'role': 'user', 'content': question}]})
def mark(name): return tok.special(name)

def gpt(seed=0, chatty=2.5, dtype=torch.float64, **shape):
    "A small random model; float64, so that rounding decides nothing"
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(vocab_size=tok.n_vocab, n_layer=2, n_head=2, n_kv_head=1, head_dim=8, max_len=96), **shape}))
    for name, p in model.named_parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=p.shape[-1]**-.5)
        elif name == 'smear_scale': torch.nn.init.constant_(p, .7)
    with torch.no_grad(): model.lm_head.weight[sorted(tok.special_ids)] *= chatty
    return model.to(dtype).eval()

pytestmark = pytest.mark.usefixtures('one_thread')

@pytest.fixture(scope='module')
def models(): return {name: gpt(3, **shape) for name, shape in FEATURES.items()}

@torch.no_grad()
def naive(model, prompt, s, n=0, tool=count):
    "The slow truth: the whole text through the model for each token, no cache, no batch"
    engine = Engine(model, tok, tool, prefix_bytes=0)
    reply, events = _Reply(engine, 0, prompt, s, n), []
    while not reply.finish:
        logits = model.logits(model(torch.tensor([reply.ids])))[:, -1]
        seen = torch.zeros(1, logits.shape[-1], dtype=torch.bool)
        seen[0, [i for i in reply.ids if i not in engine.marks]] = True
        masked = logits.masked_fill(~engine.allowed[reply.state], -torch.inf)
        events.append(reply.take(sample(masked, s, torch.tensor([reply.throw()]), seen).item()))
    return [e.id for e in events], ''.join(e.text for e in events), events[-1].finish

def told(events): return [e.id for e in events], ''.join(e.text for e in events), events[-1].finish

# ---- the property that everything else rests on

BEGINNINGS = ['', 'Once upon a time there was a ', 'Once upon a time there was a hen who could read', 'x'*40]
SAMPLINGS = st.builds(Sampling, temperature=st.sampled_from([0., 0., 1.2]), top_k=st.sampled_from([0, 20]), min_p=st.sampled_from([0., .02]), seed=st.integers(0, 3),
    repetition_penalty=st.sampled_from([1., 1.2]), max_tokens=st.integers(1, 25), stop=st.sampled_from([(), ('e', 'qu'), ('\n',)]))
REQUEST = st.tuples(st.sampled_from(BEGINNINGS), st.text('abc é', max_size=12), SAMPLINGS, st.integers(0, 9))

@pytest.mark.parametrize('features', list(FEATURES))
@settings(max_examples=4, deadline=None)
@given(requests=st.lists(REQUEST, min_size=1, max_size=7), chunk=st.sampled_from([1, 3, 16, 1024]), max_rows=st.sampled_from([1, 2, 5, 32]), again=st.booleans(),
       way=st.sampled_from([dict(), dict(static=True), dict(speculate=1), dict(speculate=5)]))
def test_any_company_gives_what_recomputing_gives(models, features, requests, chunk, max_rows, again, way):
    "Random prompts, settings, times of arrival, pieces and places; then once more, when all prefixes are stored"
    model = models[features]
    engine = Engine(model, tok, count, max_rows=max_rows, chunk=chunk, **way)
    for _ in range(1 + again):
        session, waiting, rows, step = engine.session(), sorted(requests, key=lambda r: r[3]), {}, 0
        while waiting or session.busy:
            while waiting and waiting[0][3] <= step:
                begin, rest, s, _ = waiting.pop(0)
                rows[session.add(ids_of(begin + rest), s)] = (ids_of(begin + rest), s, [])
            for e in session.step(): rows[e.row][2].append(e)
            step += 1
        for prompt, s, events in rows.values(): assert told(events) == naive(model, prompt, s)

@pytest.mark.parametrize('features', list(FEATURES))
def test_alone_in_eight_and_after_a_hit(models, features):
    model, prompt, s = models[features], ids_of('Once upon a time, a hen'), Sampling(temperature=1., top_p=.95, seed=4, max_tokens=30)
    engine, others = Engine(model, tok, count), [ids_of(t) for t in ('a', 'bb', 'ccc', 'Once upon a time', 'd'*50, '', 'Once upon a time, a hen')]
    alone = engine.complete([prompt], s)[0]
    assert engine.store.nbytes > 0 and engine.find(prompt).n >= len(prompt) - 1
    assert engine.complete([prompt], s)[0] == alone                                              # after a hit
    assert engine.complete([prompt, *others], [s] + [Sampling(temperature=2., seed=n, max_tokens=40) for n in range(7)])[0] == alone
    assert alone == Engine(model, tok, count, prefix_bytes=0).complete([prompt], s)[0]
    assert alone.ids == naive(model, prompt, s)[0]

# ---- what is read, and what is not

class Spy(torch.nn.Module):
    "A model that notes the shape of all it reads"
    def __init__(self, model):
        super().__init__()
        self.model, self.cfg, self.read = model, model.cfg, []
        self.new_cache, self.logits = model.new_cache, model.logits
    def forward(self, ids, cache): self.read.append(tuple(ids.shape)); return self.model(ids, cache)

def tokens(reads): return sum(b*t for b, t in reads)

def test_running_rows_flow_while_a_prompt_is_read(models):
    spy = Spy(models['plain'])
    session = Engine(spy, tok, chunk=8).session()
    session.add(ids_of('a'), Sampling(max_tokens=40, temperature=1., bias={mark('assistant_end'): -99., tok.bos: -99.}))
    session.step()
    session.add(ids_of('y'*60), Sampling(max_tokens=3))
    for _ in range(61//8): assert {e.row for e in session.step()} == {0}
    assert {e.row for e in session.step()} == {0, 1} and max(tokens([r]) for r in spy.read) <= 8

def test_the_next_turn_reads_only_what_is_new(models):
    for features, text in ((f, t) for f in FEATURES for t in ('Tell me a story.', 'Tell me a long story about a hen, please')):
        spy = Spy(models[features])
        engine, first = Engine(spy, tok, count), ask(text)
        done = engine.complete([first], Sampling(max_tokens=20))[0]
        spy.read.clear()
        second = first + done.ids + [mark('user_start'), *tok.encode('more'), mark('user_end'), mark('assistant_start')]
        again = engine.complete([second], Sampling(max_tokens=1))[0]
        assert tokens(spy.read) == len(second) - len(first) - len(done.ids) + 1            # and the last token of the reply
        assert again.ids == naive(models[features], second, Sampling(max_tokens=1))[0]

@pytest.mark.parametrize('features', list(FEATURES))
def test_a_common_beginning_is_found(models, features):
    "A cache that can be cut serves the second prompt; where windows or smear forbid that, the second leaves a mark for the third"
    spy, system, s = Spy(models[features]), 'You are a kind and patient teacher of children. ', Sampling(max_tokens=4)
    engine, saved = Engine(spy, tok, count), []
    for question in ('Why?', 'How many?', 'Is it so?'):
        spy.read.clear()
        prompt = ids_of(system + question)
        assert engine.complete([prompt], s)[0].ids == naive(models[features], prompt, s)[0]
        saved.append(len(prompt) - sum(t for b, t in spy.read if t > 1))
    assert saved[2] >= len(system) and (saved[1] >= len(system)) == (features == 'plain')

def test_regenerating_reads_nothing(models):
    for model in models.values():
        spy, prompt = Spy(model), ids_of('a question that is long enough')
        engine = Engine(spy, tok)
        engine.complete([prompt], Sampling(max_tokens=1))
        spy.read.clear()
        engine.complete([prompt], Sampling(max_tokens=1))
        assert tokens(spy.read) <= 1

def test_new_weights_empty_the_store(models):
    model = gpt(3)
    engine, prompt, s = Engine(model, tok), ids_of('a question that is long enough'), Sampling(max_tokens=10)
    before = engine.complete([prompt], s)[0].ids
    with torch.no_grad(): model.blocks[0].mlp.c_fc.weight.mul_(-3.)
    assert engine.complete([prompt], s)[0].ids == naive(model, prompt, s)[0] != before

def test_what_is_stored_is_never_written_to(models):
    for model in models.values():
        engine = Engine(model, tok, count)
        engine.complete([ids_of('a beginning that is long enough'*2)], Sampling(max_tokens=5))
        stored = {ids: [z.clone() for z in c.k + c.v + [c.last]] for ids, (c, *_) in engine.store._entries.items()}
        longer = [list(ids) + tok.encode(t) for ids in stored for t in ('x', 'yy', '')]
        for group in (longer, *([p] for p in longer)): engine.complete(group, Sampling(max_tokens=20))          # together, and alone
        for ids, (c, *_) in engine.store._entries.items():
            if ids in stored: assert all(torch.equal(a, b) for a, b in zip(c.k + c.v + [c.last], stored[ids]))

@pytest.mark.parametrize('whole', [False, True], ids=['a part', 'all of it'])
def test_a_hit_is_copied_once(models, monkeypatch, whole):
    "When it leaves the store, and a second time if there was more to read, for the store. The cache of a lone row is used as it is"
    for model in models.values():
        engine, prompt, s, calls = Engine(model, tok, count), ids_of('a beginning that is long enough'), Sampling(max_tokens=6, bias={i: -99. for i in tok.special_ids}), []
        engine.complete([prompt], Sampling(max_tokens=1))
        prompt = prompt if whole else prompt + tok.encode(' and more')
        def counted(name):
            do = getattr(KVCache, name)
            return lambda *args: calls.append(name) or do(*args)
        with monkeypatch.context() as m:
            for name in ('resized', 'select'): m.setattr(KVCache, name, counted(name))
            m.setattr(KVCache, 'cat', staticmethod(counted('cat')))
            session, events = engine.session(), []
            session.add(prompt, s)
            while len(events) < 5:
                events += session.step()
                if events: mine = {z.data_ptr() for z in session._cache.k + session._cache.v}
            assert calls == ['resized']*(1 if whole else 2) and not mine & {z.data_ptr() for c, *_ in engine.store._entries.values() for z in c.k + c.v}
            events += session.step()
        assert told(events) == naive(model, prompt, s)

def test_a_beginning_is_dropped_while_rows_use_it(models):
    "Two requests for one beginning, and the store forgets it in the middle"
    for model in models.values():
        engine, begin, s = Engine(model, tok, count), 'a beginning that is long enough', Sampling(max_tokens=12)
        engine.complete([ids_of(begin)], Sampling(max_tokens=1))
        prompts = [ids_of(begin + t) for t in ('x', 'yy')]
        session, events = engine.session(), []
        for p in prompts:
            session.add(p, s)
            for _ in range(2): events += session.step()
            engine.store.clear()
        while session.busy: events += session.step()
        for row, p in enumerate(prompts): assert told([e for e in events if e.row == row]) == naive(model, p, s)

def test_the_store_keeps_its_bounds(models):
    one = models['plain'].new_cache(1, 20).nbytes
    store = PrefixStore(10*one)
    for n in range(50): store.add([n]*20, models['plain'].new_cache(1, 20), None)
    assert len(store) == 10 and store.nbytes == 10*one and (49,)*20 in store._entries
    store.find([41]*20)                                             # used: it outlives the others
    for n in range(50, 59): store.add([n]*20, models['plain'].new_cache(1, 20), None)
    assert (41,)*20 in store._entries and (42,)*20 not in store._entries
    assert len(PrefixStore(0)) == 0 and not PrefixStore(0).add([1]*20, models['plain'].new_cache(1, 20), None)

def test_the_cache_is_as_wide_as_its_rows(models):
    session = Engine(gpt(max_len=4096), tok).session()
    session.add(ids_of('a'*20), Sampling(max_tokens=None, temperature=2., seed=0, bias={tok.bos: -99., mark('assistant_end'): -99.}))
    for _ in range(30): session.step()
    assert session.width == 64
    for _ in range(30): session.step()
    assert session.width == 128

@pytest.mark.parametrize('features', list(FEATURES))
def test_a_hit_brings_no_width(features):
    "A short prompt that begins like a long text is as wide as it must be"
    model = gpt(max_len=1024, **FEATURES[features])
    quiet = {i: -99. for i in tok.special_ids}
    engine, begin, s = Engine(model, tok), 'Once upon a time there was a ', Sampling(max_tokens=3, bias=quiet)
    for long in ('x'*600, 'y'*600): engine.complete([ids_of(begin + long)], s)              # the second leaves a copy where they part
    prompt = ids_of(begin + 'hen')
    for known in (20, len(prompt) - 1):                             # a part of the prompt, and then what can be had of it
        assert engine.find(prompt).n >= known
        session, events, widths = engine.session(), [], set()
        session.add(prompt, s)
        while session.busy:
            events += session.step()
            widths |= {session.width} - {0}
        assert widths == {64} and told(events) == naive(model, prompt, s)

# ---- coming, going, ends

def test_cancel(models):
    engine = Engine(ScriptedModel(tok, {'long': 'y'*200}), tok, max_rows=2)
    session = engine.session()
    rows = [session.add(ask('long')) for _ in range(4)]
    for _ in range(5): session.step()
    session.cancel(rows[0]); session.cancel(rows[3]); session.cancel(99)
    events = session.step()
    assert [(e.row, e.finish) for e in events] == [(rows[0], 'stopped'), (rows[1], None)]
    assert {e.row for e in session.step()} == {rows[1], rows[2]}                    # a place was free
    session.cancel()
    last = session.step()
    assert [e.finish for e in last] == ['stopped']*2 and session.step() == [] and not session.busy
    assert not session._rows and session._cache is None and session._unread is None

def test_a_prompt_that_is_being_read_can_be_cancelled(models):
    session = Engine(models['plain'], tok, chunk=8).session()
    a, b = session.add(ids_of('a'*60), Sampling(max_tokens=2)), session.add(ids_of('b'*60), Sampling(max_tokens=2))
    session.step(); session.cancel(a)
    assert {e.row for _ in range(30) for e in session.step()} == {b} and not session.busy and not session._rows

def test_rows_are_added_from_many_threads(models):
    engine, s = Engine(models['plain'], tok, count, max_rows=3), Sampling(max_tokens=8, temperature=1., seed=1)
    session, texts = engine.session(), [f'number {n}' for n in range(24)]
    with ThreadPoolExecutor(6) as pool:
        adding = pool.map(lambda t: (session.add(ids_of(t), s), t), texts)
        got, rows = {}, {}
        while len(rows) < len(texts) or session.busy:
            for e in session.step(): got.setdefault(e.row, []).append(e)
            rows.update(itertools.islice(adding, 1))
    assert len(rows) == 24
    for row, text in rows.items(): assert told(got[row]) == naive(models['plain'], ids_of(text), s)

def test_one_setting_for_each_prompt(models):
    engine, prompts = Engine(models['plain'], tok), [ids_of(t) for t in 'abc']
    rows = [Sampling(max_tokens=3), Sampling(max_tokens=5, temperature=1., seed=2), Sampling(max_tokens=7, bias={65: 99.})]
    assert engine.complete(prompts, rows) == [engine.complete([p], s)[0] for p, s in zip(prompts, rows)]
    with pytest.raises(UserError, match='2 settings for 3 prompts'): engine.stream(prompts, rows[:2])
    with pytest.raises(ValueError, match='bias'): engine.stream(prompts, Sampling(bias={999: 1.}))
    with pytest.raises(ValueError, match='forced'): engine.stream(prompts, Sampling(forced=(999,)))

# ---- stop strings

WORDS = Tokenizer({**{bytes([i]): i for i in range(256)}, b'ab': 256, b' END': 257, b'aab': 258, '好'.encode(): 259, b'ND.': 260})
@settings(max_examples=60, deadline=None)
@example('DaD', ['a', 'DaD'])
@given(st.text('abEND. 你好👋', min_size=1, max_size=30), st.lists(st.text('abEND 你好👋', min_size=1, max_size=5), min_size=1, max_size=3))
def test_stop_strings_cut_exactly(text, stops):
    prompt = render_prompt(WORDS, {'messages': [{'role': 'user', 'content': '?'}]})
    events = [*Engine(ScriptedModel(WORDS, {'?': text}), WORDS).stream([prompt], Sampling(stop=stops))]
    cut = min([(i + len(s), i) for s in stops if (i := text.find(s)) >= 0], default=(0, len(text)))[1]       # the stop string that is whole first
    assert ''.join(e.text for e in events) == text[:cut] and events[-1].finish == 'stop'
    shown = list(itertools.accumulate(e.text for e in events))
    assert all(text[:cut].startswith(s) for s in shown) and not any('�' in s for s in shown)            # nothing is taken back
    (c,) = Engine(ScriptedModel(WORDS, {'?': text}), WORDS).complete([prompt], Sampling(stop=stops))
    assert c.text == text[:cut] == ''.join(p['text'] for p in c.parts) and (c.ids[-1] == WORDS.special('assistant_end')) == (cut == len(text))

def test_held_back_text_is_not_lost():
    engine = Engine(ScriptedModel(tok, {'q': 'abcEN', 't': 'aE<|python_start|>1+1<|python_end|>ND'}), tok)
    events = [*engine.stream([ask('q')], Sampling(stop=('END',)))]
    assert [e.text for e in events] == ['a', 'b', 'c', '', '', 'EN']
    assert [e.text for e in engine.stream([ask('q')], Sampling(stop=('END',), max_tokens=4))] == ['a', 'b', 'c', 'E']
    (c,) = engine.complete([ask('t')], Sampling(stop=('END', '1+1')))                                 # not across a call, not in one
    assert [p['text'] for p in c.parts] == ['aE', '1+1', '2', 'ND'] and c.finish == 'stop'

# ---- forced beginnings

@pytest.mark.parametrize('logprobs', [None, 0])
def test_forced_beginnings_continue_as_if_chosen(models, logprobs):
    for model in models.values():
        engine, prompt = Engine(model, tok, count), ids_of('tell')
        free = engine.complete([prompt], Sampling(max_tokens=25, logprobs=logprobs))[0]
        for n in {0, 5, len(free.ids) - 1}:
            if n and free.forced[n - 1]: continue                                       # in the middle of a tool's output
            c = engine.complete([prompt], Sampling(max_tokens=25, forced=free.ids[:n], logprobs=logprobs))[0]
            assert (c.ids, c.text, c.finish) == (free.ids, free.text, free.finish) and c.forced[:n] == [True]*n
            if logprobs is not None: assert c.logprobs == pytest.approx(free.logprobs)

def test_forced_calls():
    asked, engine = [], Engine(ScriptedModel(tok, {'q': 'no'}), tok, tool=lambda c: asked.append(c) or '42')
    def spell(text): return [i for part in text.replace('<', '|<').replace('>', '>|').split('|') if part for i in ([mark(part[1:-1])] if part[0] == '<' else tok.encode(part))]
    call = spell('is <python_start>6*7<python_end>')
    c, = engine.complete([ask('q')], Sampling(forced=call, max_tokens=20))
    assert asked == ['6*7'] and [p['text'] for p in c.parts[:3]] == ['is ', '6*7', '42']
    given = call + spell('<output_start>41<output_end>')
    c, = engine.complete([ask('q')], Sampling(forced=given, max_tokens=30))
    assert asked == ['6*7'] and c.ids[:len(given)] == given and [p['text'] for p in c.parts[:3]] == ['is ', '6*7', '41']
    c, = engine.complete([ask('q')], Sampling(forced=tok.encode('abc') + [mark('assistant_end')]))
    assert (c.text, c.finish, c.forced) == ('abc', 'stop', [True]*4)
    c, = engine.complete([ask('q')], Sampling(forced=tok.encode('abc'), max_tokens=2))
    assert (c.text, c.finish) == ('ab', 'length')

# ---- log-probabilities

def test_logprobs_are_the_models_own(models):
    model = models['all']
    rows = [Sampling(temperature=1.5, top_k=3, seed=1, logprobs=4, max_tokens=12), Sampling(max_tokens=9), Sampling(max_tokens=9, logprobs=0, bias={70: 9.}),
            Sampling(max_tokens=6, logprobs=2, forced=tok.encode('hm'))]
    prompts = [ids_of(t) for t in ('a', 'b', 'cc', 'd')]
    got = [[] for _ in rows]
    for e in Engine(model, tok, count).stream(prompts, rows): got[e.row].append(e)
    for prompt, s, events in zip(prompts, rows, got):
        with torch.no_grad(): logp = model.logits(model(torch.tensor([prompt + [e.id for e in events]])))[0, len(prompt)-1:-1].log_softmax(-1)
        for e, lp in zip(events, logp):
            if s.logprobs is None: assert (e.logprob, e.entropy, e.top) == (None, None, ()); continue
            assert e.logprob == pytest.approx(lp[e.id].item()) and e.entropy == pytest.approx(-(lp.exp()*lp).sum().item())
            assert [i for i, _ in e.top] == lp.topk(s.logprobs).indices.tolist() and [p for _, p in e.top] == pytest.approx(lp.topk(s.logprobs).values.tolist())
    assert any(e.forced for e in got[3])

# ---- static shapes

def test_static_steps_keep_their_buffers(models):
    "Rows come and go; every step of a bucket runs in the same memory, with the same shapes"
    quiet = {i: -99. for i in tok.special_ids}
    session, s = Engine(models['all'], tok, count, static=True).session(), Sampling(max_tokens=12, temperature=1., seed=0, bias=quiet)
    session.add(ids_of('a'), s); session.step(); session.step()
    def shape(step): return [(z.data_ptr(), tuple(z.shape)) for z in (*step.cache.k, *step.cache.v, step.cache.pos, step.cache.last, step.ids)]
    before = {key: shape(step) for key, step in session._steps.items()}
    for n in range(20): session.add(ids_of('b'*(n % 5)), s)
    while session.busy: session.step()
    assert list(before) == [(1, 64)] and {64} == {width for _, width in session._steps} and max(rows for rows, _ in session._steps) == 32
    assert all(shape(session._steps[key]) == old for key, old in before.items())

# ---- what a step costs

class Waits(TorchFunctionMode):
    "Counts what would wait for a device: values read from tensors that are not born of a list on the host"
    def __init__(self): super().__init__(); self.n, self.host = 0, []
    def __torch_function__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        name = getattr(f, '__name__', '')
        if name in ('tensor', 'as_tensor') and 'device' not in (kwargs or {}): self.host.append(out)
        reads = name in ('tolist', 'item', '__bool__', '__int__', '__float__', '__index__', 'cpu', 'numpy', 'nonzero', 'equal')
        if reads and not any(args[0] is h for h in self.host): self.n += 1
        return out

@pytest.mark.parametrize('static', [False, True], ids=['plain', 'static'])
@pytest.mark.parametrize('features', list(FEATURES))
def test_a_step_waits_for_the_device_once(models, features, static):
    session = Engine(models[features], tok, count, static=static).session()
    quiet = {i: -99. for i in tok.special_ids}
    for n, s in enumerate((dict(), dict(temperature=1., top_k=5, seed=0), dict(temperature=1., top_p=.9, min_p=.1, seed=0, repetition_penalty=1.1, logprobs=3))):
        session.add(ids_of('a'*(n + 1)), Sampling(max_tokens=60, bias=quiet, **s))
    session.step()
    for _ in range(20):
        with Waits() as waits:
            for r in session._replies: r.throw = lambda: .5                       # the dice are on the host, and so are their numbers
            assert len(session.step()) == 3
        assert waits.n == 1

def requests(engine, n, rng):
    "n requests of a short reply each, through one session; how many tokens came"
    session, tokens, waiting = engine.session(), 0, n
    while waiting or session.busy:
        while waiting and len(session._inbox) < 8:
            text = ''.join(rng.choices('abcde', k=rng.randrange(30)))
            session.add(ids_of(text), Sampling(temperature=1., seed=waiting, max_tokens=rng.randrange(1, 6)))
            if rng.random() < .1: session.cancel(rng.randrange(n))
            waiting -= 1
        tokens += len(session.step())
    assert not session._rows and session._cache is None
    return tokens

def flat(n, warm, most_growth):
    rng, engine = random.Random(0), Engine(gpt(n_layer=1, dtype=torch.float32), tok, prefix_bytes=2**20)
    def kept(): return sum(len(c.k) + len(c.v) + 3 for c, *_ in engine.store._entries.values())         # pos, last, hidden
    def held(): gc.collect(); return sum(type(o) is torch.Tensor for o in gc.get_objects()) - kept()
    requests(engine, warm, rng)
    before, peak = held(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    requests(engine, n, rng)
    assert held() <= before + 4 and len(engine.store) <= engine.store.most and engine.store.nbytes <= 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < most_growth                    # KiB

def test_memory_is_flat_over_requests(): flat(150, 150, 40_000)

@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_requests(): flat(10_000, 1000, 20_000)

# ---- guesses

@pytest.mark.parametrize('features', list(FEATURES))
def test_guesses_change_nothing_but_the_number_of_steps(models, features):
    "Greedy rows that repeat themselves, one that samples, one with a stop string, one that meets its limit, a tool in the middle"
    quiet = {mark('assistant_end'): -99., tok.bos: -99., mark('python_start'): -99.}
    prompts = [ids_of(t) for t in ('abcabcabcabc', 'x'*30, 'one two one two one', 'abcabc', 'abababab', 'say it again say it again')]
    each = [Sampling(max_tokens=40, bias=quiet), Sampling(max_tokens=7, bias=quiet), Sampling(max_tokens=30, temperature=1., seed=3), Sampling(max_tokens=40, stop=('b',)),
            Sampling(max_tokens=40, repetition_penalty=1.3), Sampling(max_tokens=30, forced=tuple([mark('python_start'), *tok.encode('1+1'), mark('python_end')]))]
    spies = [Spy(models[features]) for _ in range(2)]
    plain, guessed = (Engine(spy, tok, count, prefix_bytes=0, speculate=n).complete(prompts, each) for spy, n in zip(spies, (0, 4)))
    assert plain == guessed and [c.ids for c in plain] == [naive(models[features], p, s)[0] for p, s in zip(prompts, each)]
    assert len(spies[1].read) < len(spies[0].read)

@pytest.mark.parametrize('n', range(9, 19))
def test_a_stop_string_may_end_inside_a_draft(n):
    "Wherever in a draft it is whole: the same reply, in fewer steps"
    done, reads = [], []
    for speculate in (0, 4):
        spy = Spy(ScriptedModel(tok, {'q': 'so: ' + 'ab'*20}))
        engine = Engine(spy, tok, speculate=speculate)
        done += engine.complete([ask('q')], Sampling(stop=('ab'*9)[:n]))
        reads.append(len(spy.read))
    assert done[0] == done[1] and (done[0].text, done[0].finish) == ('so: ', 'stop') and reads[1] < reads[0]

def test_a_guess_never_goes_past_the_end(models):
    model = gpt(max_len=32)
    for prompt in ('ab'*n for n in (4, 10, 14)):
        for n in (1, 4, 50):
            done = Engine(model, tok, count, speculate=n).complete([ids_of(prompt), ids_of('q')], Sampling(max_tokens=None, bias={tok.bos: -99., mark('assistant_end'): -99.}))
            assert done == Engine(model, tok, count).complete([ids_of(prompt), ids_of('q')], Sampling(max_tokens=None, bias={tok.bos: -99., mark('assistant_end'): -99.}))

def test_a_row_that_guesses_badly_gives_up(models):
    session = Engine(ScriptedModel(tok, {'q': ''.join(f'ab{chr(48 + i % 70)}' for i in range(66))}), tok, None, speculate=4).session()
    row = session.add(ask('q'), Sampling(max_tokens=200))
    reply = session._rows[row]
    while session.busy: session.step()
    assert not reply.guesses.worth and reply.guesses.made < 24 + 8

def test_cancelled_in_the_middle_of_a_draft(models):
    "From another thread, between the reading of a draft and its check"
    session = Engine(models['all'], tok, count, speculate=4).session()
    row = session.add(ids_of('abcabcabc'), Sampling(max_tokens=60, bias={tok.bos: -99., mark('assistant_end'): -99., mark('python_start'): -99.}))
    check, events = session._check, []
    def late(drafts, hidden):
        session.cancel(row)
        return check(drafts, hidden)
    while session.busy:
        events += session.step()
        if len(events) > 20: session._check = late
    assert events[-1].finish == 'stopped' and [e.finish for e in events[:-1]] == [None]*(len(events) - 1)

def test_static_and_guesses_exclude_each_other(models):
    with pytest.raises(UserError, match='choose one of the two'): Engine(models['plain'], tok, static=True, speculate=4)
