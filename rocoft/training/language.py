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

from rocoft.commands import Progress
from rocoft.data import (
    Completion,
    Completions,
    encode_completion,
    generated,
    log_likelihoods,
    text_scores,
)
from rocoft.models import (
    DATA_STRATEGIES,
    BackboneError,
    allow_padding,
    check_direction,
    length_limit,
    load_pretrained,
    locate,
)
from rocoft.training.checkpoints import search_folder
from rocoft.training.methods import (
    LEARNING_RATES,
    Method,
    apply_method,
    left_out,
    parse_method,
)
from rocoft.training.readout_trainer import OrderedTrainer, TrainingError
from rocoft.training.search import TrainingJob, search, seeded_generators
from rocoft.training.trainer import (
    FineTuned,
    calibration_examples,
    check_weight_decay,
    count_parameters,
    search_record,
)


@dataclass(frozen=True)
class LanguageModel:
    """A causal or encoder-decoder language model with its tokenizer.

    Attributes:
        name: Hub id, local folder or GGUF file, or the title of an embedded model.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        max_length: Maximum number of tokens of an example.
        notes: Remarks for the user on where the model comes from.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    notes: tuple[str, ...] = ()

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder, with the prompt in the encoder."""
        return bool(self.model.config.is_encoder_decoder)

    def truncated(self, examples: Sequence[Completion]) -> int:
        """Return how many examples are longer than ``max_length`` tokens."""
        unlimited = replace(self, max_length=10**9)
        rows = (_encoded(unlimited, e.prompt, e.completion) for e in examples)
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
        model: Hub id, local folder, GGUF file or an embedded model, see
            `rocoft.models.locate`.
        max_length: Maximum number of tokens of an example; the model's own limit if
            that is lower.
        device: Device of the model.
        dtype: Type of its parameters.

    Returns:
        The model, encoder-decoder or causal by its configuration.

    Raises:
        BackboneError: If it cannot be loaded, its checkpoint lacks the output layer, or
            it is no causal model and no encoder-decoder, as BERT.
    """
    place = locate(model)
    path, name = place.path, place.name
    config = load_pretrained(AutoConfig, path, name)
    tokenizer = load_pretrained(AutoTokenizer, path, name)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    loaded, info = load_pretrained(
        kind, path, name, dtype=dtype, output_loading_info=True
    )
    if lacking := sorted(map(str, info["missing_keys"])):
        # transformers has drawn them at random, and an adapter would not hold them.
        raise BackboneError(
            f"the checkpoint of {name!r} lacks {len(lacking)} weights of a language "
            f"model, such as {lacking[0]!r}, which would be random. Give a checkpoint "
            "with its language-model head."
        )
    loaded = loaded.to(device).eval()
    allow_padding(tokenizer, loaded)
    if not encoder_decoder:
        check_direction(loaded, name, causal=True)
    limit = min(max_length, length_limit(config, tokenizer))
    return LanguageModel(name, loaded, tokenizer, limit, place.notes)


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
    if there are choices, else by the mean log-likelihood of a token. Without choices,
    completions of the test examples are also generated greedily and compared with the
    expected ones.

    Args:
        start: The model; it is left untouched.
        data: The examples.
        method: The method, or its text as in `rocoft.training.methods`. The output
            layer is trained only by ``full`` and, if it is not tied to the embeddings,
            by ``head``.
        lrs: Peak learning rates; None means those of `methods.LEARNING_RATES`. Of
            several, the best may be at an end: then rates beyond it are tried too.
        arguments: Arguments of transformers' `TrainingArguments` by name, over those of
            `search.PROTOCOL`.
        patience: Evaluations without a new best on dev after which training stops;
            None trains to the end.
        seed: Seed of LoRA's initialisation, the order of examples and dropout.
        folder: Folder for checkpoints; None means a temporary one.
        resume: Continue the search in ``folder``.
        progress: Called at every step.

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
    metric = "accuracy" if data.multiple_choice else "log_likelihood"
    with seeded_generators(seed), search_folder(folder) as used_folder:
        result = search(
            TrainingJob(
                name=f"{method!s}, {data.name}, {start.name}",
                build=lambda: _prepared(start, data, method),
                train=[_encoded(start, e.prompt, e.completion) for e in data.train],
                dev=_encoded_choices(start, data.dev),
                collate=DataCollatorForSeq2Seq(start.tokenizer),
                compute_metrics=lambda p: _compute_metrics(p, data.dev),
                primary_metric=metric,
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
            folder=used_folder,
            resume=resume,
            progress=progress,
        )
        sums = result.trainer.predict(_encoded_choices(start, data.test)).predictions
    model = result.model
    test = _scores(sums, data.test)
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
        "metric": metric,
        "test": test,
        "parameters": count_parameters(model, start.model),
        **search_record(result),
    }
    record["warnings"] += left_out(start.model, method)
    logits = _by_choice(sums, data.test)
    answers = torch.tensor([example.answer for example in data.test])
    return FineTuned(model, method, logits, answers, record)


class CompletionTrainer(OrderedTrainer):
    """A Trainer whose predictions are two numbers for each text, not its logits.

    They are the sum and the count of its labels' log-likelihoods. The loss is the mean
    over all labels of an optimizer step, over all its batches.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The Trainer passes the count of labels only if this is set.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and the two numbers on request.

        Args:
            model: The model.
            inputs: A batch with ``labels``.
            return_outputs: Whether to return ``{"logits": (n, 2)}`` as well.
            num_items_in_batch: Number of labels in all batches of the optimizer step.

        Returns:
            The loss, or loss and outputs.
        """
        assert num_items_in_batch is not None
        labels = inputs["labels"]
        config: Any = getattr(self.model, "config", None)
        shifted = not config.is_encoder_decoder
        # Encoder-decoders make the decoder's inputs from the labels.
        outputs = model(
            **{k: v for k, v in inputs.items() if k != "labels" or not shifted}
        )
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
            # Gradients are averaged over processes, but labels are counted over all.
            loss = loss * self.accelerator.num_processes
        return (loss, {"logits": sums}) if return_outputs else loss


def _prepared(start: LanguageModel, data: Completions, method: Method) -> nn.Module:
    batches: list[dict[str, Tensor]] = []
    if method.strategy in DATA_STRATEGIES:
        collate = DataCollatorForSeq2Seq(start.tokenizer)
        batches = [
            dict(collate([_encoded(start, e.prompt, e.completion)]))
            for e in calibration_examples(data.train)
        ]
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


def _encoded_choices(start: LanguageModel, examples: Sequence[Completion]) -> Any:
    return [_encoded(start, e.prompt, choice) for e in examples for choice in e.choices]


def _by_choice(sums: Any, examples: Sequence[Completion]) -> Tensor:
    """Return ``(n, choices)`` mean log-likelihoods of a token, padded with -inf."""
    totals, counts = torch.as_tensor(sums, dtype=torch.float64).T
    means = (totals / counts).split([len(e.choices) for e in examples])
    return nn.utils.rnn.pad_sequence(
        list(means), batch_first=True, padding_value=float("-inf")
    )


def _compute_metrics(
    prediction: EvalPrediction, examples: Sequence[Completion]
) -> dict[str, float]:
    if not np.isfinite(prediction.predictions).all():
        return dict.fromkeys(("accuracy", "log_likelihood"), float("-inf"))
    return _scores(prediction.predictions, examples)


def _scores(sums: Any, examples: Sequence[Completion]) -> dict[str, float]:
    """Return the mean log-likelihood of right tokens, and the accuracy of choices."""
    answers = torch.tensor([example.answer for example in examples])
    starts = np.cumsum([0] + [len(example.choices) for example in examples[:-1]])
    right = torch.as_tensor(sums, dtype=torch.float64)[
        torch.from_numpy(starts) + answers
    ]
    scores = {"log_likelihood": float(right[:, 0].sum() / right[:, 1].sum())}
    if len(examples[0].choices) > 1:
        likeliest = _by_choice(sums, examples).argmax(dim=1)
        scores["accuracy"] = float((likeliest == answers).double().mean())
    return scores


def _generation_scores(
    model: nn.Module, start: LanguageModel, examples: Sequence[Completion]
) -> dict[str, float]:
    labels = [_encoded(start, e.prompt, e.completion)["labels"] for e in examples]
    texts = generated(
        model,
        start.tokenizer,
        [example.prompt for example in examples],
        max_new_tokens=max(sum(label >= 0 for label in row) for row in labels),
        max_length=start.max_length,
    )
    return text_scores(texts, [example.completion for example in examples])
