"""The summary of a study of layers.

The summary is plain JSON. It depends neither on the order of the records nor on times.
Missing values are None and are not imputed.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ntk.layer_selection import LayerOrder
from ntk.measures import Array, Bracket, brackets, gram_matrix, spectrum
from ntk.reporting import Row, across, points, select, spread, standard_error
from ntk.studies.folder import Key, Record
from ntk.studies.layers.correlation import FEWEST, noise, rank_correlation
from ntk.studies.layers.predictors import (
    PREDICTORS,
    STATIC,
    alignment,
    explained,
    gradient_norm,
    kernel_of,
    predictors,
)
from ntk.studies.layers.ranking import TunedSets, add_static, correlated
from ntk.studies.layers.records import HEAD, LAYERS, LayerKernels
from ntk.studies.layers.subsets import (
    BASELINES,
    RANDOM,
    TARGET_AWARE,
    Choice,
    Subset,
    layers_of,
    method_of,
    subset,
)
from ntk.studies.order import order_of_task
from ntk.studies.overview import overview, rounded

ALL = "all layers"
NONE = "head alone"


@dataclass(frozen=True, eq=False)
class _Seed:
    """The results of one split.

    Attributes:
        kernels: The kernels of the layers.
        orders: Chosen layers by rule.
        scores: Test scores of fine-tuning by method.
    """

    kernels: LayerKernels
    orders: dict[str, LayerOrder]
    scores: dict[str, float]


def collect(
    records: Sequence[tuple[Key, Record | None]],
    command: str,
    settings: Mapping[str, Any],
    choice: Choice,
) -> dict[str, Any]:
    """Return the summary of a study of layers.

    Args:
        records: Records in any order, None for missing ones.
        command: Command that computes the study.
        settings: Settings of the study, JSON values.
        choice: Settings of the rules.

    Returns:
        Rows by task and shots: ``layers``, measures of each layer; ``brackets``, bounds
        of the spectrum of all layers from that without one; ``rules``, the choices of
        each rule and their scores; ``references``; ``held``, rank correlations of
        predicted drop and score over the chosen sets; ``subsets``, predictors and
        scores of the sets tuned on every split; ``noise`` and ``correlations`` of
        these, also given each of `predictors.CONTROLS`. ``correlations`` over all tasks
        have the task None. ``differences`` are
        points of the target-aware choice above the others, over tasks.
    """
    there = [(key, record) for key, record in records if record is not None]
    there.sort(key=lambda pair: _order(pair[0]))
    groups: dict[tuple[str, int], dict[int, _Seed]] = defaultdict(dict)
    tuned: dict[Any, dict[str, float]] = defaultdict(dict)
    for key, record in there:
        if key.kind != LAYERS:
            score = record["test"][record["metric"]]
            tuned[key.cell][key.subject] = score
    for key, record in there:
        if key.kind == LAYERS:
            kernels = LayerKernels.of(record)
            seed = _Seed(kernels, choice(kernels), tuned[key.cell])
            groups[key.cell.task, key.cell.shots][key.cell.seed] = seed
    results: dict[str, list[Row]] = {
        name: []
        for name in (
            "layers",
            "brackets",
            "rules",
            "references",
            "held",
            "subsets",
            "noise",
        )
    }
    sets: dict[int, dict[str, TunedSets]] = defaultdict(dict)
    for (task, shots), seeds in groups.items():
        where = {"task": task, "shots": shots}
        results["layers"] += [where | row for row in _layers(seeds, choice)]
        results["brackets"] += [where | row for row in _brackets(seeds, choice)]
        results["rules"] += [where | row for row in _rules(seeds, choice)]
        results["references"] += [where | row for row in _references(seeds, choice)]
        results["held"] += [where | row for row in _held(seeds, choice)]
        sets[shots][task] = _subsets(seeds, choice)
    correlations: list[Row] = []
    for shots, by_task in sets.items():
        add_static(by_task)
        for task, tuned_sets in by_task.items():
            where = {"task": task, "shots": shots}
            results["subsets"] += [where | row for row in _rows(tuned_sets)]
            if len(tuned_sets.layers) >= FEWEST:
                results["noise"].append(where | _noise(tuned_sets.scores))
        correlations += [{"shots": shots} | row for row in correlated(by_task)]
    of_kernels = [record for key, record in there if key.kind == LAYERS]
    summary = {
        **overview(
            [key for key, _ in records if key.kind == LAYERS],
            [pair for pair in there if pair[0].kind == LAYERS],
            command,
            settings,
        ),
        "space": choice.space,
        "budget": asdict(choice.budget),
        "epsilon": choice.epsilon,
        "tasks": list(dict.fromkeys(task for task, _ in groups)),
        "metrics": {record["task"]: record["metric"] for record in of_kernels},
        "left_out": sorted({n for record in of_kernels for n in record["left_out"]}),
        "records": {"asked": len(records), "there": len(there)},
        "missing": [
            {**asdict(key.cell), "kind": key.kind, "subject": key.subject}
            for key in sorted((k for k, r in records if r is None), key=_order)
        ],
        **results,
        "correlations": correlations,
        "differences": _differences(results["rules"]),
    }
    rounded_summary: dict[str, Any] = rounded(summary)
    return rounded_summary


def _order(key: Key) -> tuple[Any, ...]:
    cell = key.cell
    return order_of_task(cell.task), cell.shots, cell.seed, key.kind, key.subject


def _layers(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    """Return measures of each layer and of the head, spreads over splits."""
    sizes = next(iter(seeds.values())).kernels.layers
    rows = []
    for name in (*sizes, HEAD):
        measures = [
            _of_layer(seed.kernels, name, choice.epsilon) for seed in seeds.values()
        ]
        if any(measures):
            row = {key: spread(each[key] for each in measures) for key in measures[0]}
            count = sizes[name].parameters if name in sizes else None
            rows.append({"layer": name, "parameters": count, **row})
    return rows


def _of_layer(kernels: LayerKernels, name: str, epsilon: float) -> dict[str, float]:
    """Return measures of the kernel of one layer or the head; empty without a head."""
    gram = kernels.base
    if name != HEAD:
        gram = gram_matrix(kernels.layers[name].kernel).numpy()
    elif not gram.any():
        return {}
    total = np.trace(kernels.base) + sum(
        float(np.trace(gram_matrix(each.kernel))) for each in kernels.layers.values()
    )
    honest = kernels.honest
    unseen = honest.base
    if name != HEAD:
        unseen = gram_matrix(honest.layers[name].kernel).numpy()
    r = honest.residual
    return {
        "trace_share": float(np.trace(gram)) / total,
        "largest_eigenvalue": float(spectrum.eigenvalues(gram)[0]),
        "alignment": alignment(honest, unseen, r),
        "gradient_norm": gradient_norm(unseen, r),
        "drop": explained(kernels, () if name == HEAD else (name,), epsilon),
    }


def _brackets(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    """Return bounds of the spectrum of all layers, from that without each layer.

    Numbers are medians over layers and splits: a single kernel close to singular would
    dominate a mean. Conditions count the layers and splits on which they hold.
    """
    by_name: dict[str, list[Bracket]] = defaultdict(list)
    for seed in seeds.values():
        layers = seed.kernels.layers
        of_all = spectrum.eigenvalues(kernel_of(seed.kernels, layers))
        ridge = spectrum.relative_ridge(of_all, choice.epsilon)
        for name, layer in layers.items():
            others = [other for other in layers if other != name]
            gram = kernel_of(seed.kernels, others)
            if not gram.any():  # The only layer of a model without a head.
                continue
            added = gram_matrix(layer.kernel).numpy()
            for quantity, bracket in brackets(gram, added, ridge).items():
                by_name[quantity].append(bracket)
    return [
        {
            "quantity": quantity,
            "lower": float(np.median([each.lower for each in known])),
            "least": float(np.median([each.measured.min() for each in known])),
            "most": float(np.median([each.measured.max() for each in known])),
            "upper": float(np.median([each.upper for each in known])),
            "conditions": {
                condition: sum(each.conditions[condition] for each in known)
                for condition in known[0].conditions
            },
            "kernels": len(known),
        }
        for quantity, known in by_name.items()
    ]


def _rules(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    """Return the choice of each rule on each split and its score after fine-tuning."""
    rows = []
    best = [_reached(seed, [TARGET_AWARE], choice) for seed in seeds.values()]
    for rule in (TARGET_AWARE, *BASELINES, RANDOM):
        chosen, shares, scores, sizes = [], [], [], []
        for seed in seeds.values():
            names = [n for n in seed.orders if n.partition(" ")[0] == RANDOM]
            names = names if rule == RANDOM else [rule]
            sets = [subset(seed.orders[name]) for name in names]
            chosen.append([list(each) for each in sets])
            shares.append(_mean(_explained(seed, s, choice) for s in sets))
            scores.append(_reached(seed, names, choice))
            sizes.append(_mean(seed.orders[name].parameters for name in names))
        rows.append(
            {
                "rule": rule,
                "chosen": chosen,
                "parameters": spread(sizes),
                "explained": spread(shares),
                "score": spread(scores),
                "points": spread(
                    points(one, other) for one, other in zip(best, scores, strict=True)
                ),
            }
        )
    return rows


def _explained(seed: _Seed, chosen: Subset, choice: Choice) -> float:
    return explained(seed.kernels, chosen, choice.epsilon)


def _reached(seed: _Seed, rules: Iterable[str], choice: Choice) -> float | None:
    """Return the mean score of the rules' choices; None unless all were tuned."""
    layers = seed.kernels.layers
    methods = [method_of(subset(seed.orders[r]), choice.space, layers) for r in rules]
    return _mean(seed.scores.get(method) for method in methods)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean; None if there are no values or one is None."""
    values = list(values)
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) > 0 else None


def _references(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    rows = []
    for name in (ALL, NONE):
        scores, shares = [], []
        for seed in seeds.values():
            chosen = tuple(seed.kernels.layers) if name == ALL else ()
            scores.append(_score(seed, chosen, choice))
            shares.append(_explained(seed, chosen, choice))
        row = {"score": spread(scores), "explained": spread(shares)}
        rows.append({"name": name, **row})
    return rows


def _held(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    """Return Spearman's rho of predicted drop and score over the chosen sets."""
    rhos, sets = [], []
    for seed in seeds.values():
        chosen = {subset(order) for order in seed.orders.values()}
        pairs = [
            (_explained(seed, each, choice), score)
            for each in sorted(chosen)
            if (score := _score(seed, each, choice)) is not None
        ]
        sets.append(len(pairs))
        columns = np.array(pairs).reshape(-1, 2, 1)
        rhos.append(rank_correlation(columns[:, 0], columns[:, 1]))
    return [{"sets": sets, "spearman": spread(rhos)}] if any(sets) else []


def _score(seed: _Seed, chosen: Subset, choice: Choice) -> float | None:
    """Return the score of tuning some layers; None if they were not tuned."""
    return seed.scores.get(method_of(chosen, choice.space, seed.kernels.layers))


def _subsets(seeds: Mapping[int, _Seed], choice: Choice) -> TunedSets:
    """Return the sets tuned on every split, their predictors and scores."""
    splits = list(seeds.values())
    layers = tuple(splits[0].kernels.layers)
    common = set.intersection(*(set(seed.scores) for seed in splits)) - {HEAD}
    sets = sorted(
        (layers_of(method, choice.space, layers) for method in common),
        key=lambda each: (len(each), list(map(int, each))),
    )
    measured = [
        [predictors(seed.kernels, each, choice.epsilon) for seed in splits]
        for each in sets
    ]
    values = {
        name: np.array([[of_split[name] for of_split in row] for row in measured])
        for name in PREDICTORS
        if name != STATIC
    }
    scores = np.array(
        [[_score(seed, each, choice) for seed in splits] for each in sets], dtype=float
    )
    return TunedSets(sets, values, scores)


def _rows(tuned: TunedSets) -> list[Row]:
    """Return the row of each set."""
    return [
        {
            "layers": list(each),
            "score": spread(tuned.scores[i].tolist()),
            "predictors": {
                n: float(value[i].mean()) for n, value in tuned.predictors.items()
            },
        }
        for i, each in enumerate(tuned.layers)
    ]


def _noise(scores: Array) -> Row:
    means = scores.mean(axis=1)
    return {
        "subsets": len(scores),
        "splits": scores.shape[1],
        "least": float(means.min()),
        "most": float(means.max()),
        **asdict(noise(scores)),
    }


def _differences(rules: Sequence[Row]) -> list[Row]:
    """Return points of the target-aware choice above each other rule.

    The mean and its standard error are over tasks, or over splits for a single task.
    """
    differences = []
    for shots, rule in dict.fromkeys((row["shots"], row["rule"]) for row in rules):
        if rule == TARGET_AWARE:
            continue
        tasks = [
            row
            for row in select(rules, shots=shots, rule=rule)
            if row["points"]["mean"] is not None
        ]
        row = across(tasks, "points", "mean")
        if len(tasks) == 1:
            known = [v for v in tasks[0]["points"]["values"] if v is not None]
            row["standard_error"] = standard_error(known)
        differences.append({"shots": shots, "rule": rule, **row})
    return differences
