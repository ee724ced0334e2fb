"""A few requests that expose a misleading server before a run pays for its answers.

Some servers accept `echo` and repeat nothing, report a constant, or score the wrong
tokens. A fluent sentence must be likelier than the same words shuffled, two sentences
must not score alike, and every token must have a number.
"""

from gecko_jax.llm import protocol

_PROMPT = "The following sentences are taken from a book.\n\n"
_FLUENT = "The cat sat on the mat and looked out of the window."
_SHUFFLED = "the window mat of on looked sat cat out and the The."
_OTHER = "Water boils at a lower temperature on a high mountain."
_LABELS = ("Paris", "London")
_QUESTION = (
    "Question: What is the capital of England?\nAnswer: London\n\n"
    "Question: What is the capital of France?\nAnswer:"
)


def check(model: protocol.LanguageModel, *, scores: bool, labels: bool) -> None:
    """Sends requests whose answers any correct server agrees on.

    `scores` and `labels` say what the run scores. Raises a ValueError that lists what
    is wrong with the answers, and the remedy.
    """
    errors = []
    sampling = protocol.Sampling(0.0, 1.0, 8, ())
    (text,) = model.generate([_PROMPT + _FLUENT], [0], sampling)
    if isinstance(text, protocol.Failure):
        errors.append(f"generate: {text.reason} ({text.detail})")
    if scores:
        errors += _find_score_errors(model)
    if labels:
        errors += _find_label_errors(model)
    if errors:
        raise ValueError(
            f"{model.name}: the canary requests show that the server's answers cannot "
            "be trusted; see docs/fret.md for the settings of each server:\n  "
            + "\n  ".join(errors)
        )


def _find_score_errors(model: protocol.LanguageModel) -> list[str]:
    sentences = [_FLUENT, _SHUFFLED, _OTHER]
    answers = model.score([_PROMPT.rstrip()] * 3, [f" {text}" for text in sentences])
    scores = [answer for answer in answers if isinstance(answer, protocol.Score)]
    if len(scores) < 3:
        failure = next(a for a in answers if isinstance(a, protocol.Failure))
        return [f"score: {failure.reason} ({failure.detail}); set llm.scoring"]
    fluent, shuffled, other = (score.log_prob for score in scores)
    # A token has at least one character and is rarely longer than a word.
    errors = [
        f"score: {score.num_tokens} tokens for {len(text.split())} words"
        for text, score in zip(sentences, scores, strict=True)
        if not len(text.split()) <= score.num_tokens <= len(text)
    ]
    if fluent in (other, 0.0):
        errors.append(f"score: the same number {fluent} for two sentences")
    elif fluent <= shuffled:
        errors.append(
            f"score: a fluent sentence has {fluent:.2f} nats, its words shuffled "
            f"{shuffled:.2f}"
        )
    return errors


def _find_label_errors(model: protocol.LanguageModel) -> list[str]:
    (answer,) = model.label_log_probs([_QUESTION], _LABELS)
    if isinstance(answer, protocol.Failure):
        return [
            f"labels: {answer.reason} ({answer.detail}); raise llm.top_log_probs, or "
            "use a server that lists log-probabilities"
        ]
    first, second = answer.log_probs
    return [f"labels: the same number {first} for both"] if first == second else []
