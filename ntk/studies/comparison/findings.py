"""The findings of a comparison as sentences, with their uncertainty."""

import math
import re
from collections.abc import Iterator

from ntk.classifiers import paired_difference
from ntk.reporting import Record, label_of, number_at, reference_of, shown, spaces_of
from ntk.studies.comparison.figures import CLASSIFIERS


def question(record: Record) -> str:
    """Return the question that a comparison answers.

    Args:
        record: The record of a comparison.
    """
    asked = [_spoken(s) for s in spaces_of(record) if s.get("role") == "requested"]
    if not asked:
        return "What is the reference kernel like, and how well does it classify?"
    listed = " and ".join(filter(None, (", ".join(asked[:-1]), asked[-1])))
    one, several = ("Is the kernel", "does it"), ("Are the kernels", "do they")
    opening, verb = one if len(asked) == 1 else several
    reference = _reference_name(reference_of(record))
    return f"{opening} over {listed} close to {reference}, and {verb} classify as well?"


def summary_lines(record: Record) -> list[str]:
    """Return the findings as sentences, with their uncertainty.

    Args:
        record: The record of a comparison.
    """
    reference = reference_of(record)
    asked = [s for s in spaces_of(record) if s.get("role") == "requested"]
    return [
        *(_comparison(space, reference, record) for space in asked),
        *_controls(record),
        *_labels(record),
        *_services(record),
        _certificate(record),
        *_estimate(record),
        *_provenance(record),
        *map(str, (record.get("model") or {}).get("notes") or []),
    ]


def _comparison(space: Record, reference: Record | None, record: Record) -> str:
    """Return how a kernel and its accuracy differ from the reference."""
    name = _reference_name(reference)
    text = f"The kernel over {_spoken(space)}"
    if math.isfinite(share := number_at(space, "share")):
        text += f" ({_short(share)} % of the parameters)"
    difference = number_at(space, "distance.frobenius_rescaled")
    if math.isfinite(difference):
        text += f" differs from {name} by {_short(difference)} % (Frobenius, best scale"
        body = number_at(space, "body_distance.frobenius_rescaled")
        if math.isfinite(body):
            text += f"; {_short(body)} % without the head's block"
        text += ")"
    elif space.get("zero"):
        return f"{text} is zero: the outputs depend on none of them at these examples."
    else:
        text += f" has no distance to {name} that could be computed"
    for kind in CLASSIFIERS:
        p = number_at(space, f"classifiers.{kind}.accuracy")
        if math.isfinite(p):
            accuracy = f"reaches {100 * p:.1f} %"
            if reference is not None:
                accuracy = _gap(space, reference, kind, record)
            text += f" and its {'SVM' if kind == 'svm' else kind} classifier {accuracy}"
            break
    return f"{text}."


def _gap(space: Record, reference: Record, kind: str, record: Record) -> str:
    """Return the difference of two accuracies with its paired standard error."""
    path = f"classifiers.{kind}"
    p, q = (number_at(each, f"{path}.accuracy") for each in (space, reference))
    if not math.isfinite(q):
        return f"reaches {100 * p:.1f} %"
    points = 100 * (p - q)
    side = "above" if points > 0 else "below"
    text = f"is {abs(points):.1f} points {side} it" if p != q else "is as accurate"
    text += f" ({100 * p:.1f} % against {100 * q:.1f} %"
    splits = record.get("splits") or {}
    first, second = (
        ((each.get("classifiers") or {}).get(kind) or {}).get("correct")
        for each in (space, reference)
    )
    if first and second:
        crossed = bool(splits.get("same_test"))
        _, error = paired_difference(first, second, crossed=crossed)
        noise = 200 * error
        text += f"; paired standard error {100 * error:.1f}, {_data(record)}: "
        if abs(points) <= noise or not math.isfinite(noise):
            text += "within two standard errors"
        else:
            text += "beyond two standard errors"
    return f"{text})"


def _data(record: Record) -> str:
    """Return how many splits and test examples a difference is over."""
    count = (record.get("splits") or {}).get("count", 1)
    splits = "one split" if count == 1 else f"{count} splits"
    return f"{splits}, {number_at(record, 'task.test'):.0f} test examples"


def _labels(record: Record) -> Iterator[str]:
    """Yield what was measured on examples whose labels the head has not seen."""
    kernel = record.get("kernel") or {}
    if folds := kernel.get("folds"):
        yield (
            "The head was fitted to the training examples. Regularisations and "
            f"alignment are out of fold: each of {folds} folds is measured under a "
            "head that was fitted without it. Label power is that of the fitted head, "
            "which has seen the labels."
        )


def _controls(record: Record) -> Iterator[str]:
    """Yield the accuracies of the controls."""
    listed = []
    for space in spaces_of(record):
        p = number_at(space, "classifiers.ridge.accuracy")
        if space.get("role") == "control" and math.isfinite(p):
            listed.append(f"{100 * p:.1f} % over {_spoken(space)}")
    for item in record.get("random") or []:
        if value := _spread(item):
            selection = f"{item.get('count')} random {item.get('axis')}"
            listed.append(f"{value} over {selection} ({item.get('seeds')} seeds)")
    if value := _spread(record.get("shuffled")):
        listed.append(f"{value} with shuffled labels")
    if listed:
        yield f"Controls: ridge reaches {', '.join(listed)}."
    if math.isfinite(f0 := number_at(record, "f0.accuracy")):
        fitted = (record.get("kernel") or {}).get("head_saw_labels")
        when = "with the fitted head" if fitted else "before any training"
        yield f"The model's own outputs, {when}, reach {100 * f0:.1f} %."


def _services(record: Record) -> Iterator[str]:
    """Yield how parameters were computed, by name unless from whole batches."""
    services = (record.get("kernel") or {}).get("services") or {}
    if math.isfinite(count := number_at(services, "batch")):
        yield f"{count:,.0f} parameter tensors were served by factors of whole batches."
    for key, what in (
        ("single", "served by factors of one example at a time"),
        ("definition", "served by the definition (plain autograd)"),
        ("unused", "without effect on the outputs, so that its kernel is zero"),
    ):
        if names := services.get(key):
            rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
            tensors = f"{len(names)} parameter tensor{'s' if len(names) > 1 else ''}"
            yield f"{tensors} {what}: {', '.join(map(str, names[:5]))}{rest}."


def _certificate(record: Record) -> str:
    """Return the error of the kernels at spot-checked entries."""
    checked = [s for s in spaces_of(record) if s.get("certificate")]
    if not checked:
        return "No entry was recomputed by the definition: exactness was not checked."
    unchecked = [label_of(s) for s in spaces_of(record) if not s.get("certificate")]
    besides = f" Not recomputed: {', '.join(unchecked)}." if unchecked else ""
    errors = {label_of(s): number_at(s, "certificate.relative_error") for s in checked}
    if bad := [label for label, error in errors.items() if not math.isfinite(error)]:
        return f"Recomputing entries gave no number for {', '.join(bad)}."
    entries = sum(number_at(s, "certificate.entries") for s in checked)
    worst = max(errors, key=lambda label: errors[label])
    judged = checked[0]["certificate"].get("precision")
    own = (record.get("model") or {}).get("dtype")
    other = judged is not None and judged != own
    where = f" in {judged} (the model is in {own})" if other else ""
    products = (record.get("kernel") or {}).get("precision") or "float32"
    if products != "float32":
        where += f" (the kernels' products are in {products})"
    return (
        f"{shown(entries, ',.0f')} random entries, recomputed by the definition"
        f"{where}, agree with the kernels within a relative error of "
        f"{errors[worst]:.1e} (the worst: {worst}).{besides}"
    )


def _estimate(record: Record) -> Iterator[str]:
    """Yield the error of the full kernel if it is an estimate."""
    estimate = (record.get("kernel") or {}).get("estimate")
    if estimate:
        entries, error = (
            number_at(estimate, key) for key in ("entries", "relative_error")
        )
        yield (
            f"The full kernel is an estimate from {entries:,.0f} "
            f"{estimate.get('unit', 'numbers')} of each large weight, with a relative "
            f"error (Frobenius) of about {shown(100 * error, '.1f')} %; measures "
            "against it carry that error."
        )


def _provenance(record: Record) -> Iterator[str]:
    """Yield the number of processes and the parts that were found in the cache."""
    kernel = record.get("kernel") or {}
    kept, parts = kernel.get("kept") or {}, number_at(kernel, "parts")
    if (processes := kernel.get("processes") or 1) > 1:
        yield f"{processes} processes shared the kernels' computation."
    if found := kept.get("found"):
        yield f"{found:,} of {parts:,.0f} parts of the work had been done before."
    if problem := kept.get("problem"):
        yield f"{str(problem)[:1].upper()}{str(problem)[1:]}."


def _reference_name(reference: Record | None) -> str:
    if reference is None or label_of(reference) == "full":
        return "the full kernel"
    return f"the kernel over {_spoken(reference)}"


def _spoken(space: Record) -> str:
    """Return a space's label for a sentence: "rows 3" as "3 rows"."""
    label = label_of(space)
    if match := re.fullmatch(r"(row|column)s (\d+)", label):
        return f"{match[2]} {match[1]}{'' if match[2] == '1' else 's'}"
    if match := re.fullmatch(r"(?i:lora) (\d+)", label):
        return f"LoRA of rank {match[1]}"
    said = {"full": "all parameters", "head": "the head", "bias": "the biases"}
    return said.get(label.removesuffix(" only"), label)


def _spread(results: Record | None) -> str:
    """Return mean and standard deviation of ridge's accuracy; "" if unknown."""
    mean, std = (100 * number_at(results, f"ridge.{part}") for part in ("mean", "std"))
    spread = f" ± {std:.1f}" if math.isfinite(std) else ""
    return f"{mean:.1f}{spread} %" if math.isfinite(mean) else ""


def _short(value: float) -> str:
    """Return a share in percent, with two digits below 10 %."""
    percent = 100 * value
    if 0 < percent < 0.001:
        return "less than 0.001"
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.2g}"
