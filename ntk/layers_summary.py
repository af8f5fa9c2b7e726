"""Records of a study of layers -> its summary.

The summary is plain JSON. It depends neither on the order of the records nor on any
time. What cannot be computed is None; nothing is filled in.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ntk import distance, spectrum
from ntk.kernel import gram_matrix
from ntk.layer_budget import LayerOrder
from ntk.layers_correlation import (
    FEWEST,
    bootstrap,
    interval,
    noise,
    rank_correlation,
)
from ntk.layers_predictors import PREDICTORS, SIZE, explained, gradient_norm, predictors
from ntk.layers_records import HEAD, LAYERS, Split
from ntk.layers_subsets import (
    BASELINES,
    RANDOM,
    TARGET_AWARE,
    Choice,
    Subset,
    layers_of,
    method_of,
    subset,
)
from ntk.spectrum import Array
from ntk.study import Key, Record
from ntk.study_order import order_of_task
from ntk.study_records import overview, rounded
from ntk.study_scores import Row, across, points, spread, standard_error

ALL = "all layers"
NONE = "head alone"


@dataclass(frozen=True, eq=False)
class _Seed:
    """What is known of one split.

    Attributes:
        split: The layers.
        orders: Of the rules, by name.
        scores: Of fine-tuning, by method.
    """

    split: Split
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
        records: In any order; None stands for one that is missing.
        command: That makes the study.
        settings: Of the study, as JSON knows them.
        choice: What the rules choose by.

    Returns:
        Rows by task and shots: ``layers``, what is known of each; ``rules``, what each
        chose, and what that reached; ``references``; ``held``, how far the order of
        what was chosen is that of the scores; ``subsets``, predictors and scores of
        what was tuned on every split; ``noise`` and ``correlations`` of these. With
        the task None, over all tasks: ``correlations``, and ``differences``, points of
        the target-aware choice above the others.
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
            split = Split.of(record)
            seed = _Seed(split, choice(split), tuned[key.cell])
            groups[key.cell.task, key.cell.shots][key.cell.seed] = seed
    found: dict[str, list[Row]] = {
        name: []
        for name in ("layers", "rules", "references", "held", "subsets", "noise")
    }
    correlations: list[Row] = []
    draws: dict[tuple[int, str], list[tuple[Array, Array]]] = defaultdict(list)
    for (task, shots), seeds in groups.items():
        where = {"task": task, "shots": shots}
        found["layers"] += [where | row for row in _layers(seeds, choice)]
        found["rules"] += [where | row for row in _rules(seeds, choice)]
        found["references"] += [where | row for row in _references(seeds, choice)]
        found["held"] += [where | row for row in _held(seeds, choice)]
        rows, values, scores = _subsets(seeds, choice)
        found["subsets"] += [where | row for row in rows]
        if len(rows) < FEWEST:
            continue
        means = scores.mean(axis=1)
        found["noise"].append(
            {
                **where,
                "subsets": len(rows),
                "splits": scores.shape[1],
                "least": float(means.min()),
                "most": float(means.max()),
                **asdict(noise(scores)),
            }
        )
        size = values[SIZE]
        for name, own in values.items():
            drawn = bootstrap(own, scores), bootstrap(own, scores, size)
            draws[shots, name].append(drawn)
            rhos = rank_correlation(own, scores), rank_correlation(own, scores, size)
            correlations.append({**where, **_correlation(name, rhos, drawn)})
    correlations += _over_tasks(correlations, draws)
    kernels = [record for key, record in there if key.kind == LAYERS]
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
        "metrics": {record["task"]: record["metric"] for record in kernels},
        "left_out": sorted({n for record in kernels for n in record["left_out"]}),
        "records": {"asked": len(records), "there": len(there)},
        "missing": [
            {**asdict(key.cell), "kind": key.kind, "subject": key.subject}
            for key in sorted((k for k, r in records if r is None), key=_order)
        ],
        **found,
        "correlations": correlations,
        "differences": _differences(found["rules"]),
    }
    whole: dict[str, Any] = rounded(summary)
    return whole


def _order(key: Key) -> tuple[Any, ...]:
    cell = key.cell
    return order_of_task(cell.task), cell.shots, cell.seed, key.kind, key.subject


def _layers(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    """Return what is known of each layer, and of the head, means over splits."""
    several = list(seeds.values())
    rows = []
    for name in (*several[0].split.layers, HEAD):
        found = [_of_layer(seed.split, name, choice.epsilon) for seed in several]
        if any(found):
            row = {key: spread(each[key] for each in found) for key in found[0]}
            sizes = several[0].split.layers
            count = sizes[name].parameters if name in sizes else None
            rows.append({"layer": name, "parameters": count, **row})
    return rows


def _of_layer(split: Split, name: str, epsilon: float) -> dict[str, float]:
    """Return measures of one layer's kernel alone; nothing if there is no head."""
    gram = split.base
    if name != HEAD:
        gram = gram_matrix(split.layers[name].kernel).numpy()
    elif not gram.any():
        return {}
    total = np.trace(split.base) + sum(
        float(np.trace(gram_matrix(each.kernel))) for each in split.layers.values()
    )
    r = split.residual
    found = {
        "trace_share": float(np.trace(gram)) / total,
        "largest_eigenvalue": float(spectrum.eigenvalues(gram)[0]),
        "alignment": distance.alignment(gram, r) if gram.any() else 0.0,
        "gradient_norm": gradient_norm(gram, r),
    }
    return {**found, "drop": explained(split, () if name == HEAD else (name,), epsilon)}


def _rules(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    """Return what each rule chose on each split, and what fine-tuning that reached."""
    rows = []
    best = {seed: _reached(own, [TARGET_AWARE], choice) for seed, own in seeds.items()}
    for rule in (TARGET_AWARE, *BASELINES, RANDOM):
        chosen, shares, scores, sizes = [], [], [], []
        for own in seeds.values():
            names = [n for n in own.orders if n.partition(" ")[0] == RANDOM]
            names = names if rule == RANDOM else [rule]
            sets = [subset(own.orders[name]) for name in names]
            chosen.append([list(each) for each in sets])
            shares.append(_mean(_explained(own, s, choice) for s in sets))
            scores.append(_reached(own, names, choice))
            sizes.append(_mean(own.orders[name].parameters for name in names))
        rows.append(
            {
                "rule": rule,
                "chosen": chosen,
                "parameters": spread(sizes),
                "explained": spread(shares),
                "score": spread(scores),
                "points": spread(
                    points(one, other)
                    for one, other in zip(best.values(), scores, strict=True)
                ),
            }
        )
    return rows


def _explained(seed: _Seed, chosen: Subset, choice: Choice) -> float:
    return explained(seed.split, chosen, choice.epsilon)


def _reached(seed: _Seed, rules: Iterable[str], choice: Choice) -> float | None:
    """Return the mean score of what some rules chose, None unless all were tuned."""
    layers = seed.split.layers
    methods = [method_of(subset(seed.orders[r]), choice.space, layers) for r in rules]
    return _mean(seed.scores.get(method) for method in methods)


def _mean(values: Iterable[float | None]) -> float | None:
    several = list(values)
    known = [value for value in several if value is not None]
    return sum(known) / len(known) if len(known) == len(several) > 0 else None


def _references(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    rows = []
    for name in (ALL, NONE):
        scores, shares = [], []
        for own in seeds.values():
            chosen = tuple(own.split.layers) if name == ALL else ()
            method = method_of(chosen, choice.space, own.split.layers)
            scores.append(own.scores.get(method))
            shares.append(_explained(own, chosen, choice))
        row = {"score": spread(scores), "explained": spread(shares)}
        rows.append({"name": name, **row})
    return rows


def _held(seeds: Mapping[int, _Seed], choice: Choice) -> list[Row]:
    """Return the rank correlation of what was chosen, on each split."""
    found, sets = [], []
    for own in seeds.values():
        chosen = {subset(order) for order in own.orders.values()}
        pairs = [
            (_explained(own, each, choice), score)
            for each in sorted(chosen)
            if (score := _score(own, each, choice)) is not None
        ]
        sets.append(len(pairs))
        columns = np.array(pairs).reshape(-1, 2, 1)
        found.append(rank_correlation(columns[:, 0], columns[:, 1]))
    return [{"sets": sets, "spearman": spread(found)}] if any(sets) else []


def _score(seed: _Seed, chosen: Subset, choice: Choice) -> float | None:
    return seed.scores.get(method_of(chosen, choice.space, seed.split.layers))


def _subsets(
    seeds: Mapping[int, _Seed], choice: Choice
) -> tuple[list[Row], dict[str, Array], Array]:
    """Return the sets that were tuned on every split: rows, predictors, scores."""
    several = list(seeds.values())
    layers = tuple(several[0].split.layers)
    common = set.intersection(*(set(own.scores) for own in several)) - {HEAD}
    sets = sorted(
        (layers_of(method, choice.space, layers) for method in common),
        key=lambda each: (len(each), list(map(int, each))),
    )
    measured = [
        [predictors(own.split, each, choice.epsilon) for own in several]
        for each in sets
    ]
    values = {
        name: np.array([[own[name] for own in row] for row in measured])
        for name in PREDICTORS
    }
    scores = np.array(
        [[_score(own, each, choice) for own in several] for each in sets], dtype=float
    )
    rows = [
        {
            "layers": list(each),
            "score": spread(scores[i].tolist()),
            "predictors": {n: float(own[i].mean()) for n, own in values.items()},
        }
        for i, each in enumerate(sets)
    ]
    return rows, values, scores


def _correlation(
    name: str,
    rhos: tuple[float | None, float | None],
    draws: tuple[Array, Array],
) -> Row:
    """Return a plain and a partial correlation, and whether they go as they should."""
    row: Row = {"predictor": name}
    for key, rho, drawn in zip(("plain", "beyond_size"), rhos, draws, strict=True):
        ends = interval(drawn)
        row[key] = {
            "spearman": rho,
            "towards": None if rho is None else PREDICTORS[name].sign * rho,
            "low": ends and ends[0],
            "high": ends and ends[1],
        }
    return row


def _over_tasks(
    rows: Sequence[Row], draws: Mapping[tuple[int, str], Sequence[tuple[Array, Array]]]
) -> list[Row]:
    """Return the means over tasks, with the uncertainty of sets and splits alone."""
    found = []
    for (shots, name), several in draws.items():
        own = [r for r in rows if (r["shots"], r["predictor"]) == (shots, name)]
        plain, beyond = (
            _mean(row[key]["spearman"] for row in own)
            for key in ("plain", "beyond_size")
        )
        means = [np.mean(drawn, axis=0) for drawn in zip(*several, strict=True)]
        row = _correlation(name, (plain, beyond), (means[0], means[1]))
        found.append({"task": None, "shots": shots, **row})
    return found


def _differences(rules: Sequence[Row]) -> list[Row]:
    """Return points of the target-aware choice above each other one.

    Of several tasks it is the mean over them and its standard error; of one, over its
    splits.
    """
    found = []
    for shots, rule in dict.fromkeys((row["shots"], row["rule"]) for row in rules):
        own = [r for r in rules if (r["shots"], r["rule"]) == (shots, rule)]
        if rule == TARGET_AWARE:
            continue
        several = [row for row in own if row["points"]["mean"] is not None]
        row = across(several, "points", "mean")
        if len(several) == 1:
            known = [v for v in several[0]["points"]["values"] if v is not None]
            row["standard_error"] = standard_error(known)
        found.append({"shots": shots, "rule": rule, **row})
    return found
