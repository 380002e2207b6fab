"""The chat cell in JupyterLab, driven by a real browser: text grows, Stop stops, hostile text stays text.

Skipped where Playwright or a Chromium is missing. `CHROMIUM` names another browser, `NANOCHAT_BROWSER_NOTEBOOK` a real
notebook with a chat cell to drive too (its kernel gets the environment of this process, such as NANOCHAT_BASE_DIR)."""
import json, os, shutil, signal, subprocess, sys, time, urllib.request
import nbformat, pytest
from conftest import free_port

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed: pip install nanochat[browser]')
CHROMIUM = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
if not CHROMIUM: pytest.skip('no Chromium: install one, or name it in CHROMIUM', allow_module_level=True)
pytest.importorskip('jupyterlab', reason='jupyterlab is not installed: pip install nanochat[notebook]')
pytest.importorskip('anywidget', reason='anywidget is not installed: pip install nanochat[notebook]')

TOKEN = 'tok'
LONG = 180                 # seconds: only a busy machine needs them
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync']
HOSTILE = '<img src=x onerror=alert(1)><script>alert(2)</script>'
HOSTILE_ALL = ' | '.join([HOSTILE, '<iframe srcdoc="<script>alert(3)</script>">', '<style>@import "http://127.0.0.1:1/x"</style>',
    '[x](javascript:alert(4))', '[x](data:text/html,<script>alert(5)</script>)', '![](http://127.0.0.1:1/?leak)', '$\\href{javascript:alert(6)}{x}$',
    '</script></div>', 'NUL \x00 here', '```<b>open fence', '\u202ereversed'])
CELLS = ['''
import time
from types import SimpleNamespace
from nanochat.chat import Chat
from nanochat.engine import Engine, Event, ScriptedModel
from nanochat.tokenizer import Tokenizer
from nanochat.widget import ChatWidget

class Scripted:
    "Says what the question asks for"
    tok, model = Tokenizer({bytes([i]): i for i in range(256)}), SimpleNamespace(cfg=SimpleNamespace(max_len=10**9))
    def reply(self, conv, sampling=None, stop=None):
        question = conv['messages'][-1]['content']
        if 'fail' in question: raise RuntimeError('out of memory')
        script = [('text', 'It is '), ('python', '37*24'), ('python_output', '888'), ('text', '888.')] if 'product' in question else \\
                 [('text', question)] if question.startswith('echo') else [('text', 'A long answer. '*40_000 if 'long' in question else 'A short answer.')]
        for kind, text in script:
            size = 5 if question[:4] != 'echo' else 20_000
            for i in range(0, len(text), size):
                if stop.wait(0.01): return
                yield Event(0, 0, text[i:i+size], kind, kind == 'python_output', None)
        yield Event(0, 0, '', 'text', False, 'stop')
''', 'one = ChatWidget(Chat(Scripted()))\none', '''
tok = Scripted.tok
two = ChatWidget(Chat(Scripted()))
two''', '''
real = ChatWidget(Chat(Engine(ScriptedModel(tok, {'Sky?': 'It is <|python_start|>6*7<|python_end|>42, <b>blue</b>.', 'Sea?': 'Wet.'}, max_len=2000), tok), pairs='pairs.jsonl'))
real''']

@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab of our own on loopback: (its address, its folder)"
    home, port = tmp_path_factory.mktemp('lab'), free_port()
    root = home/'root'; root.mkdir()
    own = {f'JUPYTER_{k}_DIR': str(home/k.lower()) for k in ('CONFIG', 'DATA', 'RUNTIME')}
    own |= {f'JUPYTERLAB_{k}_DIR': str(home/f'lab_{k.lower()}') for k in ('SETTINGS', 'WORKSPACES')} | {'IPYTHONDIR': str(home/'ipython')}
    settings = {'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
                'notebook-extension/tracker': {'windowingMode': 'none'}}      # otherwise cells out of sight leave the page
    for name, values in settings.items():
        file = home/'lab_settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True); file.write_text(json.dumps(values))
    log = open(home/'lab.log', 'w')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
        '--ServerApp.port_retries=0', f'--ServerApp.root_dir={root}', f'--IdentityProvider.token={TOKEN}', '--LabApp.expose_app_in_browser=True',
        '--LabApp.extension_manager=readonly', '--LabApp.news_url=',
        '--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate'],
        cwd=root, env={**os.environ, **own}, stdout=log, stderr=log, start_new_session=True)
    url = f'http://127.0.0.1:{port}'
    try:
        end = time.monotonic() + LONG
        while time.monotonic() < end:
            if server.poll() is not None: pytest.fail(f'JupyterLab ended: {(home/"lab.log").read_text()[-2000:]}')
            try: urllib.request.urlopen(f'{url}/api?token={TOKEN}', timeout=1).close(); break
            except OSError: time.sleep(0.1)
        else: pytest.fail(f'JupyterLab did not start within {LONG} s')
        yield url, root
    finally:
        server.terminate()                                  # shuts its kernels down, too
        try: server.wait(10)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
        log.close()

@pytest.fixture(scope='module')
def browser():
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=1000*LONG)
        yield b
        b.close()

def write(nb, path):
    "With a kernel named, so that JupyterLab does not ask for one; without outputs, so that what is seen is new"
    nb.metadata['kernelspec'] = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.outputs = []
    nbformat.write(nb, path)

class Page:
    "A notebook open in the browser, and what went wrong in it"
    def __init__(self, browser, lab, name):
        self.url, self.folder, self.name = *lab, name
        self.page = browser.new_page(viewport={'width': 1100, 'height': 900})
        self.page.set_default_timeout(1000*LONG)             # of clicks and waits; 30 s where none is given
        self.errors, self.dialogs, self.elsewhere = [], [], []
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.on('dialog', lambda d: (self.dialogs.append(d.message), d.dismiss()))
        self.page.on('request', lambda r: self.elsewhere.append(r.url) if not r.url.startswith((self.url, 'data:', 'blob:')) else None)
    def open(self, reset='&reset'):
        self.page.goto(f'{self.url}/lab/tree/{self.name}?token={TOKEN}{reset}', wait_until='domcontentloaded')
        # Ask the application itself: the toolbar's kernel indicator turns idle too early.
        self.wait("window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    def wait(self, js, seconds=LONG):
        try: self.page.wait_for_function(js, timeout=1000*seconds)
        except sync_api.TimeoutError:
            self.page.screenshot(path=self.folder/'failure.png')
            pytest.fail(f'waited {seconds} s for {js}; see {self.folder}/failure.png')
    def run(self, code):
        "Run code in the kernel, beside the cells"
        kernel = 'window.jupyterapp.shell.currentWidget.sessionContext.session.kernel'
        self.page.evaluate(f'code => {kernel}.requestExecute({{code}}).done.then(() => null)', code)
    def do(self, command): self.page.evaluate(f"window.jupyterapp.commands.execute('{command}').then(() => null)")
    def start(self, command): self.page.evaluate(f"void window.jupyterapp.commands.execute('{command}')")

class Cell:
    "One chat cell of a page"
    def __init__(self, page, n=0): self.page, self.root = page.page, page.page.locator('.nc-chat').nth(n)
    def ask(self, text):
        self.root.locator('.bar input').fill(text)
        self.press('send')
    def text(self): return '\n'.join(self.root.locator('.body').all_inner_texts())
    def until(self, ok, seconds=LONG):
        end = time.monotonic() + seconds
        while not ok(self.text()):
            assert time.monotonic() < end, f'waited {seconds} s, the transcript is: {self.text()[-300:]!r}'
            self.page.wait_for_timeout(40)
        return self.text()
    def idle(self, seconds=LONG): self.root.locator('.stop:disabled').wait_for(timeout=1000*seconds)
    def press(self, name): self.root.locator(f'.bar .{name}').click()
    def contrast(self, what, enough=4.5, seconds=20):
        "Of the last of these and its ground, once the colours of a theme have arrived"
        end = time.monotonic() + seconds
        while (now := self.root.locator(what).last.evaluate(CONTRAST)) < enough and time.monotonic() < end: self.page.wait_for_timeout(100)
        return now
    def tool(self, name, n=-1): self.root.locator(f'.turn.assistant .tools .{name}').nth(n).click()

def check_growth(cell, question):
    "A reply grows while it streams, Stop ends it, and it does not go on"
    before = len(cell.text())
    cell.ask(question)
    early = len(cell.until(lambda t: len(t) > before + len(question) + 10))
    later = len(cell.until(lambda t: len(t) > early + 50))
    cell.press('stop'); cell.idle()
    stopped = cell.text()
    cell.page.wait_for_timeout(600)
    assert cell.text() == stopped and 'stopped' in stopped
    return before, early, later, len(stopped)

@pytest.fixture(scope='module')
def page(lab, browser):
    write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in CELLS]), lab[1]/'chat.ipynb')
    page = Page(browser, lab, 'chat.ipynb')
    page.open(); page.start('notebook:run-all-cells')
    page.wait("document.querySelectorAll('.nc-chat').length === 3")
    yield page
    page.page.close()

def test_stream_stop_ask_again(page):
    cell = Cell(page)
    print('lengths', check_growth(cell, 'a long one'))
    cell.ask('again'); cell.until(lambda t: 'A short answer.' in t); cell.idle()
    for i in range(8): cell.ask(f'number {i}'); cell.until(lambda t: f'number {i}' in t); cell.idle()     # Stop never stays lit
    n = cell.text().count('A short answer.')
    cell.root.locator('.bar input').fill('with Enter'); cell.root.locator('.bar input').press('Enter')
    assert cell.until(lambda t: t.count('A short answer.') == n + 1).count('with Enter') == 1

def test_a_press_on_stop_counts_though_the_button_moves_away(page):
    "The text above it grows: the mouse goes down on the button, and up on what has come into its place. A browser sees no click then"
    cell = Cell(page)
    cell.ask('a long one'); cell.until(lambda t: t.count('A long answer') > 2)
    cell.root.locator('.bar .stop').dispatch_event('pointerdown', dict(pointerType='mouse', button=0))
    cell.idle()

def test_hostile_text_stays_text(page):
    cell = Cell(page, 1)
    cell.ask('echo ' + HOSTILE_ALL); cell.until(lambda t: t.count(HOSTILE_ALL) == 2); cell.idle()       # the question and the reply
    page.run("two.ask('echo ' + '>'*10_000 + 'x'*100_000).join()")
    cell.until(lambda t: t.count('x'*100_000) == 2)
    page.page.wait_for_timeout(200)
    assert cell.root.locator('.log').locator('img, script, iframe, style, a, b').count() == 0
    assert page.dialogs == [] and page.elsewhere == []
    assert cell.root.locator('.log').evaluate("e => e.scrollWidth <= e.clientWidth + 1")             # a long line breaks
    cell.press('clear'); cell.until(lambda t: not t.strip()); cell.idle()

def test_tools_and_errors_are_visible(page):
    cell = Cell(page)
    cell.ask('a product'); cell.until(lambda t: '37*24 = 888' in t and '888.' in t); cell.idle()
    trace = cell.root.locator('details.tool').last
    assert trace.locator('summary').inner_text() == '37*24 = 888' and not trace.locator('.result').is_visible()
    trace.locator('summary').click()
    assert trace.locator('.call').inner_text() == '37*24' and trace.locator('.result').inner_text() == '888'
    cell.ask('fail now'); cell.until(lambda t: 'RuntimeError: out of memory' in t); cell.idle()
    cell.ask('usable?'); cell.until(lambda t: t.endswith('A short answer.')); cell.idle()

def test_edit_again_switch_vote(page):
    cell = Cell(page, 2)
    cell.ask('Sky?'); cell.until(lambda t: 'blue' in t); cell.idle()
    cell.root.locator('.turn.user .edit').click()
    field = cell.root.locator('.editing')
    field.fill('Sea?'); field.press('Enter')
    cell.until(lambda t: t == 'Sea?\nWet.'); cell.idle()
    assert cell.root.locator('.count').inner_text() == '2/2'
    cell.tool('older'); cell.until(lambda t: t.startswith('Sky?') and 'blue' in t)
    assert cell.root.locator('.count').inner_text() == '1/2' and cell.root.locator('.older').is_disabled()
    cell.tool('again'); cell.until(lambda t: 'same reply again' in t); cell.idle()
    cell.tool('good'); cell.root.locator('.good[aria-pressed=true]').wait_for()
    assert 'opposite vote' in cell.root.locator('[role=status]').inner_text()

def test_xray_and_branch_with_the_keyboard(page):
    cell = Cell(page, 2)
    cell.root.locator('.tools .see').last.focus(); page.page.keyboard.press('Enter')
    tokens = cell.root.locator('.tok')
    tokens.first.wait_for()
    spelled = ''.join(tokens.all_text_contents())
    assert 'Sky?' in spelled and '<b>blue</b>' in spelled and cell.root.locator('.xray b').count() == 0
    assert cell.root.locator('.tok.forced').count() == 4 and cell.root.locator('.tok.counted').count() > 20       # 42 and its two marks
    cell.root.locator('.tok[tabindex="0"]').focus()                     # one stop of Tab; arrows walk
    page.page.keyboard.press('ArrowRight')
    assert cell.root.locator('.tok:focus').inner_text() == 't' and 'probability 100%, entropy 0.00 bits, sampled, counted' in cell.root.locator('.numbers').inner_text()
    cell.root.locator('.xray').screenshot(path=page.folder/'xray.png'); print('screenshot', page.folder/'xray.png')
    cell.root.locator('.alt').nth(1).click()                             # another second letter
    cell.until(lambda t: 'I' in t and 'It is' not in t); cell.idle()
    assert cell.root.locator('.count').inner_text() == '4/4' and cell.root.locator('.tok.forced').count() >= 2     # the X-ray follows
    cell.tool('bad'); cell.root.locator('[role=status]', has_text='1 preference pair added to pairs.jsonl').wait_for()
    assert len((page.folder/'pairs.jsonl').read_text().splitlines()) == 1
    cell.root.locator('.xray .close').click(); cell.root.locator('.xray[hidden]').wait_for(state='attached')

def test_settings(page):
    cell = Cell(page, 2)
    cell.root.locator('.settings summary').click()
    def fill(name, value): cell.root.locator(f'.settings .{name} > *').fill(value); cell.root.locator('.bar input').focus()
    fill('temperature', '-1')
    cell.root.locator('[role=status]', has_text='temperature is -1').wait_for()
    page.wait("document.querySelectorAll('.nc-chat')[2].querySelector('.settings .temperature input').value === '0'")     # back to what is true
    fill('temperature', '0.5'); fill('system', 'Be <i>brief</i>.')
    cell.until(lambda t: t.startswith('Be <i>brief</i>.'))
    cell.root.locator('.settings summary').click()

def test_an_interrupted_kernel(page):
    cell = Cell(page)
    cell.ask('a long one'); cell.until(lambda t: t.count('A long answer') > 2)
    page.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.interrupt().then(() => null)")
    cell.press('stop'); cell.idle()
    cell.ask('still there?'); cell.until(lambda t: t.endswith('A short answer.')); cell.idle()

def test_two_cells_at_once(page):
    one, two = Cell(page, 0), Cell(page, 1)
    one.ask('a long one'); two.ask('another long one')
    for cell in (one, two):
        n = len(cell.text()); cell.until(lambda t: len(t) > n + 100)
    two.press('stop'); two.idle()
    n = len(one.text()); one.until(lambda t: len(t) > n + 50)                         # Stop of one is not Stop of the other
    one.press('stop'); one.idle()

def test_reloaded_in_the_middle(page):
    cell = Cell(page, 1)
    page.do('docmanager:save')                          # outputs that were not saved do not come back
    cell.ask('a long one to reload'); cell.until(lambda t: len(t.split('to reload')[-1]) > 100)
    both, lost = "document.querySelectorAll('.nc-chat').length === 3", "document.body.innerText.includes('model not found')"
    for _ in range(10):                                 # JupyterLab gives up on any widget if the kernel is slow to answer it
        page.open(reset=''); page.wait(f'{both} || {lost}')
        if not page.page.evaluate(lost): break
    page.wait(both)
    cell = Cell(page, 1)
    n = len(cell.until(lambda t: 'to reload' in t and len(t.split('to reload')[-1]) > 100))
    cell.until(lambda t: len(t) > n + 50)               # and the deltas go on from there
    cell.press('stop'); cell.idle()
    reply = cell.text().split('to reload')[-1].strip().removesuffix('(stopped)').strip()
    assert ('A long answer. '*40_000).startswith(reply[:-1])                             # nothing lost, nothing twice

CONTRAST = """el => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number), lin = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * lin(c[0]) + 0.7152 * lin(c[1]) + 0.0722 * lin(c[2]);
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] === 1) return c; } return [255, 255, 255]; };
  const a = light(rgb(getComputedStyle(el).color)), b = light(ground(el));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""

def test_clear_and_looks(page, tmp_path):
    "Both themes and the width of a phone: readable, and nothing sticks out. LOOK at the pictures"
    cell = Cell(page)
    cell.press('clear'); cell.until(lambda t: not t.strip()); cell.idle()
    for question in ('What is the product of 37 and 24?', 'And ' + HOSTILE, 'Please fail'): cell.ask(question); cell.until(lambda t: question in t); cell.idle()
    cell.ask('Tell me a long one'); cell.until(lambda t: t.count('A long answer') > 3)
    cell.press('stop'); cell.idle()
    real = Cell(page, 2)
    real.tool('see'); real.root.locator('.tok').first.wait_for()
    for theme in ('JupyterLab Light', 'JupyterLab Dark'):
        page.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme}).then(() => null)", theme)
        page.wait(f"document.body.dataset.jpThemeName === '{theme}'")
        page.page.wait_for_timeout(300)
        for c, name in ((cell, 'chat'), (real, 'xray')):
            picture = tmp_path/f'{name}-{theme.split()[1]}.png'
            c.root.screenshot(path=picture); print('screenshot', picture)
            for what in ('.turn .body', '.tools button:not([hidden])', '.status', '.bar .clear', '.settings summary'):
                assert c.contrast(what) >= 4.5, (theme, name, what)
    for c, name in ((cell, 'chat'), (real, 'xray')):
        c.root.evaluate("e => { e.style.width = '320px'; }")
        wide = c.root.evaluate("e => [...e.querySelectorAll('*')].filter(x => x.getBoundingClientRect().right > e.getBoundingClientRect().right + 1 && !x.closest('pre, summary')).map(x => x.className)")
        c.root.screenshot(path=tmp_path/f'{name}-phone.png'); print('screenshot', tmp_path/f'{name}-phone.png')
        assert wide == []
    names = page.page.evaluate("[...document.querySelectorAll('.nc-chat button, .nc-chat input, .nc-chat textarea')].filter(e => !(e.getAttribute('aria-label') || e.closest('label') || e.textContent.trim())).length")
    assert names == 0                                                                                # every control has a name
    assert page.dialogs == [] and page.errors == [] and page.elsewhere == []

def test_a_real_notebook(lab, browser, tmp_path):
    source = os.environ.get('NANOCHAT_BROWSER_NOTEBOOK')
    if not source: pytest.skip('NANOCHAT_BROWSER_NOTEBOOK names no notebook')
    seconds = int(os.environ.get('NANOCHAT_BROWSER_SECONDS', 300))
    write(nbformat.read(source, 4), lab[1]/'real.ipynb')
    page = Page(browser, lab, 'real.ipynb')
    page.open(); page.start('notebook:run-all-cells')
    page.wait("document.querySelector('.nc-chat') && window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", seconds)
    cell = Cell(page); n = len(cell.text())
    cell.ask(os.environ.get('NANOCHAT_BROWSER_QUESTION', 'What is 37 times 24?'))
    cell.until(lambda t: len(t) > n + 25, 60); cell.idle(60)
    cell.root.scroll_into_view_if_needed()
    page.page.screenshot(path=tmp_path/'real.png'); print('screenshot', tmp_path/'real.png'); print(cell.text())
    assert page.dialogs == [] and page.errors == []
    page.page.close()
