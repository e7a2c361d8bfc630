"""The benchmark of a card, small and on the CPU: what it writes, and what a failure changes."""

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def run(gpu, tmp_path, *kinds):
    """Exit status, and the JSON that was written."""
    out = tmp_path / "gpu" / "benchmark.json"
    flags = ["--device", "cpu", "--quick", "--out", str(out), "--only", *kinds]
    return gpu.main(flags), json.loads(out.read_text())


def test_the_ratios_are_those_of_the_times_to_the_peers(gpu, tmp_path, capsys):
    status, content = run(gpu, tmp_path, "quantizer")
    keys = ["device", "versions", "quick", "seconds", "failed", "rows"]
    assert status == 0 and list(content) == keys and content["failed"] == []
    parts = 2 * len(gpu.benchmark_quantizer.KINDS)  # each kind with two codebooks
    names = ["vector-quantize-pytorch", "ours"]
    assert [row["contestant"] for row in content["rows"]] == parts * names
    for peer, ours in zip(content["rows"][::2], content["rows"][1::2], strict=True):
        assert peer["part"] == ours["part"] and peer.keys() == ours.keys() == gpu.COLUMNS.keys()
        assert peer["ratio"] == 1 and ours["ratio"] == pytest.approx(peer["ms"] / ours["ms"])
        assert ours["per_second"] == pytest.approx(1000 * 16 * 8 * 8 / ours["ms"])
        assert ours["peak_MiB"] is None  # on a CPU
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 * parts and {line.count("|") for line in table} == {
        len(gpu.COLUMNS) + 1
    }


def test_a_peer_that_is_not_installed_is_left_out_and_ours_has_no_ratio(gpu, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    status, content = run(gpu, tmp_path, "quantizer")
    peer, ours = content["rows"][:2]
    assert status == 0 and peer["note"] == "left out: vector_quantize_pytorch is not installed"
    assert peer["ms"] is None and ours["ms"] > 0 and ours["ratio"] is None


def test_a_part_that_fails_is_reported_and_the_others_go_on(gpu, tmp_path, monkeypatch, capsys):
    def fail(*flags):
        raise RuntimeError("no | memory")

    monkeypatch.setattr(gpu, "run_python", fail)
    monkeypatch.setattr(gpu.benchmark_quantizer, "prepare", lambda name, **sizes: lambda: None)
    status, content = run(gpu, tmp_path, "tests", "quantizer", "training")
    rows = 2 * 2 * len(gpu.benchmark_quantizer.KINDS)
    scripts = [f"training: train_{name}.py" for name in ("vqvae", "vqgan", "transformer")]
    assert status == 1 and content["failed"] == ["tests: device", *scripts]
    assert [bool(row["note"]) for row in content["rows"]] == [True] + rows * [False] + 3 * [True]
    assert capsys.readouterr().out.count("failed: RuntimeError: no / memory") == 4


def test_images_per_second_are_those_of_the_metrics(gpu, tmp_path, monkeypatch):
    """The scripts are not run, but have the flags that they would be given."""

    def fake(script, *flags):
        with mock.patch.object(sys, "argv", [script, *map(str, flags)]):
            args = importlib.import_module(script.removesuffix(".py")).parse()
        model = {"epochs": args.epochs, "seconds": 2.0, "batch_size": 64}
        metrics = {"device": str(args.device), "data": {"training_images": args.limit}}
        (Path(args.out) / "metrics.json").write_text(json.dumps(metrics | {"models": {"a": model}}))

    monkeypatch.setattr(gpu, "run_python", fake)
    status, content = run(gpu, tmp_path, "training")
    assert status == 0 and [row["per_second"] for row in content["rows"]] == [128.0] * 3
    assert {row["note"] for row in content["rows"]} == {"cpu, batch 64"}
