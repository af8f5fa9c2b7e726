"""Which learning rate is the best, and how a grid is extended."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rocoft.training import search as module
from rocoft.training.grid import EXTENSIONS, best_rate, grid_end, next_rate
from rocoft.training.search import TrainingJob, search


@pytest.mark.parametrize(
    ("scores", "best", "end"),
    [
        ({1: 0.1, 2: 0.3, 3: 0.2}, 2, None),
        ({1: 0.3, 2: 0.1, 3: 0.2}, 1, "lowest"),
        ({3: 0.3, 2: 0.1, 1: 0.2}, 3, "highest"),
        # A tie with a rate inside is not an end, and that rate is taken.
        ({1: 0.3, 2: 0.3, 3: 0.2}, 2, None),
        ({1: 0.3, 2: 0.3, 3: 0.3, 4: 0.3}, 2, None),
        ({3: 0.3, 2: 0.3, 1: 0.3}, 2, None),
        # A tie of both ends is one: the first.
        ({1: 0.3, 2: 0.1, 3: 0.3}, 1, "lowest"),
        ({3: 0.3, 2: 0.1, 1: 0.3}, 3, "highest"),
        ({1: 0.3, 2: 0.3}, 1, "lowest"),
        # Beyond the best one, training diverges.
        ({1: 0.1, 2: 0.3, 3: None}, 2, None),
        ({1: None, 2: 0.3, 3: 0.3}, 2, None),
        ({1: None, 2: None}, None, None),
        ({1: 0.3}, 1, None),
    ],
)
def test_the_best_rate_and_the_end_of_the_grid(scores, best, end):
    assert best_rate(scores) == best
    assert grid_end(scores) == end


def test_the_next_rate_has_the_ratio_of_its_neighbours():
    grid = dict.fromkeys((1e-3, 3e-3, 1e-2))
    assert next_rate(grid, "lowest") == pytest.approx(1e-3 / 3, rel=1e-2)
    assert next_rate(grid, "highest") == pytest.approx(1e-2 / 0.3, rel=1e-2)
    assert next_rate(dict.fromkeys((0.0, 1e-3)), "lowest") is None
    assert next_rate(dict.fromkeys((0.0, 1e-3)), "highest") is None
    assert next_rate(dict.fromkeys((0.0, 1e-3, 2e-3)), "highest") == 4e-3


@pytest.fixture
def searched(monkeypatch, tmp_path):
    """Return a search whose trainings are a function from rates to dev scores."""

    class Arguments:
        def __init__(self, learning_rate, **_):
            self.learning_rate = learning_rate

    def train(job, options, patience, file, progress):
        trained.append(options.learning_rate)
        dev = job.build(options.learning_rate)
        dev = None if dev is None else {"accuracy": dev}
        record = {"learning_rate": options.learning_rate, "dev": dev}
        file.write_text(json.dumps({**record, "history": [], "steps": 1}))
        save_file({}, file.with_suffix(".safetensors"))

    class Model:
        def eval(self):
            return self

    trained = []
    monkeypatch.setattr(module, "_train", train)
    monkeypatch.setattr(module, "load_file", lambda _: {})
    monkeypatch.setattr(module, "load_weights", lambda *_: 1.0)
    monkeypatch.setattr(module, "_trainer", lambda *_: Model())
    monkeypatch.setattr(
        module, "_arguments", lambda job, rate, *_: Arguments(learning_rate=rate)
    )

    def do(score, rates, **options):
        trained.clear()

        def build(rate=None):
            return Model() if rate is None else score(rate)

        job = TrainingJob("", build, [], [], None, None, "accuracy", None, None, {})
        result = search(
            *(job, rates),
            arguments={},
            patience=None,
            seed=0,
            folder=tmp_path / "search",
            **{"resume": False, **options},
        )
        return result, list(trained)

    return do


def peak(at):
    return lambda rate: 1 - abs(math.log10(rate / at)) / 10


def test_a_grid_is_extended_until_the_best_is_inside(searched):
    rates = [1e-3, 1e-2, 1e-1]
    result, trained = searched(peak(1e-2), rates)
    assert trained == rates
    assert result.end is None
    result, trained = searched(peak(1e-4), rates)
    assert trained == pytest.approx([*rates, 1e-4, 1e-5])
    assert result.best["learning_rate"] == pytest.approx(1e-4)
    assert result.end is None
    result, trained = searched(peak(1e1), rates)
    assert trained == pytest.approx([*rates, 1.0, 10.0, 100.0])
    assert result.end is None


def test_a_grid_is_extended_three_times_at_most_and_stays_marked(searched):
    result, trained = searched(peak(1e-9), [1e-3, 1e-2, 1e-1])
    assert trained[3:] == pytest.approx([1e-4, 1e-5, 1e-6])
    assert len(trained) == 3 + EXTENSIONS
    assert result.best["learning_rate"] == pytest.approx(1e-6)
    assert result.end == "lowest"
    result, trained = searched(peak(1e-9), [1e-3, 1e-2, 1e-1], extensions=0)
    assert (len(trained), result.end) == (3, "lowest")


def test_a_search_that_diverges_beyond_its_best_rate_is_inside(searched):
    score = lambda rate: None if rate > 0.5 else rate
    result, trained = searched(score, [1e-3, 1e-2, 1e-1])
    assert trained[3:] == [1.0]
    assert (result.best["learning_rate"], result.end) == (0.1, None)


def test_one_rate_is_what_was_asked_for(searched):
    result, trained = searched(peak(1e-9), [1e-3])
    assert (trained, result.end) == ([1e-3], None)


def test_a_resumed_search_trains_only_what_is_missing(searched, tmp_path):
    first, trained = searched(peak(1e-5), [1e-3, 1e-2, 1e-1])
    (tmp_path / "search" / "lr-1e-05.json").unlink()
    again, trained = searched(peak(1e-5), [1e-3, 1e-2, 1e-1], resume=True)
    assert trained == [1e-5]
    assert again.runs == first.runs


@given(
    st.lists(
        st.tuples(st.floats(1e-6, 1.0), st.sampled_from([None, 0.1, 0.2, 0.3])),
        unique_by=lambda pair: pair[0],
        min_size=1,
    )
)
def test_an_end_is_a_strictly_best_end(pairs):
    scores = dict(pairs)
    value = {r: -math.inf if s is None else s for r, s in scores.items()}
    inner = sorted(value)[1:-1]
    top = max(value.values())
    strict = len(scores) > 1 and np.isfinite(top)
    strict = strict and all(value[r] < top for r in inner)
    assert (grid_end(scores) is not None) == bool(strict)
    if np.isfinite(top):
        assert value[best_rate(scores)] == top
