"""bench.py: its tables, its arguments, what it refuses to time."""

import copy
import json
import math

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import bench
from attention import LinearAngularAttention, castle
from test_castling import Released, randn


def test_bench_prints_its_tables(tmp_path, capsys, monkeypatch):
    """Every table has a row with time, memory and quartiles around its ratio for each form; the file says on what."""
    small = {
        "core": [(2, 2, 30, 8)],
        "models": [("levit128", 1, 64, "levit128", None)],
        "training": [("deit_tiny", 1, 32, 0)],
    }
    tables = {name: (f, small[name], title) for name, (f, _, title) in bench.TABLES.items()}
    monkeypatch.setattr(bench, "TABLES", tables)
    path, threads = tmp_path / "bench.json", torch.get_num_threads()
    try:
        bench.main(bench.parser().parse_args(["--rounds=2", f"--json={path}"]))
    finally:
        torch.set_num_threads(threads)
    written = json.loads(path.read_text())
    assert {"threads", "torch", "device", "dtype"} <= set(written["environment"])
    assert Image.open(tmp_path / "bench.png").size == (900, 525)
    printed = capsys.readouterr().out
    for name in small:
        (row,) = written[name]
        assert row["shape"] in printed and ("no MLP DWConv" in row["shape"]) == (name == "training")
        for form in set(row) - {"shape"}:
            low, high = row[form]["quartiles"]
            assert low <= row[form]["ratio"] <= high and row[form]["ms"] > 0 and row[form]["mib"] > 0


def test_bench_names_bad_arguments(capsys):
    """Numbers, devices and files that cannot be used are named before anything is timed."""
    wrong = {
        "--threads=0": "at least 1, got 0", "--rounds=x": "'x'", "--device=gpu": "cannot use 'gpu'",
        "--device=meta": "cpu or cuda, got meta", "--json=/none/x.json": "no folder /none",
        "--json=x.png": "a JSON file, got x.png", "--json=.": "a JSON file, got .",
    }  # fmt: skip
    for flag, said in wrong.items():
        with pytest.raises(SystemExit, match="2"):
            bench.parser().parse_args([flag])
        assert said in capsys.readouterr().err
    assert bench.parser().parse_args([]).device == torch.device("cpu")


def test_bench_times_nothing_that_is_wrong():
    """A form that strays from float64 stops the run."""
    exact = randn(4, 4)
    bench.check("right", exact.float(), exact, torch.float32)
    for wrong in (exact.float() * 1.001, exact.float() * math.nan):
        with pytest.raises(RuntimeError, match="wrong"):
            bench.check("wrong", wrong, exact, torch.float32)


def test_released_formula_of_the_benchmark():
    """What `released` times is the authors' block: equal to this file's Released, branch included."""
    block = LinearAngularAttention(16, 2, sparse_reg=True, schedule="fixed")
    theirs = Released(16, 2, bias=False, sparse=True)
    theirs.load_state_dict(castle(copy.deepcopy(block)).state_dict())
    x = randn(2, 60, 16, dtype=torch.float32)
    assert_close(bench.released(block)(x), theirs(x), atol=1e-6, rtol=1e-6)
