"The shell runs: each executed at its tiny setting, from the same flags and stages as the large one; and what they promise in their first lines"
import importlib, json, os, re, subprocess, sys
import pytest
from conftest import ROOT, reaches

RUNS = ['speedrun.sh', 'run1000.sh', 'miniseries.sh', 'scaling_laws.sh']

def run(name, *args, base, path=None, timeout=500, **env):
    env = {**os.environ, 'NANOCHAT_BASE_DIR': str(base), 'OMP_NUM_THREADS': '1', **env}
    if path: env['PATH'] = f'{path}{os.pathsep}{env["PATH"]}'
    return subprocess.run(['bash', str(ROOT/'runs'/name), *map(str, args)], cwd=base, env=env, capture_output=True, text=True, timeout=timeout)

def read(base, stage, tag, name='result.json'): return json.loads((base/stage/tag/name).read_text())

def well(r):
    assert r.returncode == 0, (r.stdout + r.stderr)[-4000:]
    return r

@pytest.fixture(scope='module')
def base(tmp_path_factory): return tmp_path_factory.mktemp('runs')

# ------------------------------------------------------------------------------------------------ what needs no training
@pytest.mark.parametrize('name', sorted(p.name for p in (ROOT/'runs').glob('*') if p.suffix in ('.sh', '.sbatch')))
def test_scripts_parse_and_stop_at_the_first_error(name):
    assert subprocess.run(['bash', '-n', ROOT/'runs'/name], capture_output=True, text=True).stderr == ''
    assert '\nset -euo pipefail\n' in (ROOT/'runs'/name).read_text()

@pytest.mark.parametrize('name', RUNS)
def test_help_is_the_head_of_the_file(name, tmp_path):
    r = well(run(name, '--help', base=tmp_path))
    assert f'bash runs/{name} --tiny' in r.stdout and 'set -euo' not in r.stdout and r.stderr == '' and not list(tmp_path.iterdir())

@pytest.mark.parametrize('name', RUNS)
@pytest.mark.parametrize('args, words', [(['--dpeth', '3'], '--dpeth is not an option'), (['--gpus'], '--gpus needs a value'),
                                         (['--gpus', 'two'], "--gpus must be a whole number, and is 'two'")], ids=['unknown', 'no value', 'no number'])
def test_a_wrong_flag_is_one_sentence(name, args, words, tmp_path):
    r = run(name, *args, base=tmp_path)
    assert r.returncode == 2 and words in r.stderr and len(r.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())

def test_several_nodes_must_say_which_and_where(tmp_path):
    for args, words in ((['--nodes', 2, '--node', 0], 'needs --head'), (['--nodes', 2, '--node', 2, '--head', 'a:1'], 'from 0 to 1')):
        r = run('speedrun.sh', *args, base=tmp_path)
        assert r.returncode == 2 and words in r.stderr

def test_every_flag_that_is_read_is_documented():
    for name in ('speedrun.sh', 'miniseries.sh', 'scaling_laws.sh'):
        text = (ROOT/'runs'/name).read_text()
        head, flags = text.split('set -euo')[0], re.search(r'flags="(.*)"', text)[1].split()
        assert [f for f in flags if f'--{f}' not in head] == []

@pytest.mark.parametrize('name, hours, dollars', [('speedrun.sh', 'under three hours', r'about \$(\d+)'), ('run1000.sh', 'about 46 hours', None)],
                         ids=['speedrun', 'run1000'])
def test_the_costs_in_the_first_lines_are_those_of_the_plan(name, hours, dollars, tmp_path):
    r = well(run(name, '--plan', 'h100', base=tmp_path))
    head = (ROOT/'runs'/name).read_text().split('set -euo')[0]
    took, cost = float(re.search(r', ([\d.]+) hours', r.stdout)[1]), float(re.search(r'\$([\d.]+) at', r.stdout)[1])
    assert hours in head and (2 < took < 3 if name == 'speedrun.sh' else 45.5 < took < 46.5)
    assert abs(cost - float(re.search(dollars, head)[1])) < 1 if dollars else 800 < cost < 1100
    assert 'DOES NOT FIT' not in r.stdout and not list(tmp_path.iterdir())

STUB = """#!/usr/bin/env bash
case "$*" in -c*|*nanochat.scripts.plan*|*--plan*) exec "$REAL_PYTHON" "$@" ;; esac
printf '%s\\n' "$*" >> "$LOG"
echo '{}'
"""

def commands(name, *args, folder):
    "What a run would start at its large setting: a checkout whose Python writes down every line but the plans"
    import hashlib, shutil
    shutil.copytree(ROOT/'runs', folder/'runs')
    shutil.copy(ROOT/'pyproject.toml', folder)
    (folder/'.venv/bin').mkdir(parents=True)
    (folder/'.venv/bin/python').write_text(STUB)
    (folder/'.venv/bin/python').chmod(0o755)
    (folder/'.venv/nanochat-installed').write_text(hashlib.sha256((folder/'pyproject.toml').read_bytes()).hexdigest() + ' \n')
    env = {**os.environ, 'NANOCHAT_BASE_DIR': str(folder/'base'), 'OMP_NUM_THREADS': '1', 'REAL_PYTHON': sys.executable, 'LOG': str(folder/'log')}
    well(subprocess.run(['bash', str(folder/'runs'/name), *map(str, args)], cwd=folder, env=env, capture_output=True, text=True, timeout=300))
    return (folder/'log').read_text().splitlines()

def check_flags(line):
    "The script of a line, after its parser has taken the flags"
    from fastcore.script import anno_parser
    from nanochat.scripts.data import ACTIONS
    words = line.split()
    at = next(i for i, w in enumerate(words) if w.startswith('nanochat.scripts.'))
    script, flags = words[at].split('.')[-1], words[at + 1:]
    if script == 'data': anno_parser(ACTIONS[flags[0]]).parse_args(flags[1:])
    else: anno_parser(getattr(importlib.import_module(words[at]).main, '__wrapped__', importlib.import_module(words[at]).main)).parse_args(flags)
    return f'{script} {flags[0]}' if script == 'data' else script

TEXT = ['data fetch', 'data prepare', 'tok_train', 'data tokenize']

def test_the_large_speedrun_in_its_own_words(tmp_path):
    lines = commands('speedrun.sh', '--gpus', 8, '--depth', 4, '--precision', 'fp32', folder=tmp_path)
    assert [check_flags(line) for line in lines] == [*TEXT, 'data fetch', 'data prepare', 'base_train', 'base_eval', 'chat_sft', 'report']
    assert ['--nproc-per-node=8' in line for line in lines] == [False]*6 + [True]*3 + [False]
    assert re.search(r'--source climbmix --shards \d+$', lines[0]) and '--vocab-size 32768' in lines[2] and '--max-len 2048' in lines[6] and '--compiled' in lines[6]
    rows = int(re.search(r'--device-batch (\d+)', lines[6])[1])
    assert f'--batch-tokens {8*rows*2048}' in lines[8] and 'data/smoltalk/train.jsonl' in lines[8]

@pytest.mark.parametrize('name, args, runs', [('miniseries.sh', ['--depths', '2 4'], ['miniseries-d2', 'miniseries-d4']),
                                              ('scaling_laws.sh', ['--depths', '2 3', '--flops', '1e15 2e15'], ['scaling-d2-1e15', 'scaling-d3-1e15', 'scaling-d2-2e15', 'scaling-d3-2e15'])],
                         ids=['miniseries', 'scaling_laws'])
def test_a_large_series_in_its_own_words(name, args, runs, tmp_path):
    lines = commands(name, '--gpus', 2, '--precision', 'fp32', '--dial', 'head_dim=64', *args, folder=tmp_path)
    assert [check_flags(line) for line in lines] == [*TEXT, *['base_train']*len(runs), 'laws']
    trained = lines[4:-1]
    assert [re.search(r'--tag (\S+)', line)[1] for line in trained] == runs and all('--dial head_dim=64' in line and '--compiled' in line for line in trained)

def test_a_series_fetches_text_for_the_model_that_the_dial_makes(tmp_path):
    "Heads sixteen times as wide: a model of 0.9 billion parameters, not of ten million"
    from nanochat.plan import find_device, plan
    lines = commands('miniseries.sh', '--gpus', 2, '--depths', '4', '--dial', 'head_dim=1024', folder=tmp_path)
    need = plan(4, find_device('h100'), head_dim=1024)['shards']
    assert need > 100 and [re.search(r'--shards (\d+)', line)[1] for line in lines[:2]] == [str(need)]*2

# ------------------------------------------------------------------------------------------------ executed
def stages(r): return [line[3:] for line in r.stdout.splitlines() if line.startswith('== ')]

def test_speedrun(base):
    "Every stage, on two processes where there is something to share"
    r = well(run('speedrun.sh', '--tiny', base=base))
    trained, card = read(base, 'base', 'speedrun-tiny'), read(base, 'report', 'speedrun-tiny')
    assert trained['processes'] == 2 and trained['depth'] == 1 and not card['missing']
    assert read(base, 'base_eval', 'speedrun-tiny')['processes'] == read(base, 'sft', 'speedrun-tiny')['processes'] == 2
    assert read(base, 'base', 'speedrun-tiny', 'config.json')['recipe']['vocab_size'] == 512
    assert stages(r) == ['plan', 'text', 'tokenizer', 'pretraining', 'evaluation', 'fine-tuning', 'exam', 'report card']

@pytest.mark.slow
def test_run1000_prepares(base):
    "With its own dial, as on a machine with network and without GPUs"
    r = well(run('run1000.sh', '--tiny', '--prepare', base=base))
    assert stages(r) == ['plan', 'text', 'tokenizer'] and 'depth 2' in r.stdout and 'prepared: run the same command' in r.stderr
    assert (base/'tokenizer/run1000-tiny/result.json').exists() and not (base/'base/run1000-tiny').exists()

@pytest.mark.slow
def test_run1000(base):
    "--gpus 1 needs no torchrun"
    r = well(run('run1000.sh', '--tiny', '--gpus', 1, '--depth', 1, '--tokens-per-param', .1, base=base))
    assert read(base, 'base', 'run1000-tiny')['processes'] == 1 and not read(base, 'report', 'run1000-tiny')['missing']
    assert stages(r)[-1] == 'report card'

@pytest.mark.slow
def test_miniseries(base):
    well(run('miniseries.sh', '--tiny', base=base))
    runs = read(base, 'laws', 'miniseries-tiny')['runs']
    assert [m['depth'] for m in runs] == [1, 2] and all(abs(m['ratio'] / .2 - 1) < .1 for m in runs)

@pytest.mark.slow
def test_scaling_laws(base):
    r = well(run('scaling_laws.sh', '--tiny', base=base))
    runs = read(base, 'laws', 'scaling-tiny')['runs']
    assert sorted(m['depth'] for m in runs) == [1, 2]
    assert all(abs(m['flops'] / 2e10 - 1) < .1 for m in runs) and 'too few runs for a law' in r.stdout
    analysed(base/'laws/scaling-tiny/result.json')

CELLS = """
import json, matplotlib, sys
matplotlib.use('Agg')
names = {}
for c in json.load(open('80a_analysis.ipynb', encoding='utf-8'))['cells']:
    if c['cell_type'] == 'code': exec(''.join(c['source']), names)
print(len(names['stored']['runs']))
"""

def analysed(file):
    "Every cell of page 80a, with the result of another series than the stored one"
    env = {**os.environ, 'NANOCHAT_SERIES': str(file), 'OMP_NUM_THREADS': '1'}
    r = well(subprocess.run([sys.executable, '-W', 'ignore', '-c', CELLS], cwd=ROOT/'nbs', env=env, capture_output=True, text=True, timeout=300))
    assert int(r.stdout.splitlines()[-1]) == len(json.loads(file.read_text())['runs'])

def test_a_stage_that_fails_ends_the_run_with_one_sentence(base):
    r = run('miniseries.sh', '--tiny', '--data', 'nowhere', base=base)
    assert r.returncode == 1 and r.stderr.splitlines()[-1].startswith('error: tokenizer ended with exit code 1: see the lines above')
    assert 'nowhere' in r.stderr and '== miniseries-tiny-d1' not in r.stdout and 'Traceback' not in r.stderr

# ------------------------------------------------------------------------------------------------ minutes
@pytest.mark.slow
def test_a_finished_run_is_skipped_and_a_stopped_one_goes_on(base, tmp_path):
    "SIGTERM to all its processes, as SLURM gives notice, then the same line again"
    import signal
    env = {**os.environ, 'NANOCHAT_BASE_DIR': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    args = ['bash', str(ROOT/'runs/speedrun.sh'), '--tiny', '--tokens-per-param', '5']
    p = subprocess.Popen(args, env=env, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    metrics = tmp_path/'base/speedrun-tiny/metrics.jsonl'
    assert reaches(metrics, 60, p)
    os.killpg(p.pid, signal.SIGTERM)                                                     # hundreds of steps before the end
    p.wait(timeout=200)                                                                  # it waits for the save, so that the same line can follow
    assert p.returncode != 0 and list((tmp_path/'base/speedrun-tiny/checkpoints').glob('step-*'))
    well(run('speedrun.sh', '--tiny', '--tokens-per-param', 5, base=tmp_path))
    steps = [r['step'] for r in map(json.loads, metrics.read_text().splitlines()) if 'loss' in r]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == read(tmp_path, 'base', 'speedrun-tiny')['steps']
    before = read(tmp_path, 'base', 'speedrun-tiny')
    again = well(run('speedrun.sh', '--tiny', '--tokens-per-param', 5, base=tmp_path))
    assert again.stdout.count('already finished') == 5 and read(tmp_path, 'base', 'speedrun-tiny') == before

@pytest.mark.slow
def test_a_grid_gives_a_law(base):
    well(run('scaling_laws.sh', '--tiny', '--tag', 'grid', '--depths', '1 2 3', '--flops', '1e10 2e10 4e10', '--ratios', '.001 100',
             '--dial', 'head_dim=32,batch_tokens=1024', base=base))
    got = read(base, 'laws', 'grid-tiny')
    assert len(got['runs']) == 9 and got['law']['E'] == pytest.approx(got['marks']['entropy of the corpus'])
    analysed(base/'laws/grid-tiny/result.json')

# the pause: whoever reads only the first line must not end it with SIGPIPE, as a long list of nodes would
FAKE = {'scontrol': 'echo 127.0.0.1; sleep .3; for i in $(seq 2 "$SLURM_JOB_NUM_NODES"); do echo 127.0.0.1; done',
        'srun': '''n="$SLURM_JOB_NUM_NODES"
while [ "${1#--}" != "$1" ]; do case "$1" in --nodes=*) n="${1#*=}" ;; esac; shift; done
echo "srun on $n: $* ${NANOCHAT_HEAD:-}" >> "$FAKE_LOG"
[ -z "${FAKE_ONLY:-}" ] || exit 0
for i in $(seq 0 $((n - 1))); do SLURM_NODEID=$i "$@" & pids="${pids:-} $!"; done
for p in $pids; do wait "$p"; done'''}

def fake_slurm(folder):
    "srun and scontrol that take this machine for every node"
    folder.mkdir()
    for name, body in FAKE.items():
        (folder/name).write_text(f'#!/usr/bin/env bash\nset -eu\n{body}\n')
        (folder/name).chmod(0o755)
    return folder

def sbatch(base, tmp_path, *args, **env):
    slurm = dict(SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NUM_NODES='2', SLURM_JOB_NODELIST='node[0-1]', SLURM_JOB_ID=str(os.getpid()), FAKE_LOG=str(tmp_path/'log'))
    return run('slurm.sbatch', *args, base=base, path=fake_slurm(tmp_path/'bin'), **{**slurm, **env})

def test_sbatch_prepares_on_one_node_and_trains_on_all(tmp_path):
    well(sbatch(tmp_path, tmp_path, '--depth', 12, '--tag', 'it', FAKE_ONLY='yes'))
    first, second = (tmp_path/'log').read_text().splitlines()
    assert first.rstrip() == 'srun on 1: bash runs/speedrun.sh --prepare --depth 12 --tag it'
    assert second.startswith('srun on 2: bash -c') and second.endswith(f' 2 --depth 12 --tag it 127.0.0.1:{20000 + os.getpid() % 12000}')

def test_sbatch_says_where_to_submit_it(tmp_path):
    r = sbatch(tmp_path, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path))
    assert r.returncode == 1 and 'submit from its top folder' in r.stderr and not (tmp_path/'log').exists()

@pytest.mark.slow
def test_sbatch_runs_every_stage_on_two_nodes(tmp_path):
    r = well(sbatch(tmp_path, tmp_path, '--tiny', '--gpus', 1))
    assert read(tmp_path, 'base', 'speedrun-tiny')['processes'] == 2 and not read(tmp_path, 'report', 'speedrun-tiny')['missing']
    assert r.stdout.count('== report card') == 1

def test_sky_file():
    yaml = pytest.importorskip('yaml')
    task = yaml.safe_load((ROOT/'runs/sky.yaml').read_text())
    assert task['num_nodes'] == 1 and task['resources']['accelerators'] == 'H100:8' and task['workdir'] == '.'
    for part in ('setup', 'run'):
        assert subprocess.run(['bash', '-n'], input=task[part], capture_output=True, text=True).stderr == ''
        assert 'bash runs/speedrun.sh' in task[part] and task[part].startswith('set -euo pipefail\n')
