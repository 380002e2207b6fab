"The benchmark of the model: every row is there and holds numbers; what it counts by hand is right. No test looks at a clock"
import json, math, os, subprocess, sys
import pytest, torch
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
import bench_model
from nanochat.kernels import kernels

@pytest.fixture(scope='module')
def rows():
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    r = subprocess.run([sys.executable, str(ROOT/'tools/bench_model.py'), '--quick', '--json', '--device', 'cpu'], env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    out = json.loads(r.stdout)
    assert out['environment']['device'] == 'cpu' and out['environment']['torch'] == torch.__version__
    return out['rows']

def columns(rows, start): return [set(r) - {'what'} for r in rows if r['what'].startswith(start) and 'skipped' not in r and 'A/A' not in r['what']]

def test_quick_has_every_row(rows):
    assert {r['what'].split()[1].strip(',') for r in rows if r['what'].startswith('attention ')} == set(kernels('cpu'))     # those that are missing, too
    for start, n, wanted in (('attention slices', 2, {'full ms', 'window ms', '×', '±', 'full MiB', 'window MiB', 'dense mask MiB'}),
                             ('head', 2, {'plain ms', 'chunked ms', '×', '±', 'plain MiB', 'chunked MiB'}),
                             ('step eager', 1, {'ms', 'tok/s', 'share %', '±', 'products'}),
                             ('decode: d', 1, {'ms', 'MB read', 'floor ms', '% of the floor'}), ('decode: fp32', 1, {'product GB/s', 'copy GB/s'})):
        found = columns(rows, start)
        assert len(found) == n and all(wanted <= c for c in found), (start, found)
    assert [r['what'].split(':')[0] for r in rows if 'A/A' in r['what']] == ['attention', 'head', 'step']
    assert [r['skipped'] for r in rows if r['what'].startswith('step compiled')] == ['--quick compiles nothing']
    for r in rows: assert all(math.isfinite(x) and x >= 0 for x in r.values() if isinstance(x, (int, float))), r

def test_products_alone_are_the_matrices_of_the_model():
    model, T = bench_model.build(2, 512, 64, 'cpu', 'fp32'), 64
    _, flops = bench_model.products_alone(model, T, torch.float32, 'cpu')
    attention = 12*model.cfg.n_embd*model.cfg.n_layer*(T + 1)/2                            # of a token: query times key, weight times value
    assert model.flops_per_token(T)*T == pytest.approx(flops + attention*T, rel=1e-3)

def test_no_gpu_is_one_sentence():
    if torch.cuda.is_available(): pytest.skip('there is one')
    env = {k: v for k, v in os.environ.items() if k != 'NANOCHAT_GPU_CHECK_DEVICE'}
    r = subprocess.run(['bash', str(ROOT/'runs/gpu_check.sh')], env=env, capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.startswith('error: no GPU here') and r.stderr.count('\n') == 1
