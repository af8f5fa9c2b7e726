"""The tokens of label words, and the module that reads them off a language model.

One token each
    The outputs are the words' logits (`readouts.LabelWords`).
Several tokens, causal model
    The outputs are the words' log-likelihoods after the prompt, summed over their
    tokens (`readouts.PromptedSequences`), if a single word has more than one. The two
    readouts differ only by what all outputs of an example share, its log-normaliser,
    where all words have one token. Long words are less likely: give words of about the
    same length.
Several tokens, masked model
    Refused: the prompt has one mask.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

from transformers import PreTrainedTokenizerBase

from rocoft.commands import Readout
from rocoft.models.pretrained import BackboneError
from rocoft.models.readouts import (
    AtPositions,
    LabelWords,
    Prompted,
    PromptedSequences,
)

_ADVICE = "Give other words with --label-words, or use --readout head."


def word_tokens(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], readout: Readout
) -> list[list[int]]:
    """Return the tokens of each label word as it is inside a sentence, after a space.

    Args:
        tokenizer: The model's tokenizer.
        words: The label words.
        readout: ``"masked"`` or ``"causal"``.

    Returns:
        For each word its tokens; one unless the readout is causal.

    Raises:
        BackboneError: If a word has a token that the model does not know, several for a
            masked model, the tokens of another word, or begins with another word.
    """
    if readout == "masked" and tokenizer.mask_token is None:
        raise BackboneError(
            "readout='masked' needs a tokenizer with a mask token. Use 'causal' or "
            "'head'."
        )
    first = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = []
    for word in words:
        both = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
        tokens = both[len(first) :] if both[: len(first)] == first else both
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        several = readout == "masked" and len(tokens) > 1
        if not tokens or several or tokens == [tokenizer.unk_token_id]:
            raise BackboneError(
                f"label word {word!r} is not one token of this model but {pieces}. "
                f"{_ADVICE}"
            )
        if tokenizer.unk_token_id in tokens:
            raise BackboneError(
                f"label word {word!r} has parts that this model does not know: "
                f"{pieces}. {_ADVICE}"
            )
        found.append(tokens)
    if len(set(map(tuple, found))) != len(found):
        raise BackboneError(
            f"label words {', '.join(map(repr, words))} are not distinct tokens of "
            f"this model. {_ADVICE}"
        )
    for (word, tokens), (other, longer) in permutations(
        zip(words, found, strict=True), 2
    ):
        if longer[: len(tokens)] == tokens:
            raise BackboneError(
                f"label word {other!r} begins with label word {word!r}, so it is never "
                f"the more likely one. {_ADVICE}"
            )
    return found


def prompted(module: Any, words: Sequence[Sequence[int]]) -> Prompted:
    """Return a language model with the outputs of its label words.

    Args:
        module: The language model; its output layer is replaced.
        words: Tokens of each word, from `word_tokens`.

    Returns:
        The module, on the device of the model.
    """
    output = module.get_output_embeddings()
    if all(len(tokens) == 1 for tokens in words):
        single = [tokens[0] for tokens in words]
        label_words = LabelWords(output, single).to(output.weight.device)
        module.set_output_embeddings(label_words)
        return Prompted(module)
    module.set_output_embeddings(AtPositions(output))
    return PromptedSequences(module, words)
