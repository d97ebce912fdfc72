"""Tests of random_search.py by what it promises: plain PyTorch is the oracle."""

import concurrent.futures
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


net = functools.partial(rs.mlp, 6, outputs=3, num_layers=1, dropout=0.0)
TASK = make_task(net)
ONE = make_task(functools.partial(net, outputs=1), F.mse_loss, FLOATS)


def sample(space, numbers, seed=0) -> list[rs.Trial]:
    return [rs.Trial(n, rs.sample_hyperparams(space, seed, n), seed) for n in numbers]


def run(task, trials, epochs=2) -> dict:
    """The trials' scores as text: exact, and NaN is equal to NaN."""
    scored = rs.train_and_evaluate(trials, task, epochs)
    return {(trial.number, trial.repeat, trial.seed): repr(score) for trial, score in scored}


# ---- Reproducibility and best-score tracking ----------------------------------------------------
def test_a_search_is_reproducible_and_its_first_trials_are_a_smaller_search():
    search = functools.partial(rs.random_search, rs.regression(), epochs=30, seed=5)
    every = search(trials=150)
    assert every == search(trials=150) != search(trials=150, seed=6)
    for numbers in (10, [np.int64(5), 5], range(5, 150, 16)):
        chosen = range(numbers) if numbers == 10 else numbers
        assert search(trials=numbers) == [trial for trial in every if trial.number in chosen]


def test_the_best_score_is_tracked_and_comes_first():
    found = rs.random_search(lambda hyperparams: -hyperparams["lr"], rs.HYPERPARAMS, 50)
    assert found[0].score == max(-trial.hyperparams["lr"] for trial in found)
    assert [t.score for t in found] == sorted((t.score for t in found), reverse=True)


def test_the_finals_decide_by_the_mean_of_repeats():
    calls = []

    def lucky(hyperparams):  # the lower the better, by luck, in its first run alone
        calls.append(hyperparams["n"])
        return hyperparams["n"] * (-1 if calls.count(hyperparams["n"]) == 1 else 1)

    found = rs.random_search(lucky, {"n": range(10**6)}, 9, repeats=3)
    *finals, a, b, c, d = sorted(calls[:9])
    assert [trial.hyperparams["n"] for trial in found] == [*finals[::-1], a, b, c, d]
    assert [trial.repeats for trial in found] == [[n] * 3 for n in finals[::-1]] + [[]] * 4


def any_order(width, dropout, activation):  # of 3 and 6 as many weights
    first = activation(), nn.Dropout(dropout), nn.Linear(6, width), nn.Linear(width, 36 // width)
    last = nn.ReLU(True), nn.Tanh(), nn.Dropout(dropout), nn.Tanh(), nn.Linear(36 // width, 3)
    return nn.Sequential(*first, *last, nn.Tanh())


ANY_ORDER = {"activation": [nn.ReLU, nn.Tanh], "width": [3, 6], "batch_size": [1, 45]}
ADAM = {"weight_decay": [0.0, 0.1], "lr": [0.001, 0.01]}
STACKED = {  # a task, and what its space has besides
    "deep": (TASK, {"num_layers": [1, 2, 4]}),
    "any order": (make_task(any_order), ANY_ORDER),
    "sgd": (TASK, {"weight_decay": [0.0, 0.1], "momentum": [0.0, 0.5, 0.9]}),
    "partial": (TASK._replace(optimizer=functools.partial(optim.SGD, momentum=0.9)), {}),
    "adam": (TASK._replace(optimizer=optim.Adam), ADAM),
    "adamw": (TASK._replace(optimizer=optim.AdamW), ADAM),
    "adamw's own decay": (TASK._replace(optimizer=optim.AdamW), {"lr": [0.001, 0.01]}),
    "epochs": (TASK._replace(score=lambda o, y: o.mean() + torch.rand(1)), {"epochs": [3, 7]}),
    "one output, float64": (make_task(ONE.build_model, F.mse_loss, FLOATS.double()), {}),
    "three outputs": (make_task(net, F.mse_loss, X[:, 3:]), {}),
    "huber": (ONE._replace(loss=F.huber_loss), {}),
    "binary": (make_task(ONE.build_model, nn.BCEWithLogitsLoss(), (FLOATS > 0).float()), {}),
    "poisson": (make_task(ONE.build_model, F.poisson_nll_loss, FLOATS.abs().round()), {}),
    "class weights": (TASK._replace(loss=nn.CrossEntropyLoss(torch.tensor([1.0, 2, 5]))), {}),
    "ignored classes": (make_task(net, y=torch.where(X[:, 5] > 0.5, -100, CLASSES)), {}),
    "smooth": (TASK._replace(loss=functools.partial(F.cross_entropy, label_smoothing=0.1)), {}),
    "soft targets of sum 1.1": (make_task(net, y=F.one_hot(CLASSES) * 0.9 + 0.2 / 3), {}),
    "flat targets": (make_task(ONE.build_model, F.mse_loss, FLOATS[:, 0]), {}),
    "a sum": (TASK._replace(loss=lambda outputs, y: outputs.sum()), {}),
    "what it changes": (ONE._replace(loss=lambda o, y: o.mul_(2).sub_(y.add_(1)).norm()), {}),
}


@pytest.mark.filterwarnings("ignore:Using a target size")  # flat targets broadcast, in both
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
    trials += [rs.replace(t, **other) for t in trials[:2] for other in ({"repeat": 2}, {"seed": 9})]
    every = run(task, trials)
    assert every == run(task, trials[::-1])
    for company in [*zip(trials[::3], strict=True), trials[:3], trials[3:6], trials[10:15]]:
        assert run(task, company).items() <= every.items()


def test_dropout_in_a_stack_is_dropout_by_kolmogorovs_and_smirnovs_distance():
    space = {"lr": [0.3], "batch_size": [15], "hidden_size": [16], "dropout": [0.5]}
    trials = sample(space, range(300))
    losses = [sorted(map(float, run(t, trials, 5).values())) for t in (TASK, ALONE["stack=False"])]
    shares = [np.searchsorted(own, sum(losses, []), side="right") / 300 for own in losses]
    assert abs(shares[0] - shares[1]).max() < 0.133  # chance passes it once in 100


def changed(change, hidden_size):
    model = net(hidden_size=hidden_size).extend([nn.Linear(3, 3), nn.Linear(3, 3)])
    change(model)
    return model


CHANGES = {
    "another layer": lambda m: m.append(nn.Sigmoid()),
    "batch norm": lambda m: m.append(nn.BatchNorm1d(3)),
    "convolution": lambda m: m.extend([nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 3, 1), nn.Flatten()]),
    "gru": lambda m: m.append(nn.GRUCell(3, 3)),
    "transformer": lambda m: m.append(nn.TransformerEncoderLayer(3, 1)),
    "a layer twice": lambda m: m.append(m[-1]),
    "tied": lambda m: setattr(m[-1], "weight", m[-2].weight),
    "one memory": lambda m: setattr(m[-1].weight, "data", m[-2].weight.data),
    "own class": lambda m: setattr(m[0], "bias", type("Own", (nn.Parameter,), {})(m[0].bias)),
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
    "of another make": TASK._replace(optimizer=type("Own", (functools.partial,), {})(optim.SGD)),
    "a value": TASK._replace(optimizer=functools.partial(optim.SGD, momentum=math.nan)),
    "a tensor": TASK._replace(optimizer=functools.partial(optim.SGD, momentum=X[0, 0].abs())),
    "float64": make_task(lambda: net(hidden_size=5).double(), x=X.double()),
    "more dimensions": make_task(net, F.mse_loss, X[:, None, 3:], X[:, None]),
    "a subclass of all": make_task(lambda: type("Own", (nn.Sequential,), {})(nn.Linear(6, 3))),
    "a module": make_task(lambda: nn.Linear(6, 3)),
    "a hook of all modules": TASK,
}


@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_known_trains_alone_and_as_plain_pytorch(name, monkeypatch):
    if name == "a hook of all modules":
        monkeypatch.setitem(nn.modules.module._global_forward_hooks, 0, lambda own, x, y: y / 2)
    task = ALONE[name]
    for trial in sample(SPACE | {"dropout": [0.3]}, range(3), seed=9):
        model = rs.make_model(trial, task)
        assert rs.structure(trial, model, task) is None
        optimizer = task.optimizer(model.parameters(), lr=trial.hyperparams["lr"])
        rs.seed_everything(rs.DROPOUT, trial.seed, trial.repeat)
        order = np.random.default_rng([rs.ORDER, trial.seed, trial.repeat])
        for permutation in (order.permutation(45), order.permutation(45)):
            for rows in torch.from_numpy(permutation).split(trial.hyperparams["batch_size"]):
                optimizer.zero_grad()
                task.loss(model(task.train_x[rows]), task.train_y[rows]).backward()
                optimizer.step()
        score = -task.loss(model.eval()(task.valid_x), task.valid_y).item()
        assert [*run(task, [trial]).values()] == [repr(score)]


@pytest.mark.parametrize("name", rs.TASKS)
def test_section_4_can_be_deleted(name):
    head, _, tail = re.split("# ==== [45]", Path(rs.__file__).read_text())
    names = {"__name__": "shorter"}
    exec(head + "structure = lambda trial, model, task: None\n#" + tail, names)
    found = names["random_search"](names["TASKS"][name](), trials=3, epochs=20, repeats=1)
    loops = rs.random_search(rs.TASKS[name]()._replace(stack=False), trials=3, epochs=20, repeats=1)
    assert [vars(trial) for trial in found] == [vars(trial) for trial in loops]


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

    rs.seed_everything(1)
    before = draw()
    rs.seed_everything(1)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        a, b, c = pool.map(lambda _: rs.random_search(draw, {}, 3, repeats=2), range(3))
    assert draw() == before and a == b == c and a[0].score not in a[0].repeats


def test_scores_of_any_type_and_those_that_are_none(capsys):
    for kind in (np.float32, torch.tensor, np.array, lambda own: torch.tensor([own])):
        assert rs.random_search(lambda own, kind=kind: kind(0.5), {}, 1)[0].score == 0.5
    bad = (score for score in [math.nan, -math.inf, math.inf, 0.5] * 2)  # cannot be pickled
    found = rs.random_search(lambda hyperparams: next(bad), {}, 8)
    assert [trial.score for trial in found[:4]] == [math.inf] * 2 + [0.5] * 2
    rs.report(found)
    rs.report(rs.random_search(make_task(net, x=X * math.nan, score=fails), SPACE, 3, 1))
    told = re.findall("the score of (.*) trials is NaN(.*)\n", capsys.readouterr().out)
    assert told == [("4 of 8", ""), ("3 of 3", "; standardise the rows or lower lr")]


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


def fails(*_):
    raise OSError("of the reader's own")


OUTPUTS = r"outputs \['rows', 1\] and y \['rows'\] would"
BAD = [
    *(("trials", {name: n}) for name in ("trials", "epochs") for n in (0, -1, [], [0.5])),
    *(("seed, repeats", {name: n}) for name in ("seed", "repeats") for n in (-1, 2.0)),
    *(("lr must be a list .* for a range", {"space": {"lr": own}}) for own in ((0.1, 1.0), [])),
    ("draw from the generator alone", {"space": {"lr": lambda generator: random.random()}}),
    *(("batch_size, epochs", {"space": {"batch_size": [n]}}) for n in (0, 9.0)),
    ("batch_size, epochs", {"space": {"epochs": [0]}}),
    ("'width'.* not of build_model, optimizer", {"space": {"width": [3]}}),
    ("higher is better", {"task": TASK._replace(score=F.cross_entropy)}),
    ("new parameters each", {"task": make_task(functools.cache(net))}),
    ("cannot pickle", {"task": functools.partial(max, (n for n in "")), "log": ":memory:"}),
    ("45 rows and y 9", {"task": TASK._replace(train_y=CLASSES[:9])}),
    *((OUTPUTS, {"task": make_task(ONE.build_model, y=own)}) for own in (CLASSES, FLOATS[:, 0])),
    (OUTPUTS, {"task": ONE._replace(valid_y=CLASSES[45:])}),
    (r"\['rows', 1\] and y \['rows', 3\]", {"task": make_task(ONE.build_model, y=X[:, :3])}),
    (r"\['rows'\] and y \['rows', 1\]", {"task": make_task(lambda **_: nn.Flatten(0), y=FLOATS)}),
]


@pytest.mark.parametrize("message, options", BAD)
def test_bad_input_is_one_line_before_training(message, options, monkeypatch):
    monkeypatch.setattr(rs, "run", None)  # so that training would fail
    space = SPACE | options.pop("space", {})
    with pytest.raises(rs.InputError, match=message) as error:
        rs.random_search(**{"task": TASK, "space": space, "trials": 3} | options)
    assert "\n" not in str(error.value)


FAILING = {
    "build_model": make_task(lambda hidden_size: fails() if hidden_size == 8 else nn.Linear(6, 3)),
    "loss": TASK._replace(loss=lambda outputs, y: fails() if outputs.max() > 1 else outputs.mean()),
    "score": TASK._replace(score=fails),
    "optimizer": TASK._replace(optimizer=lambda parameters, lr: fails()),
}


@pytest.mark.parametrize("part", FAILING)
def test_an_error_of_the_readers_own_keeps_its_traceback_and_names_the_trial(part):
    with pytest.raises(OSError, match="of the reader's own") as error:
        rs.random_search(FAILING[part], SPACE, 20, 2)
    (note,) = error.value.__notes__
    assert note in [f"in trial {t.number}: {t.hyperparams}" for t in sample(SPACE, range(20))]
    assert error.traceback[-1].name == "fails"
    assert part != "build_model" or "'hidden_size': 8" in note


def rows(log, columns="number, repeat, score, hyperparams") -> list[tuple]:
    with contextlib.closing(sqlite3.connect(log)) as database:
        return database.execute(f"SELECT {columns} FROM trials ORDER BY 1, 2").fetchall()


def test_a_search_resumes_bit_for_bit_and_says_what_is_there(tmp_path, capsys):
    log = str(tmp_path / "trials.db")
    search = functools.partial(rs.random_search, space=SPACE, epochs=2, name="first", log=log)
    search(TASK, trials=10)
    resumed = search(TASK, trials=14, repeats=2)
    assert resumed == search(TASK, trials=14, repeats=2, log=None)
    for name, own in {"epochs": 3, "name": "x", "seed": 1, "space": {"hidden_size": [5]}}.items():
        search(TASK, trials=1, **{name: own})
    search(ONE, trials=1)
    told = re.findall(r"\d+(?= of)", capsys.readouterr().err)  # of these there, of others
    assert [*map(int, told)] == [0, 0, 10, 0, 0, 14, 0, 15, 0, 16, 0, 17, 0, 18]
    assert os.listdir(tmp_path) == ["trials.db"]
    row = 0, resumed[0].number, 0, "first", resumed[0].score, json.dumps(resumed[0].hyperparams)
    assert row in rows(log, "repeat, number, seed, name, score, hyperparams")


def notebook(code):  # whose source is in no file
    exec(code, names := {"__name__": "__main__"})
    return names["own"]


DIFFERENT = {
    "rows": lambda n: X + n,
    "a function": lambda n: lambda: n,
    "a default": lambda n: lambda default=n: default,
    "a keyword's default": lambda n: lambda *, default=n: default,
    "code": lambda n: notebook(f"own = lambda x: x {'+-'[n - 1]} 3"),
    "code within": lambda n: notebook(f"own = lambda x: [y + {n} for y in x]"),
    "an attribute": lambda n: notebook(f"own = lambda x: x.value_{n}"),
    "arguments": lambda n: notebook(("own = lambda a, b: a", "own = lambda b, a: b")[n - 1]),
    "a helper": lambda n: notebook(f"def f(): return {n}\ndef own(): return [f() for _ in 'a']"),
    "a class": lambda n: notebook(f"class Own:\n def __call__(self): return {n}\nown = Own()"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_search_is_known_by_all_that_decides_its_scores(what, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))  # as in a notebook
    one, same, other = (DIFFERENT[what](n) for n in (1, 1, 2))
    assert rs.search_key(one, one) == rs.search_key(one, same) != rs.search_key(one, other)


def test_a_search_is_known_by_files_but_for_comments_and_what_runs_it(tmp_path, monkeypatch):
    file = tmp_path / "helper.py"
    monkeypatch.setitem(sys.modules, "helper", types.SimpleNamespace(__file__=str(file)))
    keys = []
    for end in ("", "  # why\n\n", "\nif __name__ == '__main__':\n    f(x)", " + 1"):
        file.write_text("x = 1" + end)
        keys.append(rs.search_key())
    assert keys[0] == keys[1] == keys[2] != keys[3]


# ---- The command line and the processes ----------------------------------------------------------
def call(line) -> tuple[int, str, str]:  # the status, output and errors of main()
    sys.argv = ["random_search.py", *line.split()]
    out, error = io.StringIO(), io.StringIO()
    to_text = contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)
    with to_text[0], to_text[1], pytest.raises(SystemExit) as end:
        sys.exit(rs.main())
    return end.value.code, out.getvalue(), error.getvalue()


def test_input_errors_are_one_line_and_change_no_file(tmp_path):
    sqlite3.connect(tmp_path / "foreign").execute("CREATE TABLE trials (number)").connection.close()
    call(f"--trials 3 --epochs 1 --log {tmp_path}/torn")
    os.truncate(tmp_path / "torn", 9000)
    (tmp_path / "text").write_text("no database, but a text of more than a few words" * 9)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    wrong = [f"--log {path}" for path in (*before, "/", "/none/log")]
    wrong += ["--save /", "--save /none/best.pt", "--trials 0", "--trials x", "--seed -1"]
    wrong += ["--epochs 0", "--epochs -1", "--device gpu", "--device cuda:99"]
    for line in wrong:
        status, out, error = call(line)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"random_search.py: error: [^\n]+\n", error), line
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("after, lines", [(0, 0), (2, 5), (4, 6)])
def test_ctrl_c_and_errors_keep_what_has_finished(after, lines, monkeypatch, tmp_path):
    calls = itertools.count()

    def score(outputs, y):
        number = next(calls)
        if number == after:
            raise KeyboardInterrupt
        return fails() if number == after + 2 else 0.5

    monkeypatch.setitem(rs.TASKS, "xor", lambda: rs.xor()._replace(score=score))
    line = f"--trials 3 --epochs 1 --log {tmp_path}/log"
    status, out, _ = call(line)
    assert (status, out.count("\n"), len(rows(tmp_path / "log"))) == (130, lines, after)
    with pytest.raises(OSError):
        call(line)
    assert len(rows(tmp_path / "log")) == after + 1


def test_progress_is_shown_where_it_takes_long(capsys, monkeypatch):
    clock = itertools.count(0, 0.3)
    for now, shown in ((clock, r"(\d of 9 trials, best 0\.5 +\r)+ +\r"), (itertools.repeat(0), "")):
        monkeypatch.setattr(rs.time, "monotonic", now.__next__)
        rs.random_search(lambda own: 0.5, {}, 9)
        assert re.fullmatch(shown, capsys.readouterr().err)


def start(line, **options) -> subprocess.Popen:
    options = {"cwd": HERE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, *line.split()], text=True, **options)


def test_processes_and_machines_share_the_trials_and_every_log_ends_whole(tmp_path):
    search = "random_search.py --task regression --trials 3:27 --epochs 5 --repeats 2"
    launch = "-m torch.distributed.run --master-addr=127.0.0.1 --master-port=29617 --nnodes=2"
    node = f"{launch} --node-rank=%d -- {search} --log {tmp_path}/%d"
    runs = [start(node % (rank, rank)) for rank in (0, 1)]
    runs.append(start(f"{search} --log {tmp_path}/two --processes 2"))
    plain = {"env": os.environ | {"PYTHONIOENCODING": "ascii"}, "preexec_fn": lambda: os.close(2)}
    runs.append(start(f"-OO {search} --log {tmp_path}/one", stderr=None, **plain))
    assert [run.communicate()[0].count("trial  ") for run in runs] == [1, 0, 1, 1]
    expected = rows(tmp_path / "one")
    assert {row[0] for row in expected} == {*range(3, 27)} and len(expected) == 24 + 10
    assert [rows(tmp_path / log) for log in ("0", "1", "two")] == [expected] * 3


SCRIPT = """
import os, random_search as rs
score = lambda own: len({"a", "b"} & {"b"}) / (3 - own["n"])
key = rs.search_key(score, {"x": {"a", "b", "c"}}, rs.xor())
try:
    rs.random_search(score, {"n": [1, 2]}, 4 + int(os.environ["RANK"]))
except rs.InputError as error:
    found = rs.random_search(score, {"n": [1, 2], "own": [{"a", "b", "c"}]}, 40)
    print(f"{key}, {len(found)} trials, {error}\\n", end="", flush=True)
rs.random_search(score, {"n": [1, 2, 3]}, 40)
"""


def test_a_key_is_the_same_in_every_process_and_a_rank_that_fails_ends_the_run(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = f"-m torch.distributed.run --standalone --nproc-per-node=2 {tmp_path}/script.py"
    run = start(launch, env=os.environ | {"PYTHONPATH": str(HERE)})
    out, error = run.communicate()
    first, second = re.findall("[0-9a-f]{16}, 40 trials, the processes differ in trials.*", out)
    assert first == second
    assert run.returncode != 0 and "ZeroDivisionError" in error and "in trial " in error


def test_the_readmes_code_runs_and_shows_what_it_shows(tmp_path, monkeypatch):
    text = (HERE / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, {"__name__": "__main__"})
    line, table = re.search(r"python (random_s[^\n]*)\n\n```\n(.*?)```", text, re.S).groups()
    status, out, _ = call(line.partition(" ")[2] + " --save best.pt")
    assert (status, out[:23]) == (0, "regression: 40 trials, ") and out.splitlines()[1] in table
    number, *_, mean, _, _ = table.splitlines()[2].split()  # whose last digits differ by processor
    task = rs.regression()
    (trial,) = rs.random_search(task, trials=[int(number)], epochs=150, repeats=5)
    assert np.mean(trial.repeats) == pytest.approx(-float(mean), rel=0.02)
    kept = torch.load("best.pt")
    model = task.build_model(**rs.taken_by(task.build_model, kept["hyperparams"]))
    model.load_state_dict(kept["state_dict"])
    assert rs.evaluate(model, task) == trial.score and out.endswith(f"{trial.hyperparams}\n")
    assert len(text.splitlines()) <= 110 and max(map(len, text.splitlines())) <= 100
