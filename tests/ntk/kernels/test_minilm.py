"""Kernels of real pretrained weights in float32."""

import copy
from pathlib import Path

import pytest

from ntk.kernels.empirical import empirical_ntk
from ntk.spaces.kinds import Bias, Columns, Embeddings, Full, Head, LoRA, Norm, Rows
from rocoft.data.splits import few_shot
from rocoft.data.tasks import load_task
from rocoft.models.architecture import Architecture
from rocoft.models.backbone import load_backbone
from rocoft.models.location import locate
from rocoft.models.readouts import MeanPooled

SPACES = {
    "full": Full(),
    "rows": Rows(3),
    "random rows": Rows(3, strategy="random", seed=1, rescale=True),
    "columns": Columns(3),
    "lora": LoRA(4, alpha=8),
    "bias": Bias(),
    "norm": Norm(),
    "embeddings": Embeddings(),
    "head": Head(),
    "sum": Rows(1).at("query", "value").layers(0, -1) + Bias() + Head(),
}
LAYER = "encoder.layer.{}."
SAMPLE = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    "embeddings.LayerNorm.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.attention.self.query.bias",
    "encoder.layer.3.attention.self.key.bias",
    "encoder.layer.5.attention.self.value.weight",
    "encoder.layer.2.attention.output.dense.weight",
    "encoder.layer.2.attention.output.LayerNorm.bias",
    "encoder.layer.1.intermediate.dense.weight",
    "encoder.layer.4.output.dense.weight",
    "encoder.layer.5.output.LayerNorm.weight",
    "classifier.weight",
    "classifier.bias",
)
NO_GRADIENT = "encoder.layer.3.attention.self.key.bias"
"""The softmax is invariant to a shift of all keys: these gradients are rounding."""


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(
    scope="module",
    params=[
        "MeanPooled",
        pytest.param("BertForSequenceClassification", marks=pytest.mark.slow),
    ],
)
def case(request, tmp_path_factory):
    """A model with one padded batch of three examples."""
    split = few_shot(load_task("reviews"), 4, 3, 0)
    folder = None
    if request.param != "MeanPooled":
        # Without the pooling configuration it loads as a plain encoder.
        folder = tmp_path_factory.mktemp("minilm")
        for file in Path(locate("minilm").path).iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
    backbone = load_backbone(None if folder is None else str(folder), split)
    assert type(backbone.module).__name__ == request.param
    assert isinstance(backbone.module, MeanPooled) == (folder is None)
    (batch,), _ = backbone.encode((split.train[0], split.train[4], split.test[0]), 3)
    assert not batch["attention_mask"].all()
    return backbone.module, batch


@pytest.fixture(scope="module")
def blocks(case):
    """Each sampled parameter as its own space."""
    names = list(Architecture(case[0]).parameters)
    found = {}
    for end in SAMPLE:
        (name,) = [n for n in names if n.endswith(end)]
        found[end] = Full().at(name)
    return found


@pytest.fixture(scope="module")
def by_factors(case, blocks):
    return empirical_ntk(*case, space={**SPACES, **blocks})


def test_factors_agree_with_the_jacobian(case, blocks, by_factors):
    """In float32, for all spaces and single parameters of every kind."""
    expected = empirical_ntk(
        *case, space={**SPACES, **blocks}, implementation="jacobian"
    )
    for name in SPACES:
        # The definition sums 22 million products of "full" in float32.
        tolerance = 3e-5 if name == "full" else 1e-5
        assert relative_error(by_factors[name], expected[name]) < tolerance, name
    scale = expected["full"].norm()
    for name in SAMPLE:
        if name == NO_GRADIENT:
            assert by_factors[name].norm() < 1e-9 * scale
            assert expected[name].norm() < 1e-9 * scale
        else:
            assert expected[name].norm() > 1e-9 * scale, name
            error = relative_error(by_factors[name], expected[name])
            assert error < (3e-5 if name.endswith("dense.weight") else 1e-5), name


def test_float32_is_enough(case, blocks, by_factors):
    model, batch = case
    spaces = {**SPACES, **blocks}
    exact = empirical_ntk(copy.deepcopy(model).double(), batch, space=spaces)
    for name in spaces:
        if name != NO_GRADIENT:
            assert relative_error(by_factors[name], exact[name]) < 1e-5, name
    assert exact[NO_GRADIENT].norm() < 1e-20 * exact["full"].norm()


def test_blocks_add_up(case, by_factors):
    """The kernel of a sum of disjoint spaces is the sum of their kernels."""
    parts = {"classifier": Full().at("classifier"), "body": Full().at("encoder")}
    tables = Full().at("embeddings")
    kernels = empirical_ntk(*case, space={**parts, "embeddings": tables})
    if "pooler" in " ".join(dict(case[0].named_parameters())):
        kernels["pooler"] = empirical_ntk(*case, space=Full().at("pooler"))
    assert relative_error(sum(kernels.values()), by_factors["full"]) < 1e-6


def test_embedded_files_equal_the_published_ones():
    folder = Path(locate("minilm").path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        Path(file).name for file in folder.iterdir()
    }
