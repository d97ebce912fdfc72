"""Tests of random_search.py, `make test`, and its benchmark, `make bench`."""

import contextlib
import itertools
import json
import math
import os
import pty
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

if __name__ != "__main__":  # two threads that wait for each other crawl on a busy machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import random_search as rs  # isort: skip  # before torch: it sets how torch's matrix library rounds
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
MAC = sys.platform == "darwin"  # it counts memory in bytes, others in KiB
SHAPES = list(itertools.product([32, 64, 128, 256], [1, 2, 3, 4]))


def generated_task(name: str) -> rs.Task:
    """Made-up tasks of 90 rows, 72 of which train: full and smaller batches, 3 features."""
    x = np.random.default_rng(0).normal(size=(90, 3))
    return {
        "two outputs": rs.Task(x, np.stack([x[:, 0] * x[:, 1], x[:, 2]], 1), F.mse_loss),
        "binary": rs.Task(x, x[:, 0] * x[:, 1] > 0, rs.binary_cross_entropy),
        "three classes": rs.Task(x, x.argmax(1), F.cross_entropy, classes=3),
    }[name]


@pytest.fixture
def tasks(monkeypatch):
    for name in ("two outputs", "binary", "three classes"):
        monkeypatch.setitem(rs.TASKS, name, generated_task(name))


def make_trial(number: int, **hyperparams) -> rs.Trial:
    return rs.Trial(number, 0, rs.sample_hyperparams(rs.HYPERPARAMS, 0, number) | hyperparams)


def make_keys(trials: list[rs.Trial]) -> torch.Tensor:
    seeds = [np.random.SeedSequence(t.seed, spawn_key=(t.number, 1)) for t in trials]
    return torch.from_numpy(np.stack([s.generate_state(2) for s in seeds]).view(np.int32))


def train(trials: list[rs.Trial], data: dict, epochs: int) -> list[float]:
    return rs.train_stack(trials, data, epochs)[0]


def numbered(trials: list[rs.Trial]) -> list[rs.Trial]:
    return sorted(trials, key=lambda trial: trial.number)


def bits(scores: list[float]) -> list[str]:
    return [score.hex() for score in scores]


def command(*arguments, program=(sys.executable,), **options):
    line = [*program, str(HERE / "random_search.py"), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 600} | options
    return subprocess.run(line, check=False, **options)


def call(monkeypatch, capsys, *arguments):
    """main() in this process: its status, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["random_search.py", *map(str, arguments)])
    try:
        status = rs.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


# ---- The oracle: the same training in ordinary PyTorch, one trial after another -----------------


def train_plain(model, train, scored, loss, lr, batch_size, orders) -> float:
    """Train an ordinary model; orders are the rows' orders, one an epoch. Return the final loss."""
    (x, y), (scored_x, scored_y) = train, scored
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    for order in orders:
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return loss(model(scored_x), scored_y).item()


class GivenDropout(nn.Module):
    """Dropout by the masks that a stack of this trial alone would use, drawn beforehand."""

    def __init__(self, stacked: rs.StackedDropout, rows: list[int], features: int):
        super().__init__()
        self.masks = [stacked(torch.ones(2, count, features))[0] for count in rows]

    def forward(self, x):
        return x * self.masks.pop(0) if self.training else x


def plain_copy(trial: rs.Trial, data: dict, epochs: int) -> tuple[nn.Module, list]:
    """An ordinary model with a trial's initial weights and masks, and its row orders."""
    keys = make_keys([trial] * 2)
    stack = rs.build_stack([trial] * 2, data["sizes"], keys)
    shape = {name: v for name, v in trial.hyperparams.items() if name not in rs.TRAINING}
    model = rs.build_model(nn.Linear, nn.Dropout, **data["sizes"], **shape)
    model.load_state_dict({name: value[0] for name, value in stack.state_dict().items()})
    rows = len(data["train"][0])
    batch = trial.hyperparams["batch_size"]
    steps = [len(range(rows)[at : at + batch]) for at in range(0, rows, batch)] * epochs
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Dropout):
            given = GivenDropout(stack.get_submodule(name), steps, trial.hyperparams["hidden_size"])
            model.set_submodule(name, given)
    shuffle = rs.random_bits(keys, 2)
    orders = [torch.arange(rows)] * epochs  # of a full batch the order does not matter
    if batch < rows:
        orders = [rs.random_bits(shuffle, rows, e * rows)[0].argsort() for e in range(epochs)]
    return model, orders


def mean_loss(data: dict):
    return lambda outputs, y: data["loss"](outputs, y, reduction="none").mean()


@pytest.mark.parametrize("name", ["xor", "regression", "two outputs", "binary", "three classes"])
def test_a_stack_ends_like_plain_pytorch(name, tasks):
    data, epochs = rs.prepare(name), 12
    for hidden_size, num_layers in [(32, 1), (64, 4), (256, 2)]:
        shape = {"hidden_size": hidden_size, "num_layers": num_layers, "batch_size": 32}
        trials = [make_trial(number, **shape) for number in range(4)]
        scores, model = rs.train_stack(trials, data, epochs)
        for index, trial in enumerate(trials):
            plain, orders = plain_copy(trial, data, epochs)
            loss = mean_loss(data)
            lr, batch_size = trial.hyperparams["lr"], trial.hyperparams["batch_size"]
            end = train_plain(plain, data["train"], data["scored"], loss, lr, batch_size, orders)
            assert 1 / scores[index] == pytest.approx(end, rel=1e-4)
            state = model.state_dict()
            for key, value in plain.state_dict().items():
                torch.testing.assert_close(state[key][index], value, rtol=1e-3, atol=1e-5)


# ---- A trial is a function of (seed, number) ----------------------------------------------------


@pytest.mark.parametrize("name", ["xor", "regression"])
def test_bit_for_bit_alone_in_a_pair_and_in_a_wide_stack(name):
    data = rs.prepare(name)
    for hidden_size, num_layers in SHAPES:
        shape = {"hidden_size": hidden_size, "num_layers": num_layers}
        trials = [make_trial(number, **shape) for number in range(19)]
        wide = bits(train(trials, data, 6))
        assert len(set(wide) - {"nan"}) == 19 - wide.count("nan") > 10
        assert bits(train(trials[3:4], data, 6)) == wide[3:4]
        assert bits(train(trials[17:], data, 6)) == wide[17:]
        assert bits(train(trials[::-1], data, 6)) == wide[::-1]


def test_bit_for_bit_where_more_rows_score_than_train(monkeypatch):
    x = np.random.default_rng(0).normal(size=(150, 3))
    task = rs.Task(x, x[:, 0] * x[:, 1], F.mse_loss, held_out=slice(50, None))
    monkeypatch.setitem(rs.TASKS, "mine", task)
    data = rs.prepare("mine")
    trials = [make_trial(n, hidden_size=32, num_layers=1) for n in range(24)]
    for stack in rs.make_stacks(trials, data):
        scores = bits(train(stack, data, 3))
        assert scores == bits([train([t], data, 3)[0] for t in stack])


@pytest.mark.parametrize("name", ["two outputs", "binary", "three classes"])
def test_bit_for_bit_in_batches_on_any_number_of_threads(name, tasks):
    data, threads = rs.prepare(name), torch.get_num_threads()
    trials = [make_trial(n, hidden_size=64, num_layers=2, batch_size=16) for n in range(40)]
    wide = bits(train(trials, data, 4))
    torch.set_num_threads(2)
    try:
        assert bits(train(trials[7:8], data, 4)) == wide[7:8]
        assert bits(train(trials[5:20], data, 4)) == wide[5:20]
    finally:
        torch.set_num_threads(threads)


def search(count: int, seed: int = 0, **options) -> list[rs.Trial]:
    data = rs.prepare("xor")
    trials = rs.random_search(
        lambda trials: train(trials, data, 5),
        rs.HYPERPARAMS,
        count,
        seed,
        lambda trials: rs.make_stacks(trials, data),
        **options,
    )
    return numbered(trials)


def test_the_seed_and_nothing_else_decides():
    state = torch.get_rng_state()
    first = search(30)
    torch.manual_seed(99)
    np.random.seed(99)
    assert search(30) == first
    assert search(10) == first[:10]
    other = search(10, seed=1)
    assert all(a.hyperparams != b.hyperparams for a, b in zip(first, other, strict=False))
    assert {trial.score for trial in first}.isdisjoint(trial.score for trial in other)
    torch.set_rng_state(state)
    np.random.seed(7)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    search(10)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_the_sampler_is_uniform_and_gives_plain_values():
    space = {"a": np.linspace(0, 1, 5), "b": np.arange(4), "c": [None, True, "x", 2.5], "d": (7,)}
    space["e"] = lambda generator: 10 ** generator.uniform(-4, -1)
    samples = [rs.sample_hyperparams(space, 3, number) for number in range(4000)]
    assert {type(value) for sample in samples for value in sample.values()} == {
        float,
        int,
        bool,
        str,
        type(None),
    }
    for name, size in {"a": 5, "b": 4, "c": 4}.items():
        counts = [[s[name] for s in samples].count(value) for value in list(space[name])]
        expected = len(samples) / size
        assert sum((count - expected) ** 2 / expected for count in counts) < 25  # chi squared
    assert all(1e-4 <= sample["e"] <= 1e-1 for sample in samples)
    assert len({tuple(sample.values()) for sample in samples}) == len(samples)


def masks(trials: list[rs.Trial], rate: float, steps: int, stream: int) -> torch.Tensor:
    keys = rs.random_bits(make_keys(trials), 2, 2 * stream)
    layer = rs.StackedDropout(keys, torch.full((len(trials), 1), rate))
    return torch.stack([layer(torch.ones(len(trials), 8, 64)) for _ in range(steps)])


def test_dropout_keeps_its_rate_and_is_independent():
    trials = [make_trial(number) for number in range(16)]
    one, other = (masks(trials, 0.3, 40, stream) for stream in (3, 6))
    kept = (one > 0).float()
    assert one.unique().tolist() == pytest.approx([0, 1 / 0.7])
    count = kept.numel()
    assert kept.mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / count))
    shifted = {
        "step": (kept[1:], kept[:-1]),
        "trial": (kept[:, 1:], kept[:, :-1]),
        "row": (kept[:, :, 1:], kept[:, :, :-1]),
        "unit": (kept[..., 1:], kept[..., :-1]),
        "layer": (kept, (other > 0).float()),
    }
    for name, pair in shifted.items():
        a, b = (values.flatten() - 0.7 for values in pair)
        correlation = (a * b).mean().item() / 0.21
        assert abs(correlation) < 5 / math.sqrt(len(a)), name
    flat = kept.transpose(0, 1).flatten(0, 1).flatten(1)  # no two masks of any trial, step agree
    agreement = (flat @ flat.T + (1 - flat) @ (1 - flat).T) / flat.shape[1]
    agreement.fill_diagonal_(0)
    assert agreement.max() < 0.58 + 6 * math.sqrt(0.25 / flat.shape[1])


def test_both_words_of_a_key_act():
    keys = torch.tensor([[5, 7], [5, 8], [6, 7]], dtype=torch.int32)
    streams = rs.random_bits(keys, 10_000).unique(return_counts=True)[1]
    assert streams.sum() == 30_000
    assert len(streams) > 29_990  # of two streams alike, half would be gone


def test_initial_weights_are_those_of_linear_and_differ_between_trials_and_layers():
    data = rs.prepare("xor")
    keys = torch.from_numpy(np.arange(12, dtype=np.int32).reshape(6, 2))
    trial = make_trial(0, hidden_size=64, num_layers=3)
    values = list(rs.build_stack([trial] * 6, data["sizes"], keys).parameters())
    for value in values[2:]:
        bound = 1 / 8
        assert value.abs().max() <= bound
        assert value.mean().item() == pytest.approx(0, abs=5 * bound / math.sqrt(3 * value.numel()))
        if value.numel() > 1000:
            assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
            assert len(value.unique()) > 0.95 * value.numel()
    assert not torch.equal(values[2][0], values[2][1])
    assert not torch.equal(values[2][0], values[4][0])


def test_every_trial_and_epoch_has_an_order_of_its_own(tasks):
    data, steps = rs.prepare("two outputs"), []

    def loss(outputs, y, reduction):
        steps.append(y.view(2, -1, 2))
        return F.mse_loss(outputs, y, reduction=reduction)

    rs.train_stack([make_trial(n, batch_size=32) for n in range(2)], data | {"loss": loss}, 2)
    rows = data["train"][1]
    steps = steps[:6]  # the others score
    assert [step.shape[1] for step in steps] == [32, 32, 8] * 2
    epochs = [torch.cat(steps[:3], 1), torch.cat(steps[3:], 1)]
    for epoch, trial in itertools.product(range(2), range(2)):
        order = epochs[epoch][trial]
        assert sorted(order.tolist()) == sorted(rows.tolist())
        assert not torch.equal(order, rows)
    assert not torch.equal(epochs[0][0], epochs[0][1])
    assert not torch.equal(epochs[0][0], epochs[1][0])


def test_a_whole_lr_is_that_of_a_float():
    data = rs.prepare("xor")
    trials = [make_trial(n, hidden_size=32, num_layers=1, lr=lr) for n, lr in enumerate([1, 0.5])]
    scores = bits(train(trials, data, 5))
    assert scores[:1] == bits(train(trials[:1], data, 5))
    trials[0].hyperparams["lr"] = 1.0
    assert bits(train(trials, data, 5)) == scores


def test_every_hyperparameter_acts(tasks):
    data = rs.prepare("two outputs")
    base = {"lr": 0.05, "batch_size": 16, "hidden_size": 32, "num_layers": 2, "dropout": 0.1}
    changes = {"lr": 0.06, "batch_size": 32, "hidden_size": 64, "num_layers": 3, "dropout": 0.2}
    losses = []
    for change in [{}, *({name: value} for name, value in changes.items())]:
        scores, model = rs.train_stack([make_trial(0, **base | change)], data, 3)
        losses += scores
        hidden = (base | change)["hidden_size"]
        layers = [m for m in model.modules() if isinstance(m, rs.StackedLinear)]
        assert len(layers) == (base | change)["num_layers"] + 1
        assert layers[0].weight.shape[1:] == (hidden, 3)
    assert len(set(losses)) == len(losses)


def test_a_batch_size_past_the_rows_is_a_full_batch():
    data = rs.prepare("xor")
    trials = [make_trial(0, batch_size=size) for size in rs.HYPERPARAMS["batch_size"]]
    assert len(rs.make_stacks(trials, data)) == 1
    assert len(set(train(trials, data, 5))) == 1
    assert len({train([trial], data, 5)[0] for trial in trials}) == 1


# ---- The search ---------------------------------------------------------------------------------


def test_three_lines_search_any_function():
    trials = rs.random_search(
        lambda ts: [-(t.hyperparams["x"] ** 2) for t in ts], {"x": range(-9, 10)}, 99
    )
    best = trials[0]
    assert best.hyperparams == {"x": 0}
    assert best.number == min(t.number for t in trials if t.hyperparams["x"] == 0)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([1.0, 3.0, 2.0], 1),
        ([2.0, 3.0, 3.0, 3.0], 1),
        ([math.nan, -5.0, -7.0], 1),
        ([math.nan, math.nan], None),
        ([math.inf, 1.0, -math.inf], 1),
    ],
)
def test_the_best_is_the_highest_then_the_lowest_number_and_never_nan(scores, best, order):
    trials = rs.random_search(
        lambda stack: [scores[trial.number] for trial in stack],
        {"x": [0]},
        len(scores),
        make_stacks=lambda trials: [[trial] for trial in trials[::order]],
    )
    assert [trial.number for trial in numbered(trials)] == list(range(len(scores)))
    assert (None if math.isnan(trials[0].score) else trials[0].number) == best
    found = [trial.score for trial in trials if not math.isnan(trial.score)]
    assert found == sorted(found, reverse=True)


def test_a_missing_score_is_an_error():
    with pytest.raises(ValueError, match="shorter"):
        rs.random_search(lambda stack: [], {"x": [0]}, 1)


def test_a_loss_of_zero_has_a_finite_score_and_divergence_none():
    data, trials = rs.prepare("xor"), [make_trial(0)] * 2
    for factor, score in [(0.0, 1e12), (math.nan, math.nan), (math.inf, math.nan)]:
        data["loss"] = lambda outputs, y, reduction, factor=factor: outputs.abs() * factor
        scores = train(trials, data, 1)
        assert scores == pytest.approx([score] * 2, nan_ok=True)


def test_divergence_of_one_trial_leaves_the_others_alone():
    data = rs.prepare("regression")
    shape = {"hidden_size": 64, "num_layers": 3}
    trials = [make_trial(0, **shape, lr=1e9), make_trial(1, **shape), make_trial(2, **shape)]
    scores = train(trials, data, 30)
    assert math.isnan(scores[0])
    assert bits(scores[1:]) == bits(train(trials[1:], data, 30))


def test_stacks_are_bounded_and_hold_each_trial_once():
    data = rs.prepare("xor")
    trials = [make_trial(number) for number in range(600)]
    stacks = rs.make_stacks(trials, data)
    assert sorted(t.number for stack in stacks for t in stack) == list(range(600))
    for stack in stacks:
        assert (
            len({(t.hyperparams["hidden_size"], t.hyperparams["num_layers"]) for t in stack}) == 1
        )
        model = rs.build_stack(stack[:1], data["sizes"], make_keys(stack[:1]))
        weights = sum(p.numel() for p in model.parameters())
        assert len(stack) <= max(2, 2**24 / 4 / weights)


def test_training_never_waits_for_the_device(tasks):
    """On the meta device, which holds no values, any read of one raises: only the scores are."""
    for name in ("xor", "two outputs", "three classes"):
        with pytest.raises(NotImplementedError) as caught:
            rs.train_stack([make_trial(0), make_trial(0)], rs.prepare(name, "meta"), 3)
        (place,) = [entry for entry in caught.traceback if Path(entry.path) == Path(rs.__file__)]
        assert ".tolist()" in str(place.statement)


# ---- Log, resume, replay ------------------------------------------------------------------------


def sorted_log(path: Path) -> list[str]:
    return sorted(path.read_text().splitlines(), key=lambda line: json.loads(line)["trial"])


def strict_rows(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def agree(trials: list[rs.Trial], path: Path) -> bool:
    rows = {row["trial"]: row["score"] for row in strict_rows(path)}
    return {t.number: None if math.isnan(t.score) else t.score for t in trials} == rows


def test_the_log_is_strict_json_and_resumes_only_what_is_missing(tmp_path):
    path, space, ran = tmp_path / "log", {"x": range(5), "y": [None, "a", 0.1, True]}, []

    def score(stack):
        ran.extend(trial.number for trial in stack)
        return [math.nan if t.hyperparams["x"] == 0 else t.hyperparams["x"] / 3 for t in stack]

    options = {"log": str(path), "settings": {"task": "t"}}
    first = rs.random_search(score, space, 20, **options)
    rows = strict_rows(path)
    assert list(rows[0]) == ["task", "seed", "trial", "x", "y", "score"]
    assert any(row["score"] is None for row in rows)
    assert agree(first, path)
    again = rs.random_search(score, space, 30, **options)
    assert ran == list(range(30))
    scores = [bits([t.score for t in numbered(trials)[:20]]) for trials in (first, again)]
    assert scores[0] == scores[1]
    assert agree(again, path)
    fewer = rs.random_search(score, space, 10, **options)
    assert [trial.number for trial in numbered(fewer)] == list(range(10))
    assert len(strict_rows(path)) == len(ran) == 30


@pytest.fixture(scope="module")
def xor_log(tmp_path_factory):
    """The log of an uninterrupted search of 40 trials, and its output."""
    path = tmp_path_factory.mktemp("log") / "log"
    run = command("--trials", 40, "--epochs", 20, "--log", path)
    assert run.returncode == 0, run.stderr
    return path, run.stdout


def tables(output: str) -> str:
    return "\n".join(line for line in output.splitlines() if "run now in" not in line)


def test_resume_and_extend_give_the_log_of_one_run(xor_log, tmp_path):
    path = tmp_path / "log"
    assert command("--trials", 15, "--epochs", 20, "--log", path).returncode == 0
    start = path.read_text()
    run = command("--trials", 40, "--epochs", 20, "--log", path)
    assert path.read_text().startswith(start)
    assert sorted_log(path) == sorted_log(xor_log[0])
    assert tables(run.stdout) == tables(xor_log[1])
    assert "40 trials, 25 run now in" in run.stdout


def test_a_killed_search_resumes_to_the_same_log(tmp_path):
    whole, path, moments = tmp_path / "whole", tmp_path / "log", random.Random(5)
    options, killed = ["--trials", 60, "--epochs", 300], 0
    assert command(*options, "--log", whole).returncode == 0
    for _ in range(8):
        try:  # run() kills by SIGKILL
            command(*options, "--log", path, timeout=moments.uniform(1, 2.5))
        except subprocess.TimeoutExpired:
            killed += 1
    assert killed
    assert command(*options, "--log", path).returncode == 0
    assert sorted_log(path) == sorted_log(whole)


def test_a_torn_last_line_runs_again_wherever_it_was_cut(tmp_path, capsys):
    whole, path = tmp_path / "whole", tmp_path / "log"
    settings = {"task": "xor", "seed": 0, "epochs": 5}
    search(4, log=str(whole), settings=settings)
    content = whole.read_bytes()
    last = content[:-1].rfind(b"\n") + 1
    for cut in range(last, len(content)):
        path.write_bytes(content[:cut])
        capsys.readouterr()
        with open(path, "r+b", buffering=0) as log:
            done = {}
            rs.update_log(log, rs.HYPERPARAMS, settings, done, [])
        assert len(done) == 3
        assert path.read_bytes() == content[:last]
        assert ("torn" in capsys.readouterr().err) == (cut > last)
    search(4, log=str(path), settings=settings)
    assert sorted_log(path) == sorted_log(whole)


def spoil_line(number: int, old: str, new: str):
    def spoil(content: str) -> str:
        lines = content.splitlines(keepends=True)
        assert old in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(old, new, 1)
        return "".join(lines)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "line", "named"),
    [
        (lambda content: "hello\n" + content, 1, "not a line"),
        (lambda content: "no log at all", 1, "not a line"),
        (lambda content: "[]\n", 1, "not a line"),
        (lambda content: "[" * 200_000, 1, "not a line"),
        (lambda content: '{"trial": 0, "score": 1' + "0" * 400 + "}\n", 1, "not a line"),
        (lambda content: '{"task": "xor", "seed": 0, "epochs": 2000, "trial": 0', 1, "not a line"),
        (lambda content: content + content.splitlines()[4] + "\n", 41, "expected once"),
        (lambda content: content + "x", 41, "not a line"),
        (spoil_line(3, '"score": ', '"score": NaN, "x": '), 3, ""),
        (spoil_line(5, "{", ""), 5, "not a line"),
        (spoil_line(7, '"xor"', '"regression"'), 7, '"task": "xor"'),
        (spoil_line(7, '"seed": 0', '"seed": 1'), 7, '"seed": 0'),
        (spoil_line(7, '"epochs": 20', '"epochs": 21'), 7, '"epochs": 20'),
        (spoil_line(9, '"lr": 0', '"lr": 1'), 9, '"lr": 0'),
        (spoil_line(9, ", ", ",  "), 9, "expected once"),
        (spoil_line(9, '"score": ', '"score": "'), 9, "not a line"),
    ],
)
def test_a_log_of_something_else_is_refused_and_left_alone(
    spoil, line, named, xor_log, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "log"
    path.write_text(spoil(xor_log[0].read_text()))
    before = path.read_bytes()
    monkeypatch.setattr(rs, "train_stack", lambda *_: pytest.fail("it trained"))
    status, out, err = call(monkeypatch, capsys, "--trials", 50, "--epochs", 20, "--log", path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert f"{path}, line {line}:" in err
    assert named in err
    assert path.read_bytes() == before


def test_a_line_that_is_not_written_whole_ends_the_search(tmp_path):
    path, limit = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    score = lambda stack: [1.0] * len(stack)
    rs.random_search(score, {"x": range(9)}, 2, log=str(path))
    whole = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, limit[1]))
    try:
        with pytest.raises(ValueError, match="not written whole"):
            rs.random_search(score, {"x": range(9)}, 4, log=str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(path.read_bytes()) == len(whole) + 9
    rs.random_search(score, {"x": range(9)}, 4, log=str(path))
    assert [row["trial"] for row in strict_rows(path)] == [0, 1, 2, 3]


def test_what_another_process_wrote_meanwhile_is_not_written_again(tmp_path):
    path, nested = tmp_path / "log", []

    def score(stack):
        if not nested:  # a process that outlived the kill of its parent does the work first
            nested.append(True)
            rs.random_search(lambda s: [1.0] * len(s), {"x": range(9)}, 6, log=str(path))
        return [1.0] * len(stack)

    rs.random_search(score, {"x": range(9)}, 8, log=str(path))
    assert [row["trial"] for row in strict_rows(path)] == list(range(8))


@pytest.mark.parametrize("name", ["xor", "regression"])
def test_trial_runs_one_trial_as_the_search_did(name, tmp_path, monkeypatch, capsys):
    path, alone, options = tmp_path / "log", tmp_path / "alone", ["--task", name, "--epochs", 15]
    call(monkeypatch, capsys, *options, "--trials", 12, "--log", path)
    rows = sorted(strict_rows(path), key=lambda row: row["trial"])[::4]
    for row in rows:
        one = [*options, "--trial", row["trial"], "--log", alone]
        status, out, _ = call(monkeypatch, capsys, *one)
        assert status == 0
        assert eval(out.splitlines()[-1], {}) == {key: row[key] for key in rs.HYPERPARAMS}
        assert "1 trials, 1 run now" in out
    assert strict_rows(alone) == rows


def test_the_predictions_are_those_of_the_best_trial(monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "--task", "regression", "--trials", 20)
    assert status == 0
    table = np.array(eval(out.split("of the best\ntensor(")[1].split("])")[0] + "]", {}))
    targets, predictions = table.T
    held_out = [float(value) for value in rs.ARTICLE_Y.split()[2::3]]
    assert targets == pytest.approx(held_out, abs=1e-4)
    loss = float(out.splitlines()[4].split()[2])
    assert ((targets - predictions) ** 2).mean() == pytest.approx(loss, rel=1e-2)


def run_on_a_terminal(*arguments, until: str = "") -> tuple[int, str, str]:
    """Run with a terminal for standard error; Ctrl-C as soon as until is seen on it."""
    terminal, end = pty.openpty()
    line = [sys.executable, str(HERE / "random_search.py"), *map(str, arguments)]
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    options = {"stdout": subprocess.PIPE, "stderr": end, "text": True, "preexec_fn": default}
    process = subprocess.Popen(line, **options)
    os.close(end)
    err = ""
    with contextlib.suppress(OSError):  # so a terminal ends on Linux
        while text := os.read(terminal, 1000).decode():
            err += text
            if until and until in err:
                process.send_signal(signal.SIGINT)
                until = ""
    os.close(terminal)
    out = process.communicate(timeout=60)[0]
    return process.returncode, out, err


def test_progress_is_one_line_on_a_terminal():
    status, out, err = run_on_a_terminal("--trials", 30, "--epochs", 5)
    assert status == 0
    lines = err.split("\r")
    assert lines[-2:] == ["30 of 30 trials", ""]
    assert all(line.endswith(" of 30 trials") for line in lines[:-1])
    assert len(out.splitlines()[0]) > len(lines[-2])  # what is printed next covers it


def test_ctrl_c_reports_what_is_finished(tmp_path):
    path = tmp_path / "log"
    status, out, err = run_on_a_terminal("--trials", 3000, "--log", path, until="of 3000 trials")
    assert status == 130
    assert "Traceback" not in err
    best = max(strict_rows(path), key=lambda row: row["score"] or 0)
    assert eval(out.splitlines()[-1], {}) == {key: best[key] for key in rs.HYPERPARAMS}


def torchrun(*options) -> tuple:
    """Its own options end at the --: it would take our --log for one of them."""
    return (sys.executable, "-m", "torch.distributed.run", "--standalone", *options, "--")


def test_two_processes_are_one(xor_log, tmp_path):
    path, program = tmp_path / "log", torchrun("--nproc-per-node=2")
    run = command("--trials", 40, "--epochs", 20, "--log", path, program=program)
    assert run.returncode == 0, run.stderr
    assert sorted_log(path) == sorted_log(xor_log[0])
    assert tables(run.stdout) == tables(xor_log[1])


def test_a_killed_worker_costs_only_its_unfinished_stacks(xor_log, tmp_path):
    path, worker = tmp_path / "log", tmp_path / "worker.py"
    worker.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nimport random_search as rs\n"
        "train, first_life = rs.train_stack, os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "def dies(trials, data, epochs):\n"
        "    if first_life and rs.RANK == 1 and any(trial.number > 20 for trial in trials):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return train(trials, data, epochs)\n"
        "rs.train_stack = dies\n"
        "sys.exit(rs.main())\n"
    )
    program = torchrun("--nproc-per-node=2", "--max-restarts=2")
    line = [*program, str(worker), "--trials", "40", "--epochs", "20", "--log", str(path)]
    run = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert sorted_log(path) == sorted_log(xor_log[0])
    assert tables(run.stdout) == tables(xor_log[1])


# ---- Yours in five minutes: own data, space, model; the report ----------------------------------

README = (HERE / "README.md").read_text()


def readme_section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def readme_code(title: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", readme_section(title), re.DOTALL)
    return code


STATISTICS = "What mattered, and would more trials help"


@pytest.mark.parametrize(
    "title",
    [
        "Keep the best model",
        STATISTICS,
        "Your own data",
        "Your own space",
        "Your own model that stacks",
        "Your own model that does not stack",
    ],
)
def test_a_section_of_the_readme_runs_as_written(title, tmp_path):
    code = readme_code(title)
    environment = os.environ | {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8"}
    line = [sys.executable, "-c", code]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    if title == STATISTICS:
        command("--trials", 60, "--epochs", 5, "--log", tmp_path / "trials.jsonl")
    for _ in range(2 if "log=" in code else 1):  # again: all of it comes from the log
        run = subprocess.run(line, check=False, timeout=120, **options)
        assert run.returncode == 0, run.stderr
        assert run.stdout
    if "log=" in code:
        (log,) = tmp_path.glob("*.jsonl")
        assert len(strict_rows(log)) == 12


def test_the_kept_model_is_that_of_the_best_trial(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("keep.py").write_text(readme_code("Keep the best model"))
    names = runpy.run_path("keep.py")
    task = rs.TASKS["regression"]
    x = torch.tensor([[float(value)] for value in task.x[task.held_out]])
    y = torch.tensor([[float(value)] for value in task.y[task.held_out]])
    loss = F.mse_loss(names["model"](x), y).item()
    assert loss == pytest.approx(1 / names["best"].score, rel=1e-4)
    saved = torch.load("best.pt", weights_only=True)
    assert saved["hyperparams"] == names["best"].hyperparams
    assert saved["state_dict"].keys() == names["model"].state_dict().keys()


def test_the_readme_names_the_options_that_exist():
    run = command("--help")
    assert run.returncode == 0
    options = set(re.findall(r"--[a-z]+", run.stdout)) - {"--help"}
    assert set(re.findall(r"`(--[a-z]+)", readme_section("Options"))) == options
    for line in re.findall(r"^    (.*random_search\.py.*)$", README, re.MULTILINE):
        assert set(re.findall(r"--[a-z]+", line.split("random_search.py")[1])) <= options
    makefile = (HERE / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


X = np.arange(20.0).reshape(10, 2)


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (rs.Task(X, np.zeros(9), F.mse_loss), "10 rows, y has 9"),
        (rs.Task(X[:0], [], F.mse_loss), "0 rows"),
        (rs.Task(np.where(X == 3, math.nan, X), np.zeros(10), F.mse_loss), "NaN"),
        (rs.Task(X, np.full(10, math.inf), F.mse_loss), "infinity"),
        (rs.Task(X, np.zeros(10), F.mse_loss, held_out=[]), "held_out"),
        (rs.Task(X, np.zeros(10), F.mse_loss, held_out=slice(10, 20)), "held_out"),
        (rs.Task(X, np.zeros(10), F.mse_loss, held_out=slice(None)), "held_out"),
        (rs.Task(X, np.zeros(10), F.mse_loss, held_out=[12]), "held_out"),
        (rs.Task(X, np.arange(10), F.cross_entropy, classes=5), "0 to 4"),
        (rs.Task(X, np.full(10, -1), F.cross_entropy, classes=5), "0 to 4"),
        (rs.Task(X, np.full(10, 2), rs.binary_cross_entropy), "0 to 1"),
        (rs.Task(X, np.zeros(10, int), F.cross_entropy), "classes"),
        (rs.Task([["a"]], [1], F.mse_loss), "could not convert"),
    ],
)
def test_bad_data_is_one_line_that_names_the_task(task, problem, monkeypatch, capsys):
    monkeypatch.setitem(rs.TASKS, "mine", task)
    status, out, err = call(monkeypatch, capsys, "--task", "mine", "--trials", 2, "--epochs", 1)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "'mine'" in err
    assert problem in err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": []}, ["lr"]),
        ({"lr": [-1]}, ["lr", "-1"]),
        ({"lr": ["fast"]}, ["lr", "fast"]),
        ({"lr": [math.inf]}, ["lr", "inf"]),
        ({"lr": 0.1}, ["lr", "0.1"]),
        ({"batch_size": [0]}, ["batch_size", "0"]),
        ({"batch_size": [2.5]}, ["batch_size", "2.5"]),
        ({"dropout": [1.5]}, ["dropout", "1.5"]),
        ({"hidden_size": [2.5]}, ["hidden_size", "2.5"]),
        ({"num_layers": lambda generator: 1.5}, ["num_layers", "1.5"]),
        ({"momentum": [0.9]}, ["momentum"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"lr": None}, ["lr"]),
    ],
)
def test_a_bad_space_is_one_line_that_names_key_and_value(change, named, monkeypatch, capsys):
    space = {name: v for name, v in (rs.HYPERPARAMS | change).items() if v is not None}
    monkeypatch.setattr(rs, "HYPERPARAMS", space)
    monkeypatch.setattr(rs, "train_stack", lambda *_: pytest.fail("it trained"))
    status, out, err = call(monkeypatch, capsys, "--trials", 3)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    for name in named:
        assert name in err


def test_inputs_are_standardised_by_the_training_rows_and_a_constant_one_does_no_harm(monkeypatch):
    x = np.random.default_rng(0).normal(5, 3, size=(40, 3))
    x[:, 1], x[4::5] = 0.25, 1e3  # a constant feature; rows that are held out
    monkeypatch.setitem(rs.TASKS, "mine", rs.Task(x, x[:, 0] / 1e3, F.mse_loss))
    data = rs.prepare("mine")
    rows = data["train"][0]
    assert [len(data[part][0]) for part in ("train", "scored")] == [32, 8]
    torch.testing.assert_close(rows.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    expected = torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(rows.std(0, correction=0), expected, atol=1e-4, rtol=0)
    assert data["scored"][0].min() > 100
    trial = make_trial(0, lr=0.001, hidden_size=32)
    assert math.isfinite(train([trial], data, 3)[0])


def test_a_layer_that_cannot_stack_is_refused(monkeypatch, capsys):
    for layer in (nn.LayerNorm(2), nn.PReLU(), nn.Linear(2, 2, bias=False), nn.Linear(2, 2)):
        model = lambda Linear, Dropout, layer=layer, **_: nn.Sequential(layer, Linear(2, 1))
        monkeypatch.setattr(rs, "build_model", model)
        status, _, err = call(monkeypatch, capsys, "--trials", 2, "--epochs", 1)
        assert (status, len(err.splitlines())) == (2, 1)
        assert "stack" in err


def test_a_linear_used_twice_is_an_error_not_a_wrong_gradient(monkeypatch):
    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(self.layer(x))[..., :1]

    monkeypatch.setattr(rs, "build_model", lambda Linear, Dropout, **_: Twice(Linear(2, 2)))
    with pytest.raises(RuntimeError, match="inplace"):
        rs.train_stack([make_trial(0)] * 2, rs.prepare("xor"), 1)


def made_up_trials(count: int, score) -> list[rs.Trial]:
    trials = [make_trial(number) for number in range(count)]
    for trial in trials:
        trial.score = float(score(trial.hyperparams))
    return trials


@pytest.fixture(scope="module")
def statistics(tmp_path_factory) -> dict:
    """The functions of the README's section, without what follows them."""
    path = tmp_path_factory.mktemp("statistics") / "statistics.py"
    path.write_text(readme_code(STATISTICS).split("rows = [json")[0])
    return runpy.run_path(str(path))


def importance(statistics: dict, trials: list[rs.Trial], name: str) -> tuple[float, str]:
    best = sorted(trials, key=lambda t: (math.isnan(t.score), -t.score, t.number))
    return statistics["importance"]([trial.hyperparams[name] for trial in best])


def test_what_mattered_finds_it_and_nothing_else(statistics):
    trials = made_up_trials(300, lambda h: math.exp(20 * h["lr"] + h["num_layers"]))
    trials[0].score, trials[1].score = math.nan, 1e30  # an outlier and a diverged trial
    shares = {name: importance(statistics, trials, name)[0] for name in rs.HYPERPARAMS}
    assert shares["num_layers"] > 0.7
    assert 0.05 < shares["lr"] < 0.3
    assert shares["batch_size"] == shares["hidden_size"] == shares["dropout"] == 0
    assert importance(statistics, trials, "num_layers")[1] == "4 to 4"
    assert importance(statistics, trials, "lr")[1].endswith("to 0.1")
    kinds = [rs.Trial(n, 0, {"a": "xyz"[n % 3]}, n % 3 + n / 1e3) for n in range(60)]
    share, where = importance(statistics, kinds, "a")
    assert (share > 0.8, where) == (True, "z to z")


@pytest.mark.parametrize("name", ["xor", "regression"])
def test_batch_size_comes_out_as_nothing_where_it_does_nothing(name, statistics):
    data = rs.prepare(name)
    for start in range(0, 360, 120):
        trials = [make_trial(number) for number in range(start, start + 120)]
        for stack in rs.make_stacks(trials, data):
            for trial, score in zip(stack, train(stack, data, 20), strict=True):
                trial.score = score
        assert importance(statistics, trials, "batch_size")[0] == 0


def test_the_expected_best_is_the_mean_over_all_subsets(statistics):
    scores = [7.0, 3.0, 2.0, 2.0, 1.0, 0.0]
    for size in range(1, 7):
        subsets = [max(subset) for subset in itertools.combinations(scores, size)]
        expected = statistics["expected_best"](np.array(scores), size)
        assert expected == pytest.approx(sum(subsets) / len(subsets), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_report_of_a_few_trials(count, capsys):
    for sign in (1, -1, 0):
        rs.report(made_up_trials(count, lambda h, sign=sign: sign * h["lr"]), losses=sign != 0)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80


# ---- The command line ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xor", "regression"])
def test_the_command_line_end_to_end(name):
    run = command("--task", name, "--trials", 40, "--epochs", 300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    hyperparams = eval(lines[-1], {})
    assert list(hyperparams) == list(rs.HYPERPARAMS)
    assert max(map(len, lines[:-1])) <= 80
    assert f"task {name}" in lines[0]
    header = next(
        i for i, line in enumerate(lines) if line.split()[:3] == ["trial", "score", "loss"]
    )
    numbers, losses = zip(
        *[(l.split()[0], float(l.split()[2])) for l in lines[header + 1 : header + 6]], strict=True
    )
    assert list(losses) == sorted(losses)
    best = rs.sample_hyperparams(rs.HYPERPARAMS, 0, int(numbers[0]))
    assert best == hyperparams
    assert losses[0] < {"xor": 0.01, "regression": 0.0785}[name]
    assert "diverged" in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trials", "0"], "--trials"),
        (["--trials", "-3"], "--trials"),
        (["--trials", "many"], "--trials"),
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--seed", "-1"], "--seed"),
        (["--trial", "-1"], "--trial"),
        (["--task", "sudoku"], "--task"),
        (["--device", "abacus"], "--device"),
        (["--device", "cuda:99"], "--device"),
        (["--log", "/no/such/folder/log"], "/no/such/folder/log"),
        (["--log", "/"], "'/'"),
        (["--log", ""], "''"),
        (["--tri", "1"], "--tri"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, named, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rs, "train_stack", lambda *_: pytest.fail("it trained"))
    status, out, err = call(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert named in err
    assert not list(tmp_path.iterdir())


def test_bad_input_from_the_shell():
    run = command("--trials", 0)
    assert (run.returncode, run.stdout, len(run.stderr.splitlines())) == (2, "", 1)


def test_all_diverged_is_status_1(monkeypatch, capsys):
    monkeypatch.setitem(rs.HYPERPARAMS, "lr", [1e30])
    status, out, err = call(monkeypatch, capsys, "--task", "regression", "--trials", 3)
    assert status == 1
    assert "diverged" in err.splitlines()[-1]
    assert "3 of 3 trials diverged" in out


# ---- The benchmark, `make bench` ----------------------------------------------------------------


def bench_child(kind: str, count: int, epochs: int) -> None:
    """Train the first trials of the XOR search one way; print the seconds, losses, peak memory."""
    data = rs.prepare("xor")
    trials = [make_trial(number) for number in range(count)]
    if kind == "plain":
        plain = [(trial, *plain_copy(trial, data, epochs)) for trial in trials]
        loss, rows = F.binary_cross_entropy_with_logits, (data["train"], data["scored"])
        start = time.perf_counter()
        losses = [
            train_plain(
                model, *rows, loss, t.hyperparams["lr"], t.hyperparams["batch_size"], orders
            )
            for t, model, orders in plain
        ]
    else:
        start = time.perf_counter()
        for stack in rs.make_stacks(trials, data):
            for trial, score in zip(stack, train(stack, data, epochs), strict=True):
                trial.score = score
        losses = [1 / trial.score for trial in trials]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if MAC else 10)
    print(json.dumps({"seconds": seconds, "losses": losses, "peak": peak}))


def bench(epochs: int = 200, sample: int = 64) -> None:
    """Compare the oracle's plain loop with stacks on the same trials; both times with imports."""

    def child(*arguments) -> tuple[float, dict]:
        start = time.perf_counter()
        line = [sys.executable, __file__, *map(str, arguments), str(epochs)]
        run = subprocess.run(line, capture_output=True, text=True, check=True)
        return time.perf_counter() - start, json.loads(run.stdout)

    wall, _ = child("stacked", 0)
    print(f"XOR, {epochs} epochs a trial, {torch.get_num_threads()} threads; whole processes, of")
    print(
        f"which {wall:.1f} s are imports. The plain loop ran at most {sample} trials; its time at"
    )
    print(
        "more is scaled up from those.\n\ntrials  plain trials/s  stacked trials/s  ratio  peak MiB"
    )
    for count in (16, 64, 256, 1024):
        _, plain = child("plain", min(count, sample))
        seconds, stacked = child("stacked", count)
        pairs = zip(plain["losses"], stacked["losses"], strict=False)
        assert all(math.isclose(*pair, rel_tol=0.02) for pair in pairs), "the losses differ"
        plain_seconds = wall + plain["seconds"] * max(1, count / sample)
        cells = [count, count / plain_seconds, count / seconds, plain_seconds / seconds]
        print("{:6} {:15.1f} {:17.1f} {:6.1f}".format(*cells), f"{stacked['peak']:9.0f}")
    print("\nBoth ways ended with the same losses, to 2 %.")


if __name__ == "__main__":
    if sys.argv[1:]:
        bench_child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        bench()
