"""The union of the maps that several parts of a space have of one weight."""

from ntk.spaces.maps import LowRank, Map, Sketch, Slices, Whole
from rocoft.models import SelectionError


def unite(
    name: str, first: tuple[Map, ...], second: tuple[Map, ...]
) -> tuple[Map, ...]:
    """Unite maps that select entries of one weight; LoRA pairs are new weights.

    Args:
        name: Name of the weight.
        first: Maps of one part; empty if it does not select the weight.
        second: Maps of another part.

    Returns:
        Maps in which every entry counts once.

    Raises:
        SelectionError: If one part estimates entries that the other selects, or only
            one of them is rescaled.
    """
    if not first:
        return second
    for each in (*first, *second):
        if isinstance(each, Sketch) or (isinstance(each, Slices) and each.odds):
            raise SelectionError(
                f"{name!r} is estimated in one part of a sum and selected in another, "
                "whose entries would count twice. Estimate the whole sum instead."
            )
    selections = [m for m in (*first, *second) if not isinstance(m, LowRank)]
    pairs = dict.fromkeys(m for m in (*first, *second) if isinstance(m, LowRank))
    if len({m.rescale for m in selections if isinstance(m, Slices)}) > 1 or (
        any(isinstance(m, Whole) for m in selections)
        and any(isinstance(m, Slices) and m.rescale for m in selections)
    ):
        raise SelectionError(
            f"{name!r} is selected both with and without rescale=True; entries in both "
            "would have two weights. Rescale all parts of the sum or none."
        )
    if any(isinstance(m, Whole) for m in selections):
        return (Whole(), *pairs)
    slices = [m for m in selections if isinstance(m, Slices)]
    if not slices:
        return tuple(pairs)
    rows = sorted({i for m in slices for i in m.rows})
    columns = sorted({j for m in slices for j in m.columns})
    of, rescale = slices[0].of, slices[0].rescale
    return (Slices(of, tuple(rows), tuple(columns), rescale), *pairs)
