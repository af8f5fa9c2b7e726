"""The cost record as a table in the terminal and as a file."""

from collections.abc import Iterator
from pathlib import Path

from rocoft.commands.files import write_text


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def print_size(row: dict) -> None:
    """Print our figures at one size."""
    print(
        f"\nn = {row['n']}: floor {row['floor_seconds']['median']:.3f} s, "
        f"{row['gflops_of_matrix_product']['median']:.0f} GFLOP/s, full kernel "
        f"{sum(row['full_multiply_adds'].values()) / 1e9:.1f} G multiply-adds, "
        f"bound {row['bound_to_floor']['median']:.2f} floors, "
        f"{row['busy_cores_elsewhere']:.2f} cores busy elsewhere"
    )
    lines = {f"{name} / floor": r for name, r in row["ratio_to_floor"].items()}
    lines["full / (floor + operations)"] = row["full_to_floor_and_operations"]
    lines["thirty / full"] = row["thirty_to_full"]
    for name, r in row["layers_to_whole"].items():
        lines[f"all layers / whole, {name}"] = r
    for name, r in lines.items():
        kept = ""
        if "limit" in r:
            kept = f"  <= {r['limit']}: {'holds' if r['holds'] else 'FAILS'}"
        print(
            f"  {name:30} {r['median']:6.2f}  ({r['min']:.2f} to {r['max']:.2f}){kept}"
        )


def print_peers(row: dict) -> None:
    """Print the peers at one size."""
    print(
        f"\npeers, n = {row['n']}, as ratios to the floor, "
        f"{row['busy_cores_elsewhere']:.2f} cores busy elsewhere"
    )
    for name, tool in row["tools"].items():
        if "skipped" in tool:
            print(f"  {name:32} {tool['skipped'][:90]}")
            continue
        r, error = tool["ratio_to_floor"], tool.get("relative_error")
        agrees = "" if error is None else f"  differs from ours by {error:.1e}"
        print(
            f"  {name:32} {r['median']:6.2f}  ({r['min']:.2f} to {r['max']:.2f})"
            f"{agrees}"
        )


def print_memory(n: int, table: dict[str, dict]) -> None:
    """Print the memory table."""
    print(f"\npeak memory at n = {n}, GiB")
    for name, row in table.items():
        if "skipped" in row:
            print(f"  {name:32} {row['skipped'][:90]}")
            continue
        kept = ""
        if "limit" in row:
            kept = f"  < {row['limit']}: {'holds' if row['holds'] else 'FAILS'}"
        print(
            f"  {name:32} {row['peak']:6.2f}  "
            f"({row['after_loading']:.2f} with the model loaded){kept}"
        )


def failed(record: object, path: str) -> Iterator[str]:
    """Yield where a check does not hold."""
    if isinstance(record, dict):
        if record.get("holds") is False:
            yield path
        for name, value in record.items():
            yield from failed(value, f"{path}/{name}")
    elif isinstance(record, list):
        for value in record:
            own = f"{path}/n={value['n']}" if isinstance(value, dict) else path
            yield from failed(value, own)


def rounded(record: object) -> object:
    """Return the record with five digits to a number."""
    if isinstance(record, float):
        return float(f"{record:.5g}")
    if isinstance(record, dict):
        return {name: rounded(value) for name, value in record.items()}
    if isinstance(record, list):
        return [rounded(value) for value in record]
    return record
