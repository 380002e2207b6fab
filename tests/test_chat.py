"Conversations stay valid whatever happens in the middle of a reply, and the terminal shows nothing but text"
import io, itertools, json, os, random, re, runpy, select, subprocess, sys, threading, time
import pytest, torch
from nanochat.chat import Chat, keep_parts, open_chat, pick_tool, transcript
from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError, run_dir
from nanochat.conversation import check_conversation, render, render_prompt
from nanochat.engine import Engine, Sampling, ScriptedModel
from nanochat.gpt import GPT, GPTConfig
from nanochat.preferences import read_pairs
from nanochat.scripts.chat_cli import Screen, converse
from nanochat.tokenizer import Tokenizer
from nanochat.xray import label, xray, xray_html

TOK = Tokenizer({bytes([i]): i for i in range(256)})
PRODUCT = 'It is <|python_start|>37*24<|python_end|>, so 888.'
QUESTION = 'What is 37 times 24?'

def scripted(max_len=1000, **replies):
    model = ScriptedModel(TOK, {QUESTION: PRODUCT, **replies}, default='I see.', max_len=max_len)
    return Engine(model, TOK)

def valid(chat): check_conversation({'messages': chat.messages}) if chat.path else None

# the conversation

def test_history_and_tools():
    chat = Chat(scripted(), system='Be kind.')
    assert chat.answer(QUESTION) == 'It is , so 888.' and chat.answer('Thanks') == 'I see.'
    assert transcript(chat.messages[:3]) == f'system: Be kind.\nuser: {QUESTION}\nassistant: It is [37*24 = 888], so 888.'
    assert len(chat.messages) == 5 and chat.finish == 'stop'
    chat.clear()
    assert chat.messages == [{'role': 'system', 'content': 'Be kind.'}]

@pytest.mark.parametrize('how', ['stop', 'leave', 'raise'])
def test_every_way_to_end_a_reply_keeps_it_valid(how):
    total = sum(1 for _ in Chat(scripted()).ask(QUESTION))
    for n in range(total + 1):
        chat, stop = Chat(scripted()), threading.Event()
        if n == 0: stop.set()
        try:
            for i, event in enumerate(chat.ask(QUESTION, stop), 1):
                if i < n: continue
                if how == 'stop': stop.set()
                if how == 'leave': break
                if how == 'raise': raise KeyboardInterrupt
        except KeyboardInterrupt: pass
        valid(chat)
        assert all(p['type'] != 'python' or q['type'] == 'python_output' for m in chat.messages[1::2] if isinstance(m['content'], list)
                   for p, q in zip(m['content'], m['content'][1:]))
        render_prompt(TOK, {'messages': [*chat.messages, {'role': 'user', 'content': 'x'}]})
        assert chat.answer('Are you there?') == 'I see.'
        valid(chat)

@pytest.mark.parametrize('after', [0, 1, 7, 20])
def test_an_error_inside_the_engine(after):
    chat = Chat(scripted())
    model, calls = chat.engine.model, iter(range(10_000))
    class Broken(type(model)):
        def forward(self, ids, cache):
            if next(calls) == after: raise RuntimeError('out of memory')
            return super().forward(ids, cache)
    model.__class__ = Broken
    with pytest.raises(RuntimeError): chat.answer(QUESTION)
    valid(chat)
    assert chat.answer('Are you there?') == 'I see.'
    valid(chat)

@pytest.mark.parametrize('max_tokens', [1, 7, 12, None])
def test_any_length_limit(max_tokens):
    chat = Chat(scripted(), sampling=Sampling(max_tokens=max_tokens))
    for _ in range(3): chat.answer(QUESTION); valid(chat)

@pytest.mark.parametrize('max_len', [60, 64, 80, 100, 200, 333])
def test_old_exchanges_are_dropped_and_counted(max_len):
    chat = Chat(scripted(max_len=max_len), system='Be kind.', sampling=Sampling(max_tokens=30))
    asked = 0
    for i in range(20):
        chat.answer(f'Number {i:02}?'); asked += 1
        valid(chat)
        assert chat.messages[0] == {'role': 'system', 'content': 'Be kind.'}
        assert chat.dropped + (len(chat.messages) - 1)//2 == asked
        assert chat.messages[-2]['content'] == f'Number {i:02}?'
    assert chat.dropped > 0

def test_a_message_too_long_changes_nothing():
    chat = Chat(scripted(max_len=100))
    chat.answer('Hello'); before = list(chat.messages)
    with pytest.raises(UserError, match='too long'): chat.answer('x'*100)
    assert chat.messages == before and chat.dropped == 0 and chat.answer('Hello') == 'I see.'

def test_special_tokens_in_a_question_are_text():
    chat = Chat(scripted())
    for text in TOK.specials: chat.answer(text)
    ids = render_prompt(TOK, {'messages': [*chat.messages, {'role': 'user', 'content': 'x'}]})
    assert sum(i in TOK.special_ids for i in ids) == 2 + 2*len(chat.messages) + 2

def test_hostile_unicode_round_trips():
    chat = Chat(scripted())
    for text in ('\ud800', '\x00', '🙂'*20, '\u202eabc', 'a\r\nb'): assert chat.answer(text) == 'I see.'
    valid(chat)

def test_two_threads_one_chat():
    chat = Chat(scripted()); running = chat.ask('One'); next(running)
    with pytest.raises(UserError, match='still answering'): chat.answer('Two')
    list(running)
    assert chat.answer('Two') == 'I see.'

def test_parts_are_always_valid():
    kinds = ('text', 'python', 'python_output')
    for n in range(6):
        for seq in itertools.product(kinds, repeat=n):
            if any(b == 'python_output' and a not in ('python', 'python_output') for a, b in zip(('text',) + seq, seq)): continue
            for whole in (True, False):
                parts = keep_parts([(k, 'x') for k in seq], whole)
                check_conversation({'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': parts}]})

# the tree

def walk(seed, chat, steps):
    "Whatever a reader can do, at random"
    dice = random.Random(seed)
    for step in range(steps):
        old, place = [t.question for t in chat.turns], dice.randrange(len(chat.turns)) if chat.turns and dice.random() < .5 else None
        if place is not None and dice.random() < .3: chat.switch(place)
        elif place is not None and dice.random() < .3: chat.vote(place, dice.choice([-1, 0, 1]))
        else:
            text = None if place is not None and dice.random() < .5 else dice.choice([QUESTION, f'Number {step}?'])
            events, stop, cut = chat.turns[place].events if text is None else (), threading.Event(), dice.choice([0, 3, 12, 999])
            own = [n for n, e in enumerate(events) if e.kind != 'python_output']
            forced = chat.beginning(place, at := dice.choice(own), events[at].id) if own and dice.random() < .5 else ()
            for i, _ in enumerate(chat.ask(text, stop, place, forced)):
                if i >= cut: stop.set()
        assert [t.question for t in chat.turns][:len(old)] == old
        yield step

@pytest.mark.parametrize('seed', range(4))
def test_every_path_of_a_tree_is_valid(tmp_path, seed):
    chat = Chat(scripted(max_len=200), sampling=Sampling(max_tokens=40), pairs=tmp_path/'pairs.jsonl')
    for _ in walk(seed, chat, 40): valid(chat)
    for n in range(len(chat.turns)):
        chat.switch(n)
        assert n in chat.path and chat.path == sorted(chat.path) and n in chat.siblings(n)
        valid(chat)
    chat.save(tmp_path/'chat.json')
    again = Chat(scripted()); again.load(tmp_path/'chat.json')
    assert (again.turns, again.head, again.system) == (chat.turns, chat.head, chat.system)
    if chat.pairs.exists():
        for p in read_pairs(chat.pairs): assert p['chosen'] != p['rejected']

def test_alternatives_have_their_own_seeds():
    "The same seed, another reply; and all of it once more"
    def three():
        chat = Chat(Engine(Loose(), TOK), sampling=Sampling(seed=1, temperature=1., max_tokens=12))
        for n in (None, 0, 0): list(chat.ask('Sky?' if n is None else None, instead_of=n))
        return [t.reply for t in chat.turns]
    first = three()
    assert len(set(first)) == 3 and three() == first

class Loose(ScriptedModel):
    "Believes in all letters alike"
    def __init__(self): super().__init__(TOK, {})
    def logits(self, hidden): return torch.zeros_like(hidden).index_fill(-1, torch.arange(97, 123), 5.)

@pytest.mark.parametrize('at', range(12))
def test_a_branch_begins_with_what_was_asked_for(at):
    chat = Chat(scripted(), sampling=Sampling(logprobs=2))
    chat.answer(QUESTION)
    events = chat.turns[0].events
    if events[at].kind == 'python_output':
        with pytest.raises(UserError, match='written by a tool'): chat.beginning(0, at, 65)
        return
    list(chat.ask(instead_of=0, forced=chat.beginning(0, at, ord('Z'))))
    new = chat.turns[1].events
    assert [e.id for e in new[:at+1]] == [e.id for e in events[:at]] + [ord('Z')] and all(e.forced for e in new[:at+1])
    assert [e.logprob for e in new[:at]] == [e.logprob for e in events[:at]]           # the model's own, whoever chose
    valid(chat)

def test_no_mark_can_be_forced_where_it_does_not_belong():
    chat = Chat(scripted()); chat.answer(QUESTION)
    kinds = [e.kind for e in chat.turns[0].events]
    allowed = {(kind, name) for kind in ('text', 'python') for name in TOK.specials for at in [kinds.index(kind) + (kind == 'python')]
               if not raises(lambda: chat.beginning(0, at, TOK.special(name)))}
    assert allowed == {('text', '<|python_start|>'), ('text', '<|assistant_end|>'), ('python', '<|python_end|>')}

def raises(f):
    try: f()
    except UserError: return True

@pytest.mark.parametrize('end', range(8))
def test_a_vote_makes_a_pair_only_of_comparable_replies(tmp_path, end):
    "One reply is good; the other is like it, or asked otherwise, cut, or read with another system message"
    chat = Chat(scripted(), pairs=tmp_path/'pairs.jsonl')
    chat.answer(QUESTION); chat.vote(0, 1)
    how = ('whole', 'edited', 'system', 'cut')[end % 4]
    if how == 'system': chat.system = 'Be kind.'
    stop = threading.Event()
    text = 'Other?' if how == 'edited' else None
    for i, _ in enumerate(chat.ask(text, stop, 0, () if text else chat.beginning(0, 0, ord('a') + end))):
        if how == 'cut' and i > 3: stop.set()
    assert chat.vote(1, -1) == (how == 'whole')
    if how == 'whole':
        [p] = read_pairs(chat.pairs)
        assert p['prompt'] == [{'role': 'user', 'content': QUESTION}] and p['chosen'] == chat.turns[0].messages[1]
        assert chat.vote(1, -1) == 0 and len(read_pairs(chat.pairs)) == 1                # the same click again

def test_a_vote_that_cannot_be_written_is_not_cast(tmp_path):
    (tmp_path/'file').write_text('')
    chat = Chat(scripted(), pairs=tmp_path/'file'/'pairs.jsonl')
    chat.answer(QUESTION); list(chat.ask(instead_of=0, forced=[65]))
    chat.vote(0, 1)
    with pytest.raises(UserError, match='cannot add'): chat.vote(1, -1)
    assert chat.turns[1].vote == 0

# files

def saved_chat(path):
    chat = Chat(scripted(), system='Be kind. \ud800', sampling=Sampling(logprobs=2))
    chat.answer(QUESTION); list(chat.ask(instead_of=0)); chat.answer('Thanks'); chat.vote(0, -1)
    chat.save(path)
    return chat

def places(x, path=()):
    "Every place in a JSON value"
    if isinstance(x, (dict, list)):
        for k, v in x.items() if isinstance(x, dict) else enumerate(x[:2]): yield path + (k,); yield from places(v, path + (k,))

def test_a_changed_file_never_breaks_a_chat(tmp_path):
    "Each value replaced by each of many others: refused with one sentence, or a valid conversation. Nothing in between"
    saved_chat(tmp_path/'chat.json')
    text, chat, refused = (tmp_path/'chat.json').read_text(), Chat(scripted()), 0
    chat.answer('Hello?'); before = chat.messages
    for path in places(json.loads(text)):
        for value in (None, -1, 99, 1.5, True, '', 'x', [], {}, [1], {'a': 1}):
            bad = at = json.loads(text)
            for key in path[:-1]: at = at[key]
            at[path[-1]] = value
            (tmp_path/'bad.json').write_text(json.dumps(bad))
            try: chat.load(tmp_path/'bad.json')
            except UserError as e:
                refused += 1
                assert chat.messages == before and '\n' not in str(e) and 'bad.json' in str(e)
                continue
            valid(chat)
            for n in range(len(chat.turns)): chat.switch(n); valid(chat); xray(chat, n)
            chat.clear(); chat.system = None; chat.answer('Hello?')
    assert refused > 300

def test_a_cut_file_and_no_file(tmp_path):
    saved_chat(tmp_path/'chat.json')
    data = (tmp_path/'chat.json').read_bytes()
    for n in range(0, len(data) - 2, 97):
        (tmp_path/'cut.json').write_bytes(data[:n])
        with pytest.raises(UserError, match='no saved chat'): Chat(scripted()).load(tmp_path/'cut.json')
    for where, complaint in ((tmp_path, 'cannot read'), (tmp_path/'x', 'there is no file')):
        with pytest.raises(UserError, match=complaint): Chat(scripted()).load(where)

def test_tokens_of_another_tokenizer_are_left_out(tmp_path):
    chat = saved_chat(tmp_path/'chat.json')
    saved = json.loads((tmp_path/'chat.json').read_text())
    saved['tokenizer'] = 'another'
    (tmp_path/'chat.json').write_text(json.dumps(saved))
    again = Chat(scripted()); again.load(tmp_path/'chat.json')
    assert again.messages == chat.messages and all(t.events == [] for t in again.turns) and all(t.events for t in chat.turns)

def test_save_replaces_no_other_file(tmp_path):
    (tmp_path/'thesis.tex').write_text('years of work')
    with pytest.raises(UserError, match='no saved chat'): Chat(scripted()).save(tmp_path/'thesis.tex')
    assert (tmp_path/'thesis.tex').read_text() == 'years of work'
    chat = saved_chat(tmp_path/'chat.json'); chat.answer('More'); chat.save(tmp_path/'chat.json')
    again = Chat(scripted()); again.load(tmp_path/'chat.json')
    assert again.messages == chat.messages

def test_names_that_no_disk_holds(tmp_path):
    "Path.exists raises for such a name; the chat answers with a sentence and goes on"
    chat = Chat(scripted())
    said = commands(chat, *(f'/{what} {name}' for what in ('save', 'load') for name in ('x' * 300, f'{tmp_path}/{"d" * 300}/chat.json')), 'Hello?')
    assert said.count('error: cannot write') == 2 and said.count('error: there is no file') == 2 and 'I see.' in said

def test_a_vote_is_a_whole_number(tmp_path):
    chat = Chat(scripted()); chat.answer('Hello?')
    for odd in (True, False, 1., -1., '1', None, 2):
        with pytest.raises(UserError, match='a vote is'): chat.vote(0, odd)
    chat.vote(0, 1); chat.save(tmp_path/'chat.json'); Chat(scripted()).load(tmp_path/'chat.json')

# the X-ray

def test_the_xray_agrees_with_training():
    "Ids and mask of the views are those that `render` gives for the same conversation"
    chat = Chat(scripted(), sampling=Sampling(logprobs=3))
    for question in (QUESTION, 'Thanks €'): chat.answer(question)
    rendered, views = render(TOK, {'messages': chat.messages}), xray(chat, 0) + xray(chat, 1)
    assert [v['id'] for v in views] == rendered.ids[1:] and [v['counted'] for v in views] == [bool(m) for m in rendered.mask[1:]]
    written = [v for v in views if v['kind'] != 'prompt']
    assert all(0 <= v['p'] <= 1 and v['h'] >= 0 and len(v['top']) == 3 for v in written)
    assert [v['forced'] for v in written] == [v['kind'] == 'python_output' for v in written]
    assert json.loads(json.dumps(views)) == views

def test_an_xray_without_probabilities():
    chat = Chat(scripted()); chat.answer(QUESTION)
    assert 'title="forced"' in xray_html(xray(chat, 0)).html and 'title="sampled"' in xray_html(xray(chat, 0)).html
    assert {v['p'] for v in xray(chat, 0)} == {None} and '888' in repr(xray_html(xray(chat, 0))).replace(' ', '')

def test_every_byte_has_a_label():
    labels = [label(TOK, i) for i in range(TOK.n_vocab)]
    assert len(set(labels)) == TOK.n_vocab and not any('\ufffd' in text for text in labels)

# a trained model, and none

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run folder with a random model: it talks nonsense, and everything around it is real"
    base = tmp_path_factory.mktemp('base')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_BASE_DIR', str(base))
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=TOK.n_vocab, n_layer=1, n_head=1, n_kv_head=1, head_dim=16, max_len=128, head_std=1.))
        TOK.save(base/'tokenizer'/'tiny')
        save_checkpoint(run_dir('sft', 'tiny'), 1, model, TOK.hash)
    return base

def test_open_chat(trained, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(trained))
    chat = open_chat(device='cpu', max_tokens=20, temperature=1., seed=1)
    assert chat.answer('Hello?') == open_chat(device='cpu', max_tokens=20, temperature=1., seed=1).answer('Hello?')
    valid(chat)
    with pytest.raises(UserError, match=r'runs/tiny\.sh.*--tag tiny'): open_chat(tag='other')
    with pytest.raises(UserError, match='temperature'): open_chat(temperature=-1.)

def run_cli(monkeypatch, capsys, *args, base=None, stdin=''):
    "Run the script in this process as `python -m` would; (exit code, stdout, stderr)"
    monkeypatch.setenv('NANOCHAT_COMMAND', '1')
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(base))
    monkeypatch.setattr(sys, 'argv', ['chat_cli', *args])
    monkeypatch.setattr(sys, 'stdin', None if stdin is None else io.StringIO(stdin))
    code = 0
    kept = sys.modules.pop('nanochat.scripts.chat_cli', None)         # runpy warns about a module that is already there
    try: runpy.run_module('nanochat.scripts.chat_cli', run_name='__main__', alter_sys=True)
    except SystemExit as e: code = e.code or 0
    finally: sys.modules['nanochat.scripts.chat_cli'] = kept
    return code, *capsys.readouterr()

def test_no_model_is_one_sentence(monkeypatch, capsys, tmp_path):
    code, out, err = run_cli(monkeypatch, capsys, '-p', 'Hello?', base=tmp_path)
    assert code == 1 and out == '' and err.count('\n') == 1 and 'bash runs/tiny.sh' in err

def test_help_teaches(monkeypatch, capsys, tmp_path):
    code, out, err = run_cli(monkeypatch, capsys, '--help', base=tmp_path)
    assert code == 0
    for word in ('-p', '--prompt', '--temperature', '--seed', '--max-tokens', '--tool', '--step', '/help', 'Ctrl-C', 'runs/tiny.sh'): assert word in out
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('args', [['--nonsense'], ['--temperature', 'hot'], ['-p'], ['--tool', 'bash']])
def test_bad_flags(monkeypatch, capsys, tmp_path, args):
    code, out, err = run_cli(monkeypatch, capsys, *args, base=tmp_path)
    assert code == 2 and out == '' and args[0].lstrip('-')[:4] in err

@pytest.mark.parametrize('args', [['--temperature', '-1'], ['--temperature', 'nan'], ['--max-tokens', '0'], ['--device', 'tpu'], ['--tag', '../x']])
def test_bad_values(monkeypatch, capsys, trained, args):
    code, out, err = run_cli(monkeypatch, capsys, '-p', 'Hi', *args, base=trained)
    assert code == 1 and out == '' and err.startswith('error: ') and err.count('\n') == 1

def test_a_piped_conversation(monkeypatch, capsys, trained):
    code, out, err = run_cli(monkeypatch, capsys, '--max-tokens', '4', '--device', 'cpu', base=trained, stdin='Hello?\n/help\n/nothing\n/quit\nnever\n')
    assert code == 0 and '/clear' in out and 'no command /nothing' in out and 'you>' not in out and '\x1b' not in out
    code, out, err = run_cli(monkeypatch, capsys, '--max-tokens', '4', '--device', 'cpu', base=trained, stdin='Hello?')
    assert code == 0 and err == '' and out.endswith('\n') and not out.endswith('\n\n')             # the end of the input adds no line
    code, out, err = run_cli(monkeypatch, capsys, base=trained, stdin=None)
    assert code == 1 and out == '' and err.count('\n') == 1 and '-p' in err

def test_one_answer_in_a_process_of_its_own(trained):
    r = subprocess.run([sys.executable, '-m', 'nanochat.scripts.chat_cli', '-p', 'Hello?', '--max-tokens', '20', '--device', 'cpu'], text=True,
                       capture_output=True, env={**os.environ, 'NANOCHAT_BASE_DIR': str(trained)}, timeout=300, encoding='utf-8')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_BASE_DIR', str(trained))
        expected = open_chat(device='cpu', max_tokens=20).answer('Hello?')
    assert r.returncode == 0 and r.stderr == '' and r.stdout == re.sub('[\x00-\x08\x0b-\x1f\x7f-\x9f]', '', expected) + '\n'

# the terminal

PTY = '''
import json, sys, time
from nanochat.chat import Chat
from nanochat.engine import Engine, Sampling, ScriptedModel
from nanochat.scripts import chat_cli
from nanochat.tokenizer import Tokenizer
tok = Tokenizer({bytes([i]): i for i in range(256)})
class Slow(ScriptedModel):
    def forward(self, ids, cache): time.sleep(0.01); return super().forward(ids, cache)
replies = {'Count': 'one ' * 2000, 'Größe 🙂?': 'Groß. 🙂 Ende', 'Product': 'It is <|python_start|>37*24<|python_end|>888.'}      # a minute to be stopped in
chat = Chat(Engine(Slow(tok, replies, default='I see.', max_len=10_000), tok), sampling=Sampling(max_tokens=None))
print('ready', flush=True)
chat_cli.open_chat = lambda **options: chat
chat_cli.chat_cli()
print('LEFT', json.dumps([m['role'] for m in chat.messages]))
'''

@pytest.mark.skipif(sys.platform == 'win32', reason='pseudo-terminals are of Unix')
@pytest.mark.parametrize('last', [b'\x03', b'\x04'], ids=['Ctrl-C', 'Ctrl-D'])
def test_keys_in_a_terminal(last):
    import pty
    env = {**os.environ, 'TERM': 'xterm'}; env.pop('NO_COLOR', None)
    pid, fd = pty.fork()
    if pid == 0: os.execve(sys.executable, [sys.executable, '-c', PTY], env)
    seen = b''
    def until(word, seconds=300):
        nonlocal seen
        end = time.monotonic() + seconds
        while word not in seen:
            assert time.monotonic() < end, seen
            if not select.select([fd], [], [], 1)[0]: continue
            try: seen += os.read(fd, 4096)
            except OSError: break                                     # the other side is closed
        assert word in seen, seen
        seen = seen[seen.index(word) + len(word):]
    def press(key, word):
        "A key that arrives between the prompt and the read is lost, as it is for a person, who presses it again"
        for _ in range(20):
            try: os.write(fd, key)
            except OSError: break
            try: return until(word, 60)
            except AssertionError: pass
        until(word)
    until(b'ready'); until(b'you> ')
    os.write(fd, b'Count\n'); until(b'one one one')
    os.write(fd, b'\x03'); until(b'(stopped)'); until(b'you> ')       # the first Ctrl-C ends the reply, not the program
    os.write(fd, b'Product\n'); until(b'\x1b[2m[\x1b[0m'); until(b'888.'); until(b'you> ')
    os.write(fd, 'Größe 🙂?\n'.encode()); until('Groß. 🙂 Ende'.encode()); until(b'you> ')      # characters of several bytes, both ways
    os.write(fd, b'/retry\n'); until('Groß. 🙂 Ende'.encode()); until(b'the same reply again'); until(b'you> ')
    os.write(fd, b'\x1b[A\x1b[A\r'); until('Groß. 🙂 Ende'.encode()); until(b'you> ')                       # two lines up: the question again
    if last == b'\x03': os.write(fd, b'half a line'); until(b'half a line'); press(last, b'to leave'); until(b'you> ')       # at the prompt the first one only warns
    press(last, b'LEFT ["user", "assistant", "user", "assistant", "user", "assistant", "user", "assistant"]')
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(fd)

class Terminal(io.StringIO):
    def isatty(self): return True

@pytest.mark.parametrize('env, colour', [({}, True), ({'NO_COLOR': '1'}, False), ({'NO_COLOR': ''}, True), ({'TERM': 'dumb'}, False)])
def test_colours(monkeypatch, env, colour):
    monkeypatch.delenv('NO_COLOR', raising=False); monkeypatch.setenv('TERM', 'xterm')
    for k, v in env.items(): monkeypatch.setenv(k, v)
    out, pipe = Terminal(), io.StringIO()
    Screen(out).write('x', 'tool'); Screen(pipe).write('x', 'tool')
    assert ('\x1b' in out.getvalue()) == colour and pipe.getvalue() == 'x'

def test_no_control_character_reaches_the_terminal():
    hostile = ''.join(map(chr, range(256)))
    chat, out = Chat(scripted(**{'Say': hostile}, max_len=2000), sampling=Sampling(max_tokens=None)), io.StringIO()
    lines = iter(['Say', hostile])
    def read(prompt):
        for line in lines: return line
        raise EOFError
    converse(chat, Screen(out), read)
    assert not {c for c in out.getvalue() if ord(c) < 32 or 127 <= ord(c) < 160} - {'\n', '\t'}
    assert chat.messages[1]['content'] == hostile                     # only the screen is cleaned

def commands(chat, *lines):
    "What a terminal shows for these lines"
    out, lines = io.StringIO(), iter(lines)
    def read(prompt):
        for line in lines:
            if isinstance(line, BaseException): raise line
            return line
        raise EOFError
    converse(chat, Screen(out), read)
    return out.getvalue()

def test_commands_of_the_sampling():
    chat = Chat(scripted())
    said = commands(chat, '/temperature 0.7', '/topk 5', '/topp 0.9', '/seed 3', '/tokens off', '/temperature', '/temperature hot', '/topk -1',
                    '/topp nan', '/topk 1.5', '/temperature 1e999', '/seed off')
    s = chat.sampling
    assert (s.temperature, s.top_k, s.top_p, s.seed, s.max_tokens) == (.7, 5, .9, None, None)
    assert said.count('error: ') == 5 and said.count('(temperature is 0.7)') == 2

def test_commands_of_the_conversation(tmp_path):
    chat = Chat(scripted())
    said = commands(chat, '/retry', QUESTION, '/retry', '/system Be kind.', '/system', f'/save {tmp_path}/a b.json', '/clear', 'Hello?', f'/load {tmp_path}/a b.json')
    assert 'error: there is no reply yet' in said and said.count('It is [37*24 = 888], so 888.') == 3
    assert [t.question for t in chat.turns] == [QUESTION]*2 and chat.siblings(0) == [0, 1] and chat.system is None
    for line in ('/load', '/save', '/load /nowhere/x', f'/save {tmp_path}', '/model a b c', '/model ../x', '/model nothing', '/nothing'):
        before = list(chat.turns)
        assert commands(chat, line).count('error: ') == 1 and chat.turns == before
    assert "/help lists" in commands(chat, '/ask me')

def test_the_chat_outlives_the_engine():
    chat = Chat(scripted())
    model = chat.engine.model
    class Broken(type(model)):
        def forward(self, ids, cache): raise RuntimeError('out of memory')
    whole, model.__class__ = model.__class__, Broken
    said = commands(chat, 'Hello?')
    model.__class__ = whole
    assert 'error: out of memory' in said and 'I see.' in commands(chat, 'Hello?') and len(chat.messages) == 2

def test_interrupting_a_command(monkeypatch):
    chat = Chat(scripted()); chat.answer('Hello?')
    def slow(**options): raise KeyboardInterrupt
    monkeypatch.setattr(chat, 'use', slow)
    assert '(stopped)' in commands(chat, '/model big') and 'I see.' in commands(chat, 'Hello?')
    said = commands(chat, KeyboardInterrupt(), 'Hello?', KeyboardInterrupt(), KeyboardInterrupt(), 'never')
    assert said.count('to leave') == 2 and said.count('I see.') == 1 and said.endswith('to leave)\n\n') and len(chat.messages) == 6

def test_versions_of_a_reply_and_votes(tmp_path):
    chat = Chat(scripted(**{'Sky?': 'Blue.', 'Sea?': 'Green.'}), pairs=tmp_path/'pairs.jsonl')
    for line in ('/edit Sea?', '/other', '/good', '/bad', '/retry'): assert commands(chat, line) == 'error: there is no reply yet: ask something first\n\n'
    said = commands(chat, 'Sky?', '/other', '/edit', '/good', '/edit Sea?', '/bad')
    assert said.count('error: ') == 2 and 'Green.' in said and [(t.question, t.vote) for t in chat.turns] == [('Sky?', 1), ('Sea?', -1)]
    assert not chat.pairs.exists()                                    # another question: nothing to compare
    said = commands(chat, '/other', 'Thanks', '/other')
    assert '(version 1 of 2)' in said and 'Sky?\nBlue.' in said and 'no other version' in said and chat.path == [0, 2]
    chat.switch(0); list(chat.ask(instead_of=0, forced=TOK.encode('Red')))
    said = commands(chat, '/bad', '/bad', '/other', '/other')
    [pair] = read_pairs(chat.pairs)
    assert said.count(f'pairs added to {chat.pairs}: 1') == 1 and (pair['chosen']['content'], pair['rejected']['content'][:3]) == ('Blue.', 'Red')
    assert '(version 2 of 3)' in said and '(version 1 of 3)' in said; valid(chat)

def test_another_model(trained, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(trained))
    chat = open_chat(device='cpu', max_tokens=8)
    chat.answer('Hello?'); engine = chat.engine
    said = commands(chat, '/model', '/model tiny 1', '/model sft/tiny', '/model tiny 7', '/model base/tiny')
    assert '(sft tiny, newest step)' in said and '(sft tiny, step 1)' in said and said.count('error: ') == 2
    assert chat.engine is not engine and len(chat.turns) == 1 and chat.turns[0].events and chat.pairs == trained/'preferences'/'tiny'/'pairs.jsonl'

def test_python_as_a_tool():
    from nanochat.sandbox import level
    try: tool = pick_tool('python')
    except Exception as e: pytest.skip(f'no sandbox on this machine: {e}')
    model = ScriptedModel(TOK, {'Sum?': '<|python_start|>print(sum(range(10)))<|python_end|>45.'}, max_len=1000)
    chat = Chat(Engine(model, TOK, tool, max_output=256))
    assert ''.join(t for _, t in chat.stream('Sum?')) == '[print(sum(range(10))) = 45]45.', level()
    assert 'python' not in [p['type'] for p in Chat(Engine(model, TOK, pick_tool('off'))).engine.complete([render_prompt(TOK, {'messages': [{'role': 'user', 'content': 'Sum?'}]})])[0].parts]

@pytest.mark.parametrize('args, stdin', [(['-p', 'Hi'], ''), ([], 'Hi\n')])
def test_low_walls_are_named(trained, monkeypatch, capsys, args, stdin):
    "Refused without the flag; with it the conversation begins with the level, and -p prints nothing but the answer"
    from nanochat import sandbox
    monkeypatch.setattr(sandbox, 'level', lambda: sandbox.Level(1, ('limits',), 'no Landlock'))
    args = [*args, '--tool', 'python', '--max-tokens', '2', '--device', 'cpu']
    code, out, err = run_cli(monkeypatch, capsys, *args, base=trained, stdin=stdin)
    assert code == 1 and out == '' and 'level 1 of 3' in err and '--i-accept-unsafe-code' in err
    code, out, err = run_cli(monkeypatch, capsys, *args, '--i-accept-unsafe-code', base=trained, stdin=stdin)
    assert code == 0 and err == '' and out.startswith('(programs of the model run in a jail of level 1 of 3)\n') == (not args[0] == '-p')

def test_int8_and_guesses_are_options_that_change_no_greedy_answer(trained, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(trained))
    plain, ahead, small = open_chat(device='cpu', max_tokens=20), open_chat(device='cpu', max_tokens=20, speculate=4), open_chat(device='cpu', max_tokens=20, int8=True)
    assert plain.answer('Hello?') == ahead.answer('Hello?')
    assert 'Int8Linear' in {type(m).__name__ for m in small.engine.model.modules()} and len(small.answer('Hello?')) > 0 and ahead.engine.speculate == 4
