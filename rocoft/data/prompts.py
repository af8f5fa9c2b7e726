"""Prompts and completions, the examples for fine-tuning language models.

A file has one JSON object per line: ``{"prompt", "completion"}``, or
``{"prompt", "choices": [...], "answer": i}`` for multiple choice; the other kinds of
`rocoft.data.files` have columns of these names. Only the completion is learnt. Choices
are compared by the mean log-likelihood of their tokens, so that long ones have no
disadvantage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rocoft.data.files import Row, base_name, check_characters, read_rows, shown
from rocoft.data.templates import TaskError

IGNORED = -100
"""Label of positions without a loss."""


@dataclass(frozen=True)
class Completion:
    """A prompt with its completion, or with several choices.

    Attributes:
        prompt: The prompt.
        choices: Possible completions; only one unless the example is multiple choice.
        answer: Index of the right choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int = 0

    @property
    def completion(self) -> str:
        """The right completion."""
        return self.choices[self.answer]


@dataclass(frozen=True)
class Completions:
    """Training, dev and test examples of a file.

    Attributes:
        name: Name of the file without its ending.
        train: Examples to learn.
        dev: Examples to choose hyperparameters by.
        test: Examples to predict at the end.
        seed: Seed of the draw.
        source: Path of the file.
    """

    name: str
    train: tuple[Completion, ...]
    dev: tuple[Completion, ...]
    test: tuple[Completion, ...]
    seed: int
    source: str

    @property
    def multiple_choice(self) -> bool:
        """Whether the examples have several choices."""
        return len(self.train[0].choices) > 1


def has_prompts(path: Path) -> bool:
    """Return whether a file's first row has a prompt, and no text with a label.

    Args:
        path: The file; one that cannot be read has none.
    """
    try:
        first = next(read_rows(path), None)
    except TaskError:
        # Whoever reads the file says what is wrong with it.
        return False
    columns = set() if first is None else {*first.values}
    labelled = "label" in columns and not columns.isdisjoint({"text", "text_a"})
    return "prompt" in columns and not labelled


def read_completions(path: Path) -> tuple[Completion, ...]:
    """Read prompts with completions or choices.

    Args:
        path: File in this module's format.

    Returns:
        The examples.

    Raises:
        TaskError: If the file cannot be read, or a row has another format.
    """
    rows = list(read_rows(path))
    if not rows:
        raise TaskError(f"file {str(path)!r} holds no examples.")
    examples = tuple(map(_completion, rows))
    kinds = [len(example.choices) > 1 for example in examples]
    if len({*kinds}) > 1:
        other = kinds.index(not kinds[0])
        raise TaskError(
            f"file {str(path)!r} mixes completions and choices: {rows[0].where} and "
            f"{rows[other].where} differ. Give a file with one kind."
        )
    return examples


def split_completions(
    path: Path, *, seed: int, dev_share: float = 0.1, test_size: int | None = None
) -> Completions:
    """Draw training, dev and test examples of a file.

    Args:
        path: The file.
        seed: Seed of the dev examples. Test examples are the same for all seeds.
        dev_share: Share of the training examples that becomes dev examples.
        test_size: Maximum number of test examples; None means a fifth of all.

    Returns:
        The three disjoint parts.

    Raises:
        TaskError: If a part would be empty.
    """
    examples = list(read_completions(path))
    try:
        train, test = train_test_split(examples, test_size=0.2, random_state=0)
        train, dev = train_test_split(train, test_size=dev_share, random_state=seed)
    except ValueError as error:
        raise TaskError(
            f"the {len(examples)} examples of {str(path)!r} cannot be split: {error}"
        ) from None
    parts = (tuple(train), tuple(dev), tuple(test[:test_size]))
    return Completions(base_name(path), *parts, seed, str(path))


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completion: str,
    *,
    max_length: int,
    encoder_decoder: bool,
) -> dict[str, list[int]]:
    """Tokenise a prompt with a completion and the end of the text.

    For a causal model the two are tokenised as one text. The labels begin at the first
    token that differs from the tokens of the prompt alone.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The prompt; its front is cut if the text is too long.
        completion: The completion.
        max_length: Maximum number of tokens; for an encoder-decoder, on each side.
        encoder_decoder: Whether the prompt goes to an encoder.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, ``IGNORED`` on the prompt.

    Raises:
        TaskError: If the completion has no token of its own.
    """
    if encoder_decoder:
        tokens = tokenizer(prompt, truncation=True, max_length=max_length)["input_ids"]
        labels = _with_end(tokenizer, tokenizer(text_target=completion)["input_ids"])
        labels = labels[:max_length]
    else:
        prompt_tokens = without_end(tokenizer, tokenizer(prompt)["input_ids"])
        tokens = _with_end(tokenizer, tokenizer(prompt + completion)["input_ids"])
        pairs = zip(prompt_tokens, tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(prompt_tokens))
        labels = [IGNORED] * same + tokens[same:]
        tokens, labels = tokens[-max_length:], labels[-max_length:]
        labels[0] = IGNORED  # No token before it predicts it.
    ends = {tokenizer.eos_token_id, IGNORED}
    if all(label in ends for label in labels):
        raise TaskError(
            f"completion {completion!r} of prompt {prompt[-40:]!r} has no token of its "
            "own. Give a text that continues the prompt."
        )
    mask = [1] * len(tokens)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def log_likelihoods(logits: Tensor, labels: Tensor, *, shifted: bool) -> Tensor:
    """Return the log-likelihood of the labels of each text.

    Args:
        logits: ``(n, t, vocabulary)``.
        labels: ``(n, t)``, `IGNORED` where nothing is predicted.
        shifted: Whether logits at a position predict the next token, as in a causal
            model.

    Returns:
        ``(n, 2)``, in float32: the sum of log-likelihoods (nat) and the number of
        labels.
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    chosen = labels.clamp(min=0)[..., None]
    values = logits.float().log_softmax(-1).gather(-1, chosen)[..., 0]
    return torch.stack([(values * counted).sum(1), counted.sum(1).float()], dim=1)


def generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_length: int,
    batch_size: int = 16,
) -> list[str]:
    """Return the text that a model generates greedily after each prompt.

    Args:
        model: A transformers model, or a `PeftModel` of one.
        tokenizer: The model's tokenizer.
        prompts: The prompts.
        max_new_tokens: Maximum number of tokens to generate.
        max_length: Maximum number of tokens of the model. For a causal model the front
            of a prompt is cut so that prompt and text fit, for an encoder its end.
        batch_size: Number of prompts in one pass.

    Returns:
        The texts, without the prompts and the end-of-text token.
    """
    encoder_decoder = model.config.is_encoder_decoder
    device = next(model.parameters()).device
    side = tokenizer.padding_side
    if not encoder_decoder:
        max_new_tokens = min(max_new_tokens, max_length - 1)
    texts: list[str] = []
    try:
        # A causal model continues at the end of the prompt, so padding comes first.
        tokenizer.padding_side = "right" if encoder_decoder else "left"
        for start in range(0, len(prompts), batch_size):
            batch_prompts = prompts[start : start + batch_size]
            if encoder_decoder:
                cut = {"truncation": True, "max_length": max_length}
                tokens = [tokenizer(p, **cut)["input_ids"] for p in batch_prompts]
            else:
                tokens = [
                    without_end(tokenizer, tokenizer(p)["input_ids"])
                    for p in batch_prompts
                ]
                tokens = [row[max_new_tokens - max_length :] for row in tokens]
            batch = tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(device)
            with torch.no_grad():
                output = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            if not encoder_decoder:
                output = output[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
    return texts


def _completion(row: Row) -> Completion:
    values, where = row.values, row.where
    prompt, completion = values.get("prompt"), values.get("completion")
    given, answer = values.get("choices"), values.get("answer")
    if not isinstance(prompt, str):
        raise TaskError(
            f"{where} has no text as 'prompt'; this one has "
            f"{', '.join(map(shown, values)) or 'nothing'}."
        )
    if completion and given:
        raise TaskError(
            f"{where} has the 'completion' {shown(completion)} beside 'choices', "
            f"{shown(given)}. Give one of them."
        )
    one = isinstance(completion, str) and bool(completion)
    choices: list[Any] = [completion] if one else given if type(given) is list else []
    if not (one or len(choices) > 1) or not all(
        isinstance(choice, str) and choice for choice in choices
    ):
        raise TaskError(
            f"{where} has neither a text as 'completion' nor two or more as 'choices', "
            f"but {shown(completion)} and {shown(given)}."
        )
    check_characters(prompt, where, "prompt")
    for text in choices:
        check_characters(text, where, "completion" if one else "choices")
    if one:
        return Completion(prompt, tuple(choices))
    if len({choice.strip() for choice in choices}) < len(choices):
        raise TaskError(
            f"{where} has 'choices', {shown(choices)}, of which two are equal "
            "or differ only by blanks around them. Give each once."
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise TaskError(
            f"{where} has answer={shown(answer)}, which is no number of a choice, 0 to "
            f"{len(choices) - 1}."
        )
    return Completion(prompt, tuple(choices), answer)


def without_end(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """Return the tokens of a text that continues, without an end of the text.

    Args:
        tokenizer: The tokenizer.
        tokens: Tokens of one text.
    """
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        return tokens[:-1]
    return tokens


def _with_end(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    tokens = without_end(tokenizer, tokens)
    end = tokenizer.eos_token_id
    return tokens if end is None else [*tokens, end]
