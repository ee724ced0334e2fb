"""The canary: a few requests that show a misleading server before it costs anything.

Some servers accept `echo` and repeat nothing, some report a constant, some score the
wrong tokens. A fluent sentence must be likelier than the same words shuffled; two
sentences must not score alike; every token must have its number.
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
    """Asks the model what any right one answers alike.

    Args:
        model: Answers through the server that the run will use.
        scores: Continuations will be scored.
        labels: Labels will be scored.

    Raises:
        ValueError: Names what is wrong with the answers, and the remedy.
    """
    faults = []
    sampling = protocol.Sampling(0.0, 1.0, 8, ())
    (text,) = model.generate([_PROMPT + _FLUENT], [0], sampling)
    if isinstance(text, protocol.Failure):
        faults.append(f"generate: {text.reason} ({text.detail})")
    if scores:
        faults += _score_faults(model)
    if labels:
        faults += _label_faults(model)
    if faults:
        raise ValueError(
            f"{model.name}: the canary found that the server's answers cannot be "
            "trusted; see docs/fret.md for the settings of each server:\n  "
            + "\n  ".join(faults)
        )


def _score_faults(model: protocol.LanguageModel) -> list[str]:
    sentences = [_FLUENT, _SHUFFLED, _OTHER]
    answers = model.score([_PROMPT.rstrip()] * 3, [f" {text}" for text in sentences])
    scores = [answer for answer in answers if isinstance(answer, protocol.Score)]
    if len(scores) < 3:
        failed = next(a for a in answers if isinstance(a, protocol.Failure))
        return [f"score: {failed.reason} ({failed.detail}); set llm.scoring"]
    fluent, shuffled, other = scores
    faults = []
    # A token is at least a character and rarely longer than a word.
    for text, score in zip(sentences, scores, strict=True):
        if not len(text.split()) <= score.num_tokens <= len(text):
            faults.append(
                f"score: {score.num_tokens} tokens for {len(text.split())} words"
            )
    if fluent.log_prob == other.log_prob or fluent.log_prob == 0.0:
        faults.append(f"score: the same number {fluent.log_prob} for two sentences")
    elif fluent.log_prob <= shuffled.log_prob:
        faults.append(
            f"score: a fluent sentence has {fluent.log_prob:.2f} nats, its words "
            f"shuffled {shuffled.log_prob:.2f}"
        )
    return faults


def _label_faults(model: protocol.LanguageModel) -> list[str]:
    answers = model.label_log_probs([_QUESTION], _LABELS)
    if isinstance(answers[0], protocol.Failure):
        return [
            f"labels: {answers[0].reason} ({answers[0].detail}); raise "
            "llm.top_log_probs, or ask a server that lists log-probabilities"
        ]
    first, second = answers[0].log_probs
    return [f"labels: the same number {first} for both"] if first == second else []
