"""Errors of users and machines in one line; mistakes of the program are not hidden."""

import csv
import errno
import json

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from rocoft.commands.failures import DISK, MEMORY, reason


def raised(act):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        act()
    return caught.value


def damaged_tensors():
    load(b"\xff" * 20)


def long_field():
    list(csv.reader([f'"{"x" * 200_000}"']))


def deep_json():
    json.loads("[" * 100_000)


def no_such_yaml():
    yaml.safe_load("a: [")


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (damaged_tensors, "a file of tensors is damaged or incomplete: "),
        (long_field, "a table of text cannot be read: field larger than field limit"),
        (deep_json, "the input is nested too deeply"),
        (no_such_yaml, "a YAML file cannot be read: "),
        (lambda: torch.empty(10**15), MEMORY),
        (lambda: load_file("/nowhere"), "/nowhere"),
        (lambda: save_file({"x": torch.ones(1)}, "/nowhere/x"), "No such file"),
        (lambda: __import__("galore_torch"), "No module named 'galore_torch'. Install"),
    ],
)
def test_errors_as_libraries_raise_them(act, said):
    text = reason(raised(act))
    assert said in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), MEMORY),
        (RuntimeError("std::bad_alloc"), MEMORY),
        (MemoryError(), MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), MEMORY),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/x"), DISK),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DISK),
        (RuntimeError("[enforce fail at inline_container.cc:858] . unexpected"), DISK),
        (RuntimeError("basic_ios::clear: iostream error"), DISK),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DISK),
        (
            TypeError("get_wsd_schedule() missing 1 required positional argument: 'n'"),
            "Choose another --lr-scheduler-type",
        ),
        (TypeError("ReduceLROnPlateau.__init__() got an unexpected keyword"), "Choose"),
        (ValueError("one\n  and two"), "one and two"),
        (ValueError(""), "ValueError"),
        (ValueError("\x1b[2Jlabel\x9b"), r"\x1b[2Jlabel\x9b"),
        (PermissionError(13, "Permission denied", "a [b]"), "'a [b]': Permission"),
    ],
)
def test_errors_by_what_they_say(error, said):
    assert said in reason(error)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        AttributeError("'NoneType' object has no attribute 'x'"),
        AssertionError(),
        TypeError("f() missing 1 required positional argument: 'x'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ImportError("cannot import name 'x' from 'ntk.scale'", name="ntk.scale"),
    ],
)
def test_mistakes_of_the_program_stay_what_they_are(error):
    assert reason(error) is None
