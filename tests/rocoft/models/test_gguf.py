"""GGUF files: the same numbers as the folder, once made and then read, or one line."""

import json
import re
import shutil
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import transformers as tf
from checkpoints import SENTIMENT, outputs, reviews
from commands import exit_code
from gguf_files import Q, finish, pair
from peft import PeftModel
from tasks_on_disk import write_reviews

from ntk import compare, empirical_ntk, evaluate
from ntk.spaces import Full, Rows
from rocoft import train
from rocoft.models import gguf as reading
from rocoft.models import load_backbone, locate
from rocoft.models.pretrained import BackboneError

KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "F16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files and folders by family and quantisation, and a cache folder."""
    base = tmp_path_factory.mktemp("gguf")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pairs = {
            (family, kind): pair(base / family / kind, family, kind)
            for family in ("llama", "gemma2")
            for kind in KINDS
        }
    data = write_reviews(base / "words.tsv")
    return SimpleNamespace(pairs=pairs, cache=base / "cache", data=data)


@pytest.fixture(autouse=True)
def cache(made, monkeypatch):
    """Folders are kept between tests, away from the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.cache))
    return made.cache


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A cache folder that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "fresh"))
    return tmp_path / "fresh" / "rocoft-ntk"


def both(made, family, kind, **options):
    file, folder = made.pairs[family, kind]
    split = reviews(6, prompt=SENTIMENT, test=1)
    return split, *(load_backbone(str(p), split, **options) for p in (file, folder))


# The same numbers.


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_those_of_the_folder(made, family, kind):
    split, found, expected = both(made, family, kind)
    assert found.readout == expected.readout == "causal"
    kernels = []
    for backbone in (found, expected):
        batches, _ = backbone.encode(split.train, 4)
        spaces = {"full": Full(), "rows": Rows(3)}
        kernels.append(empirical_ntk(backbone.module, batches, space=spaces))
    for name, kernel in kernels[0].items():
        assert kernel.diagonal().abs().min() > 0
        assert torch.equal(kernel, kernels[1][name])


def test_a_head_equals_that_of_the_folder(made):
    split, found, expected = both(made, "llama", "Q4_1", readout="head", head="random")
    assert torch.equal(outputs(found, split.train), outputs(expected, split.train))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_weights_are_those_of_transformers_own_reading(made, family):
    file, _ = made.pairs[family, "Q4_0"]
    read = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    kept = tf.AutoModelForCausalLM.from_pretrained(locate(str(file)).path)
    expected, found = read.state_dict(), kept.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert found["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "text", ["it was great .", "  two  spaces", "a\nÉ🙂", "", "<bos>x<|end|>"]
)
def test_tokens_are_those_of_the_file_and_of_the_folder(made, family, text):
    file, twin = made.pairs[family, "Q8_0"]
    found = tf.AutoTokenizer.from_pretrained(locate(str(file)).path)
    read = tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    expected = tf.AutoTokenizer.from_pretrained(twin)
    tokens = found(text)["input_ids"]
    assert tokens == read(text)["input_ids"] == expected(text)["input_ids"]
    assert (tokens[:1] == [2]) == (family == "gemma2")
    assert found.decode(tokens) == read.decode(tokens)
    for name in ("bos_token", "eos_token", "pad_token", "padding_side"):
        assert getattr(found, name) == getattr(read, name)
    assert found.bos_token == expected.bos_token
    assert found.eos_token == expected.eos_token


# Once made, then read.


def test_the_first_use_says_what_is_made_and_later_ones_read_it(
    made, fresh, monkeypatch
):
    file = str(made.pairs["llama", "Q4_1"][0])
    first = locate(file)
    assert first.name == file
    assert first.notes[0] == "licence of the weights: cc0-1.0"
    (made_once,) = first.notes[1:]
    size = sum(f.stat().st_size for f in (fresh / first.path).iterdir())
    assert made_once.startswith("dequantised once from tiny-llama.Q4_1.gguf to float32")
    assert f"{size / 2**20:,.0f} MiB in {first.path!r}" in made_once
    assert [p.name for p in fresh.iterdir()] == [
        (fresh / first.path).name  # Nothing is left beside it.
    ]

    def none(*_, **__):
        raise AssertionError

    # Neither the package nor a second reading.
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    monkeypatch.setattr(reading, "_make", none)
    again = locate(file)
    assert (again.path, again.notes) == (first.path, first.notes[:1])


def test_another_file_of_the_same_name_has_its_own_folder(made, fresh, tmp_path):
    paths = []
    for kind in ("Q4_0", "Q8_0"):
        shutil.copy(made.pairs["gemma2", kind][0], tmp_path / "m.gguf")
        paths.append(locate(str(tmp_path / "m.gguf")).path)
    assert paths[0] != paths[1]
    assert len(list(fresh.iterdir())) == 2


def test_a_process_that_was_faster_wins(made, fresh, monkeypatch):
    file = str(made.pairs["gemma2", "F16"][0])
    read = reading._read

    def slow(*given):
        monkeypatch.setattr(reading, "_read", read)
        locate(file)
        return read(*given)

    monkeypatch.setattr(reading, "_read", slow)
    path = locate(file).path
    assert [str(p) for p in fresh.iterdir()] == [path]
    assert tf.AutoModelForCausalLM.from_pretrained(path)


def test_values_without_a_place_are_counted(made, fresh, tmp_path):
    file = tmp_path / "more.gguf"
    rewritten(made.pairs["llama", "Q8_0"][0], file, more={"rope_freqs.weight": 32})
    notes = locate(str(file)).notes
    assert any(
        note.startswith("32 of the ") and "more.gguf have no place" in note
        for note in notes
    )


# Commands.


def test_compare_says_where_the_weights_are_from(made, fresh, tmp_path, capsys):
    file = made.pairs["llama", "Q4_1"][0]
    options = ["--data", made.data, "--shots", 2, "--test-size", 4, "--rows", 1]
    options += ["--readout", "head", "--output", tmp_path / "runs"]
    assert exit_code(compare.main, "--model", file, *options) == 0
    printed = capsys.readouterr()
    assert "note: licence of the weights: cc0-1.0" in printed.out
    assert "note: dequantised once from tiny-llama.Q4_1.gguf" in printed.out
    assert "de-quantizing" not in printed.err
    (folder,) = (tmp_path / "runs").glob("tiny-llama.Q4-1-words-*")
    record = json.loads((folder / "report.json").read_text())
    assert record["model"]["name"] == str(file)


@pytest.mark.parametrize("method", ["rows:2", "lora:2"])
def test_adapters_load_on_what_they_name(made, tmp_path, method):
    file = made.pairs["llama", "Q8_0"][0]
    options = ["--data", made.data, "--readout", "head", "--lr", "1e-2", "--quiet"]
    options += ["--max_steps", 2, "--device", "cpu", "--method", method]
    code = exit_code(
        train.main, "--model", file, *options, "--output", tmp_path, "--name", "a"
    )
    assert code == 0
    adapter = tmp_path / "a" / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())
    base = base["base_model_name_or_path"]
    assert base == locate(str(file)).path
    model = tf.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    tuned = PeftModel.from_pretrained(model, adapter).eval()
    # The card's own way gives the same model.
    code = (adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f"locate({str(file)!r}).path" in code
    there: dict = {}
    exec(code.replace("this folder", str(adapter)), there)
    tokenizer = tf.AutoTokenizer.from_pretrained(adapter)
    batch = tokenizer("the film was fine", return_tensors="pt")
    with torch.no_grad():
        expected, found = tuned(**batch).logits, there["model"].eval()(**batch).logits
    assert torch.equal(expected, found)


def test_a_language_model_of_prompts(made, tmp_path, capsys):
    rows = [{"prompt": f"film {i} was", "completion": " great"} for i in range(8)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = made.pairs["gemma2", "Q8_0"][0]
    options = ["--data", data, "--rows", 1, "--lr", "1e-3", "--max_steps", 1]
    options += ["--output", tmp_path, "--name", "a", "--device", "cpu"]
    assert exit_code(train.main, "--model", file, *options) == 0
    assert "note: licence of the weights: cc0-1.0" in capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "results.json").read_text())
    assert record["model"] == str(file)


# What cannot be read: one line, exit 2.


def rewritten(source, target, *, architecture=None, without=(), more=None, kind=None):
    """Copy a file with another architecture, parts left out, added or retyped."""
    reader = gguf.GGUFReader(source)
    was = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture or was)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if any(name.startswith(part) for part in without):
            continue
        name = name.replace(was, architecture or was)
        element = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        if any(tensor.name.startswith(part) for part in without):
            continue
        if kind is not None and tensor.name.startswith("token_embd"):
            size = gguf.GGML_QUANT_SIZES[kind][1]
            raw = np.zeros((tensor.shape[1], size), np.uint8)
            writer.add_tensor(tensor.name, raw, raw_dtype=kind)
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, count in (more or {}).items():
        writer.add_tensor(name, np.ones(count, np.float32))
    finish(writer)


def cut(source, target, *, share):
    whole = source.read_bytes()
    target.write_bytes(whole[: int(share * len(whole))])


BAD = {
    "cut in the weights": (
        lambda s, t: cut(s, t, share=0.9),
        "could not be read .*cut",
    ),
    "cut in the header": (
        lambda s, t: cut(s, t, share=0.001),
        "could not be read .*cut",
    ),
    "empty": (lambda s, t: t.write_bytes(b""), "is no GGUF file"),
    "foreign": (lambda s, t: t.write_bytes(b"PK\3\4" * 99), "is no GGUF file"),
    "magic alone": (lambda s, t: t.write_bytes(b"GGUF"), "could not be read"),
    "absent": (lambda s, t: None, "is no file.*local folder or a Hub id"),
    "quantisation": (
        lambda s, t: rewritten(s, t, kind=Q.Q8_K),
        "weights in Q8_K, which gguf .* does not dequantise.*Q8_0",
    ),
    "architecture": (
        lambda s, t: rewritten(s, t, architecture="rwkv7"),
        "architecture rwkv7 is not supported",
    ),
    "no tokenizer": (
        lambda s, t: rewritten(s, t, without=["tokenizer."]),
        "could not be read by transformers",
    ),
    "no sizes": (
        lambda s, t: rewritten(s, t, without=["llama.embedding_length"]),
        "could not be read by transformers",
    ),
    "one of several parts": (
        lambda s, t: rewritten(s, t, without=["blk.1."]),
        "lacks 9 weights of a LlamaForCausalLM.*llama-gguf-split",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", [compare, evaluate, train])
def test_bad_files_are_one_line(made, fresh, tmp_path, capsys, command, case):
    write, expected = BAD[case]
    file = tmp_path / "bad.gguf"
    write(made.pairs["llama", "Q8_0"][0], file)
    capsys.readouterr()
    options = ["--model", file, "--output", tmp_path / "r", "--quiet"]
    assert exit_code(command.main, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(file) in line
    assert re.search(expected, line)
    assert not fresh.exists()


def test_a_quantisation_that_gguf_has_no_name_for(made, fresh, tmp_path):
    source = made.pairs["llama", "Q8_0"][0]
    name = b"blk.0.attn_q.weight"
    raw = bytearray(source.read_bytes())
    # After a name: the number of dimensions, two of them, and the type.
    place = raw.index(name) + len(name) + 4 + 16
    assert raw[place] == Q.Q8_0
    raw[place] = 211
    (tmp_path / "new.gguf").write_bytes(raw)
    with pytest.raises(BackboneError, match=r"211.? is not a valid .*a later gguf"):
        locate(str(tmp_path / "new.gguf"))


def test_without_the_package_the_error_says_how_to_get_it(
    made, fresh, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    file = made.pairs["llama", "Q8_0"][0]
    assert exit_code(compare.main, "--model", file, "--output", tmp_path / "r") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Install it with pip install gguf.")


def test_a_cache_that_cannot_be_written(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = made.pairs["llama", "Q8_0"][0]
    assert exit_code(compare.main, "--model", file, "--output", tmp_path / "r") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes 4 MiB, which could not be written" in line
    assert line.endswith("XDG_CACHE_HOME.")


def test_a_full_disk_leaves_nothing(made, fresh, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(BackboneError, match="No space left.*Make room"):
        locate(str(made.pairs["llama", "Q8_0"][0]))
    assert list(fresh.iterdir()) == []
