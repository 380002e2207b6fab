"Conversations stay valid whatever happens in the middle of a reply, and the terminal shows nothing but text"
import io, itertools, os, re, runpy, select, subprocess, sys, threading, time
import pytest, torch
from nanochat.chat import Chat, keep_parts, open_chat, transcript
from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError, run_dir
from nanochat.conversation import check_conversation, render_prompt
from nanochat.engine import Engine, Sampling, ScriptedModel
from nanochat.gpt import GPT, GPTConfig
from nanochat.scripts.chat_cli import Screen, converse
from nanochat.tokenizer import Tokenizer

TOK = Tokenizer({bytes([i]): i for i in range(256)})
PRODUCT = 'It is <|python_start|>37*24<|python_end|>, so 888.'
QUESTION = 'What is 37 times 24?'

def scripted(max_len=1000, **replies):
    model = ScriptedModel(TOK, {QUESTION: PRODUCT, **replies}, default='I see.', max_len=max_len)
    return Engine(model, TOK)

def valid(chat): check_conversation({'messages': chat.messages}) if chat.messages else None

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
    monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
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
    for word in ('-p', '--prompt', '--temperature', '--seed', '--max-tokens', '/help', 'Ctrl-C', 'runs/tiny.sh'): assert word in out
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('args', [['--nonsense'], ['--temperature', 'hot'], ['-p']])
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

def test_one_answer_in_a_process_of_its_own(trained):
    r = subprocess.run([sys.executable, '-m', 'nanochat.scripts.chat_cli', '-p', 'Hello?', '--max-tokens', '20', '--device', 'cpu'], text=True,
                       capture_output=True, env={**os.environ, 'NANOCHAT_BASE_DIR': str(trained)}, timeout=120, encoding='utf-8')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NANOCHAT_BASE_DIR', str(trained))
        expected = open_chat(device='cpu', max_tokens=20).answer('Hello?')
    assert r.returncode == 0 and r.stderr == '' and r.stdout == re.sub('[\x00-\x08\x0b-\x1f\x7f-\x9f]', '', expected) + '\n'

# the terminal

PTY = '''
import json, sys, time
from nanochat.chat import Chat
from nanochat.engine import Engine, ScriptedModel
from nanochat.scripts.chat_cli import Screen, converse
from nanochat.tokenizer import Tokenizer
tok = Tokenizer({bytes([i]): i for i in range(256)})
class Slow(ScriptedModel):
    def forward(self, ids, cache): time.sleep(0.01); return super().forward(ids, cache)
chat = Chat(Engine(Slow(tok, {'Count': 'one ' * 200, 'Product': 'It is <|python_start|>37*24<|python_end|>888.'}, default='I see.'), tok))
print('ready', flush=True)
converse(chat, Screen())
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
    def until(word, seconds=120):
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
            try: return until(word, 3)
            except AssertionError: pass
        until(word)
    until(b'ready'); until(b'you> ')
    os.write(fd, b'Count\n'); until(b'one one one')
    os.write(fd, b'\x03'); until(b'(stopped)'); until(b'you> ')       # the first Ctrl-C ends the reply, not the program
    os.write(fd, b'Product\n'); until(b'\x1b[2m[\x1b[0m'); until(b'888.'); until(b'you> ')
    press(last, b'LEFT ["user", "assistant", "user", "assistant"]')
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
