"""GGUF files as folders that every loader reads: weights in float32 and a tokenizer.

transformers reads a GGUF file in seconds to minutes, and only into a model with a
language-model head. So a file is dequantised once, to a folder of
``$XDG_CACHE_HOME/rocoft-ntk`` (``~/.cache/rocoft-ntk``) named by the file's sha256 and
the version of transformers, which decides what is read how. Folders there can be
removed at any time.
"""

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from rocoft.commands import temporary_folder
from rocoft.models.pretrained import BackboneError, first_line

ORIGIN = "gguf.json"
"""What a folder says of the file that it was made of."""


def is_gguf(model: str) -> bool:
    """Return whether a user means a GGUF file by a model.

    Args:
        model: A path or a Hub id.

    Example:
        >>> is_gguf("models/llama.Q4_K_M.gguf"), is_gguf("org/llama-gguf")
        (True, False)
    """
    return model.lower().endswith(".gguf") and not os.path.isdir(model)


def dequantised(file: Path, name: str) -> tuple[Path, tuple[str, ...], str | None]:
    """Return the folder of a GGUF file's model, after making it where there is none.

    Args:
        file: The GGUF file.
        name: The model in errors.

    Returns:
        The folder, remarks for the user, and the licence that the file states.

    Raises:
        BackboneError: If the package gguf is missing, the file does not exist or cannot
            be read, or the folder cannot be written.
    """
    if not file.is_file():
        raise BackboneError(
            f"model {name!r} is no file. Give the path of a GGUF file, a local folder "
            "or a Hub id."
        )
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = _cache() / f"{digest[:16]}-transformers-{transformers.__version__}"
    new = not (folder / ORIGIN).is_file()
    if new:
        origin = _described(file, name) | {"sha256": digest}
        _make(folder, file, name, origin)
    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    notes = []
    if new:
        size = sum(part.stat().st_size for part in folder.iterdir()) / 2**20
        notes.append(
            f"dequantised once from {file.name} to float32, {size:,.0f} MiB in "
            f"{str(folder)!r}, which is read from now on"
        )
    if origin["unread"]:
        notes.append(
            f"{origin['unread']:,} of the {origin['values']:,} values in {file.name} "
            "have no place in transformers' model and were left out"
        )
    return folder, tuple(notes), origin["licence"]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rocoft-ntk"


def _described(file: Path, name: str) -> dict[str, Any]:
    """Return what a file says of itself, after a check that all of it can be read."""
    if find_spec("gguf") is None:
        raise BackboneError(
            f"model {name!r} is a GGUF file, which the package gguf reads; it is not "
            "installed. Install it with pip install gguf."
        )
    import gguf

    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise BackboneError(
                f"{name!r} is no GGUF file, it does not begin with the letters GGUF. "
                "Give a GGUF file, a local folder or a Hub id."
            )
    known = f"gguf {version('gguf')}"
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:
        # The reader checks nothing: whatever numpy says of what is not there.
        raise BackboneError(
            f"{name!r} could not be read ({first_line(error)}). It is cut, damaged, or "
            f"of a form that {known} does not know. Get the file again, or a later "
            "gguf."
        ) from error
    for kind, tensor in {t.tensor_type: t for t in reader.tensors}.items():
        try:
            gguf.dequantize(np.atleast_2d(tensor.data)[:1], kind)
        except Exception as error:
            # Such as NotImplementedError, of a type that is known by name alone.
            raise BackboneError(
                f"{name!r} holds weights in {kind.name}, which {known} does not "
                "dequantise. Give the model in another quantisation, such as Q8_0 or "
                "Q4_K."
            ) from error
    licence = reader.get_field("general.license")
    return {
        "file": file.name,
        "licence": None if licence is None else str(licence.contents()),
        "values": sum(int(tensor.n_elements) for tensor in reader.tensors),
    }


def _make(folder: Path, file: Path, name: str, origin: dict[str, Any]) -> None:
    """Read a file with transformers, and write what came of it as a folder."""
    model, tokenizer = _read(file, name)
    # Tied weights are one parameter here and one tensor there.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    origin["unread"] = max(0, origin["values"] - parameters)
    try:
        with _new_folder(folder) as part, _no_bars():
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            (part / ORIGIN).write_text(json.dumps(origin, indent=1), encoding="utf-8")
    except Exception as error:
        # Errors of the disk come as OSError and as safetensors' own.
        raise BackboneError(
            f"{name!r} dequantised takes {4 * parameters / 2**20:,.0f} MiB, which "
            f"could not be written to {str(folder.parent)!r}: {first_line(error)}. "
            "Make room, or name another cache folder with XDG_CACHE_HOME."
        ) from error


def _read(file: Path, name: str) -> tuple[Any, Any]:
    """Return a file's model, whose weights are ordinary ones, and its tokenizer."""
    options: dict[str, Any] = {
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,  # of files beside it
    }
    plain: dict[str, Any] = {}
    kind: Any = AutoModelForCausalLM
    if hasattr(transformers, "GgufConfig"):
        # Some weights would stay in blocks where there are kernels for them.
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with _no_bars():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
            model, info = kind.from_pretrained(
                file.parent,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
                **plain,
            )
    except Exception as error:
        # Errors of configurations, tokenizers and weights share no base class.
        reason = first_line(error)
        if isinstance(error, KeyError):
            reason = f"it does not state {error.args[0]!r}"
        raise BackboneError(
            f"{name!r} could not be read by transformers {transformers.__version__}: "
            f"{reason}. Give a GGUF file of a causal language model that it supports, "
            "or the model's folder or Hub id."
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise BackboneError(
            f"{name!r} lacks {len(missing)} weights of a {type(model).__name__}, such "
            f"as {missing[0]!r}. If it is one of several parts, join them with "
            "llama-gguf-split --merge."
        )
    # The weights are dequantised, but transformers goes on to call the model quantised
    # and would refuse to save it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _no_bars() -> contextlib.AbstractContextManager[Any]:
    """Keep out bars of transformers, of which that of dequantising obeys no setting."""
    return contextlib.redirect_stderr(io.StringIO())


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder beside its place, and put it there unless another process has."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent, f".{folder.name}.") as part:
        yield part
        try:
            os.rename(part, folder)
        except OSError:
            if not (folder / ORIGIN).is_file():
                raise
