"The chat cell without a browser: what it keeps, what it sends, what it shows where no widget runs"
import os, subprocess, sys, threading, time
from html.parser import HTMLParser
import pytest
pytest.importorskip('anywidget', reason='anywidget is not installed: pip install nanochat[notebook]')
from nanochat.chat import Chat, shown
from nanochat.common import UserError
from nanochat.conversation import check_conversation
from nanochat.engine import Engine, Sampling, ScriptedModel
from nanochat.tokenizer import Tokenizer
from nanochat.widget import CSS, ESM, ChatWidget, join_pieces, transcript_html

TOK = Tokenizer({bytes([i]): i for i in range(256)})
LONG = 'word '*100
HOSTILE = ['<img src=x onerror=alert(1)>', '<iframe srcdoc="<script>alert(1)</script>">', '<style>@import "http://127.0.0.1:1"</style>',
           '</div></script><script>alert(1)</script>', '[x](javascript:alert(1))', '"\'&lt;', '\u202eabc', '\x00', '>'*300]

class Model(ScriptedModel):
    "Says what it is scripted to say, and can be slow, held or broken"
    def __init__(self, replies=None, gate=None, **kwargs):
        super().__init__(TOK, {'long': LONG, 'product': 'It is <|python_start|>37*24<|python_end|>888.', **(replies or {})}, default='I see.',
                         max_len=100_000, **kwargs)
        self.gate, self.broken = gate, False
    def forward(self, ids, cache):
        if self.broken: raise RuntimeError('out of memory')
        if self.gate: self.gate.acquire()
        return super().forward(ids, cache)

class Recorded(ChatWidget):
    def __init__(self, *args, **kwargs): self.sent = []; super().__init__(*args, **kwargs)
    def send(self, content, buffers=None): self.sent.append(content)
    def send_state(self, key=None):
        if hasattr(self, 'sent'): self.sent.append({'type': 'state', 'key': key})
        super().send_state(key)

def make(cls=ChatWidget, **kwargs): return cls(Chat(Engine(Model(**kwargs), TOK), sampling=Sampling(max_tokens=None)))
def text(turn): return ''.join(t for _, t in shown(turn['pieces']))

def test_a_conversation():
    w = make()
    for q in ('product', 'Hello?'): w.ask(q).join()
    assert [t['role'] for t in w.turns] == ['user', 'assistant']*2
    assert [text(t) for t in w.turns] == ['product', 'It is [37*24 = 888]888.', 'Hello?', 'I see.']
    assert w.messages == w.chat.messages and not w.busy and w.error is None
    check_conversation({'messages': w.messages})

def test_an_old_conversation_is_shown():
    chat = make().chat; chat.answer('product')
    assert text(ChatWidget(chat).turns[1]) == 'It is [37*24 = 888]888.'

def test_stop_in_the_middle_then_ask_again():
    gate = threading.Semaphore(20)
    w = make(gate=gate)
    thread = w.ask('long')
    with pytest.raises(UserError, match='being written'): w.ask('Hello?')
    while not w.turns[-1]['pieces']: time.sleep(0.001)
    w.stop(); gate.release(10_000); thread.join(120)
    assert not thread.is_alive() and not w.busy and text(w.turns[1]).endswith(' (stopped)')
    w.ask('Hello?').join(120)
    assert text(w.turns[-1]) == 'I see.'
    check_conversation({'messages': w.messages})

def test_an_error_is_shown_and_the_cell_goes_on():
    w = make()
    w.chat.engine.model.broken = True
    w.ask('Hello?').join()
    assert w.turns[-1]['role'] == 'error' and text(w.turns[-1]) == 'RuntimeError: out of memory' and isinstance(w.error, RuntimeError)
    w.chat.engine.model.broken = False
    w.ask('Hello?').join()
    assert text(w.turns[-1]) == 'I see.' and w.error is None and not w.busy
    assert len({t['id'] for t in w.turns}) == len(w.turns)

def test_a_user_error_is_its_sentence():
    w = make(); w.ask('   ').join()
    assert w.turns[-1]['role'] == 'error' and text(w.turns[-1]).startswith('the message is empty')

def test_messages_from_a_front_end():
    w = make(Recorded)
    w._received(w, {'type': 'ask', 'text': 'Hello?'}, []); w.thread.join()
    assert text(w.turns[-1]) == 'I see.'
    w._received(w, {'type': 'sync'}, [])
    assert w.sent[-1] == {'type': 'state', 'key': ['turns', 'busy']}
    for odd in ({}, {'type': 'what'}, {'type': 'stop'}, {'type': 'ask', 'text': 7}): w._received(w, odd, [])
    w.thread.join()
    w._received(w, {'type': 'clear'}, [])
    assert w.turns == [] and w.messages == []

def test_a_question_while_busy_gets_the_state():
    gate = threading.Semaphore(5)
    w = make(Recorded, gate=gate)
    thread = w.ask('long')
    w._received(w, {'type': 'ask', 'text': 'Hello?'}, [])
    assert {'type': 'state', 'key': ['turns', 'busy']} in w.sent and len([t for t in w.turns if t['role'] == 'user']) == 1
    w.stop(); gate.release(10_000); thread.join(120)

def test_clear_during_a_reply():
    gate = threading.Semaphore(10_000)
    w = make(gate=gate); w.ask('long'); w.clear()
    assert (w.turns, w.messages, w.busy) == ([], [], False)
    w.ask('Hello?').join()
    assert text(w.turns[-1]) == 'I see.'

def test_deltas_add_up_to_the_transcript():
    w = make(Recorded)
    w.interval = 0.
    w.ask('product').join(); w.ask('long').join()
    for turn in (w.turns[1], w.turns[3]):
        deltas = [d for d in w.sent if d['type'] == 'delta' and d['id'] == turn['id']]
        assert [d['seq'] for d in deltas] == list(range(1, turn['seq'] + 1))
        assert join_pieces(p for d in deltas for p in d['pieces']) == turn['pieces']

def test_few_messages():
    w = make(Recorded)
    start = time.monotonic(); w.ask('long').join(); seconds = time.monotonic() - start
    assert 1 <= sum(d['type'] == 'delta' for d in w.sent) <= min(500, 2 + seconds/w.interval)        # of 500 tokens

def test_two_at_once():
    one, two = make(), make()
    for t in (one.ask('long'), two.ask('product')): t.join()
    assert text(one.turns[1]) == LONG and text(two.turns[1]) == 'It is [37*24 = 888]888.'

class Tags(HTMLParser):
    def __init__(self): super().__init__(); self.tags, self.attrs, self.text = set(), set(), ''
    def handle_starttag(self, tag, attrs): self.tags.add(tag); self.attrs |= {k for k, _ in attrs}
    def handle_data(self, data): self.text += data

@pytest.mark.parametrize('hostile', HOSTILE, ids=lambda s: s[:12])
def test_hostile_text_stays_text(hostile):
    w = make(replies={hostile: hostile}); w.ask(hostile).join()
    w.turns.append({'role': 'error', 'pieces': [['note', hostile*100], ['python', hostile], ['python_output', hostile]]})
    bundle, _ = w._repr_mimebundle_()
    seen = Tags(); seen.feed(bundle['text/html']); seen.close()
    assert seen.tags <= {'div', 'span', 'code', 'i'} and seen.attrs <= {'style'}
    assert bundle['text/plain'].startswith(f'user: {hostile}\nassistant: {hostile}')
    assert hostile in seen.text or '\x00' in hostile

def test_a_role_is_escaped_too():
    assert '<b>' not in transcript_html([{'role': '<b>', 'pieces': [['<b>', '<b>']]}])

def test_the_page_never_writes_html():
    for word in ('innerHTML', 'outerHTML', 'insertAdjacentHTML', 'document.write', 'eval(', 'Function(', 'http', 'import '): assert word not in ESM
    for word in ('http', '@import', 'url('): assert word not in CSS

def test_a_bundle_holds_the_live_widget():
    bundle, _ = make()._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' in bundle and bundle['text/plain'] == 'an empty chat'

def test_without_anywidget_one_sentence():
    code = "import sys; sys.modules['anywidget'] = None; import nanochat.widget"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode and "pip install 'nanochat[notebook]'" in r.stderr.splitlines()[-1]

# branches, votes, X-ray, settings

def drawn(w): return [text(t) for t in w.turns]

def test_edit_again_and_switch():
    w = make()
    for q in ('product', 'Hello?'): w.ask(q).join()
    w.ask('long', instead_of=0).join()
    assert drawn(w) == ['long', LONG] and [t['alts'] for t in w.turns] == [[0, 2]]*2
    w.ask(instead_of=2).join()
    assert drawn(w)[0] == 'long' and w.turns[1]['alts'] == [0, 2, 3] and 'same reply again' in text(w.turns[1])
    w.switch(0)
    assert drawn(w) == ['product', 'It is [37*24 = 888]888.', 'Hello?', 'I see.']
    w.ask('More?').join()
    assert [t['turn'] for t in w.turns] == [0, 0, 1, 1, 4, 4] and w.messages == w.chat.messages
    check_conversation({'messages': w.messages})

def test_ids_live_as_long_as_turns():
    "A front end keeps a box by its id, so an id never means two things, and a turn keeps its id"
    w, seen = make(), {}
    def look():
        assert len({t['id'] for t in w.turns}) == len(w.turns)
        for t in w.turns:
            if t['turn'] is not None: assert seen.setdefault(t['id'], (t['role'], t['turn'])) == (t['role'], t['turn'])
    for act in (lambda: w.ask('a').join(), lambda: w.ask('b').join(), lambda: w.ask(instead_of=0).join(), lambda: w.switch(1), lambda: w.switch(2),
                lambda: w.ask('c', instead_of=1).join(), lambda: w.vote(0, 1)): act(); look()
    assert len(set(seen.values())) == len(seen)
    w.clear(); seen_before = set(seen); seen.clear()
    w.ask('d').join(); look()
    assert not seen_before & set(seen)

@pytest.mark.parametrize('again', [False, True])
def test_an_alternative_that_fails_gives_way(again):
    w = make(); w.ask('product').join(); w.see_through(0)
    w.chat.engine.model.broken = True
    w.ask(None if again else 'edited', instead_of=0).join()
    assert drawn(w) == ['product', 'It is [37*24 = 888]888.', 'RuntimeError: out of memory'] and w.xray == {}
    w.chat.engine.model.broken = False
    w.ask('Hello?').join()
    assert [t['turn'] for t in w.turns] == [0, 0, None, 1, 1] and w.chat.path == [0, 1]

def test_stopped_alternatives_are_kept():
    gate = threading.Semaphore(10_000)
    w = make(gate=gate); w.ask('long').join()
    gate._value = 30
    thread = w.ask(instead_of=0)
    while not w.turns[-1]['pieces']: time.sleep(0.001)
    w.stop(); gate.release(10_000); thread.join(120)
    assert w.turns[1]['alts'] == [0, 1] and text(w.turns[1]).endswith(' (stopped)') and len(w.chat.turns) == 2
    check_conversation({'messages': w.messages})

def test_the_xray_is_data_and_follows_a_branch():
    w = make(); w.ask('product').join()
    w._received(w, {'type': 'xray', 'turn': 0}, [])
    views = w.xray['views']
    assert ''.join(v['text'] for v in views if v['kind'] == 'prompt') == '<|user_start|>product<|user_end|><|assistant_start|>'
    assert all(v['p'] is not None and len(v['top']) == 5 for v in views if v['kind'] != 'prompt')
    first = next(i for i, v in enumerate(views) if v['kind'] != 'prompt')
    w._received(w, {'type': 'branch', 'turn': 0, 'at': 1, 'id': ord('n')}, []); w.thread.join()
    assert w.xray['turn'] == 1 and [v['text'] for v in w.xray['views'][first:first+2]] == ['I', 'n'] and text(w.turns[1]).startswith('In is ')
    w._received(w, {'type': 'xray', 'turn': 1}, [])
    assert w.xray == {}

def test_votes_write_pairs(tmp_path):
    w = make(); w.chat.pairs = tmp_path/'pairs.jsonl'
    w.ask('product').join(); w.branch(0, 0, ord('A')).join()
    w._received(w, {'type': 'vote', 'turn': 1, 'vote': -1}, [])
    assert 'opposite vote' in w.status and [t['vote'] for t in w.turns] == [-1, -1]
    w._received(w, {'type': 'vote', 'turn': 0, 'vote': 1}, [])
    assert w.status == '1 preference pair added to pairs.jsonl' and len(w.chat.pairs.read_text().splitlines()) == 1

def test_settings_hold_for_the_next_reply():
    w = make()
    w._received(w, {'type': 'set', 'values': {'max_tokens': 3, 'system': ' Be brief. '}}, [])
    w.ask('long').join()
    assert text(w.turns[-1]) == 'wor (cut off at the length limit)' and w.messages[0] == {'role': 'system', 'content': 'Be brief.'}
    assert text(w.turns[0]) == 'Be brief.' and w.settings['max_tokens'] == 3
    w.adjust(system='', max_tokens=None)
    assert [t['role'] for t in w.turns] == ['user', 'assistant'] and w.messages[0]['role'] == 'user'

def test_a_refused_setting_changes_nothing_else():
    w = make()
    w._received(w, {'type': 'set', 'values': {'temperature': -1, 'system': 'Be brief.'}}, [])
    assert 'temperature' in w.status and w.chat.system is None and w.turns == [] and w.messages == []

ODD = [None, -1, 99, 1.5, True, 'x', '', [], {}, '__class__', 10**30]

@pytest.mark.parametrize('kind', ['ask', 'edit', 'again', 'branch', 'switch', 'vote', 'xray', 'set', 'stop', 'clear', 'sync', 'what', None])
def test_nothing_that_a_front_end_sends_breaks_the_cell(kind):
    w = make(Recorded); w.ask('product').join()
    for field in ('turn', 'at', 'id', 'vote', 'text', 'values'):
        for odd in ODD:
            w._received(w, {'type': kind, 'turn': 0, 'at': 0, 'id': 65, 'vote': 1, 'text': 'x', 'values': {'seed': 1}, field: odd}, [])
            if field == 'values': w._received(w, {'type': kind, 'turn': 0, 'values': {odd if isinstance(odd, str) else 'seed': odd}}, [])
            w.thread.join(120)
            assert not w.busy and w.chat.sampling.check() is None
    w.adjust(temperature=0., max_tokens=None); w.ask('Hello?').join(120)
    assert text(w.turns[-1]).startswith('I see.')
    check_conversation({'messages': w.messages})

def test_a_line_of_a_megabyte():
    "Deltas stay small and nothing is lost"
    class Loud:
        tok, model = TOK, Model()
        def reply(self, conv, sampling=None, stop=None):
            from nanochat.engine import Event
            for i in range(20): yield Event(0, 0, 'x'*50_000, 'text', False, 'stop' if i == 19 else None)
    w = Recorded(Chat(Loud())); w.interval = 0.
    w.ask('Speak').join()
    sizes = [sum(len(t) for _, t in m['pieces']) for m in w.sent if m['type'] == 'delta']
    assert sum(sizes) == 1_000_000 and max(sizes) <= 100_000 and text(w.turns[-1]) == 'x'*1_000_000

def test_load_draws_the_saved_conversation(tmp_path):
    w = make(); w.ask('product').join(); w.ask(instead_of=0).join(); w.chat.save(tmp_path/'chat.json')
    other = make(); other.ask('Hello?').join(); other.load(tmp_path/'chat.json')
    assert drawn(other) == ['product', 'It is [37*24 = 888]888.'] and other.turns[1]['alts'] == [0, 1]
    with pytest.raises(UserError, match='there is no file'): other.load(tmp_path/'nothing.json')
    assert drawn(other)[0] == 'product'

def test_the_stored_page_reads_without_a_kernel():
    "Page 44 as it is committed: the widget's cell shows a transcript, and nothing of a live widget"
    import nbformat
    from conftest import ROOT
    [cell] = [c for c in nbformat.read(ROOT/'nbs'/'44_widget.ipynb', 4).cells if c.id == 'live']
    [out] = cell.outputs
    assert set(out.data) == {'text/plain', 'text/html'} and '37*24 = 888' in out.data['text/plain'] and '37*24 = 888' in out.data['text/html']
    seen = Tags(); seen.feed(out.data['text/html'])
    assert seen.tags <= {'div', 'span', 'code', 'i'}

def test_nbval_compares_the_stored_transcript(tmp_path):
    "A cell whose widget said what is stored passes nbval; one with another word stored does not"
    import nbformat
    from conftest import ROOT
    pytest.importorskip('nbval')
    code = '''from nanochat.chat import Chat
from nanochat.engine import Engine, ScriptedModel
from nanochat.tokenizer import Tokenizer
from nanochat.widget import ChatWidget
tok = Tokenizer({bytes([i]): i for i in range(256)})
widget = ChatWidget(Chat(Engine(ScriptedModel(tok, {'product': 'It is <|python_start|>37*24<|python_end|>888.'}), tok)))
widget.ask('product').join()
widget'''
    w = make(); w.ask('product').join()
    stored = {k: v for k, v in w._repr_mimebundle_()[0].items() if k.startswith('text/')}
    wrong = {k: v.replace('888', '887') for k, v in stored.items()}
    def cell(source, data): return nbformat.v4.new_code_cell(source, outputs=[nbformat.v4.new_output('execute_result', data, execution_count=1)], execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell(code, stored), cell('widget', wrong)], metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3'}}),
                   tmp_path/'page.ipynb')
    r = subprocess.run([sys.executable, '-m', 'pytest', '--nbval', '-q', '-p', 'no:cacheprovider', '-c', '/dev/null', '--rootdir', tmp_path, tmp_path],
                       capture_output=True, text=True, timeout=280, env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert '1 failed, 1 passed' in r.stdout and 'Cell 1' in r.stdout.split('FAILED')[-1], r.stdout[-2000:]
