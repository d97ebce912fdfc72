"""Tests of random_search.py by what it promises: plain PyTorch is the oracle."""

import contextlib
import functools
import io
import itertools
import json
import math
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

import random_search as rs

HERE = Path(__file__).parent
X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
CLASSES = X[:, :3].argmax(1)
FLOATS = X[:, :1] * X[:, 1:2]
SPACE = {"lr": [0.02, 0.05], "batch_size": [20, 45], "hidden_size": [3, 8]}


def make_task(build_model, loss=F.cross_entropy, y=CLASSES, x=X, **options) -> rs.Task:
    return rs.Task(x[:45], y[:45], x[45:], y[45:], build_model, loss, **options)


def net(hidden_size, outputs=3, dropout=0.0, num_layers=1) -> nn.Module:
    return rs.mlp(6, outputs, hidden_size, num_layers, dropout)


TASK = make_task(net)
ONE = make_task(functools.partial(net, outputs=1), F.mse_loss, FLOATS)


def sample(space, numbers, seed=0) -> list[rs.Trial]:
    return [rs.Trial(n, rs.sample_hyperparams(space, seed, n), seed) for n in numbers]


def run(task, trials, epochs=2) -> dict:
    """The trials' scores as text: exact, and NaN is equal to NaN."""
    scored = rs.train_and_evaluate(trials, task, epochs)
    return {(trial.number, trial.repeat): repr(score) for trial, score in scored}


# ---- Reproducibility and best-score tracking ----------------------------------------------------


def test_a_search_is_reproducible_and_its_first_trials_are_a_smaller_search():
    search = functools.partial(rs.random_search, rs.regression(), epochs=60, seed=5)
    every = search(trials=150)
    assert every == search(trials=150) != search(trials=150, seed=6)
    for numbers in (10, [np.int64(5), 5], range(5, 150, 16)):
        chosen = range(numbers) if numbers == 10 else numbers
        assert search(trials=numbers) == [trial for trial in every if trial.number in chosen]


def test_the_best_score_is_tracked_and_comes_first():
    found = rs.random_search(lambda hyperparams: -hyperparams["lr"], rs.HYPERPARAMS, 50)
    best = -math.inf
    for trial in sorted(found, key=lambda trial: trial.number):
        best = max(best, -trial.hyperparams["lr"])
    assert found[0].score == best
    assert [t.score for t in found] == sorted((t.score for t in found), reverse=True)


def test_the_finals_decide_by_the_mean_of_repeats():
    plain = rs.random_search(lambda hyperparams: -hyperparams["lr"], rs.HYPERPARAMS, 20)
    calls = []

    def lucky(hyperparams):  # in its first run the worst trial is the best
        calls.append(hyperparams)
        is_luck = hyperparams == plain[-1].hyperparams and calls.count(hyperparams) == 1
        return 1.0 if is_luck else -hyperparams["lr"]

    found = rs.random_search(lucky, rs.HYPERPARAMS, 20, repeats=3)
    numbers = [trial.number for trial in plain]
    assert [t.number for t in found] == [*numbers[:4], numbers[-1], *numbers[4:-1]]
    assert [len(t.repeats) for t in found] == [3] * 5 + [0] * 15


# ---- Many trials at once ------------------------------------------------------------------------


def any_order(hidden_size, dropout):
    first = nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, hidden_size), nn.Linear(hidden_size, 5)
    last = nn.ReLU(True), nn.Tanh(), nn.Dropout(dropout), nn.Tanh(), nn.Linear(5, 3), nn.Tanh()
    return nn.Sequential(*first, *last)


def changing(outputs, y):
    return outputs.mul_(2).sub_(y.add_(1)).square_().mean()


IGNORED = torch.where(torch.arange(60) % 5 == 0, -100, CLASSES)
SOFT = F.one_hot(CLASSES).float() * 0.9 + 0.2 / 3  # whose sum is not 1
ADAM = {"weight_decay": [0.0, 0.1], "lr": [0.001, 0.01]}
STACKED = {  # a task, and what its space has besides
    "deep": (TASK, {"num_layers": [1, 2, 4]}),
    "any order": (make_task(any_order), {}),
    "sgd": (TASK, {"momentum": [0.0, 0.5, 0.9], "weight_decay": [0.0, 0.1]}),
    "partial": (TASK._replace(optimizer=functools.partial(optim.SGD, momentum=0.9)), {}),
    "adam": (TASK._replace(optimizer=optim.Adam), ADAM),
    "adamw": (TASK._replace(optimizer=optim.AdamW), ADAM),
    "adamw's own decay": (TASK._replace(optimizer=optim.AdamW), {"lr": [0.001, 0.01]}),
    "epochs": (TASK, {"epochs": [3, 7]}),
    "a batch of one": (TASK, {"batch_size": [1], "epochs": [1]}),
    "one output": (ONE, {}),
    "three outputs": (make_task(net, F.mse_loss, X[:, 3:]), {}),
    "huber": (ONE._replace(loss=F.huber_loss), {}),
    "binary": (make_task(ONE.build_model, nn.BCEWithLogitsLoss(), (FLOATS > 0).float()), {}),
    "poisson": (make_task(ONE.build_model, F.poisson_nll_loss, FLOATS.abs().round()), {}),
    "class weights": (TASK._replace(loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]))), {}),
    "ignored classes": (make_task(net, y=IGNORED), {}),
    "smooth": (TASK._replace(loss=functools.partial(F.cross_entropy, label_smoothing=0.1)), {}),
    "soft targets": (make_task(net, y=SOFT), {}),
    "a sum": (TASK._replace(loss=lambda outputs, y: outputs.sum()), {}),
    "what it changes": (ONE._replace(loss=changing), {}),
}


@pytest.mark.parametrize("name", STACKED)
def test_the_stack_does_as_the_loop_and_has_the_same_bits_in_any_company(name):
    task, others = STACKED[name]
    trials = sample(SPACE | {"dropout": [0.0, 1.0]} | others, range(12))
    assert all(rs.structure(trial, rs.make_model(trial, task), task) for trial in trials)
    together = run(task, trials, 7)
    for trial, score in run(task._replace(stack=False), trials, 7).items():
        assert float(together[trial]) == pytest.approx(float(score), rel=1e-4)
    sizes = {"batch_size": [7, 33], "hidden_size": [1, 3, 7, 30, 100], "dropout": [0.0, 0.3]}
    trials = sample(SPACE | sizes | others, range(12))
    trials += [rs.replace(trial, repeat=2) for trial in trials[:3]]
    every = run(task, trials)
    assert every == run(task, trials[::-1])
    for company in [*zip(trials[::2], strict=True), trials[:3], trials[3:6], trials[10:14]]:
        assert run(task, company).items() <= every.items()


def test_dropout_in_a_stack_is_dropout():
    """By Kolmogorov and Smirnov's distance of 300 losses: chance passes 0.133 once in 100."""
    trials = sample(
        {"lr": [0.3], "batch_size": [15], "hidden_size": [16], "dropout": [0.5]}, range(300)
    )
    losses = [sorted(map(float, run(t, trials, 5).values())) for t in (TASK, ALONE["stack=False"])]
    shares = [np.searchsorted(own, sum(losses, []), side="right") / 300 for own in losses]
    assert abs(shares[0] - shares[1]).max() < 0.133


# ---- What trains alone --------------------------------------------------------------------------


def changed(change, hidden_size):
    model = net(hidden_size).extend([nn.Linear(3, 3), nn.Linear(3, 3)])
    change(model)
    return model


def wrapped(layer, width=6):
    return nn.Sequential(nn.Unflatten(1, (1, 6)), layer, nn.Flatten(), nn.Linear(width, 3))


CHANGES = {
    "another layer": lambda m: m.append(nn.Sigmoid()),
    "batch norm": lambda m: m.append(nn.BatchNorm1d(3)),
    "a layer twice": lambda m: m.append(m[-1]),
    "tied": lambda m: setattr(m[-1], "weight", m[-2].weight),
    "one memory": lambda m: setattr(m[-1].weight, "data", m[-2].weight.data),
    "frozen": lambda m: m[0].weight.requires_grad_(False),
    "a subclass": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
    "no bias": lambda m: m.append(nn.Linear(3, 3, bias=False)),
    "in eval mode": lambda m: m.append(nn.Dropout(0.5).eval()),
    "another forward": lambda m: setattr(m[1], "forward", lambda x, f=m[1].forward: f(2 * x)),
    "another forward of all": lambda m: setattr(m, "forward", lambda x, f=m.forward: f(2 * x)),
    "forward hook": lambda m: m[0].register_forward_hook(lambda layer, x, y: y / 2),
    "hook of all": lambda m: m.register_forward_hook(lambda layer, x, y: y / 2),
    "pre-hook": lambda m: m[0].register_forward_pre_hook(lambda layer, x: x[0] / 2),
    "backward hook": lambda m: m[1].register_full_backward_hook(lambda layer, x, y: (x[0] / 2,)),
    "backward pre-hook": lambda m: m[1].register_full_backward_pre_hook(lambda m, y: (y[0] / 2,)),
    "of a gradient": lambda m: m[0].weight.register_hook(lambda gradient: gradient / 2),
    "after a gradient": lambda m: m[0].weight.register_post_accumulate_grad_hook(lambda p: None),
}
ALONE = {name: make_task(functools.partial(changed, change)) for name, change in CHANGES.items()}
ALONE |= {
    "stack=False": TASK._replace(stack=False),
    "another optimizer": TASK._replace(optimizer=optim.RMSprop),
    "a function": TASK._replace(optimizer=lambda parameters, lr: optim.SGD(parameters, lr)),
    "an argument": TASK._replace(optimizer=functools.partial(optim.Adam, amsgrad=True)),
    "a tensor": TASK._replace(optimizer=functools.partial(optim.SGD, momentum=X[0, 0].abs())),
    "float64": make_task(lambda hidden_size: net(hidden_size).double(), x=X.double()),
    "more dimensions": make_task(net, F.mse_loss, X[:, None, 3:], X[:, None]),
    "a subclass of all": make_task(lambda: type("Own", (nn.Sequential,), {})(nn.Linear(6, 3))),
    "convolutions": make_task(lambda hidden_size: wrapped(nn.Conv1d(1, 2, 3), 8)),
    "a module": make_task(lambda: nn.Linear(6, 3)),
    "gru": make_task(lambda: nn.Sequential(nn.GRUCell(6, 8), nn.Linear(8, 3))),
    "transformer": make_task(lambda: wrapped(nn.TransformerEncoderLayer(6, 2, batch_first=True))),
}


def by_hand(trial, task, settings, epochs=2) -> str:
    """The score of a trial, in plain PyTorch."""
    model = rs.make_model(trial, task)
    optimizer = task.optimizer(model.parameters(), **settings)
    rs.seed_everything(rs.DROPOUT, trial.seed, trial.repeat)
    order = np.random.default_rng([rs.ORDER, trial.seed, trial.repeat])
    for _ in range(epochs):
        for rows in torch.from_numpy(order.permutation(45)).split(trial.hyperparams["batch_size"]):
            optimizer.zero_grad()
            task.loss(model(task.train_x[rows]), task.train_y[rows]).backward()
            optimizer.step()
    return repr(-task.loss(model.eval()(task.valid_x), task.valid_y).item())


def check_alone(task, **settings):
    space = {name: [value] for name, value in settings.items()}
    for trial in sample(SPACE | {"dropout": [0.3]} | space, range(3), seed=9):
        assert rs.structure(trial, rs.make_model(trial, task), task) is None
        settings["lr"] = trial.hyperparams["lr"]
        assert run(task, [trial]) == {(trial.number, 0): by_hand(trial, task, settings)}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_known_trains_alone_and_is_right(name):
    check_alone(ALONE[name])


def test_an_argument_of_the_space_or_a_hook_of_all_modules_trains_alone():
    check_alone(TASK._replace(optimizer=optim.Adam), betas=(0.5, 0.9))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        run(TASK, sample(SPACE | {"lr": [-0.1]}, range(3)))
    hook = nn.modules.module.register_module_forward_hook(lambda module, x, y: y / 2)
    with contextlib.closing(types.SimpleNamespace(close=hook.remove)):
        check_alone(TASK)


@pytest.mark.parametrize("name", rs.TASKS)
def test_section_4_can_be_deleted(name):
    text = Path(rs.__file__).read_text()
    names = {"__name__": "shorter"}
    stub = "structure = lambda trial, model, task: None\n"
    exec(text.partition("# ==== 4.")[0] + stub + text[text.index("# ==== 5.") :], names)
    found = names["random_search"](names["TASKS"][name](), trials=3, epochs=20, repeats=1)
    loops = rs.random_search(rs.TASKS[name]()._replace(stack=False), trials=3, epochs=20, repeats=1)
    assert [vars(trial) for trial in found] == [vars(trial) for trial in loops]


# ---- A trial and the space ----------------------------------------------------------------------


def test_a_sample_is_a_function_of_seed_and_number():
    space = rs.HYPERPARAMS | {"x": lambda generator: generator.uniform(), "n": [1, 0.1]}
    samples = [rs.sample_hyperparams(space, 3, n) for n in range(500)]
    assert samples[7] == rs.sample_hyperparams(space, 3, 7) != rs.sample_hyperparams(space, 4, 7)
    assert [{type(own[name]) for own in samples} for name in "nx"] == [{int, float}, {float}]
    counts = [sum(own["batch_size"] == size for own in samples) for size in (16, 32, 64, 128)]
    assert min(counts) > 90  # of 125: 3.6 standard deviations
    assert len({own["lr"] for own in samples}) > 90 and all(len(str(s["lr"])) < 6 for s in samples)


def test_hyperparameters_depend_on_each_other_and_go_to_those_that_take_them():
    def space(generator):
        both = int(generator.choice([2, 4]))
        return {"both": both, "widths": [6, 3 * both], "lr": 0.1, "batch_size": 9, "epochs": 2}

    def build_model(both, widths):
        widths.append(3)  # to a copy
        return nn.Sequential(nn.Linear(6, 3 * both), nn.Linear(*widths[1:]))

    def optimizer(parameters, **settings):
        assert settings.keys() == {"both", "widths", "lr"}
        return optim.SGD(parameters, settings["lr"])

    found = rs.random_search(make_task(build_model, optimizer=optimizer), space, 9, 1)
    assert {trial.hyperparams["both"] for trial in found} == {2, 4}


def test_ones_own_random_numbers_go_on_and_threads_search_in_turn():
    def draw(hyperparams=None):
        return random.random() + np.random.random() + torch.rand(1).item()

    found = []
    rs.seed_everything(1)
    before = draw()
    rs.seed_everything(1)
    search = functools.partial(rs.random_search, draw, {}, 3, repeats=2)
    threads = [threading.Thread(target=lambda: found.append(search())) for _ in range(3)]
    for step in (threading.Thread.start, threading.Thread.join):
        [*map(step, threads)]
    assert draw() == before
    assert found[0] == found[1] == found[2] and found[0][0].score not in found[0][0].repeats


def test_scores_of_any_type_and_those_that_are_none(capsys):
    for kind in (np.float32, torch.tensor, np.array, lambda own: torch.tensor([own]), int):
        (trial,) = rs.random_search(lambda own, kind=kind: kind(0.5), {}, 1)
        assert trial.score == float(kind(0.5))
    bad = itertools.cycle([math.nan, -math.inf, math.inf, 0.5])
    found = rs.random_search(lambda hyperparams: next(bad), {}, 8)
    assert [trial.score for trial in found[:4]] == [math.inf] * 2 + [0.5] * 2
    rs.report(found)
    rs.report(rs.random_search(make_task(net, x=X * math.nan, score=fails), SPACE, 3, 1))
    told = re.findall("the score of (.*)\n", capsys.readouterr().out)
    assert told == [
        "4 of 8 trials is NaN",
        "3 of 3 trials is NaN; standardise the rows or lower lr",
    ]


def test_models_are_evaluated_in_batches_and_train_again_on_other_rows():
    x = torch.randn(2100, 6, generator=torch.Generator().manual_seed(0))
    sizes = []
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3))
    model.register_forward_hook(lambda layer, x, y: sizes.append(len(y)))
    task = TASK._replace(valid_x=x, valid_y=x[:, :3].argmax(1))
    rs.evaluate(model, task)
    assert sizes == [1024, 1024, 52] and (x < 0).any()
    best, *_ = rs.random_search(task, SPACE, 2, 2)
    _, model = next(rs.train([best], task._replace(train_x=x, train_y=task.valid_y), 2))
    assert type(model) is nn.Sequential and rs.evaluate(model, task) > best.score


# ---- Bad input, and errors of the reader's own --------------------------------------------------


def fails(*_):
    raise OSError("of the reader's own")


def given(message, space=(), task=TASK, **options):
    return message, {"task": task, "space": SPACE | dict(space), "trials": 3} | options


LAST = net(3)
FLAT = make_task(lambda hidden_size: net(3, 1).append(nn.Flatten(0)), F.mse_loss, FLOATS)
OUTPUTS = r"outputs \['rows', 1\] and y \['rows'\] would"
BAD = [
    *(given("trials, epochs", trials=own) for own in (0, [], [0.5])),
    *(given("trials, epochs", epochs=own) for own in (0, -1, 2.0)),
    *(given("seed, repeats", **own) for own in ({"seed": -1}, {"repeats": 2.0})),
    *(given("lr must be a list .* function for a range", {"lr": own}) for own in ((0.1, 1.0), [])),
    given("draw from the generator alone", {"lr": lambda generator: random.random()}),
    *(given("batch_size, epochs", {"batch_size": [own]}) for own in (0, 16.0)),
    given("batch_size, epochs", {"epochs": [0]}),
    given("'width'.* not of build_model, optimizer", {"width": [3]}),
    given("higher is better", task=TASK._replace(score=F.cross_entropy)),
    given("new parameters each", task=make_task(lambda hidden_size: nn.Sequential(LAST))),
    given("45 rows and y 9", task=TASK._replace(train_y=CLASSES[:9])),
    *(given(OUTPUTS, task=make_task(ONE.build_model, y=own)) for own in (CLASSES, FLOATS[:, 0])),
    given(OUTPUTS, task=ONE._replace(valid_y=CLASSES[45:])),
    given(r"outputs \['rows'\] and y \['rows', 1\] would", task=FLAT),
]


@pytest.mark.parametrize("message, options", BAD)
def test_bad_input_is_one_line_before_training(message, options, monkeypatch):
    monkeypatch.setattr(rs, "run", None)  # so that training would fail
    with pytest.raises(rs.InputError, match=message) as error:
        rs.random_search(**options)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError):
        rs.random_search(**options, repeat=5)


FAILING = {
    "build_model": make_task(lambda hidden_size: fails() if hidden_size == 8 else net(3)),
    "forward": make_task(functools.partial(changed, lambda m: setattr(m, "forward", fails))),
    "loss": TASK._replace(loss=lambda outputs, y: fails() if outputs.max() > 1 else outputs.mean()),
    "score": TASK._replace(score=fails),
    "optimizer": TASK._replace(optimizer=lambda parameters, lr: fails()),
}


@pytest.mark.parametrize("part", FAILING)
def test_an_error_of_the_readers_own_keeps_its_traceback_and_names_the_trial(part):
    with pytest.raises(OSError, match="of the reader's own") as error:
        rs.random_search(FAILING[part], SPACE, 20, 2)
    (note,) = error.value.__notes__
    number = int(re.match(r"in trial (\d+): ", note)[1])
    assert error.traceback[-1].name == "fails"
    assert note.endswith(str(rs.sample_hyperparams(SPACE, 0, number)))
    assert part != "build_model" or "'hidden_size': 8" in note


# ---- The log ------------------------------------------------------------------------------------


def rows(log, columns="number, repeat, score, hyperparams") -> list[tuple]:
    with contextlib.closing(sqlite3.connect(log)) as database:
        return database.execute(f"SELECT {columns} FROM trials ORDER BY 1, 2").fetchall()


def test_a_search_resumes_bit_for_bit_and_says_what_is_there(tmp_path, capsys):
    log = str(tmp_path / "trials.db")
    search = functools.partial(rs.random_search, TASK, SPACE | {"dropout": [0.2]}, log=log)
    search(10, 2, name="first")
    resumed = search(14, 2, repeats=2, name="first")
    assert resumed == search(14, 2, repeats=2, log=None)
    search(3, 3)
    told = re.findall(r"(\d+) of (\d+) trials, (\d+) of others\n", capsys.readouterr().err)
    assert [[*map(int, line)] for line in told] == [[0, 10, 0], [10, 14, 0], [0, 3, 14]]
    assert os.listdir(tmp_path) == ["trials.db"]
    trial = min(resumed, key=lambda trial: trial.number)
    *row, hyperparams = rows(log, "repeat, number, seed, name, score, hyperparams")[0]
    assert row == [0, 0, 0, "first", trial.score] and json.loads(hyperparams) == trial.hyperparams


def notebook(code):
    """What code calls own, as in a notebook: its source is in no file."""
    exec(code, names := {"__name__": "__main__"})
    return names["own"]


DIFFERENT = {
    "rows": lambda n: X + n,
    "a function": lambda n: lambda: n,
    "a default": lambda n: lambda default=n: default,
    "a partial": lambda n: functools.partial(net, outputs=n),
    "a module": lambda n: nn.CrossEntropyLoss(torch.ones(3) * n),
    "an optimizer": lambda n: (optim.SGD, optim.Adam)[n - 1],
    "code": lambda n: notebook(f"own = lambda x: x + {n}"),
    "code within": lambda n: notebook(f"own = lambda x: [y + {n} for y in x]"),
    "names": lambda n: notebook("def own({}): return b".format(("a, b", "b, a")[n - 1])),
    "a helper": lambda n: notebook(f"def helper(): return {n}\ndef own(): return helper()"),
    "a class": lambda n: notebook(f"class Own:\n def __call__(self): return {n}\nown = Own()"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_search_is_known_by_all_that_decides_its_scores(what, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # as in a notebook
    first, again, other = (rs.search_key(DIFFERENT[what](n)) for n in (1, 1, 2))
    assert first == again != other


def test_a_search_is_known_by_files_but_for_comments_and_what_runs_it(tmp_path, monkeypatch):
    file = tmp_path / "helper.py"
    monkeypatch.setitem(sys.modules, "helper", types.SimpleNamespace(__file__=str(file)))
    keys = []
    for end in ("", "  # why\n\n", "\nif __name__ == '__main__':\n    f(x)", " + 1"):
        file.write_text("x = 1" + end)
        keys.append(rs.search_key())
    assert keys[0] == keys[1] == keys[2] != keys[3]
    lock = threading.Lock()
    assert rs.random_search(lambda own: lock.locked(), {}, 1)[0].score == 0
    with pytest.raises(rs.InputError, match="log: cannot pickle '_thread.lock'"):
        rs.random_search(lambda own: lock.locked(), {}, 1, log=str(tmp_path / "trials.db"))


CALLS = itertools.count(1)


def stops(hyperparams):
    call = next(CALLS)
    if call in (4, 16):
        raise KeyboardInterrupt
    return fails() if call == 8 else -hyperparams["lr"]


def test_a_trial_is_logged_as_it_finishes_and_ctrl_c_returns_what_has(tmp_path):
    log = str(tmp_path / "trials.db")
    search = functools.partial(rs.random_search, stops, rs.HYPERPARAMS, 10, log=log)
    assert len(search()) == 3
    with pytest.raises(OSError, match="reader's own"):
        search()
    assert len(rows(log)) == 6
    found = search(repeats=2)
    assert len(found) == 10 and not any(trial.repeats for trial in found)
    assert len(rows(log)) == 10 + 3


# ---- The command line and the processes ---------------------------------------------------------


def call(*arguments) -> tuple[int, str, str]:
    """main() in this process: its status, standard output and standard error."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        sys.argv = ["random_search.py", *map(str, arguments)]
        try:
            status = rs.main()
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), error.getvalue()


def test_input_errors_are_one_line_and_change_no_file(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "foreign")) as database:
        database.execute("CREATE TABLE trials (number)")
    call("--trials", 3, "--epochs", 1, "--log", tmp_path / "torn")
    os.truncate(tmp_path / "torn", 9000)
    (tmp_path / "text").write_text("no database, but a text of more than a few words" * 9)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    none = tmp_path / "none" / "file"
    wrong = [*(("--log", path) for path in (*before, "/", none)), ("--save", "/"), ("--save", none)]
    wrong += [("--epochs", 0), ("--epochs", -1), ("--trials", 0), ("--trials", "x"), ("--seed", -1)]
    wrong += [("--device", "gpu"), *[("--device", "cuda")] * (not torch.cuda.is_available())]
    for arguments in wrong:
        status, out, error = call(*arguments)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"random_search.py: error: [^\n]+\n", error), arguments
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_range_of_trials_and_a_model_that_is_kept(tmp_path):
    path = tmp_path / "best.pt"
    status, out, _ = call("--task", "regression", "--trials", "2:6", "--epochs", 9, "--save", path)
    kept = torch.load(path)
    assert status == 0 and re.match(r"regression: 4 trials, [\d.]+ s\ntrial +loss +lr ", out)
    assert out.endswith(f"{kept['hyperparams']}\n")
    task = rs.regression()
    model = task.build_model(**rs.taken_by(task.build_model, kept["hyperparams"]))
    model.load_state_dict(kept["state_dict"])
    found = rs.random_search(task, trials=range(2, 6), epochs=9, repeats=5)
    assert rs.evaluate(model, task) == found[0].score


@pytest.mark.parametrize("after, lines", [(0, 0), (2, 5), (4, 6)])
def test_ctrl_c_ends_with_130_and_the_report(after, lines, monkeypatch):
    calls = itertools.count()

    def score(outputs, y):
        if next(calls) == after:
            raise KeyboardInterrupt
        return 0.5

    monkeypatch.setitem(rs.TASKS, "xor", lambda: rs.xor()._replace(score=score))
    status, out, _ = call("--trials", 3, "--epochs", 1)
    assert (status, out.count("\n")) == (130, lines)


def test_progress_is_shown_where_it_takes_long(capsys, monkeypatch):
    clock = itertools.count(0, 0.3)
    for now, shown in ((clock, r"(\d of 9 trials, best 0\.5 +\r)+ +\r"), (itertools.repeat(0), "")):
        monkeypatch.setattr(rs.time, "monotonic", now.__next__)
        rs.random_search(lambda own: 0.5, {}, 9)
        assert re.fullmatch(shown, capsys.readouterr().err)


def command(*arguments, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, arguments)], **pipes | options)


def test_processes_and_machines_share_the_trials_and_every_log_ends_whole(tmp_path):
    options = ["--task", "regression", "--trials", 24, "--epochs", 5, "--repeats", 2, "--log"]
    launch = ["-m", "torch.distributed.run", "--master-addr=127.0.0.1", "--master-port=29617"]
    node = [*launch, "--nnodes=2", "--node-rank={}", "--", rs.__file__, *options, tmp_path / "{}"]
    runs = [command(*(str(part).format(rank) for part in node)) for rank in (0, 1)]
    runs.append(command(rs.__file__, *options, tmp_path / "two", "--processes", 2))
    call(*options, tmp_path / "one")
    assert [run.communicate()[0].count("trial  ") for run in runs] == [1, 0, 1]
    expected = rows(tmp_path / "one")
    assert len(expected) == 24 + 10
    assert [rows(tmp_path / log) for log in ("0", "1", "two")] == [expected] * 3


SCRIPT = """
import os, random_search as rs
def score(own):
    return len({"a", "b"} & {"b"}) / (3 - own["n"])
print(rs.search_key(score, {"x": {"a", "b", "c"}}, rs.xor()))
try:
    rs.random_search(score, {"n": [1, 2]}, 4 + int(os.environ["RANK"]))
except rs.InputError as error:
    print(error)
rs.random_search(score, {"n": [1, 2, 3]}, 40)
"""


def test_a_key_is_the_same_in_every_process_and_a_rank_that_fails_ends_the_run(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "ascii"}
    run = command(*launch, tmp_path / "script.py", env=environment)
    plain = {"env": environment, "stderr": None, "preexec_fn": lambda: os.close(2)}
    shown, _ = command("-OO", rs.__file__, "--trials", 3, "--epochs", 2, **plain).communicate()
    assert shown.count(" +- ") == 3
    out, error = run.communicate()
    assert run.returncode != 0 and out.count("the processes differ in trials") == 2
    assert "ZeroDivisionError" in error and "in trial " in error
    assert len({*re.findall("^[0-9a-f]{16}$", out, re.M)}) == 1


# ---- The README ---------------------------------------------------------------------------------


def test_the_readmes_code_runs_and_shows_what_it_shows(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, {"__name__": "__main__"})
    line, table = re.search(r"python (random_s[^\n]*)\n\n```\n(.*?)```", text, re.S).groups()
    _, out, _ = call(*line.split()[1:])
    assert out.splitlines()[1] in table  # numbers have other last digits on other processors
    for number, *_, mean, _, _ in (row.split() for row in table.splitlines()[2:4]):
        (trial,) = rs.random_search(rs.regression(), trials=[int(number)], epochs=150, repeats=5)
        assert np.mean(trial.repeats) == pytest.approx(-float(mean), rel=0.02)
    assert len(text.splitlines()) <= 110 and max(map(len, text.splitlines())) <= 100
