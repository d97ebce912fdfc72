"""Random search over hyperparameters in PyTorch, in one file: its trials train side by side.

    python random_search.py --task regression --trials 1000 --log trials.jsonl
    torchrun --standalone --nproc-per-node=2 -- random_search.py --trials 10000

Trials of one shape are one stacked net. All that is random about a trial is a function of (seed,
number): on the CPU its score is the same bit for bit alone, in any stack, on N processes.
"""

import argparse
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

# Without it MKL picks kernels by memory alignment, and last bits would depend on the stack.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

# A value is a sequence (each element equally likely) or a function of a numpy.random.Generator.
HYPERPARAMS = {
    "lr": np.linspace(0.001, 0.1, 100),
    "batch_size": [16, 32, 64, 128],
    "hidden_size": [32, 64, 128, 256],
    "num_layers": [1, 2, 3, 4],
    "dropout": np.linspace(0.1, 0.5, 5),
}


def build_model(Linear, Dropout, inputs, outputs, hidden_size, num_layers) -> nn.Module:
    """An ordinary model, but of the Linear and Dropout it is given; a Dropout has its rate."""
    layers = []
    for _ in range(num_layers):
        layers += [Linear(inputs, hidden_size), nn.ReLU(), Dropout()]
        inputs = hidden_size
    return nn.Sequential(*layers, Linear(inputs, outputs))


class Task(NamedTuple):
    x: Sequence  # [rows, features], or [rows] for one feature; standardised by the training rows
    y: Sequence  # [rows, outputs], or [rows] for one output; with classes [rows], labels from 0
    loss: Callable  # of torch.nn.functional
    held_out: slice | Sequence[int] | None = slice(4, None, 5)  # rows to score; None: all do both
    classes: int = 0


def binary_cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """F's ..._with_logits, but a value's last bits do not depend on its place in the array."""
    magnitude = logits.abs()
    return magnitude / 2 + (0.5 - targets) * logits + torch.log1p(torch.exp(-magnitude))


ARTICLE_X = "3.3 4.4 5.5 6.71 6.93 4.168 9.779 6.182 7.59 2.167 7.042 10.791 5.313 7.997 3.1"
ARTICLE_Y = "1.7 2.76 2.09 3.19 1.694 1.573 3.366 2.596 2.53 1.221 2.827 3.465 1.65 2.904 1.3"
TASKS = {
    "xor": Task([[0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0], binary_cross_entropy, None),
    "regression": Task(ARTICLE_X.split(), ARTICLE_Y.split(), F.mse_loss, slice(2, None, 3)),
}
# ---- The machinery: a trial, a stack of trials, the search, the report, the command line -------
TRAINING = ("lr", "batch_size", "dropout")  # these act in training, the others in build_model
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@dataclass
class Trial:
    number: int
    seed: int  # of the search; with the number it decides all that is random about the trial
    hyperparams: dict
    score: float = math.nan  # higher is better; NaN: diverged
    logged: bool = False  # read from a log, not run now


def check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def sample_hyperparams(space: dict, seed: int, trial: int) -> dict:
    """The hyperparameters of the trial of this number, plain Python values."""
    generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(trial, 0)))
    sample = {}
    for name, values in space.items():
        many = callable(values) or (hasattr(values, "__len__") and len(values) > 0)
        check(many, f"HYPERPARAMS: {name} must be a function or have values, not {values!r}")
        value = values(generator) if callable(values) else values[generator.integers(len(values))]
        sample[name] = value.item() if isinstance(value, np.generic | Tensor) else value
    return sample


def random_bits(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """Random int32 [trials, count] of int32 keys [trials, 2] and the counters from first on.

    A hash (lowbias32 by C. Wellons, with a key before and within) is the same on every device.
    """
    counters = torch.arange(first, first + count, device=keys.device)
    bits = keys[:, :1] + (counters * 0x9E3779B9).int()
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)  # as if the shift brought in zeros
    bits *= 0x7FEB352D
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits += keys[:, 1:]
    bits *= 0x846CA68B - 2**32
    bits ^= (bits >> 16).bitwise_and_(0xFFFF)
    return bits


class LinearStep(torch.autograd.Function):
    """A linear layer for each trial that takes its SGD step on the way back.

    A loss comes scaled by its trial's lr, so the gradient is the step, and is never stored: it is
    the moving of weights through memory that costs most in nets of this size.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        grad_x = grad.bmm(weight) if ctx.needs_input_grad[0] else None  # before the step
        weight.baddbmm_(grad.mT, x, alpha=-1)
        bias.sub_(grad.sum(1))
        return grad_x, None, None


class StackedLinear(nn.Module):
    """nn.Linear for x [trials, rows, inputs], with its initial distribution."""

    def __init__(self, keys: Tensor, inputs: int, outputs: int):
        super().__init__()
        values = (random_bits(keys, (1 + inputs) * outputs) >> 8) * (2**-23 / math.sqrt(inputs))
        self.bias = nn.Parameter(values[:, :outputs].contiguous())
        # A weight with gaps would take another kernel, one trial after another.
        self.weight = nn.Parameter(values[:, outputs:].reshape(-1, outputs, inputs).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return LinearStep.apply(x, self.weight, self.bias)


class StackedDropout(nn.Module):
    """nn.Dropout for x [trials, rows, features], with a rate for each trial, [trials, 1]."""

    def __init__(self, keys: Tensor, rates: Tensor):
        super().__init__()
        self.keys, self.used, self.masks = keys, 0, keys[:, :0]
        self.threshold, self.scale = rates * 2**32 - 2**31, 1 / (1 - rates)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        size = x[0].numel()
        if self.masks.shape[1] < size:  # draw those of many steps in one call
            bits = random_bits(self.keys, max(size, 2**17 // len(x)), self.used)
            # 1 where bits > threshold, else 0: both are whole. A comparison is three times as slow.
            self.masks = bits.float().sub_(self.threshold).clamp_(0, 1).mul_(self.scale)
        mask, self.masks = self.masks[:, :size], self.masks[:, size:]
        self.used += size
        return x * mask.view_as(x)


def build_stack(trials: list[Trial], sizes: dict, keys: Tensor) -> nn.Module:
    """One model for trials of one shape; keys, [trials, 2], decide all that is random in it."""
    rates = torch.tensor([[t.hyperparams.get("dropout", 0.0)] for t in trials], device=keys.device)
    layer_keys = (random_bits(keys, 2, 2 * layer) for layer in range(1, 10**9))
    linear = lambda inputs, outputs: StackedLinear(next(layer_keys), inputs, outputs)
    dropout = lambda: StackedDropout(next(layer_keys), rates)
    rest = {k: v for k, v in trials[0].hyperparams.items() if k not in TRAINING}
    return build_model(linear, dropout, **sizes, **rest)


def make_stacks(trials: list[Trial], data: dict) -> list[list[Trial]]:
    """Group the trials that can train together, as many in a stack as memory allows."""
    groups, stacks = {}, []
    most_rows = max(len(data[part][0]) for part in ("train", "scored"))  # more are a full batch
    memory = 2**24 if data["train"][0].is_cpu else 2**30  # a CPU's caches should hold a stack
    try:
        for trial in trials:
            lr, batch_size = trial.hyperparams["lr"], trial.hyperparams["batch_size"]
            good = 0 < lr < math.inf and isinstance(batch_size, int) and batch_size > 0
            check(good, "lr and batch_size must be above 0, batch_size whole")
            check(0 <= trial.hyperparams.get("dropout", 0) < 1, "dropout must be 0 to below 1")
            rest = (v for k, v in trial.hyperparams.items() if k not in TRAINING)
            groups.setdefault((min(batch_size, most_rows), *rest), []).append(trial)
        for (batch_rows, *_), group in groups.items():
            trial, model = group[0], build_stack(group[:1], data["sizes"], torch.zeros(1, 2).int())
            floats = sum(w.numel() + 4 * batch_rows * w.shape[-1] for w in model.parameters())
            count = math.ceil(len(group) / max(2, memory // (4 * floats + 16 * most_rows)))
            stacks += [group[start::count] for start in range(count)]
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"HYPERPARAMS {trial.hyperparams}: {error}") from None
    return stacks


def train_stack(trials: list[Trial], data: dict, epochs: int) -> tuple[list[float], nn.Module]:
    """Train trials of one shape; their scores, 1 / loss or NaN if it diverged, and their model."""
    stack = trials if len(trials) > 1 else trials * 2  # alone: another kernel, other last bits
    seeds = (np.random.SeedSequence(t.seed, spawn_key=(t.number, 1)) for t in stack)
    keys = np.stack([seed.generate_state(2) for seed in seeds]).view(np.int32)
    keys = torch.tensor(keys, device=data["train"][0].device)
    lr = torch.tensor([float(t.hyperparams["lr"]) for t in stack], device=keys.device)
    batch_size, shuffle = trials[0].hyperparams["batch_size"], random_bits(keys, 2)
    model = build_stack(stack, data["sizes"], keys)

    def batches(x, y, epochs):  # every trial has its own order of rows in every epoch
        in_order = torch.arange(len(x), device=x.device).expand(len(stack), -1)
        full = batch_size >= len(x)  # then the order does not matter
        for epoch in range(epochs):
            order = in_order if full else random_bits(shuffle, len(x), epoch * len(x)).argsort()
            for rows in order.split(batch_size, dim=1):
                yield x[rows], y[rows]

    def loss_per_trial(x, y):
        losses = data["loss"](model(x).flatten(0, 1), y.flatten(0, 1), reduction="none")
        return losses.view(len(stack), -1).mean(1)

    for x, y in batches(*data["train"], epochs):
        loss_per_trial(x, y).dot(lr).backward()  # each layer takes its step on the way back
    check(all(w.grad is None for w in model.parameters()), "build_model: a layer does not stack")
    model.eval()
    with torch.no_grad():
        losses = sum(loss_per_trial(x, y) * x.shape[1] for x, y in batches(*data["scored"], 1))
    losses = (losses / len(data["scored"][0]))[: len(trials)].tolist()
    return [1 / max(loss, 1e-12) if math.isfinite(loss) else math.nan for loss in losses], model


def prepare(name: str, device: torch.device | str = "cpu") -> dict:
    """A task's rows on a device, x standardised: "train" and "scored", each (x, y)."""
    task = TASKS[name]
    try:
        x, y = np.asarray(task.x, float), np.asarray(task.y, np.float32)
        check(len(x) == len(y) > 0, f"x has {len(x)} rows, y has {len(y)}")
        check(np.isfinite(x).all() and np.isfinite(y).all(), "there is NaN or infinity in x or y")
        classes = task.classes or 2 * (task.loss is binary_cross_entropy)
        check(not classes or np.isin(y, range(classes)).all(), f"y must be 0 to {classes - 1}")
        check(classes or task.loss is not F.cross_entropy, "cross_entropy needs classes")
        rows, all_rows = np.arange(len(x)), task.held_out is None
        train = rows if all_rows else np.delete(rows, task.held_out)
        scored = rows if all_rows else np.delete(rows, train)
        check(len(train) and len(scored), "held_out is empty, or all rows are in it")
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"task {name!r}: x, y or held_out: {error}") from None
    x, y = x.reshape(len(x), -1), y.astype(int) if task.classes else y.reshape(len(y), -1)
    mean, spread = x[train].mean(0), np.where(np.ptp(x[train], 0) > 0, x[train].std(0), 1)
    x, y = torch.tensor((x - mean) / spread).float().to(device), torch.tensor(y).to(device)
    sizes = {"inputs": x.shape[1], "outputs": task.classes or y.shape[1]}
    data = {"loss": task.loss, "sizes": sizes, "mean": mean, "spread": spread}
    return data | {"train": (x[train], y[train]), "scored": (x[scored], y[scored])}


def random_search(
    train_and_evaluate: Callable[[list[Trial]], Sequence[float]],
    space: dict,
    trials: int | Sequence[int],
    seed: int = 0,
    make_stacks: Callable = lambda trials: [[trial] for trial in trials],
    log: str | None = None,
    settings: dict | None = None,
) -> list[Trial]:
    """Score trials 0 to trials - 1, or those of the numbers trials; return them, the best first.

    train_and_evaluate returns a score for each of a list of trials (of one, unless make_stacks
    groups them). Those in the file log, of these settings, seed and space, do not run again.
    """
    numbers = (range(trials) if isinstance(trials, int) else trials)[RANK::WORLD_SIZE]
    settings, done = (settings or {}) | {"seed": seed}, {}
    with open(os.devnull if log is None else log, "a+b", buffering=0) as file:
        file.seek(0)
        if log is not None:
            update_log(file, space, settings, done, [])
        finished = [done[n] for n in numbers if n in done]
        new = [Trial(n, seed, sample_hyperparams(space, seed, n)) for n in numbers if n not in done]
        try:
            for stack in make_stacks(new):
                for trial, score in zip(stack, train_and_evaluate(stack), strict=True):
                    trial.score = float(score) if math.isfinite(score) else math.nan
                if log is not None:
                    update_log(file, space, settings, done, stack)
                finished += stack
                if sys.stderr.isatty() and RANK == 0:
                    print(f"{len(finished)} of {len(numbers)} trials", end="\r", file=sys.stderr)
            if WORLD_SIZE > 1:  # gloo's own time limit is 30 minutes; ranks may differ by more
                distributed.init_process_group("gloo", timeout=timedelta(days=1000))
                parts = [[]] * WORLD_SIZE
                distributed.all_gather_object(parts, finished)
                distributed.destroy_process_group()
                finished = [trial for part in parts for trial in part]
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
    return sorted(finished, key=lambda t: (math.isnan(t.score), -t.score, t.number))


def log_line(trial: Trial, settings: dict) -> str:
    score = None if math.isnan(trial.score) else trial.score
    row = settings | {"trial": trial.number} | trial.hyperparams | {"score": score}
    return json.dumps(row, allow_nan=False) + "\n"


def update_log(file, space: dict, settings: dict, done: dict, trials: list[Trial]) -> None:
    """Add what is new in the log to done, by number; then append those of trials not in it."""
    fcntl.flock(file, fcntl.LOCK_EX)  # other processes write to it
    seed, prefix = settings["seed"], json.dumps(settings | {"trial": 0})[:-2].encode()
    for line in file.read().splitlines(keepends=True):
        where = f"{file.name}, line {len(done) + 1}"
        if not line.endswith(b"\n") and line.startswith(prefix[: len(line)]):
            print(f"{where}: torn, its trial runs again", file=sys.stderr)
            file.seek(file.truncate(file.tell() - len(line)))
            break
        try:
            row, text = json.loads(line), line.decode()
            trial = Trial(row["trial"], seed, sample_hyperparams(space, seed, row["trial"]))
            trial.score, trial.logged = math.nan if row["score"] is None else row["score"], True
            expected = log_line(trial, settings)
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError):
            raise ValueError(f"{where}: not a line of such a log") from None
        check(text == expected and trial.number not in done, f"{where}: expected once: {expected}")
        done[trial.number] = trial
    new = {trial.number: trial for trial in trials if trial.number not in done}
    lines = "".join(log_line(trial, settings) for trial in new.values()).encode()
    check(file.write(lines) == len(lines), f"{file.name}: not written whole; is the disk full?")
    os.fsync(file)
    done |= new
    fcntl.flock(file, fcntl.LOCK_UN)


def report(trials: list[Trial], losses: bool = False) -> None:
    """Print the five best trials, with losses also 1 / score, and how many diverged."""
    rows = [["trial", "score", *["loss"] * losses, *trials[0].hyperparams]]
    for t in trials[:5]:
        values = [t.number, t.score, *([1 / t.score] if losses else []), *t.hyperparams.values()]
        rows.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(" ".join(map(str.rjust, row, widths))[:80])
    print(f"{sum(math.isnan(t.score) for t in trials)} of {len(trials)} trials diverged")


def pick_device(name: str) -> torch.device:
    """The device of this process: under torchrun, the accelerator of its LOCAL_RANK."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator:
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        return torch.zeros(1, device=accelerator or "cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"argument --device: {name} is not available here") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    add, started = parser.add_argument, time.monotonic()
    add("--task", choices=TASKS, default="xor", help="default: xor")
    add("--trials", metavar="N", type=int, default=200, help="default: 200")
    add("--epochs", metavar="N", type=int, default=500, help="of each trial; default: 500")
    add("--seed", metavar="S", type=int, default=0, help="of all random numbers; default: 0")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; default: auto")
    add("--log", metavar="FILE", help="append finished trials to FILE; do not repeat those in it")
    add("--trial", metavar="K", type=int, help="run only trial K")
    args = parser.parse_args()
    settings = {"task": args.task, "seed": args.seed, "epochs": args.epochs}
    numbers = range(args.trials) if args.trial is None else [args.trial]
    try:
        for name, least in {"trials": 1, "epochs": 1, "seed": 0, "trial": 0}.items():
            value = getattr(args, name)
            check(value is None or value >= least, f"argument --{name}: must be {least} or more")
        data = prepare(args.task, pick_device(args.device))
        train = lambda stack: train_stack(stack, data, args.epochs)[0]
        stacks = lambda trials: make_stacks(trials, data)
        trials = random_search(train, HYPERPARAMS, numbers, args.seed, stacks, args.log, settings)
    except (ValueError, OSError) as error:
        parser.error(str(error).partition("\n")[0])
    if RANK or not trials:
        return 0 if RANK else 130
    seconds, ran = time.monotonic() - started, sum(not trial.logged for trial in trials)
    print(f"task {args.task}, seed {args.seed}, {args.epochs} epochs, on {data['train'][0].device}")
    print(f"{len(trials)} trials, {ran} run now in {seconds:.1f} s, {ran / seconds:.1f} a second\n")
    report(trials, losses=True)
    if math.isnan(trials[0].score):
        parser.exit(1, f"{parser.prog}: every trial diverged; try a smaller lr\n")
    _, model = train_stack(trials[:1], data, args.epochs)  # the best again, alone
    x, y = (rows[:8] for rows in data["scored"])
    table = torch.cat([y.view(len(y), -1), model(x.expand(2, *x.shape))[0]], dim=1).detach()
    print(f"\nTargets and predictions of the best\n{table.cpu()}")
    print(trials[0].hyperparams)
    return 0 if len(trials) == len(numbers) else 130


if __name__ == "__main__":
    sys.exit(main())
