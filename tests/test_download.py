"Downloads against a real server that cuts, stalls, lies, refuses and flips bytes; resuming, retries, tokens, mirrors, offline, kills"
import hashlib, http.server, json, os, random, re, signal, subprocess, sys, threading, time, urllib.parse
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from nanochat import download as dl
from nanochat.common import UserError, read_json
from nanochat.download import Patience, RemoteFile, SOURCES, Source, choose, download, fetch, hub_commit, hub_files, verify_raw

QUICK = Patience(stall_s=10, tries=4, first_wait_s=0.01, longest_wait_s=0.02)
HASTY = QUICK._replace(stall_s=0.3)                                     # where the server falls silent; elsewhere a busy machine would
BIG = random.Random(0).randbytes(600_000)
SHA = hashlib.sha256(BIG).hexdigest()
COMMIT = 'c0ffee'*6 + 'c0fe'

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def do_GET(self):
        path = urllib.parse.unquote(self.path)
        self.server.seen.append((path, dict(self.headers)))
        self.close_connection = True
        for prefix, plan in self.server.faults.items():
            if path.startswith(prefix) and plan:
                if plan.pop(0)(self, path): return
                break
        self.serve(path)

    def serve(self, path, body=None, ranges=True, etag=True, say_length=None, send=None):
        body = self.server.files.get(path) if body is None else body
        if body is None: return self.reply(404)
        if callable(body): body = body(path)
        asked = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', '')) if ranges else None
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        if asked and self.headers.get('If-Range', tag) != tag: asked = None
        start = int(asked[1]) if asked else 0
        if start and start >= len(body): return self.reply(416)
        head = {'Content-Length': say_length if say_length is not None else len(body) - start}
        if etag: head['ETag'] = tag
        if asked: head['Content-Range'] = f'bytes {start}-{len(body) - 1}/{len(body)}'
        self.reply(206 if asked else 200, head, body[start:] if send is None else body[start:start + send])

    def reply(self, code, head={}, body=b''):
        self.send_response(code)
        for k, v in {'Content-Length': len(body), **head}.items(): self.send_header(k, str(v))
        self.send_header('Connection', 'close')
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, *args): pass

def start(host='127.0.0.1'):
    s = Server((host, 0), Handler)
    s.files, s.faults, s.seen, s.url = {}, {}, [], f'http://{host}:{s.server_address[1]}'
    threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
    return s

@pytest.fixture
def server(monkeypatch):
    for name in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HF_ENDPOINT'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('no_proxy', '*')
    s = start()
    s.files['/big'] = BIG
    monkeypatch.setenv('HF_ENDPOINT', s.url)
    yield s
    s.shutdown(); s.server_close()

# what a server can do to us: each gets (handler, path) and returns whether it has answered
def cut(n): return lambda h, path: h.serve(path, send=n) or True
def code(n, **head): return lambda h, path: h.reply(n, {k.replace('_', '-'): v for k, v in head.items()}) or True
def stall(n):
    def fault(h, path):
        h.serve(path, send=n)
        time.sleep(1)
        return True
    return fault
def drip(h, path):
    h.serve(path, send=1000)
    for i in range(20):
        try: h.wfile.write(b'x'); h.wfile.flush()
        except OSError: break
        time.sleep(0.1)
    return True
def no_ranges(h, path): return h.serve(path, ranges=False) or True
def lie(n): return lambda h, path: h.serve(path, say_length=n) or True
def flipped(h, path): return h.serve(path, body=bytes([BIG[0] ^ 1]) + BIG[1:]) or True
def hang_up(h, path): return True
def redirect(url): return lambda h, path: h.reply(302, {'Location': url + path}) or True
def repeat(fault): return [fault]*99

def get(server, tmp_path, want=RemoteFile('big', len(BIG), SHA), **kw):
    got = download(server.url + '/big', tmp_path/'big', want, **{'patience': QUICK, **kw})
    assert got.read_bytes() == BIG and [p.name for p in tmp_path.iterdir()] == ['big']

def fails(server, tmp_path, says, want=RemoteFile('big', len(BIG), SHA), **kw):
    with pytest.raises(UserError, match=says) as e: get(server, tmp_path, want, **kw)
    assert not (tmp_path/'big').exists() and '\n' not in str(e.value)


# --- one file and one bad server

@pytest.mark.parametrize('faults', [
    [], [cut(200_000)], [cut(100_000)]*3, [cut(0)]*3, [stall(50_000)], [drip], [code(500)], [code(503), code(502)], [code(429, Retry_After=0)],
    [cut(300_000), no_ranges], [cut(300_000), code(416)], [lie(100_000)], [lie(700_000)], [flipped], [cut(1000), flipped], [hang_up]*3,
    [code(408), cut(10), code(500), cut(20), stall(30), hang_up]],
    ids=['well', 'cut', 'cut-thrice', 'empty', 'stall', 'drip', '500', '503-502', '429', 'range-ignored', '416', 'says-less', 'says-more',
         'flipped', 'cut-then-flipped', 'hangs-up', 'all'])
def test_a_bad_server_is_outlived(server, tmp_path, faults):
    server.faults['/big'] = list(faults)
    get(server, tmp_path, patience=HASTY)

@pytest.mark.parametrize('fault, says', [
    (code(404), r'is not there \(answer 404\)'), (code(403), 'HF_TOKEN'), (code(401), 'HF_TOKEN'), (code(410), 'not there'), (code(400), 'answer 400'),
    (code(500), '4 tries: answer 500'), (stall(0), 'nothing came for'), (cut(0), 'cut at byte 0'), (flipped, 'another SHA-256.*twice'),
    (lie(100), 'says 100 bytes, and it should be 600000'), (code(429, Retry_After=99_999), 'come back in 99999 s'), (hang_up, 'no answer')],
    ids=['404', '403', '401', '410', '400', '500', 'stall', 'cut', 'flipped', 'lies', 'come-back-tomorrow', 'hangs-up'])
def test_a_server_that_stays_bad_is_one_sentence(server, tmp_path, fault, says):
    server.faults['/big'] = repeat(fault)
    fails(server, tmp_path, says, patience=HASTY)

def test_nothing_listens(server, tmp_path):
    server.shutdown(); server.server_close()
    fails(server, tmp_path, 'no connection')

def test_only_the_rest_is_fetched_again(server, tmp_path):
    server.faults['/big'] = [cut(400_000)]
    moved = []
    get(server, tmp_path, moved=moved.append)
    assert [h.get('Range') for _, h in server.seen] == [None, 'bytes=400000-'] and sum(moved) == len(BIG) == sum(m for m in moved if m > 0)

def test_bytes_thrown_away_are_counted_back(server, tmp_path):
    server.faults['/big'] = [cut(300_000), no_ranges]
    moved = []
    get(server, tmp_path, moved=moved.append)
    assert sum(moved) == len(BIG) < sum(m for m in moved if m > 0)

def test_steady_progress_is_never_given_up(server, tmp_path):
    server.faults['/big'] = [cut(30_000)]*19                        # far more than `tries`
    get(server, tmp_path)

def test_retry_after_is_honoured(server, tmp_path):
    server.faults['/big'] = [code(429, Retry_After=1)]
    start = time.monotonic(); get(server, tmp_path)
    assert time.monotonic() - start > 0.95
    assert dl._retry_after({'Retry-After': 'Fri, 01 Jan 2100 00:00:00 GMT'}) > 1e9 and dl._retry_after({'Retry-After': 'soon'}) == 0

def test_waits_double_and_differ():
    waits = [[dl._wait_s(n, Patience(), rng=random.Random(seed)) for n in range(1, 9)] for seed in range(50)]
    for n in range(8): assert all(min(60, 2**n)/2 <= w[n] <= min(60, 2**n) for w in waits) and len({w[n] for w in waits}) > 40

def test_a_length_that_nobody_knows(server, tmp_path):
    "Without a hash and a length a cut cannot be seen"
    def unsaid(h, path):
        h.send_response(200); h.end_headers(); h.wfile.write(BIG); return True
    server.faults['/big'] = repeat(unsaid)
    fails(server, tmp_path, 'does not say how long', RemoteFile('big'))
    get(server, tmp_path)


# --- what was begun earlier

def begin(server, tmp_path, want, n=250_000):
    server.faults['/big'] = [cut(n)] + repeat(code(404))
    with pytest.raises(UserError): download(server.url + '/big', tmp_path/'big', want, patience=QUICK)
    server.faults['/big'] = []; server.seen.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.big.part', '.big.part.json']

@pytest.mark.parametrize('want', [RemoteFile('big', len(BIG), SHA), RemoteFile('big')], ids=['hash-known', 'etag-only'])
def test_a_later_run_goes_on(server, tmp_path, want):
    begin(server, tmp_path, want)
    get(server, tmp_path, want)
    assert [h['Range'] for _, h in server.seen] == ['bytes=250000-']

def test_a_file_that_changed_meanwhile_starts_again(server, tmp_path):
    begin(server, tmp_path, RemoteFile('big'))
    server.files['/big'] = new = random.Random(1).randbytes(400_000)
    download(server.url + '/big', tmp_path/'big', patience=QUICK)
    assert (tmp_path/'big').read_bytes() == new

def test_a_part_of_another_version_is_not_continued(server, tmp_path):
    begin(server, tmp_path, RemoteFile('big', len(BIG), 'f'*64))
    get(server, tmp_path)
    assert [h.get('Range') for _, h in server.seen] == [None]

@pytest.mark.parametrize('damage', [lambda d: (d/'.big.part').write_bytes(b'?'*250_000), lambda d: (d/'.big.part').write_bytes(BIG + b'more'),
                                    lambda d: (d/'.big.part.json').unlink(), lambda d: (d/'.big.part.json').write_text('{'), lambda d: (d/'.big.part').unlink()],
                         ids=['other-bytes', 'too-long', 'no-note', 'damaged-note', 'no-part'])
def test_a_damaged_beginning_does_no_harm(server, tmp_path, damage):
    begin(server, tmp_path, RemoteFile('big', len(BIG), SHA))
    damage(tmp_path)
    get(server, tmp_path)

def test_git_files_are_verified_too(server, tmp_path):
    oid = hashlib.sha1(b'blob 600000\0' + BIG).hexdigest()
    server.faults['/big'] = [flipped]
    get(server, tmp_path, RemoteFile('big', len(BIG), None, oid))
    (tmp_path/'big').unlink()
    server.faults['/big'] = repeat(flipped)
    fails(server, tmp_path, 'another git hash', RemoteFile('big', len(BIG), None, oid))


# --- who gets the token

def test_the_token_stays_with_the_endpoint(server, tmp_path, monkeypatch):
    other = start('localhost')
    other.files['/big'] = BIG
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    server.faults['/big'] = repeat(redirect(other.url))
    other.faults['/big'] = [cut(1000)]
    get(server, tmp_path)
    assert all(h.get('Authorization') == 'Bearer hf_secret' for _, h in server.seen) and len(server.seen) == 2
    assert not any('Authorization' in h for _, h in other.seen) and [h.get('Range') for _, h in other.seen] == [None, 'bytes=1000-']
    (tmp_path/'big').unlink()
    download(other.url + '/big', tmp_path/'big', patience=QUICK)                     # nor is it sent to an address outside the endpoint
    assert 'Authorization' not in other.seen[-1][1]
    other.shutdown(); other.server_close()

def test_a_signed_address_that_ran_out_is_asked_for_again(server, tmp_path):
    other = start('localhost')
    other.files['/big'] = BIG
    other.faults['/big'] = [code(403)]
    server.faults['/big'] = repeat(redirect(other.url))
    get(server, tmp_path)
    other.shutdown(); other.server_close()

def test_redirects_within_the_endpoint_keep_the_token(server, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    server.files['/moved/big'] = BIG
    server.faults['/big'] = repeat(redirect(server.url + '/moved'))
    get(server, tmp_path)
    assert server.seen[-1][0] == '/moved/big' and server.seen[-1][1]['Authorization'] == 'Bearer hf_secret'

@pytest.mark.parametrize('value', ['huggingface.co', 'ftp://x.y', '://', 'https://'])
def test_an_endpoint_that_is_no_address(monkeypatch, value):
    monkeypatch.setenv('HF_ENDPOINT', value)
    with pytest.raises(UserError, match='HF_ENDPOINT'): dl.endpoint()


# --- a repository

def hub(server, n=5, repo='owner/texts', name='shard_{:05d}.parquet', page=2, make=None):
    "Put a dataset of n shards on the server, in the way the hub answers; the listing comes in pages"
    def shard(i):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({'text': [f'Shard {i}, document {j}.' for j in range(50)]}), sink)
        return sink.getvalue().to_pybytes()
    raw = {name.format(i): (make or shard)(i) for i in range(n)} | {'README.md': b'# A dataset', '.gitattributes': b'x'}
    rows = [{'type': 'directory', 'path': 'data', 'size': 0, 'oid': 'd'*40}]
    for path, b in raw.items():
        row = {'type': 'file', 'path': path, 'size': len(b), 'oid': hashlib.sha1(b'blob %d\0' % len(b) + b).hexdigest()}
        if path.endswith('.parquet'): row |= {'oid': '0'*40, 'lfs': {'oid': hashlib.sha256(b).hexdigest(), 'size': len(b), 'pointerSize': 130}}
        rows.append(row)
        server.files[f'/datasets/{repo}/resolve/{COMMIT}/{path}'] = b
    server.files[f'/api/datasets/{repo}/revision/main'] = json.dumps({'sha': COMMIT, 'id': repo}).encode()
    base = f'/api/datasets/{repo}/tree/{COMMIT}'
    def listing(h, path):
        at = int(dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(path).query)).get('cursor', 0))
        body = json.dumps(rows[at:at + page]).encode()
        more = {'Link': f'<https://elsewhere.example{base}?recursive=true&cursor={at + page}>; rel="next"'} if at + page < len(rows) else {}
        return h.reply(200, more, body) or True
    server.faults[base] = repeat(listing)
    return raw, Source(repo, '*.parquet', 'last')

def test_listing_and_commit(server):
    raw, _ = hub(server)
    assert hub_commit('owner/texts', patience=QUICK) == COMMIT
    files = hub_files('owner/texts', COMMIT, QUICK)
    assert {f.path: f.size for f in files} == {k: len(v) for k, v in raw.items()}        # all pages, all from our endpoint
    assert all((f.sha256 is None) == (not f.path.endswith('.parquet')) for f in files)

@pytest.mark.parametrize('body', [b'{}', b'[]', b'{"sha": 7}', b'{"sha": "main"}', b'<html>'])
def test_an_endpoint_that_is_no_hub(server, body):
    server.files['/api/datasets/owner/texts/revision/main'] = body
    with pytest.raises(UserError, match='does not say which commit|no JSON'): hub_commit('owner/texts', patience=QUICK)

def test_fetch_pins_and_records(server, tmp_path):
    raw, source = hub(server)
    plans = []
    m = fetch(source, tmp_path/'raw', 2, patience=QUICK, say=plans.append)
    assert m == read_json(tmp_path/'raw/download.json') and m['commit'] == COMMIT and m['revision'] == 'main'
    assert [(f['path'], f['split']) for f in m['files']] == [('shard_00000.parquet', 'train'), ('shard_00001.parquet', 'train'), ('shard_00004.parquet', 'val')]
    assert sorted(p.name for p in (tmp_path/'raw').iterdir()) == ['download.json', *sorted(f['path'] for f in m['files'])]
    for f in m['files']: assert (tmp_path/'raw'/f['path']).read_bytes() == raw[f['path']] and f['sha256'] == hashlib.sha256(raw[f['path']]).hexdigest()
    assert all(COMMIT in p for p, _ in server.seen if 'resolve' in p)
    assert 'owner/texts at c0ffeec0ffee (main)' in plans[0] and 'shard_00004.parquet' in plans[0] and 'free' in plans[0]
    verify_raw(tmp_path/'raw')

def test_fetch_again_keeps_the_commit(server, tmp_path):
    raw, source = hub(server)
    fetch(source, tmp_path/'raw', 1, patience=QUICK)
    server.files['/api/datasets/owner/texts/revision/main'] = json.dumps({'sha': 'd'*40}).encode()      # the branch moved on
    server.seen.clear()
    fetch(source, tmp_path/'raw', 1, patience=QUICK)
    assert server.seen == []                                                              # all is there: no question asked
    m = fetch(source, tmp_path/'raw', 3, patience=QUICK)
    assert m['commit'] == COMMIT and len(m['files']) == 4 and len([p for p, _ in server.seen if 'resolve' in p]) == 2
    with pytest.raises(UserError, match='holds commit c0ffeec0ffee, and v2 is dddd'):
        server.files['/api/datasets/owner/texts/revision/v2'] = json.dumps({'sha': 'd'*40}).encode()
        fetch(source, tmp_path/'raw', 1, revision='v2', patience=QUICK)
    with pytest.raises(UserError, match='holds owner/texts, not owner/other'): fetch(Source('owner/other'), tmp_path/'raw', patience=QUICK)

def test_what_is_missing_is_named_and_the_rest_is_there(server, tmp_path):
    raw, source = hub(server)
    path = f'/datasets/owner/texts/resolve/{COMMIT}/shard_00001.parquet'
    server.faults[path] = repeat(code(404))
    with pytest.raises(UserError, match='1 of 4 files are missing.*shard_00001.parquet.*404'): fetch(source, tmp_path/'raw', 3, patience=QUICK, workers=2)
    assert len(list((tmp_path/'raw').glob('*.parquet'))) == 3
    server.faults[path] = []; server.seen.clear()
    fetch(source, tmp_path/'raw', 3, patience=QUICK)
    assert [p for p, _ in server.seen] == [path]

def test_damage_is_named_file_by_file(server, tmp_path):
    raw, source = hub(server)
    fetch(source, tmp_path/'raw', 4, patience=QUICK)
    for i in (1, 3):
        p = tmp_path/f'raw/shard_0000{i}.parquet'; b = bytearray(p.read_bytes()); b[50] ^= 1; p.write_bytes(b)
    (tmp_path/'raw/shard_00000.parquet').unlink()
    with pytest.raises(UserError, match='3 of 5 files.*shard_00000.parquet: it is missing.*shard_00001.parquet: another SHA.*shard_00003.parquet: another SHA'): verify_raw(tmp_path/'raw')

def test_offline_says_what_is_missing(server, tmp_path, monkeypatch):
    raw, source = hub(server)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(UserError, match='offline.*holds no download.json'): fetch(source, tmp_path/'raw')
    monkeypatch.delenv('HF_HUB_OFFLINE')
    m = fetch(source, tmp_path/'raw', 3, patience=QUICK)
    server.shutdown(); server.server_close(); server.seen.clear()
    assert fetch(source, tmp_path/'raw', 3, no_network=True) == m
    for i in (0, 2): (tmp_path/f'raw/shard_0000{i}.parquet').unlink()
    with pytest.raises(UserError, match='offline, and 2 of 4 files are missing.*: shard_00000.parquet, shard_00002.parquet:'): fetch(source, tmp_path/'raw', 3, no_network=True)

def test_the_default_plan_is_small():
    files = [RemoteFile(f'shard_{i:05d}.parquet', 100_000_000, 'a'*64) for i in range(6543)]
    train, val = choose(files, SOURCES['climbmix'])
    assert sum(f.size for f in train + val) <= 250e6 and val == files[-1:]
    assert len(choose(files, SOURCES['climbmix'], 370)[0]) == 370 and choose(files, SOURCES['climbmix'], 370)[1] == val
    assert len(choose(files, SOURCES['climbmix'], 'all')[0]) == 6542
    for bad in (0, -1, 1.5, None, 'many'):
        with pytest.raises(UserError, match='--shards'): choose(files, SOURCES['climbmix'], bad)
    with pytest.raises(UserError, match='has 6542 training files, and --shards asks for 6543'): choose(files, SOURCES['climbmix'], 6543)

def test_named_validation_files():
    files = [RemoteFile(p) for p in ('README.md', 'data/test-00000-of-00001.parquet', 'data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet', 'logo.png')]
    train, val = choose(files, SOURCES['smoltalk'], 'all')
    assert [f.path for f in val] == ['data/test-00000-of-00001.parquet'] and len(train) == 2

def test_a_full_disk_is_said_before(server, tmp_path, monkeypatch):
    raw, source = hub(server)
    monkeypatch.setattr(dl, '_free', lambda folder: 1000)
    with pytest.raises(UserError, match='1,000 bytes free'): fetch(source, tmp_path/'raw', 3, patience=QUICK)
    assert not (tmp_path/'raw').exists() and not any('resolve' in p for p, _ in server.seen)

def test_a_disk_that_fills_up(server, tmp_path, monkeypatch):
    raw, source = hub(server)
    monkeypatch.setattr(os, 'fsync', lambda fd: (_ for _ in ()).throw(OSError(28, 'No space left on device')) if not threading.current_thread() is threading.main_thread() else None)
    with pytest.raises(UserError, match='cannot write.*(disk is full|No space)|disk is full'): fetch(source, tmp_path/'raw', 3, patience=QUICK)

@pytest.mark.parametrize('path', ['../evil', '/etc/x', 'a/../../b', '.hidden', 'a/.git/x', 'a\\b'])
def test_paths_that_leave_the_folder(path):
    with pytest.raises(UserError, match='which we do not write'): dl._safe(path)

@pytest.mark.parametrize('damage', [lambda m: m.pop('files'), lambda m: m.update(version=2), lambda m: m['files'][0].pop('sha256'),
                                    lambda m: m['files'][0].update(path='../x'), lambda m: m['files'][0].update(split='test')])
def test_a_damaged_record_is_refused(server, tmp_path, damage):
    raw, source = hub(server)
    m = fetch(source, tmp_path/'raw', 1, patience=QUICK)
    damage(m); (tmp_path/'raw/download.json').write_text(json.dumps(m))
    for f in (verify_raw, lambda d: fetch(source, d, 1, patience=QUICK)):
        with pytest.raises(UserError, match='download.json is damaged'): f(tmp_path/'raw')

def test_two_at_once(server, tmp_path):
    raw, source = hub(server)
    fetch(source, tmp_path/'raw', 1, patience=QUICK)
    fd = dl.lock_folder(tmp_path/'raw')
    if fd is None: pytest.skip('this system has no folder locks')
    with pytest.raises(UserError, match='another process is writing'): fetch(source, tmp_path/'raw', 2, patience=QUICK)
    os.close(fd)


# --- in a process of its own

CHILD = '''if 1:
    import sys
    from nanochat.common import as_command
    from nanochat.download import Patience, Source, fetch
    with as_command(): fetch(Source('owner/texts', '*.parquet', 'last'), sys.argv[1], 4, patience=Patience(300, 4, 0.01, 0.02), workers=3)'''

def child(tmp_path, server): return subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path/'raw')], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                                     env={**os.environ, 'NANOCHAT_COMMAND': '1'})

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT], ids=['kill', 'ctrl-c'])
def test_stopped_in_the_middle_then_again(server, tmp_path, how):
    raw, source = hub(server, make=lambda i: random.Random(i).randbytes(300_000))
    begun = threading.Event()
    def hang(h, path): h.serve(path, send=100_000); begun.set(); time.sleep(120); return True
    slow = f'/datasets/owner/texts/resolve/{COMMIT}/shard_00002.parquet'
    server.faults[slow] = [hang]
    p = child(tmp_path, server)
    part = tmp_path/'raw/.shard_00002.parquet.part'
    assert begun.wait(300)
    end = time.monotonic() + 60
    while time.monotonic() < end and not (part.exists() and part.stat().st_size == 100_000 and len(list((tmp_path/'raw').glob('shard*'))) == 4): time.sleep(0.02)
    at = time.monotonic(); p.send_signal(how); out, err = p.communicate(timeout=300)
    assert time.monotonic() - at < 60 and 'Traceback' not in err                          # though a worker waits for 120 s
    assert p.returncode == (130 if how == signal.SIGINT else -9)
    assert not (tmp_path/'raw/shard_00002.parquet').exists() and part.stat().st_size == 100_000
    server.seen.clear()
    m = fetch(source, tmp_path/'raw', 4, patience=QUICK)
    assert [(p, h.get('Range')) for p, h in server.seen] == [(slow, 'bytes=100000-')]
    for f in m['files']: assert (tmp_path/'raw'/f['path']).read_bytes() == raw[f['path']]

def test_a_missing_file_is_a_failed_command(server, tmp_path):
    hub(server)
    server.faults[f'/datasets/owner/texts/resolve/{COMMIT}/shard_00001.parquet'] = repeat(code(404))
    p = child(tmp_path, server)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 1 and 'Traceback' not in err and 'shard_00001.parquet' in err.splitlines()[-1]


# --- the data command over a hub

from nanochat.dataset import documents, read_manifest
from nanochat.scripts import data as script

@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv('NANOCHAT_BASE_DIR', str(tmp_path/'base'))
    monkeypatch.setattr(script, 'fetch_files', lambda *a, **kw: fetch(*a, patience=QUICK, **kw))
    return tmp_path/'base'

def texts(*shards): return [f'Shard {i}, document {j}.' for i in shards for j in range(50)]

def known(monkeypatch, source): monkeypatch.setitem(SOURCES, 'climbmix', source)

def test_a_dataset_by_name_becomes_shards(server, base, monkeypatch):
    raw, source = hub(server)
    known(monkeypatch, source)
    r = script.prepare('climbmix', shards='2')
    assert list(documents(r['folder'], 'train')) == texts(0, 1) and list(documents(r['folder'], 'val')) == texts(4)
    m = read_manifest(r['folder'])
    assert m['meta']['validation'] == ['shard_00004.parquet'] and m['meta']['commit'] == COMMIT and m['meta']['train_docs_in_val'] == 0
    assert m['meta']['sha256']['shard_00001.parquet'] == hashlib.sha256(raw['shard_00001.parquet']).hexdigest()
    server.seen.clear()
    assert script.prepare('climbmix', shards='2') == r and script.prepare('climbmix') == r and server.seen == []
    with pytest.raises(UserError, match='train_files was 2, now 3'): script.prepare('climbmix', shards='3')

def test_a_foreign_parquet_file_is_ignored(server, base, monkeypatch):
    raw, source = hub(server)
    known(monkeypatch, source)
    script.fetch('climbmix', '1')
    for name in ('shard_99999.parquet', 'aaa.parquet', 'val.parquet'): pq.write_table(pa.table({'text': ['foreign']}), base/'raw/climbmix'/name)
    r = script.prepare('climbmix')
    assert list(documents(r['folder'], 'train')) == texts(0) and list(documents(r['folder'], 'val')) == texts(4)

def test_the_number_of_documents_can_be_asked_for(server, base, monkeypatch):
    raw, source = hub(server)
    known(monkeypatch, source)
    r = script.prepare('climbmix', docs=60, shards='2')
    assert list(documents(r['folder'], 'train')) == texts(0, 1)[:60] and r['config']['docs'] == 60

def test_files_of_any_repository(server, base):
    raw, source = hub(server, repo='someone/else', name='part-{}.parquet')
    r = script.prepare('someone/else', shards='5', val_fraction=.3)                 # no file is named for validation: the hash decides
    got = [[*documents(r['folder'], s)] for s in ('train', 'val')]
    assert sorted(sum(got, [])) == sorted(texts(0, 1, 2, 3, 4)) and 40 < len(got[1]) < 110 and r['name'] == 'someone--else'

def test_prefetch_then_no_network(server, base, monkeypatch, tmp_path, capsys):
    raw, source = hub(server)
    known(monkeypatch, source)
    stick = tmp_path/'stick'
    r = script.prefetch('climbmix', str(stick), '3')
    assert r['sources']['climbmix']['train_files'] == 3 and '--offline' in capsys.readouterr().out
    server.shutdown(); server.server_close()
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')                          # nothing listens there
    for offline in (True, False):
        p = script.prepare('climbmix', raw=str(stick), offline=offline, force=True, shards='3')
        assert list(documents(p['folder'], 'train')) == texts(0, 1, 2)
    assert script.verify(raw=str(stick))['verified'] == [str(stick/'climbmix')]
    (stick/'climbmix/shard_00002.parquet').unlink()
    with pytest.raises(UserError, match='offline, and 1 of 4 files are missing.*shard_00002.parquet'): script.prepare('climbmix', raw=str(stick), offline=True, shards='3', force=True)
    with pytest.raises(UserError, match='shard_00002.parquet: it is missing'): script.verify('climbmix', raw=str(stick))
    with pytest.raises(UserError, match='offline.*asks for 4|offline, and 1 of'): script.fetch('climbmix', '4', raw=str(stick), offline=True)

def test_verify_names_what_is_damaged_in_both_places(server, base, monkeypatch):
    raw, source = hub(server)
    known(monkeypatch, source)
    r = script.prepare('climbmix')
    assert len(script.verify('climbmix')['verified']) == 2
    for p in (base/'raw/climbmix/shard_00000.parquet', base/'data/climbmix/train-00000.parquet', base/'data/climbmix/val-00000.parquet'):
        b = bytearray(p.read_bytes()); b[40] ^= 1; p.write_bytes(b)
    with pytest.raises(UserError) as e: script.verify('climbmix')
    assert all(n in str(e.value) for n in ('shard_00000.parquet', 'train-00000.parquet', 'val-00000.parquet')) and 'shard_00004' not in str(e.value)

def chats(i):
    rows = [{'messages': [{'role': 'user', 'content': f'Question {i}.{j}?'}, {'role': 'assistant', 'content': f'Answer {i}.{j}.'}], 'source': 'x'} for j in range(20)]
    if i == 1: rows[7]['messages'].pop()                                              # ends with the user
    sink = pa.BufferOutputStream(); pq.write_table(pa.table({'messages': [r['messages'] for r in rows], 'source': [r['source'] for r in rows]}), sink)
    return sink.getvalue().to_pybytes()

def test_conversations(server, base, monkeypatch):
    raw, source = hub(server, n=2, repo='owner/chats', name='data/train-{:05d}-of-00002.parquet', make=chats)
    monkeypatch.setitem(SOURCES, 'smoltalk', Source('owner/chats', '*.parquet', 'named', 'conversations'))
    with pytest.raises(UserError, match='row group 0, row 8: the last message is of user'): script.prepare('smoltalk', shards='2')
    assert not (base/'data/smoltalk').exists()
    r = script.prepare('smoltalk', shards='2', skip_bad=True, val_fraction=.2)
    lines = {s: [json.loads(l) for l in (Path(r['folder'])/f'{s}.jsonl').read_text().splitlines()] for s in ('train', 'val')}
    assert sum(map(len, lines.values())) == 39 and r['meta']['skipped']['counts'] == {'row': 1} and 1 < len(lines['val']) < 20
    assert all([m['role'] for m in c['messages']] == ['user', 'assistant'] and set(c) == {'messages'} for c in sum(lines.values(), []))
    assert script.prepare('smoltalk', shards='2', skip_bad=True, val_fraction=.2) == r
    with pytest.raises(UserError, match='holds conversations, not documents'): read_manifest(r['folder'])
    (Path(r['folder'])/'val.jsonl').write_text('')
    with pytest.raises(UserError, match='val.jsonl is damaged'): script.verify('smoltalk')

def test_streaming_through_datasets(base, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps({'text': f'Row {i}.', 'id': i}) + '\n' for i in range(300)))
    real, asked = datasets.load_dataset, []
    def local(*args, **kw):
        asked.append((args, kw))
        return real('json', data_files=str(tmp_path/'rows.jsonl'), split=kw['split'], streaming=kw['streaming'], cache_dir=str(tmp_path/'cache'))
    monkeypatch.setattr(datasets, 'load_dataset', local)
    with pytest.raises(UserError, match='--docs N'): script.prepare('hf:owner/rows')
    r = script.prepare('hf:owner/rows:en', docs=100, val_docs=20)
    assert list(documents(r['folder'], 'val')) == [f'Row {i}.' for i in range(20)] and list(documents(r['folder'], 'train')) == [f'Row {i}.' for i in range(20, 120)]
    assert asked == [(('owner/rows', 'en'), dict(split='train', streaming=True, revision=None))]
    with pytest.raises(UserError, match='offline'): script.prepare('hf:owner/rows', docs=100, offline=True, name='y')
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **kw: (_ for _ in ()).throw(ConnectionError("Couldn't reach the Hub\nlong story")))
    with pytest.raises(UserError, match="owner/rows cannot be read .ConnectionError: Couldn't reach the Hub."): script.prepare('hf:owner/rows', docs=10, name='z')

def test_without_the_datasets_package(base, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(UserError, match=r"needs the datasets package: pip install 'nanochat\[data\]'"): script.prepare('hf:owner/rows', docs=10)

@pytest.mark.parametrize('args, says', [
    (['fecth'], "no action 'fecth': did you mean fetch"), (['destroy'], 'no action .destroy.: it has fetch, prepare'), (['fetch', '--shard', '3'], 'did you mean --shards'),
    (['fetch', '--workers', 'many'], 'invalid int value'), (['inspect', 'x'], 'does not know x'), (['prepare', '--docs'], 'expected one argument')])
def test_a_mistyped_command_is_one_sentence(capsys, args, says):
    with pytest.raises(SystemExit) as e: script.main(args)
    err = capsys.readouterr().err
    assert e.value.code == 2 and re.search(says, err) and err.startswith('error: ') and err.count('\n') == 1

@pytest.mark.parametrize('kw, says', [
    (dict(source='tinyworld'), 'needs no download'), (dict(source='tests'), 'is on this machine'), (dict(shards='0'), '--shards'), (dict(shards='few'), '--shards must be a number'),
    (dict(workers=0), '--workers'), (dict(source='climb'), 'did you mean climbmix'), (dict(source='xyz'), 'known by name are')])
def test_wrong_wishes(server, base, monkeypatch, kw, says):
    raw, source = hub(server)
    known(monkeypatch, source)
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    with pytest.raises(UserError, match=says): script.fetch(**kw)

def test_help_teaches(capsys):
    script.main([])
    overview = capsys.readouterr().out
    for action, f in script.ACTIONS.items():
        assert action in overview
        with pytest.raises(SystemExit) as e: script.main([action, '--help'])
        text = capsys.readouterr().out
        assert e.value.code == 0 and all(f'--{a.replace("_", "-")}' in text for a in f.__code__.co_varnames[:f.__code__.co_argcount])
