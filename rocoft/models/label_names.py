"""The outputs of a checkpoint's own head, in the order of the task's labels.

A checkpoint names its outputs in its configuration's ``id2label``; one trained on
``negative, positive`` and one on ``positive, negative`` differ in the order of their
outputs. Names are compared without case and punctuation, and with these synonyms:
`SYNONYMS`. Numbers (``LABEL_0``, ``class 1``, ``2``) name no label but a number.

=======================================  =======================================
names                                    outputs
=======================================  =======================================
every label has its name                 in the order of the task, by name
numbers, those of labels that are such   in the order of the task, by number
some do, each at its label's place       as in the checkpoint, with a note
some do, at another label's place        refused: any order would be a guess
none does                                as in the checkpoint, with a note
other numbers, in ascending order        as in the checkpoint
other numbers, in no order               as other names, see above
the labels are no numbers                as in the checkpoint
=======================================  =======================================
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rocoft.models.architecture import Architecture
from rocoft.models.pretrained import BackboneError

SYNONYMS = (
    ("negative", "neg"),
    ("positive", "pos"),
    ("entailment", "entail", "entailed", "entails"),
    ("contradiction", "contradict", "contradicts", "contradictory"),
    ("not entailment", "non entailment", "no entailment"),
    ("description", "desc"),
    ("entity", "enty"),
    ("abbreviation", "abbr"),
    ("human", "hum"),
    ("location", "loc"),
    ("number", "num", "numeric"),
    ("sci tech", "science technology"),
)
"""Names with the same meaning: abbreviations and spellings that checkpoints use."""

_STANDARD = {name: group[0] for group in SYNONYMS for name in group}
_NUMBER = re.compile(r"(?:label|class)? ?(\d{1,300})")
_SIGNED = re.compile(r"[+-]?\d{1,300}(?:\.0)?")


def name_outputs(module: Any, labels: Sequence[str]) -> list[str]:
    """Put a head's outputs in the order of a task's labels, by their names.

    The rows of the head's last layer are permuted, and ``id2label`` with them, so that
    kernels, training and saved models need to know nothing of it.

    Args:
        module: A transformers classifier with as many outputs as labels; it is changed.
        labels: Names of the task's labels.

    Returns:
        Notes for the user.

    Raises:
        BackboneError: If names match in part and contradict the order, or the last
            layer cannot be permuted.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        ...     intermediate_size=8, id2label={0: "POS", 1: "NEG"},
        ... )
        >>> model = transformers.BertForSequenceClassification(config)
        >>> name_outputs(model, ("neg", "pos"))
        ["the checkpoint's outputs (POS, NEG) are put in the task's order (neg, pos)"]
        >>> model.config.id2label
        {0: 'NEG', 1: 'POS'}
    """
    found: Mapping[int, str] = getattr(module.config, "id2label", None) or {}
    own = [str(found.get(i, i)) for i in range(len(labels))]
    meant, asked = list(map(_meaning, own)), list(map(_meaning, labels))
    if len(labels) < 2:
        return []
    lists = f"({', '.join(own)}) {{}} ({', '.join(labels)})"
    numbers, wanted = _numbers(own), _numbers(labels)
    if numbers and wanted:
        if sorted(numbers) != sorted(wanted) and numbers == sorted({*numbers}):
            # Counted from another begin: LABEL_0, LABEL_1 for 1, 2.
            return []
        meant, asked = list(map(str, numbers)), list(map(str, wanted))
    elif numbers:
        return []
    if sorted(meant) == sorted(asked) and len(set(asked)) == len(asked):
        order = [meant.index(name) for name in asked]
        if order == sorted(order):
            return []
        _permute(module, order, labels)
        module.config.id2label = {i: own[j] for i, j in enumerate(order)}
        module.config.label2id = {own[j]: i for i, j in enumerate(order)}
        together = lists.format("are put in the task's order")
        return [f"the checkpoint's outputs {together}"]
    displaced = [n for i, n in enumerate(asked) if n in meant and meant[i] != n]
    if displaced:
        raise BackboneError(
            f"the checkpoint's outputs {lists.format('and the labels of the task')} "
            f"match in part: {', '.join(map(repr, displaced))} is at another place, so "
            "no order of the outputs is safe. Correct id2label in the checkpoint's "
            "config.json, or the label names of the task."
        )
    return [
        "names differ: the checkpoint's outputs "
        f"{lists.format('are taken, in this order, for the labels')}"
    ]


def _meaning(name: str) -> str:
    words = " ".join(re.findall(r"\w+", name.casefold().replace("_", " ")))
    return _STANDARD.get(words, words)


def _numbers(names: Sequence[str]) -> list[int]:
    """Return the numbers that names are; empty if one is none."""
    found = []
    for name in names:
        if _SIGNED.fullmatch(name.strip()):
            found.append(int(name.partition(".")[0]))
        elif number := _NUMBER.fullmatch(_meaning(name)):
            found.append(int(number[1]))
        else:
            return []
    return found


def _permute(module: Any, order: Sequence[int], labels: Sequence[str]) -> None:
    found = Architecture(module).output_layer(len(labels))
    layer = None if found is None else found[1]
    if layer is None or not layer.weight.is_floating_point():
        raise BackboneError(
            f"the outputs of {type(module).__name__} are in another order than the "
            f"task's labels ({', '.join(labels)}), and its last layer "
            f"{'is not linear' if layer is None else 'is quantised'}, so it cannot be "
            "reordered. Reorder the labels of the task"
            + ("." if layer is None else ", or load the model without quantisation.")
        )
    with torch.no_grad():
        layer.weight.copy_(layer.weight[list(order)])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias[list(order)])
