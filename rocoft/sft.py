"""Supervised fine-tuning of language models on prompts and completions."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from rocoft.backbone import allow_padding, length_limit
from rocoft.console import Progress
from rocoft.language import (
    Completion,
    Completions,
    encode_completion,
    generated,
    log_likelihoods,
)
from rocoft.methods import LEARNING_RATES, Method, apply_method, parse_method
from rocoft.metrics import text_scores
from rocoft.pretrained import load_pretrained
from rocoft.search import (
    Job,
    OrderedTrainer,
    TrainingError,
    own_random_numbers,
    search,
    search_folder,
)
from rocoft.selection import DATA_STRATEGIES
from rocoft.trainer import (
    FineTuned,
    calibration_examples,
    check_weight_decay,
    count_parameters,
    searched,
)


@dataclass(frozen=True)
class LanguageModel:
    """A causal or encoder-decoder language model with its tokenizer.

    Attributes:
        name: As the user named it.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        max_length: Most tokens of an example.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @property
    def encoder_decoder(self) -> bool:
        """Whether the prompt goes to an encoder."""
        return bool(self.model.config.is_encoder_decoder)

    def truncated(self, examples: Sequence[Completion]) -> int:
        """Return how many examples are longer than ``max_length`` tokens."""
        whole = replace(self, max_length=10**9)
        rows = (_encoded(whole, e.prompt, e.completion) for e in examples)
        lengths = (max(len(row["input_ids"]), len(row["labels"])) for row in rows)
        return sum(length > self.max_length for length in lengths)


def load_language_model(
    model: str,
    *,
    max_length: int = 512,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """Load a language model.

    Args:
        model: Hub id or local folder.
        max_length: Most tokens of an example, or what the model takes if that is less.
        device: Where to put it.
        dtype: Of its parameters.

    Returns:
        The model; an encoder-decoder if its configuration says so, else a causal one.

    Raises:
        BackboneError: If it cannot be loaded.
    """
    config = load_pretrained(AutoConfig, model, model)
    tokenizer = load_pretrained(AutoTokenizer, model, model)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    loaded = load_pretrained(kind, model, model, dtype=dtype).to(device).eval()
    allow_padding(tokenizer, loaded)
    limit = min(max_length, length_limit(config, tokenizer))
    return LanguageModel(model, loaded, tokenizer, limit)


def fine_tune_language(
    start: LanguageModel,
    data: Completions,
    method: Method | str,
    *,
    lrs: Sequence[float] | None = None,
    arguments: Mapping[str, Any] | None = None,
    patience: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> FineTuned:
    """Fine-tune a copy of a language model on the completions' tokens.

    Learning rate and checkpoint are chosen on dev: by accuracy of the likeliest choice
    if there are choices, else by the mean log-likelihood of a token. On the test
    examples completions are also generated, greedily, and compared with the expected
    ones.

    Args:
        start: The model; it is left untouched.
        data: The examples.
        method: What is trained, as `rocoft.methods` describes; the output layer is
            only by ``full`` and, if it is not tied to the embeddings, ``head``.
        lrs: As for `trainer.fine_tune`, as are the other arguments.
        arguments: More arguments of transformers' `TrainingArguments`.
        patience: Evaluations without a new best after which training stops.
        seed: Of LoRA's initialisation, the order of examples and dropout.
        folder: For checkpoints; None means a temporary one.
        resume: Continue in ``folder``.
        progress: Told of every step.

    Returns:
        The model; its ``logits`` are ``(n, choices)`` mean log-likelihoods of a token
        (nat), minus infinity where an example has fewer choices.

    Raises:
        TrainingError: If a setting is refused, or every training diverged.
        SelectionError: If the method selects nothing of the model.
    """
    method = parse_method(method) if isinstance(method, str) else method
    if method.kind == "probe":
        raise TrainingError(
            "method 'probe' fits a classification head; a language model has none."
        )
    check_weight_decay(method, arguments or {})
    readout = "seq2seq" if start.encoder_decoder else "causal"
    dev = _every_choice(start, data.dev)
    with own_random_numbers(seed), search_folder(folder) as place:
        found = search(
            Job(
                name=f"{method!s}, {data.name}, {start.name}",
                build=lambda: _prepared(start, data, method),
                train=[_encoded(start, e.prompt, e.completion) for e in data.train],
                dev=dev,
                collate=DataCollatorForSeq2Seq(start.tokenizer),
                judge=lambda p: _judge(p, data.dev),
                chief="accuracy" if data.multiple_choice else "log_likelihood",
                device=next(start.model.parameters()).device,
                trainer=(CompletionTrainer, TrainingArguments),
                details={
                    "split_seed": data.seed,
                    "readout": readout,
                    "choices": [len(example.choices) for example in data.dev],
                    "answers": [example.answer for example in data.dev],
                },
            ),
            LEARNING_RATES[method.kind] if lrs is None else lrs,
            arguments=arguments or {},
            patience=patience,
            seed=seed,
            folder=place,
            resume=resume,
            progress=progress,
        )
        predicted = found.trainer.predict(_every_choice(start, data.test))
    model = found.model
    test = _scores(predicted.predictions, data.test)
    if not data.multiple_choice:
        test |= _generation_scores(model, start, data.test)
    record = {
        "method": str(method),
        "seed": seed,
        "split_seed": data.seed,
        "task": data.name,
        "labels": [],
        "source": data.source,
        "model": start.name,
        "readout": readout,
        "examples": {
            part: len(getattr(data, part)) for part in ("train", "dev", "test")
        },
        "metric": "accuracy" if data.multiple_choice else "log_likelihood",
        "test": test,
        "parameters": count_parameters(model, start.model),
        **searched(found),
    }
    logits = _by_choice(predicted.predictions, data.test)
    answers = torch.tensor([example.answer for example in data.test])
    return FineTuned(model, method, logits, answers, record)


class CompletionTrainer(OrderedTrainer):
    """A Trainer whose evaluations keep two numbers of each text, not its logits.

    They are the sum of its labels' log-likelihoods and their count. The loss is the
    mean over all labels of an optimizer step, however many batches they lie in.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Else labels are not counted for models whose own loss takes no count.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and the two numbers if outputs are asked for.

        Args:
            model: The model.
            inputs: A batch with ``labels``.
            return_outputs: Whether to return ``{"logits": (n, 2)}`` as well.
            num_items_in_batch: Labels in all batches of the optimizer step.

        Returns:
            The loss, or a pair.
        """
        assert num_items_in_batch is not None
        labels = inputs["labels"]
        config: Any = getattr(self.model, "config", None)
        shifted = not config.is_encoder_decoder
        # Encoder-decoders make the decoder's inputs of them.
        given = {k: v for k, v in inputs.items() if k != "labels" or not shifted}
        outputs = model(**given)
        sums = log_likelihoods(outputs.logits, labels, shifted=shifted)
        loss = -sums[:, 0].sum() / num_items_in_batch
        if self.label_smoother is not None:
            loss = self.label_smoother(
                outputs,
                labels,
                shift_labels=shifted,
                num_items_in_batch=num_items_in_batch,
            )
        if self.args.average_tokens_across_devices:
            # Gradients are averaged over the processes, labels counted in all.
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": sums}) if return_outputs else loss


def _prepared(start: LanguageModel, data: Completions, method: Method) -> nn.Module:
    batches: list[dict[str, Tensor]] = []
    if method.strategy in DATA_STRATEGIES:
        some = calibration_examples(data.train)
        rows = [_encoded(start, e.prompt, e.completion) for e in some]
        collate = DataCollatorForSeq2Seq(start.tokenizer)
        batches = [dict(collate([row])) for row in rows]
    copied = copy.deepcopy(start.model)
    return apply_method(copied, method, train_head=False, batches=batches)


def _encoded(
    start: LanguageModel, prompt: str, completion: str
) -> dict[str, list[int]]:
    return encode_completion(
        start.tokenizer,
        prompt,
        completion,
        max_length=start.max_length,
        encoder_decoder=start.encoder_decoder,
    )


def _every_choice(start: LanguageModel, examples: Sequence[Completion]) -> Any:
    return [_encoded(start, e.prompt, choice) for e in examples for choice in e.choices]


def _by_choice(sums: Any, examples: Sequence[Completion]) -> Tensor:
    """Return mean log-likelihoods, one row for each example."""
    totals, counts = torch.as_tensor(sums, dtype=torch.float64).T
    means = (totals / counts).split([len(e.choices) for e in examples])
    return nn.utils.rnn.pad_sequence(
        list(means), batch_first=True, padding_value=float("-inf")
    )


def _judge(p: EvalPrediction, examples: Sequence[Completion]) -> dict[str, float]:
    if not np.isfinite(p.predictions).all():
        return dict.fromkeys(("accuracy", "log_likelihood"), float("-inf"))
    return _scores(p.predictions, examples)


def _scores(sums: Any, examples: Sequence[Completion]) -> dict[str, float]:
    """Return the accuracy of the likeliest choice, and how likely right tokens are."""
    answers = torch.tensor([example.answer for example in examples])
    starts = np.cumsum([0] + [len(example.choices) for example in examples[:-1]])
    right = torch.as_tensor(sums, dtype=torch.float64)[
        torch.from_numpy(starts) + answers
    ]
    found = {"log_likelihood": float(right[:, 0].sum() / right[:, 1].sum())}
    if len(examples[0].choices) > 1:
        likeliest = _by_choice(sums, examples).argmax(dim=1)
        found["accuracy"] = float((likeliest == answers).double().mean())
    return found


def _generation_scores(
    model: nn.Module, start: LanguageModel, examples: Sequence[Completion]
) -> dict[str, float]:
    lengths = [len(_labels(_encoded(start, e.prompt, e.completion))) for e in examples]
    texts = generated(
        model,
        start.tokenizer,
        [example.prompt for example in examples],
        max_new_tokens=max(lengths),
        max_length=start.max_length,
    )
    return text_scores(texts, [example.completion for example in examples])


def _labels(encoded: Mapping[str, list[int]]) -> list[int]:
    return [label for label in encoded["labels"] if label >= 0]
