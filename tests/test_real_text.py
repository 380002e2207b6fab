"Real text goes the same way: held-out books give bits per byte"
import os, shutil
from pathlib import Path
import pytest
from conftest import result, script

@pytest.fixture(scope='module')
def books(tmp_path_factory):
    shared = Path(os.environ.get('NANOCHAT_SHARED_DATA', '/nowhere'))/'text'
    if not shared.exists(): pytest.skip('NANOCHAT_SHARED_DATA does not name a folder with real text')
    folder = tmp_path_factory.mktemp('books')
    for name in ('books_small.jsonl.gz', 'books_val.jsonl.gz'): shutil.copy(shared/name, folder)
    return folder

@pytest.mark.slow
def test_books(books, tmp_path):
    r = script('data', 'prepare', '--source', books, '--name', 'books', base=tmp_path)
    assert r.returncode == 0, r.stderr
    assert [result(r)['splits'][s]['docs'] for s in ('train', 'val')] == [9, 5]
    r = script('tok_train', '--data', 'books', '--tag', 'books', '--vocab-size', 1024, base=tmp_path)
    assert r.returncode == 0, r.stderr
    r = script('base_train', '--data', 'books', '--tag', 'books', '--depth', 1, '--max-len', 128, '--steps', 60, '--batch-tokens', 2048, base=tmp_path)
    assert r.returncode == 0, r.stderr
    assert 1.5 < result(r)['val_bpb'] < 3.2 and result(r)['floor_bpb'] is None
    r = script('report', '--tag', 'books', base=tmp_path)
    assert r.returncode == 0 and 'sft' in result(r)['missing'], r.stderr
