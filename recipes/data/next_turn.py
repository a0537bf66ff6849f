"""What a deployment would say after an answer. A stand-in: a user who wants short answers, and says so."""

LONG = 400  # characters


def next_turn(prompt: str, answer: str) -> str | None:
    """The user's next message; None where it gives nothing away."""
    return "That was far too long. Two sentences would have done." if len(answer) > LONG else None


def verdict(prompt: str, answer: str) -> float:
    """+1 where the user was content, -1 where they complained."""
    return -1.0 if next_turn(prompt, answer) else 1.0
