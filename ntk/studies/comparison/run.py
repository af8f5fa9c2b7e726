"""The work of `python -m ntk.compare`: kernels, their record, its report."""

import datetime
import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ntk.kernels import Estimator, KernelOptions, SamplingEstimator, SketchEstimator
from ntk.reporting import to_json
from ntk.scale import (
    Plan,
    PlanCost,
    Processes,
    Resources,
    Work,
    kernels,
    launched_size,
    plan,
    save_kernels,
)
from ntk.spaces import Bias, Columns, Embeddings, LoRA, Norm, Rows, Space, parse_space
from ntk.studies.comparison import record as records
from ntk.studies.comparison import report
from ntk.studies.comparison.findings import summary_lines
from ntk.studies.comparison.options import CompareOptions
from ntk.studies.comparison.splits import over_splits
from ntk.studies.comparison.subject import Comparison
from rocoft.commands import (
    FolderKind,
    OptionError,
    Place,
    Progress,
    launched_rank,
    progress_bar,
    show_json,
    show_lines,
    show_tables,
)
from rocoft.data import Split, few_shot
from rocoft.models import Backbone, load_backbone, resolved_device
from rocoft.training import versions

KERNELS = "kernels.safetensors"
FOLDER = FolderKind(
    "ntk.compare",
    "result",
    ("report.json", "report.md", "report.html", "figures", KERNELS),
)


def run(options: CompareOptions, command: str) -> list[str]:
    """Compare kernels, and write and print what was found.

    Args:
        options: The command's options.
        command: The command line, for the record.

    Returns:
        Nothing that failed.

    Raises:
        ValueError: If the comparison cannot be done as asked.
    """
    if options.kernels.plan or (launched_size() > 1 and launched_rank()):
        # Of several processes the first one writes.
        return _run(options, command, None)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{options.model.name}-{options.task.name}-{stamp}"
    with options.output.claimed(name, FOLDER, numbered=True) as place:
        return _run(options, command, place)


def _run(options: CompareOptions, command: str, place: Place | None) -> list[str]:
    spaces = requested_spaces(options)
    approximate = estimator(options.kernels.approximate)
    processes = Processes.launched(resolved_device(options.model.device))
    helps = processes is not None and not processes.is_first
    silent = options.output.silent or helps
    if not silent and options.model.model is None:
        show_lines(["model: embedded MiniLM-L6; name another with --model"])
    task, evaluations, tests = options.task.load(), [], set()
    for number in range(options.task.splits):
        start = time.perf_counter()
        seed = options.task.seed + number
        split = few_shot(task, options.task.shots, options.task.test_size, seed)
        compared = _subject(options, split, spaces, approximate, processes)
        if not silent:
            show_lines(_opening(split, compared.backbone, number, options))
        loaded = time.perf_counter() - start
        resources = replace(
            options.kernels.resources(options.output.cache_folder), processes=processes
        )
        if options.kernels.plan:
            planned = plan(compared.work, resources)
            if not helps:
                _show_plan(compared.work, planned, processes, options.output.json)
            return []
        with progress_bar(silent) as progress:
            evaluation = _evaluated(compared, resources, options, progress)
        if evaluation is not None:
            timing = evaluation.record["timing"]
            evaluation.record["timing"] = {"load": loaded, **timing}
            evaluations.append(evaluation)
            tests.add(split.test)
    if helps or place is None:
        return []
    record = {
        "version": importlib.metadata.version("rocoft-ntk"),
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions("numpy", "scikit-learn"),
        **over_splits(
            [evaluation.record for evaluation in evaluations], same_test=len(tests) == 1
        ),
    }
    with place.filled() as part:
        report.write_report(record, part)
        save_kernels(part / KERNELS, evaluations[0].kernels, _header(record))
    _show(record, place.folder, options)
    return []


def _subject(
    options: CompareOptions,
    split: Split,
    spaces: Sequence[Space],
    approximate: Estimator | None,
    processes: Processes | None,
) -> Comparison:
    """Return what is compared on one split."""
    given, group = options.model, options.kernels
    device = resolved_device(given.device)
    backbone = load_backbone(
        given.model,
        split,
        readout=given.readout,
        head=given.head_init,
        seed=split.seed,
        max_length=given.max_length,
        device=device if processes is None else str(processes.device),
        dtype=getattr(torch, given.dtype),
        load_in=given.load_in,
        offload=given.offload,
    )
    return Comparison.of(
        backbone,
        split,
        spaces,
        with_head=options.spaces.head,
        batch_size=group.batch_size,
        approximate=approximate,
        options=KernelOptions(
            kind=group.kind,
            precision=group.precision,
            implementation=group.implementation,
        ),
    )


def _evaluated(
    compared: Comparison,
    resources: Resources,
    options: CompareOptions,
    progress: Progress | None,
) -> records.Evaluation | None:
    """Compute and measure the kernels of one split; None in a helping process."""
    group, processes = options.kernels, resources.processes
    if resources.memory is not None and group.implementation == "factors":
        # The largest computation needs the most memory: refuse it before the others.
        plan(compared.work, resources)
    # Folds first: they are quick, and may not be possible.
    folds = records.fold_kernels(
        compared, resources, count=group.folds, progress=progress
    )
    computation = kernels(compared.work, resources, progress=progress)
    if processes is not None and not processes.is_first:
        return None
    return records.evaluate(
        compared, computation, folds=folds, offset=group.offset, progress=progress
    )


def requested_spaces(options: CompareOptions) -> list[Space]:
    """Return the spaces that the options ask for, rows 1 3 and columns 1 3 if none.

    Args:
        options: The command's options.

    Returns:
        The spaces, without the full one and without the head.
    """
    given, seed = options.spaces, options.task.seed
    rows, columns = given.rows, given.columns
    others = (given.lora, given.bias, given.norm, given.embeddings, given.space)
    if not rows and not columns and not any(others):
        rows = columns = (1, 3)
    choice: dict[str, Any] = {
        "strategy": given.strategy,
        "seed": seed,
        "rescale": given.rescale,
    }
    spaces: list[Space] = [Rows(r, **choice) for r in rows]
    spaces += [Columns(r, **choice) for r in columns]
    spaces += [LoRA(r, seed=seed, rescale=given.rescale) for r in given.lora]
    spaces += [Norm()] * given.norm + [Embeddings()] * given.embeddings
    spaces += [Bias()] * given.bias
    spaces += [parse_space(text) for text in given.space]
    if given.modules:
        spaces = [space.at(*given.modules) for space in spaces]
    if given.layers:
        spaces = [space.layers(*given.layers) for space in spaces]
    return spaces


def estimator(text: str | None) -> Estimator | None:
    """Return how the full kernel is estimated.

    Args:
        text: Such as ``sketch:4096``, ``rows:64`` or ``columns:64``.

    Returns:
        The estimator; None if there is no text.

    Raises:
        OptionError: If there is no estimator of such a size.
    """
    if text is None:
        return None
    name, _, size = text.partition(":")
    try:
        if name == "sketch":
            return SketchEstimator(int(size))
        return SamplingEstimator(
            int(size), axis="rows" if name == "rows" else "columns"
        )
    except ValueError as error:
        raise OptionError(f"--approximate {text}: {error}") from None


def _header(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a file of kernels says of them."""
    keys = ("version", "command", "model", "task", "kernel")
    return {
        **{key: record[key] for key in keys},
        "rows": "training then test examples; columns: training examples",
        "spaces": {entry["label"]: entry["name"] for entry in record["spaces"]},
    }


def _show_plan(
    work: Work, plan: Plan, processes: Processes | None, as_json: bool
) -> None:
    size = 1 if processes is None else processes.size
    cost = PlanCost.of(work, plan, processes=size)
    if as_json:
        show_json({"plan": cost.lines()})
    else:
        show_lines(cost.lines())


def _show(record: dict[str, Any], folder: Path, options: CompareOptions) -> None:
    if options.output.json:
        show_json(to_json(record))
    elif not options.output.quiet:
        show_tables([report.table(record)], summary_lines(record))
        show_lines([f"report: {folder / 'report.html'}"])


def _opening(
    split: Split, backbone: Backbone, number: int, options: CompareOptions
) -> list[str]:
    """Return what is said of a split before it is computed: all of the first one."""
    task, count = split.task, options.task.splits
    which = f"split {number + 1} of {count}, " if count > 1 else ""
    lines = [
        f"task: {task.name} ({task.source}), {which}{len(split.train)} training and "
        f"{len(split.test)} test examples, labels {', '.join(task.labels)}"
    ]
    if number == 0:
        lines += [f"readout: {backbone.readout}"]
        lines += [f"note: {note}" for note in backbone.notes]
    return lines
