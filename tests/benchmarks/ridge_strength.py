"""Which choice of kernel ridge's strength classifies best, on resampled few-shot draws.

The kernels of contrasts over all parameters of a pool of examples are computed once for
every model and task, under readouts that have seen no labels (label words, or a seeded
random head). From each pool 16-shot training sets are drawn; the rest is for testing.
Differences of accuracy to today's choice are paired over draws, and their standard
error is by the jackknife over pairs of model and task. The width of the prior is chosen
on the other tasks and the other model than the one it is judged on.

    python -m tests.benchmarks.ridge_strength --data-dir DIR --folder KERNELS \
        --output figures/ridge_strength.json
"""

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np

from ntk import Full, contrasts, empirical_ntk, load_kernels, save_kernels
from ntk.classifiers.estimators import ALPHAS
from ntk.measures import RidgeRegression
from ntk.studies.encoding import encode_split
from rocoft.data import few_shot, load_task
from rocoft.models import load_backbone

UNITS = (
    *(("minilm", task) for task in ("sst2", "subj", "cr", "mpqa", "mr", "qnli")),
    ("minilm", "trec"),
    *(("smollm2", task) for task in ("sst2", "subj", "cr")),
)
POOL, SHOTS, DRAWS = 160, 16, 100
FIXED = (0.1, 0.3, 1.0, 3.0, 10.0)
WIDTHS = (0.25, 0.5, 1.0, 2.0)
"""Standard deviations of log10 alpha around 0 in the prior."""


def kernel_of(model, task, data_dir, folder):
    """Return the kernel ``(n, n, b, b)`` and the labels of a pool."""
    file = folder / f"{model}-{task}.safetensors"
    loaded = load_task(task, data_dir)
    split = few_shot(loaded, POOL // len(loaded.labels), 1, 0)
    labels = np.array([example.label for example in split.train])
    if not file.exists():
        backbone = load_backbone(model, split, head="random")
        data = encode_split(backbone, split, 16, "cpu")
        train = data.batches[: data.train_batches]
        kernel = empirical_ntk(backbone.module, train, space=Full(), reduce="contrast")
        inverse = np.argsort(data.order[: data.train])
        save_kernels(file, {"full": kernel[inverse][:, inverse].contiguous()}, {})
    return load_kernels(file)[0]["full"].numpy(), labels


def normalised(kernel, train):
    """Return the kernel centred on the training examples, with a unit diagonal."""
    n, b = len(kernel), kernel.shape[2]
    mean = kernel[:, train].mean(axis=1)
    centred = kernel - mean[:, None] - mean.swapaxes(1, 2)[None, :]
    centred = centred + kernel[np.ix_(train, train)].mean(axis=(0, 1))
    length = np.sqrt(np.trace(centred[range(n), range(n)], axis1=1, axis2=2) / b)
    return centred / (length[:, None] * length)[..., None, None]


def curves(kernel, labels, train, test):
    """Return test accuracies and criteria of every alpha on one draw."""
    c = labels.max() + 1
    Q = contrasts(c).numpy()
    n, b = len(train), c - 1
    flat = lambda K: K.swapaxes(1, 2).reshape(len(K) * b, -1)
    gram, other = flat(kernel[np.ix_(train, train)]), flat(kernel[np.ix_(test, train)])
    Y = np.eye(c)[labels[train]]
    targets = ((Y - Y.mean(axis=0)) @ Q).reshape(-1)
    fit = RidgeRegression.of(gram, targets, outputs=b)
    scale = gram.trace() / len(gram)
    rows = {"accuracy": [], "loo": [], "gcv": [], "evidence": []}
    for alpha in ALPHAS:
        ridge = alpha * scale
        a = fit.eigenvectors @ (
            fit.eigenvectors.T @ targets / (fit.eigenvalues + ridge)
        )
        f = (other @ a).reshape(-1, b) @ Q.T + Y.mean(axis=0)
        rows["accuracy"].append(float((f.argmax(axis=1) == labels[test]).mean()))
        rows["loo"].append(np.log(fit.leave_one_out(ridge)) * n * b / 2)
        rows["gcv"].append(np.log(fit.gcv(ridge)) * n * b / 2)
        rows["evidence"].append(-fit.log_evidence(ridge, scale=None))
    return {name: np.array(values) for name, values in rows.items()}


def choices(found):
    """Return the accuracy of every choice on one draw."""
    log = np.log10(ALPHAS)
    accuracy = found["accuracy"]
    pick = lambda criterion: float(accuracy[int(np.argmin(criterion))])
    chosen = {"best": float(accuracy.max())}
    for name in ("loo", "gcv", "evidence"):
        chosen[name] = pick(found[name])
        for width in WIDTHS:
            prior = (log / width) ** 2 / 2
            chosen[f"{name}, prior {width:g}"] = pick(found[name] + prior)
    for alpha in FIXED:
        nearest = int(np.argmin(np.abs(log - np.log10(alpha))))
        chosen[f"alpha {alpha:g}"] = float(accuracy[nearest])
    few = [int(np.argmin(np.abs(log - exponent))) for exponent in (-1, 0, 1)]
    chosen["loo of 0.1, 1, 10"] = float(
        accuracy[few[int(np.argmin(found["loo"][few]))]]
    )
    return chosen


def measured(kernel, labels, shots):
    """Return the mean accuracy of every choice over draws, as it is and normalised."""
    totals = {}
    for seed in range(DRAWS):
        rng = np.random.default_rng(seed)
        train = np.concatenate(
            [
                rng.choice(np.flatnonzero(labels == label), shots, replace=False)
                for label in range(labels.max() + 1)
            ]
        )
        test = np.setdiff1d(np.arange(len(labels)), train)
        for end, K in (("", kernel), (", cosine", normalised(kernel, train))):
            for name, value in choices(curves(K, labels, train, test)).items():
                totals.setdefault(name + end, []).append(value)
    return {name: statistics.mean(values) for name, values in totals.items()}


def held_out(by_unit, family):
    """Return what a family's best choice on the other models and tasks gains."""
    names = [name for name in next(iter(by_unit.values())) if name.startswith(family)]
    gains = {}
    for unit, row in by_unit.items():
        rest = [r for u, r in by_unit.items() if u[0] != unit[0] and u[1] != unit[1]]
        name = max(names, key=lambda n: statistics.mean(r[n] - r["loo"] for r in rest))
        gains[unit] = row[name] - row["loo"]
    return gains


def spread(gains):
    """Return mean and jackknife standard error in points."""
    values = [100 * gain for gain in gains]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_error": error}


def main():
    """Compute what is missing, compare the choices, print and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.folder.mkdir(parents=True, exist_ok=True)
    by_unit = {}
    for unit in UNITS:
        kernel, labels = kernel_of(*unit, options.data_dir, options.folder)
        shots = min(SHOTS, POOL // (labels.max() + 1) // 2)
        by_unit[unit] = measured(kernel, labels, shots)
        best = by_unit[unit]["best"] - by_unit[unit]["loo"]
        print(*unit, f"loo loses {100 * best:.1f} points", flush=True)  # noqa: T201
    gains = {
        name: spread(row[name] - row["loo"] for row in by_unit.values())
        for name in next(iter(by_unit.values()))
    }
    for family in ("loo, prior", "gcv, prior", "evidence, prior", "alpha"):
        gains[f"held out: {family}"] = spread(held_out(by_unit, family).values())
    for name, gain in sorted(gains.items(), key=lambda item: -item[1]["mean"]):
        mean, error = gain.values()
        print(f"{name:28} {mean:+.2f} +- {error:.2f}")  # noqa: T201
    result = {
        "command": "python -m tests.benchmarks.ridge_strength "
        + " ".join(sys.argv[1:]),
        "pool": POOL,
        "shots": SHOTS,
        "draws": DRAWS,
        "gains": gains,
        "units": [{"model": m, "task": t, **row} for (m, t), row in by_unit.items()],
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
