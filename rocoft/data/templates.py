"""Prompts of language models: templates and label words of the tasks.

Masked models
    Templates and label words are those of LM-BFF (Gao et al. 2021) and of the kernel
    view of fine-tuning (Malladi et al. 2023).
Causal models
    They read from left to right, so the whole example comes first and the label word
    directly after the template, with a space of its own. A line names each part, as
    decoders have seen it in their training texts. Label words are common and short: one
    token for the tokenizers of GPT-2's kind, and most likely for others; a word of
    several is read all the same (`rocoft.models.words`).

Causal prompts were chosen among five to eight templates and two to seven sets of words
a task, on about 160 training examples, balanced over labels, by the zero-shot outputs
of SmolLM2-135M-Instruct: a high accuracy, with and without each output's mean
subtracted, by words that do not all fall into one class. On another draw of 120
training examples (standard error up to 5 points) the accuracies in %, without and with
the mean subtracted, beside those of the masked prompt cut at its mask (for TREC its
words after ``Question: {a} Type:``):

=========  ======  ===========  ==================
task       chance  causal       masked, cut
=========  ======  ===========  ==================
reviews    50      86.7, 90.0   55.8, 76.7
sst2       50      79.2, 81.7   51.7, 66.7
mr         50      74.2, 76.7   50.8, 60.8
cr         50      81.7, 85.0   52.5, 80.8
mpqa       50      71.7, 79.2   50.0, 62.5
sst5       20      25.0, 30.0   23.3, 35.0
subj       50      71.7, 80.8   52.5, 62.5
trec       17      48.3, 53.3   23.3, 43.3
ag_news    25      77.5, 79.2   65.8, 67.5
cola       50      51.7, 50.0   46.7, 49.2
=========  ======  ===========  ==================

Without training, this model tells pairs of sentences, and whether a sentence is
grammatical, no better than by chance with any candidate (differences within two
standard errors); there a plain question with common words was taken.
"""

from dataclasses import dataclass, replace


class TaskError(ValueError):
    """A task that cannot be read, or lacks what was asked for."""


@dataclass(frozen=True)
class Prompt:
    """Templates and label words for a language model.

    Attributes:
        template: Text with ``{a}``, ``{b}`` for pairs, and ``{mask}``.
        words: One word for each label, in order.
        causal: Template for causal models, which predict the word after it.
        causal_words: The words for causal models; empty means ``words``.
    """

    template: str
    words: tuple[str, ...]
    causal: str
    causal_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            self.template.format(a="", b="", mask="")
            self.causal.format(a="", b="")
        except (KeyError, IndexError, ValueError) as error:
            raise TaskError(
                f"template {self.template!r} has a field other than {{a}}, {{b}} and "
                f"{{mask}}: {error}."
            ) from None
        if "{a}" not in self.template or self.template.count("{mask}") != 1:
            raise TaskError(
                f"template {self.template!r} must hold {{a}} and {{mask}} once, such "
                "as '{a} It was {mask}.'"
            )

    def words_for(self, *, causal: bool) -> tuple[str, ...]:
        """Return the label words of a causal or of a masked model."""
        return (causal and self.causal_words) or self.words


_SENTIMENT = Prompt(
    "{a} It was {mask}.",
    ("terrible", "great"),
    "Review: {a}\nSentiment:",
    ("negative", "positive"),
)
_ENTAILMENT = "{a}? {mask}, {b}"
_FOLLOWS = (
    "Text: {a}\nStatement: {b}\nDoes the statement follow from the text?\nAnswer:"
)
_ANSWERS = "Question: {a}\nText: {b}\nDoes the text answer the question?\nAnswer:"
_SAME = "First: {a}\nSecond: {b}\nDo both mean the same?\nAnswer:"
_ASK_SAME = (
    "Question 1: {a}\nQuestion 2: {b}\nDo the two questions ask the same?\nAnswer:"
)

PROMPTS = {
    "reviews": _SENTIMENT,
    "sst2": _SENTIMENT,
    "mr": _SENTIMENT,
    "cr": _SENTIMENT,
    "mpqa": replace(_SENTIMENT, causal="Phrase: {a}\nSentiment:"),
    "sst5": replace(
        _SENTIMENT,
        words=("terrible", "bad", "okay", "good", "great"),
        causal_words=(),
    ),
    "subj": Prompt(
        "{a} This is {mask}.",
        ("subjective", "objective"),
        # Its subjective texts are from reviews, its objective ones from plots.
        "Text: {a}\nThis text is part of a movie",
        ("review", "plot"),
    ),
    "cola": Prompt(
        "{a} This is {mask}.",
        ("incorrect", "correct"),
        "Sentence: {a}\nGrammar:",
        ("wrong", "correct"),
    ),
    "trec": Prompt(
        "{mask}: {a}",
        ("Description", "Entity", "Expression", "Human", "Location", "Number"),
        "Question: {a}\nThe answer is a",
        ("description", "thing", "word", "person", "place", "number"),
    ),
    "ag_news": Prompt(
        "{a} This article is about {mask} news.",
        ("world", "sports", "business", "tech"),
        "{a} This article is about",
        ("politics", "sports", "business", "technology"),
    ),
    "mnli": Prompt(_ENTAILMENT, ("Yes", "Maybe", "No"), _FOLLOWS),
    "snli": Prompt(_ENTAILMENT, ("Yes", "Maybe", "No"), _FOLLOWS),
    "qnli": Prompt(_ENTAILMENT, ("Yes", "No"), _ANSWERS),
    "rte": Prompt(_ENTAILMENT, ("Yes", "No"), _FOLLOWS),
    "mrpc": Prompt("{a} {mask}, {b}", ("No", "Yes"), _SAME),
    "qqp": Prompt("{a} {mask}, {b}", ("No", "Yes"), _ASK_SAME),
}
