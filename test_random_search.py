"""Tests of random_search.py: `make test`."""

import contextlib
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two that wait for each other crawl on a busy machine

import random_search as rs  # isort: skip  # before torch: it sets how torch's matrix library rounds
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
SCRIPT = HERE / "random_search.py"
ROWS = np.random.default_rng(0).normal(size=(90, 3))
TASKS = {
    "two outputs": rs.Task(ROWS, np.stack([ROWS[:, 0] * ROWS[:, 1], ROWS[:, 2]], 1), F.mse_loss),
    "three classes": rs.Task(ROWS, ROWS.argmax(1), F.cross_entropy),
    "binary": rs.Task(
        ROWS, (ROWS[:, 0] > 0).astype(float), F.binary_cross_entropy_with_logits, held_out=0.5
    ),
    "images": rs.Task(
        ROWS.reshape(90, 3)[:, :, None, None] * np.ones((8, 8)), ROWS.argmax(1), F.cross_entropy
    ),
    "words": rs.Task(np.abs(ROWS * 3).astype(int) % 7, ROWS.argmax(1), F.cross_entropy),
}


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    for name, task in TASKS.items():
        monkeypatch.setitem(rs.TASKS, name, task)


def make_trials(count: int, start: int = 0, **hyperparams) -> list[rs.Trial]:
    sample = partial(rs.sample_hyperparams, rs.HYPERPARAMS, 0)
    return [rs.Trial(n, 0, sample(n) | hyperparams) for n in range(start, start + count)]


def train(trials, data, epochs=3, models=None) -> list[str]:
    """The scores by trial, to the last bit."""
    scores = {
        trial.number: score for trial, score in rs.train_and_evaluate(trials, data, epochs, models)
    }
    return [float(scores[trial.number]).hex() for trial in trials]


def command(*arguments, program=(sys.executable,), **options):
    line = [*program, str(SCRIPT), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 300} | options
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


class GivenDropout(nn.Module):
    """Dropout by the masks of a trial, drawn from its key one after another."""

    def __init__(self, key, rate):
        super().__init__()
        self.key, self.rate, self.used = key[None], rate, 0

    def forward(self, x):
        if not self.training:
            return x
        bits = rs.random_bits(self.key, x.numel(), self.used)[0].double()
        self.used += x.numel()
        return x * ((bits > self.rate * 2**32 - 2**31) / (1 - self.rate)).view(x.shape).float()


def train_plain(trial, data, epochs, make_optimizer):
    """A trial in plain PyTorch: its loss on the rows to score, and its model."""
    keys = rs.trial_keys(trial)
    torch.manual_seed(int(keys[0, 0]))
    model = rs.build_model(*data.sizes, **rs.split_hyperparams(trial.hyperparams)[0])
    places = itertools.count(2)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, GivenDropout(keys[next(places)], module.p))
    if isinstance(model, Tied):
        model.same = model.dropout
    if isinstance(model, nn.Sequential) and type(model[-2]) is nn.Dropout:
        model[-2] = model[1]  # it stands in two places
    optimizer = make_optimizer(model.parameters(), trial.hyperparams)
    (x, y), rows, batch = data.train, len(data.train[0]), trial.hyperparams["batch_size"]
    for epoch in range(epochs):
        order = torch.arange(rows)
        if batch < rows:
            order = rs.random_bits(keys[1:2], rows, epoch * rows)[0].argsort(stable=True)
        for step in order.split(batch):
            optimizer.zero_grad()
            data.loss(model(x[step]), y[step]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        outputs = data.scales[1].restore(model(data.scored[0]))
        return data.loss(outputs, data.scored[1]).item(), model


def sgd(parameters, hyperparams):
    return torch.optim.SGD(parameters, lr=hyperparams["lr"])


def same_as_plain(trials, data, epochs, make_optimizer=sgd):
    scores = dict((t.number, s) for t, s in rs.train_and_evaluate(trials, data, epochs))
    for trial in trials:
        loss, _ = train_plain(trial, data, epochs, make_optimizer)
        assert 1 / scores[trial.number] == pytest.approx(loss, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["xor", "regression", "two outputs", "three classes", "binary"])
def test_a_stack_ends_like_plain_pytorch(name):
    for hidden_size, num_layers in [(32, 1), (64, 3)]:
        shape = {"hidden_size": hidden_size, "num_layers": num_layers, "batch_size": 16}
        same_as_plain(make_trials(4, **shape), rs.prepare(name), 6)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.attention = nn.MultiheadAttention(size // 2, 2, batch_first=True)

    def forward(self, x):
        x = x.unflatten(1, (2, -1))
        return self.attention(x, x, x)[0].flatten(1)


def dense(*layers):
    """build_model of an input layer, some layers for hidden_size, a dropout and an output layer."""

    def build_model(inputs, outputs, hidden_size, num_layers, dropout):
        inside = [layer(hidden_size) for layer in layers]
        first, last = nn.Linear(inputs, hidden_size), nn.Linear(hidden_size, outputs)
        return nn.Sequential(first, *inside, nn.Dropout(dropout), last)

    return build_model


def convolution(inputs, outputs, hidden_size, num_layers, dropout):
    layers = [nn.Conv2d(inputs, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(36, outputs))


def embedding(inputs, outputs, hidden_size, num_layers, dropout):
    return nn.Sequential(nn.Embedding(7, 8), nn.Flatten(), nn.Linear(8 * inputs, outputs))


class Tied(nn.Module):
    """Weights and a dropout that stand in two places, a frozen bias, a layer without use."""

    def __init__(self, inputs, outputs, size, dropout):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, size), nn.Linear(size, outputs)
        self.middle, self.again = nn.Linear(size, size), nn.Linear(size, size)
        self.again.weight = self.middle.weight
        self.first.bias.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.dropout = self.same = nn.Dropout(dropout)

    def forward(self, x):
        x = self.dropout(self.middle(self.first(x)).relu())
        return self.last(self.same(self.again(x).relu()))


def tied(inputs, outputs, hidden_size, num_layers, dropout):
    return Tied(inputs, outputs, hidden_size, dropout)


def shared(inputs, outputs, hidden_size, num_layers, dropout):
    """The fast path must leave it to vmap: a dropout stands in two places."""
    same = nn.Dropout(dropout)
    layers = [nn.Linear(inputs, 32), same, nn.ReLU(), nn.Linear(32, 32), same]
    return nn.Sequential(*layers, nn.Linear(32, outputs))


def without_bias(inputs, outputs, hidden_size, num_layers, dropout):
    """The fast path must leave it to vmap, too."""
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, outputs, bias=False))


MODELS = {
    "shared dropout": ("two outputs", shared),
    "no bias": ("two outputs", without_bias),
    "one layer": ("two outputs", lambda inputs, outputs, **_: nn.Linear(inputs, outputs)),
    "tied weights": ("two outputs", tied),
    "activations": ("three classes", dense(lambda size: nn.Tanh(), lambda size: nn.LeakyReLU())),
    "LayerNorm": ("two outputs", dense(nn.LayerNorm, lambda size: nn.GELU())),
    "BatchNorm1d": ("three classes", dense(nn.BatchNorm1d, lambda size: nn.ReLU())),
    "residual": (
        "two outputs",
        dense(lambda size: Residual(nn.Sequential(nn.Linear(size, size), nn.Tanh()))),
    ),
    "attention": ("three classes", dense(Attention)),
    "convolution": ("images", convolution),
    "embedding": ("words", embedding),
}


def adam(parameter, gradient, state, lr):
    step = state["step"] = state.get("step", 0) + 1
    mean = state.setdefault("mean", torch.zeros_like(parameter))
    square = state.setdefault("square", torch.zeros_like(parameter))
    mean.mul_(0.9).add_(0.1 * gradient)
    square.mul_(0.999).add_(0.001 * gradient * gradient)
    parameter -= lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)


def momentum(parameter, gradient, state, lr, momentum, weight_decay):
    velocity = state.setdefault("velocity", torch.zeros_like(parameter))
    velocity.mul_(momentum).add_(gradient + weight_decay * parameter)
    parameter -= lr * velocity


UPDATES = {
    adam: lambda p, h: torch.optim.Adam(p, h["lr"]),
    momentum: lambda p, h: torch.optim.SGD(
        p, h["lr"], h["momentum"], weight_decay=h["weight_decay"]
    ),
    rs.update: sgd,
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_any_model_stacks_bit_for_bit_and_ends_like_plain_pytorch(name, monkeypatch):
    task, model = MODELS[name]
    monkeypatch.setattr(rs, "build_model", model)
    data = rs.prepare(task)
    for update in (rs.update, adam):
        monkeypatch.setattr(rs, "update", update)
        trials = make_trials(5, hidden_size=32, num_layers=1, batch_size=17)  # 72 = 4 * 17 + 4 rows
        for trial in trials:
            trial.hyperparams["lr"] /= 10
        wide = train(trials, data)
        assert len(set(wide)) == 5
        assert train(trials[2:3], data) == wide[2:3]
        assert train(trials[3:], data) == wide[3:]
        assert train(trials[::-1], data) == wide[::-1]
        if (name, update) != (
            "BatchNorm1d",
            adam,
        ):  # it scales up a bias's gradient that is 0 but for rounding
            same_as_plain(trials[:2], data, 3, UPDATES[update])


@pytest.mark.parametrize("update", [adam, momentum])
def test_an_update_is_that_of_torch_optim_trial_by_trial(update, monkeypatch):
    monkeypatch.setattr(rs, "update", update)
    trials = make_trials(4, hidden_size=32, num_layers=2, batch_size=16)
    for trial in trials:
        extra = {"momentum": 0.2 * trial.number, "weight_decay": 0.1 / (1 + trial.number)}
        trial.hyperparams |= extra if update is momentum else {}
    same_as_plain(trials, rs.prepare("two outputs"), 4, UPDATES[update])


# ---- A trial is a function of (seed, number) ----------------------------------------------------


@pytest.mark.parametrize("name", ["xor", "regression"])
def test_bit_for_bit_alone_in_a_pair_and_in_a_wide_stack(name):
    data = rs.prepare(name)
    for hidden_size, num_layers in itertools.product([32, 64, 128, 256], [1, 2, 4]):
        trials = make_trials(11, hidden_size=hidden_size, num_layers=num_layers)
        wide = train(trials, data)
        assert len(set(wide)) > 8
        assert train(trials[3:4], data) == wide[3:4]
        assert train(trials[9:], data) == wide[9:]
        assert train(trials[::-1], data) == wide[::-1]


@pytest.mark.parametrize("name", ["two outputs", "three classes"])
def test_bit_for_bit_in_batches_on_any_number_of_threads(name):
    data, threads = rs.prepare(name), torch.get_num_threads()
    trials = make_trials(20, hidden_size=64, num_layers=2, batch_size=16)
    wide = train(trials, data)
    torch.set_num_threads(2)
    try:
        assert train(trials[7:8], data) == wide[7:8]
        assert train(trials[5:15], data) == wide[5:15]
    finally:
        torch.set_num_threads(threads)


def numbered(trials):
    return sorted(trials, key=lambda trial: trial.number)


def test_the_seed_and_nothing_else_decides():
    first = numbered(rs.search("xor", 20, 3))
    torch.manual_seed(99)
    np.random.seed(99)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = numbered(rs.search("xor", 10, 3, repeats=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert [t.score for t in again] == [t.score for t in first[:10]]
    other = numbered(rs.search("xor", 10, 3, seed=1))
    assert all(a.hyperparams != b.hyperparams for a, b in zip(first, other, strict=False))
    assert {t.score for t in first}.isdisjoint(t.score for t in other)


def test_the_sampler_is_uniform_and_gives_plain_values():
    space = {"a": np.linspace(0, 1, 5), "b": np.arange(4), "c": [None, True, "x", 2.5], "d": (7,)}
    space["e"] = lambda generator: 10 ** generator.uniform(-4, -1)
    samples = [rs.sample_hyperparams(space, 3, number) for number in range(2000)]
    kinds = {type(value) for sample in samples for value in sample.values()}
    assert kinds == {float, int, bool, str, type(None)}
    for name, size in {"a": 5, "b": 4, "c": 4}.items():
        counts = [[s[name] for s in samples].count(value) for value in list(space[name])]
        assert sum((c - 2000 / size) ** 2 / (2000 / size) for c in counts) < 25  # chi squared
    assert all(1e-4 <= sample["e"] <= 1e-1 for sample in samples)
    assert {s["x"] for s in [rs.sample_hyperparams({"x": [0.1 + 0.2]}, 0, 0)]} == {0.3}


def test_dropout_keeps_its_rate_and_is_independent():
    keys = torch.stack([rs.trial_keys(trial) for trial in make_trials(16)])
    rates = torch.full((16, 1), 0.3)
    ones = torch.ones(16, 8, 64)
    one, other = (rs.StackedDropout(keys[:, place], rates) for place in (2, 3))
    masks = torch.stack([one(ones) for _ in range(40)])
    assert masks.unique().tolist() == pytest.approx([0, 1 / 0.7])
    kept = (masks > 0).float()
    assert kept.mean().item() == pytest.approx(0.7, abs=5 * math.sqrt(0.21 / kept.numel()))
    shifted = {
        "step": (kept[1:], kept[:-1]),
        "trial": (kept[:, 1:], kept[:, :-1]),
        "row": (kept[:, :, 1:], kept[:, :, :-1]),
        "unit": (kept[..., 1:], kept[..., :-1]),
        "layer": (kept, torch.stack([(other(ones) > 0).float() for _ in range(40)])),
    }
    for name, pair in shifted.items():
        a, b = (values.flatten() - 0.7 for values in pair)
        assert abs((a * b).mean().item() / 0.21) < 5 / math.sqrt(len(a)), name


def test_every_hyperparameter_acts():
    base = {"lr": 0.05, "batch_size": 16, "hidden_size": 32, "num_layers": 2, "dropout": 0.1}
    changes = {"lr": 0.06, "batch_size": 32, "hidden_size": 64, "num_layers": 3, "dropout": 0.2}
    data = rs.prepare("two outputs")
    losses = [train([rs.Trial(0, 0, base)], data)[0]]
    losses += [train([rs.Trial(0, 0, base | {name: v})], data)[0] for name, v in changes.items()]
    assert len(set(losses)) == 6


def test_stacks_hold_each_trial_once_and_are_bounded():
    data, trials = rs.prepare("xor"), make_trials(300)
    stacks = rs.make_stacks(trials, data)
    assert sorted(t.number for stack in stacks for t in stack) == list(range(300))
    for stack in stacks:
        assert (
            len({(t.hyperparams["hidden_size"], t.hyperparams["num_layers"]) for t in stack}) == 1
        )
        weights = sum(p.numel() for p in rs.make_model(stack[0], data).parameters())
        assert len(stack) <= max(2, 2**21 / weights)
    sizes = [trial.hyperparams["batch_size"] for trial in max(stacks, key=len)]
    assert len(set(sizes)) == 4  # all are a full batch


def test_a_last_batch_of_one_row_joins_the_one_before(monkeypatch):
    monkeypatch.setitem(rs.TASKS, "odd", rs.Task(ROWS[:33], ROWS[:33, 0], F.mse_loss, None))
    data = rs.prepare("odd")
    stack = rs.stack_models(make_trials(2, batch_size=16, hidden_size=32, num_layers=1), data)
    steps = [x for x, _ in rs.batches(stack, data, 1)]
    assert [len(x[0]) for x in steps] == [16, 17]
    rows = torch.cat(steps, 1)
    assert not torch.equal(rows[0], rows[1])
    assert sorted(rows[0].tolist()) == sorted(rows[1].tolist()) == sorted(data.train[0].tolist())


def test_the_kept_model_takes_raw_rows_and_scores_what_the_search_did():
    for name, scale in [("regression", 1), ("two outputs", 1), ("huge", 1e20), ("tiny", 1e-27)]:
        x = ROWS[:, :1] * scale
        rs.TASKS.setdefault(name, rs.Task(x, 1e3 * ROWS[:, 0] ** 2 + 500, F.mse_loss))
        data, models = rs.prepare(name), []
        ((_, score),) = rs.train_and_evaluate(make_trials(1, lr=0.01), data, 20, models)
        task = rs.TASKS[name]
        order = np.random.default_rng(0).permutation(len(task.x))
        rows = order[: round(0.2 * len(order))] if name != "regression" else task.held_out
        y = torch.tensor(np.asarray(task.y)[rows]).reshape(-1, data.sizes[1]).float()
        raw = torch.tensor(np.asarray(task.x)[rows]).reshape(len(y), -1)
        assert F.mse_loss(models[0](raw).float(), y).item() == pytest.approx(1 / score, rel=1e-3)
        rs.TASKS.pop(name) if name in ("huge", "tiny") else None


# ---- The search and its log ---------------------------------------------------------------------


def negative_square(trials):
    for trial in trials:
        yield trial, -(trial.hyperparams["x"] ** 2)


def test_any_function_can_be_searched():
    best, *_ = trials = rs.random_search(negative_square, {"x": range(-9, 10)}, np.int64(99))
    assert best.hyperparams == {"x": 0}
    assert best.number == min(t.number for t in trials if t.hyperparams["x"] == 0)


@pytest.mark.parametrize(
    ("scores", "best"),
    [([1.0, 3.0, 2.0], 1), ([2.0, 3.0, 3.0], 1), ([math.nan, -5.0, -7.0], 1), ([math.inf, 1.0], 1)],
)
def test_the_best_is_the_highest_then_the_lowest_number_and_never_nan(scores, best):
    for order in (1, -1):

        def given(trials, order=order):
            return [(trial, scores[trial.number]) for trial in trials[::order]]

        found = rs.random_search(given, {"x": [0]}, len(scores))
        assert found[0].number == best
        assert sorted(t.number for t in found) == list(range(len(scores)))


def test_repeats_are_trials_of_their_own_and_stay_the_same(tmp_path):
    first = rs.search("xor", 12, 3, repeats=3, log=str(tmp_path / "log"))
    scores = [trial.repeats for trial in first[:5]]
    assert len(set(itertools.chain(*scores)) | {t.score for t in first[:5]}) == 20
    assert [t.repeats for t in first[5:]] == [[]] * 7
    again = rs.search("xor", 12, 3, repeats=3)
    assert [trial.repeats for trial in again[:5]] == scores


def rows_of(path, columns="number, repeat, score, hyperparams"):
    with contextlib.closing(sqlite3.connect(path)) as log:
        return sorted(log.execute(f"SELECT {columns} FROM trials"), key=str)


def test_the_log_resumes_only_what_is_missing(tmp_path, capsys):
    path, ran = str(tmp_path / "log"), []

    def score(trials):
        for trial in trials:
            ran.append(trial.number)
            yield trial, math.nan if trial.hyperparams["x"] == 0 else trial.hyperparams["x"] / 3

    space = {"x": range(5), "y": [None, "a", 0.1, nn.ReLU, (1, 2)]}
    first = rs.random_search(score, space, 20, log=path)
    again = rs.random_search(score, space, 30, log=path)
    assert ran == list(range(30))
    assert [t.score for t in numbered(again)[:20]] == pytest.approx(
        [t.score for t in numbered(first)], nan_ok=True
    )
    assert len(rows_of(path)) == 30
    assert None in [row[2] for row in rows_of(path)]
    rs.random_search(score, space | {"z": [1]}, 5, log=path)
    assert capsys.readouterr().err.strip().endswith("edited: space")
    rs.random_search(score, space, 5, log=path, seed=np.int64(1))
    assert capsys.readouterr().err.strip().endswith("edited: seed")
    assert len(rows_of(path)) == 40


def test_a_process_takes_its_share_first_and_then_what_is_left(tmp_path, monkeypatch):
    calls = []

    def score(trials):
        calls.append([trial.number for trial in trials])
        return [(trial, 1.0) for trial in trials]

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    rs.random_search(score, {"x": [0]}, 6, log=str(tmp_path / "log"))
    assert calls[0] == [1, 4]
    assert sorted(sum(calls, [])) == list(range(6))
    with pytest.raises(rs.InputError, match="log"):
        rs.random_search(score, {"x": [0]}, 6)


def test_a_partial_of_a_loss_is_known_again_and_by_its_arguments(tmp_path, capsys):
    for smoothing in (0.1, 0.1, 0.2):
        loss = partial(F.cross_entropy, label_smoothing=smoothing)
        rs.TASKS["smooth"] = rs.Task(ROWS, ROWS.argmax(1), loss)
        rs.search("smooth", 3, 1, log=str(tmp_path / "log"))
    rs.TASKS.pop("smooth")
    assert len(rows_of(tmp_path / "log")) == 6
    assert capsys.readouterr().err.strip().endswith("edited: loss")


def test_a_partial_of_a_train_function_is_known_again_and_by_its_arguments(tmp_path):
    def times(trials, factor):
        for trial in trials:
            yield trial, factor * trial.hyperparams["x"]

    for factor in (1, 1, 2):
        train = partial(times, factor=factor)
        (trial,) = rs.random_search(train, {"x": [3]}, 1, log=str(tmp_path / "log"))
        assert trial.score == 3 * factor
    assert len(rows_of(tmp_path / "log")) == 2


def test_a_function_in_the_space_is_known_by_what_it_encloses(tmp_path):
    def up_to(high):
        return lambda generator: generator.uniform(0, high)

    for high in (1.0, 1.0, 2.0):
        rs.random_search(negative_square, {"x": up_to(high)}, 3, log=str(tmp_path / "log"))
    assert len(rows_of(tmp_path / "log")) == 6


def test_a_resumed_search_is_not_told_as_new_whatever_its_settings(tmp_path, capsys):
    options = {"log": str(tmp_path / "log"), "threshold": math.nan}  # no equal of itself
    for _ in range(2):
        rs.random_search(negative_square, {"x": [1.0]}, 3, **options)
    assert capsys.readouterr().err == ""


def test_a_function_that_yields_nothing_is_an_error():
    with pytest.raises(rs.InputError, match="no score"):
        rs.random_search(lambda trials: [], {"x": [0]}, 1)


def test_no_search_mixes_with_another(tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "log")
    rs.search("regression", 4, 3, log=path)

    def build_model(inputs, outputs, hidden_size, num_layers, dropout):
        return nn.Sequential(
            nn.Linear(inputs, hidden_size), nn.Tanh(), nn.Linear(hidden_size, outputs)
        )

    monkeypatch.setattr(rs, "build_model", build_model)
    rs.search("regression", 4, 3, log=path)
    assert "build_model" in capsys.readouterr().err
    changed = rs.TASKS["regression"]._replace(x=rs.ARTICLE[0] ** 2)
    monkeypatch.setitem(rs.TASKS, "regression", changed)
    rs.search("regression", 4, 3, log=path)
    assert capsys.readouterr().err.strip().endswith("edited: rows")
    rs.search("regression", 4, 4, log=path)
    assert capsys.readouterr().err.strip().endswith("edited: epochs")
    rs.search("xor", 4, 3, log=path)
    rs.search("regression", 4, 3, log=path)
    assert capsys.readouterr().err == ""
    assert len(rows_of(path)) == 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The log of an uninterrupted search, and its output."""
    path = tmp_path_factory.mktemp("log") / "log"
    run = command("--trials", 40, "--epochs", 100, "--log", path)
    assert run.returncode == 0, run.stderr
    return rows_of(path), run.stdout


def test_a_killed_search_resumes_to_the_same_rows(whole, tmp_path):
    path, moments, killed = tmp_path / "log", random.Random(5), 0
    for _ in range(4):
        try:  # run() kills by SIGKILL
            command("--trials", 40, "--epochs", 100, "--log", path, timeout=moments.uniform(1, 2))
        except subprocess.TimeoutExpired:
            killed += 1
    assert killed
    run = command("--trials", 40, "--epochs", 100, "--log", path)
    assert (rows_of(path), run.stdout) == whole


def test_two_processes_are_one(whole, tmp_path):
    path = tmp_path / "log"
    program = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--",
    )
    run = command("--trials", 40, "--epochs", 100, "--log", path, program=program)
    assert run.returncode == 0, run.stderr
    assert (rows_of(path), run.stdout) == whole


def test_what_a_failing_trial_leaves_is_told_and_in_the_log(tmp_path, capsys):
    def fails(trials):
        for trial in trials:
            yield trial, [0, 1, 2, 3][trial.number]  # a score of 0 has no loss to report

    with pytest.raises(IndexError):
        rs.random_search(fails, {"x": [0]}, 9, log=str(tmp_path / "log"))
    assert len(rows_of(tmp_path / "log")) == 4
    assert "0 of 4 trials diverged" in capsys.readouterr().err


def test_progress_counts_what_is_finished_and_goes(monkeypatch, capsys):
    def slow(trials):
        for trial in trials:
            clock[0] += 0.3
            yield trial, float(trial.number)

    clock = [0.0]
    monkeypatch.setattr(rs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    rs.random_search(slow, {"x": [0]}, 5)
    first, second, last, end = capsys.readouterr().err.split("\r")
    assert first.strip() == "2 of 5 trials, best score 1, 3.3 a second, 1 s left"
    assert second.startswith("4 of 5 trials, best score 3")
    assert (last.strip(), end) == ("", "")


def test_a_reader_that_leaves_early_costs_nothing():
    line = f"{sys.executable} {SCRIPT} --trials 3 --epochs 2 | head -0"
    run = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (0, b"")


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk is full"), BrokenPipeError()])
def test_an_error_half_way_is_neither_lost_nor_longer_than_a_line(error, monkeypatch, capsys):
    def fails(trials, data, epochs):
        yield trials[0], 1.0
        raise error

    monkeypatch.setattr(rs, "train_and_evaluate", fails)
    if isinstance(error, BrokenPipeError):  # of the reader's own training, not of the report
        with pytest.raises(BrokenPipeError):
            call(monkeypatch, capsys, "--trials", 2)
    else:
        status, out, err = call(monkeypatch, capsys, "--trials", 2)
        assert (status, out, len(err.splitlines())) == (2, "", 1)


def open_together(barrier, paths, errors):
    for path in paths:
        barrier.wait()
        try:
            rs.open_log(path, {"task": "t"})[0].close()
        except Exception as error:
            errors.put(repr(error))


def test_processes_may_make_the_log_together(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, errors = context.Barrier(4), context.Queue()
    paths = [str(tmp_path / f"log{number}") for number in range(60)]
    arguments = (barrier, paths, errors)
    processes = [context.Process(target=open_together, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert errors.empty()


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"x" * 99])
def test_a_file_that_is_no_log_is_refused_and_left_alone(content, tmp_path, monkeypatch, capsys):
    path = tmp_path / "log"
    path.write_bytes(content)
    status, out, err = call(monkeypatch, capsys, "--trials", 2, "--log", path)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert path.read_bytes() == content
    other = tmp_path / "other"
    with contextlib.closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE mine (a)")
    before = other.read_bytes()
    assert call(monkeypatch, capsys, "--trials", 2, "--log", other)[0] == 2
    assert other.read_bytes() == before


# ---- Bad input ----------------------------------------------------------------------------------

X = np.arange(20.0).reshape(10, 2)


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (rs.Task(X, np.zeros(9), F.mse_loss), "10 rows, y has 9"),
        (rs.Task([[1.0], [1.0, 2.0]], np.zeros(2), F.mse_loss), "shape"),
        (rs.Task(np.where(X == 3, math.nan, X), np.zeros(10), F.mse_loss), "finite"),
        (rs.Task(X, np.full(10, math.inf), F.mse_loss), "finite"),
        (rs.Task(X * 1e300, np.zeros(10), F.mse_loss), "finite"),
        (rs.Task([["a"]] * 10, np.zeros(10), F.mse_loss), "numbers"),
        (rs.Task(X, np.arange(10.0), F.mse_loss, held_out=[]), "held_out"),
        (rs.Task(X, np.arange(10.0), F.mse_loss, held_out=slice(None)), "held_out"),
        (rs.Task(X, np.arange(10.0), lambda o, y: F.cross_entropy(o, y)), "depend"),
        (rs.Task(X, np.zeros(10, int), F.cross_entropy), "depend"),
        (rs.Task(X, np.eye(10, dtype=int), F.cross_entropy), "shape"),
        (rs.Task(X, np.arange(10) % 3, F.nll_loss), "below 0"),
    ],
)
def test_bad_rows_are_one_line(task, problem, monkeypatch, capsys):
    monkeypatch.setitem(rs.TASKS, "mine", task)
    status, out, err = call(monkeypatch, capsys, "--task", "mine", "--trials", 2, "--epochs", 1)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert problem in err


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_numbers_of_any_kind_are_the_same(loss, monkeypatch):
    trials, scores = make_trials(2), []
    for kind in (bool, int, float, np.float32):
        monkeypatch.setitem(rs.TASKS, "mine", rs.Task(ROWS, (ROWS[:, 0] > 0).astype(kind), loss))
        scores.append(train(trials, rs.prepare("mine")))
    assert scores[0] == scores[1] == scores[2] == scores[3]


@pytest.mark.parametrize(
    "y",
    [
        (ROWS[:, 0] > 0),
        (ROWS[:, 0] > 0).astype(float),
        (ROWS[:, :1] > 0),
        np.where(ROWS[:, 0] > 0, "yes", "no"),
        torch.tensor(ROWS[:, 0] > 0),
        np.where(ROWS[:, 0] > 0, "yes", np.array(None)),
        [bool(value > 0) for value in ROWS[:, 0]],
    ],
)
def test_labels_of_any_kind_are_the_same(y, monkeypatch):
    monkeypatch.setitem(rs.TASKS, "mine", rs.Task(ROWS, y, F.cross_entropy))
    monkeypatch.setitem(rs.TASKS, "whole", rs.Task(ROWS, (ROWS[:, 0] > 0) * 1, F.cross_entropy))
    trials = make_trials(2)
    assert train(trials, rs.prepare("mine")) == train(trials, rs.prepare("whole"))


def test_numbers_are_standardised_by_the_training_rows_and_constants_stay(monkeypatch):
    x = np.stack([ROWS[:, 0] * 9 + 3, np.where(np.arange(90) % 2, 0.3, 0.1 + 0.2)], 1)
    x[80:] = [1000, 0.5]
    task = rs.Task(torch.tensor(x, requires_grad=True), ROWS[:, 1] * 7, F.mse_loss, range(80, 90))
    monkeypatch.setitem(rs.TASKS, "mine", task)
    data = rs.prepare("mine")
    assert data.train[0][:, 0].mean().item() == pytest.approx(0, abs=1e-6)
    assert data.train[0][:, 0].std(correction=0).item() == pytest.approx(1)
    assert data.train[1].std(correction=0).item() == pytest.approx(1)
    assert data.scored[0][:, 1].tolist() == [0.5] * 10
    assert data.scored[1].flatten().tolist() == pytest.approx(ROWS[80:, 1] * 7)


def test_targets_of_0_and_1_stay():
    assert rs.prepare("binary").train[1].unique().tolist() == [0, 1]


def test_a_class_that_training_never_sees_is_told(monkeypatch, capsys):
    task = rs.Task(ROWS[:50], np.arange(50) % 5, F.cross_entropy, slice(4, None, 5))
    monkeypatch.setitem(rs.TASKS, "mine", task)
    rs.prepare("mine")
    assert "only in the rows to score" in capsys.readouterr().err
    monkeypatch.setitem(rs.TASKS, "mine", task._replace(held_out=0.2))
    rs.prepare("mine")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": []}, "lr"),
        ({"lr": 0.1}, "lr"),
        ({"lr": {0.1, 0.2}}, "lr"),
        ({"lr": "fast"}, "lr"),
        ({"momentum": [0.9]}, "momentum"),
        ({"hidden_size": None}, "hidden_size"),
        ({"lr": None}, "lr"),
        ({"batch_size": None}, "batch_size"),
        ({"batch_size": [2.5]}, "batch_size"),
        ({"batch_size": [0]}, "batch_size"),
        ({"inputs": [2]}, "inputs"),
    ],
)
def test_a_bad_space_is_one_line_that_names_the_key(change, named, monkeypatch, capsys):
    space = {name: v for name, v in (rs.HYPERPARAMS | change).items() if v is not None}
    monkeypatch.setattr(rs, "HYPERPARAMS", space)
    monkeypatch.setattr(rs, "stack_models", lambda *_: pytest.fail("it trained"))
    status, out, err = call(monkeypatch, capsys, "--trials", 3)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert named in err


@pytest.mark.parametrize("layer", [nn.LSTM(3, 3), nn.AlphaDropout(0.5)])
def test_a_layer_that_does_not_stack_is_named_before_training(layer, monkeypatch):
    class Net(nn.Module):
        def __init__(self, outputs):
            super().__init__()
            self.layer, self.last = layer, nn.Linear(3, outputs)

        def forward(self, x):
            x = self.layer(x)
            return self.last(x[0] if isinstance(x, tuple) else x)

    monkeypatch.setattr(rs, "build_model", lambda inputs, outputs, **_: Net(outputs))
    monkeypatch.setattr(rs, "update", lambda *_, lr: pytest.fail("it trained"))
    with pytest.raises(rs.InputError, match=type(layer).__name__):
        train(make_trials(3), rs.prepare("three classes"))


def test_outputs_of_another_shape_are_refused_with_both_shapes(monkeypatch):
    for last in (nn.Flatten(0), nn.Linear(1, 5)):
        model = nn.Sequential(nn.Linear(3, 1), last)
        monkeypatch.setattr(rs, "build_model", lambda inputs, outputs, model=model, **_: model)
        with pytest.raises(rs.InputError, match=r"outputs have shape .*targets \(16, 1\)"):
            train(make_trials(2, batch_size=16), rs.prepare("binary"))


def test_an_error_of_the_readers_own_keeps_its_place(monkeypatch):
    def build_model(inputs, outputs, **_):
        inputs.a, inputs.b = 1, 2, 3

    monkeypatch.setattr(rs, "build_model", build_model)
    with pytest.raises(ValueError, match="unpack") as caught:
        train(make_trials(2), rs.prepare("xor"))
    assert caught.traceback[-1].name == "build_model"
    assert not isinstance(caught.value, rs.InputError)


def test_divergence_of_one_trial_leaves_the_others_alone():
    data, trials = rs.prepare("two outputs"), make_trials(3, hidden_size=64, num_layers=3)
    trials[0].hyperparams["lr"] = 1e9
    scores = train(trials, data, 10)
    assert scores[0] == "nan"
    assert scores[1:] == train(trials[1:], data, 10)


def test_a_loss_of_0_has_a_finite_score_and_none_that_is_not_finite_has(monkeypatch):
    monkeypatch.setattr(rs, "evaluate", lambda stack, data: [0.0, 0.5, math.inf, math.nan])
    scores = train(make_trials(4, hidden_size=32, num_layers=1), rs.prepare("xor"), 1)
    assert scores == [(1e12).hex(), (2.0).hex(), "nan", "nan"]


def test_torch_defaults_of_the_reader_work():
    torch.set_default_dtype(torch.float64)
    try:
        same_as_plain(make_trials(2, batch_size=16), rs.prepare("three classes"), 2)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- The command line and the README ------------------------------------------------------------


@pytest.mark.parametrize("name", ["xor", "regression"])
def test_the_command_line_end_to_end(name, tmp_path, monkeypatch, capsys):
    path = tmp_path / "best.pt"
    options = ["--task", name, "--trials", 40, "--epochs", 300, "--save", path]
    status, out, err = call(monkeypatch, capsys, *options)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    best = eval(lines[-1], {})
    number, _, loss = lines[1].split()[:3]
    assert best == rs.sample_hyperparams(rs.HYPERPARAMS, 0, int(number))
    assert float(loss) < {"xor": 0.05, "regression": 0.0785}[name]
    model = rs.load_model(path)
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    if name == "xor":
        assert model(x).argmax(1).tolist() == [0, 1, 1, 0]
    status, out, _ = call(monkeypatch, capsys, *options[:2], "--epochs", 300, "--trial", number)
    assert eval(out.splitlines()[-1], {}) == best
    assert out.splitlines()[1].split()[2] == loss


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trials", "0"], "trials"),
        (["--trials", "many"], "--trials"),
        (["--epochs", "0"], "epochs"),
        (["--seed", "-1"], "seed"),
        (["--trial", "-1"], "trial"),
        (["--task", "sudoku"], "--task"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
        (["--log", "/no/such/folder/log"], "log"),
        (["--log", ""], "log"),
        (["--save", "/no/such/folder/best.pt"], "save"),
        (["--tri", "1"], "--tri"),
    ],
)
def test_bad_arguments_are_told_before_any_work(arguments, named, monkeypatch, capsys):
    monkeypatch.setattr(rs, "stack_models", lambda *_: pytest.fail("it trained"))
    status, out, err = call(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert named in err.splitlines()[-1]


def test_only_a_clear_gain_of_the_repeats_is_told(capsys):
    trials = [rs.Trial(n, 0, {}, score=1 / (1 + n), seconds=1.0) for n in range(4)]
    losses = [[0.9, 1.0, 1.1], [0.8, 0.9, 1.0], [0.1, 0.2, 0.3], [0.1]]
    for trial, own in zip(trials, losses, strict=True):
        trial.repeats = [1 / loss for loss in own]
    rs.report(trials)
    told = [line for line in capsys.readouterr().out.splitlines() if "better" in line]
    assert told == ["trial 2 is better on average, by 0.8: the best had luck"]


def test_all_diverged_is_status_1(monkeypatch, capsys):
    monkeypatch.setitem(rs.HYPERPARAMS, "lr", [1e30])
    status, out, _ = call(monkeypatch, capsys, "--task", "regression", "--trials", 3, "--epochs", 9)
    assert (status, "3 of 3 trials diverged" in out) == (1, True)


def test_ctrl_c_reports_what_is_finished(tmp_path):
    path = tmp_path / "log"
    line = [sys.executable, str(SCRIPT), "--trials", "3000", "--log", str(path)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finished = []
    while not finished:
        with contextlib.suppress(sqlite3.OperationalError):  # until the log has its tables
            finished = rows_of(path) if path.exists() else []
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "trials diverged" in err
    assert out == ""


def test_it_runs_without_the_modules_that_windows_lacks():
    code = "import sys\nfor m in ('fcntl', 'pty', 'resource', 'termios'): sys.modules[m] = None\n"
    code += f"sys.path.insert(0, {str(HERE)!r})\nimport random_search as rs\nrs.search('xor', 2, 2)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


README = (HERE / "README.md").read_text(encoding="utf-8")
README_CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the log and the model that the README speaks of."""
    path = tmp_path_factory.mktemp("readme")
    options = ["--trials", 4, "--epochs", 3, "--repeats", 0]
    run = command(*options, "--log", path / "trials.db", "--save", path / "best.pt")
    assert run.returncode == 0, run.stderr
    return path


def output_of(code, folder):
    (folder / "mine.py").write_text(code, encoding="utf-8")
    options = {"cwd": folder, "env": os.environ | {"PYTHONPATH": str(HERE)}, "check": False}
    run = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True, **options)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("code", README_CODE)
def test_the_code_of_the_readme_runs_as_written(code, folder):
    output_of(code, folder)


def test_the_statistics_of_the_readme_are_right(folder, tmp_path):
    def train_and_evaluate(trials):
        for trial in trials:
            yield trial, trial.hyperparams["acts"] or math.nan

    space = {"acts": [0, 1, 2, 3], "idle": [1, 2], "any": ["a", None, (1, 2)]}
    trials = rs.random_search(train_and_evaluate, space, 64, log=str(tmp_path / "trials.db"))
    (tmp_path / "best.pt").write_bytes((folder / "best.pt").read_bytes())
    (code,) = [code for code in README_CODE if "variation in rank" in code]
    out = output_of(code, tmp_path)
    assert "acts: 100% of the variation in rank, best from 3 to 3\n" in out
    share = re.search(r"idle: (\d+)% of the variation in rank, best from 1 to 2\n", out)
    assert int(share[1]) < 10  # 1 / 63 is expected by chance
    assert re.search(r"any: \d+% of the variation in rank, best from None to a\n", out)
    scores = [trial.hyperparams["acts"] for trial in trials]
    pairs = [max(pair) for pair in itertools.combinations(scores, 2)]
    assert f"expected best of 1 trials: {np.mean(scores):.4g}\n" in out
    assert f"expected best of 2 trials: {np.mean(pairs):.4g}\n" in out
    assert "expected best of 64 trials: 3\n" in out


def test_the_readme_names_the_options_that_exist():
    options = set(re.findall(r"--[a-z]+", command("--help").stdout)) - {"--help"}
    for line in re.findall(r"^    .*random_search\.py (.*)$", README, re.MULTILINE):
        assert set(re.findall(r"--[a-z]+", line)) <= options
    assert len(README.splitlines()) <= 200
