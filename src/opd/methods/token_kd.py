"""Token-level knowledge distillation: the teacher's distribution at every token of recorded answers."""

from __future__ import annotations

from opd.divergences import Divergence
from opd.layered import Kind, Pairs
from opd.loss import layers, match, nll
from opd.method import TEACHER, Method, NotNegative, Positive, Share, one


def token_kd(
    *,
    share: Share = 0.5,
    temperature: Positive = 1.0,
    hidden: NotNegative = 0.0,
    hidden_kind: Kind = "cosine",
    hidden_layers: Pairs = ((-1, -1),),
) -> Method:
    """Cross entropy on recorded answers, mixed with the forward KL to the teacher at each of their tokens: off-policy.

    Speaks: data. Judge: teacher; says DENSE (nobody at `share` 0, which is `sft`).
    Loss: mean over tokens of (1 - share) [-log student(y_t)] + share tau^2 KL(p_t || q_t), p and q the teacher's and
    the student's distributions at the temperature tau, in nats; the cross entropy is at temperature 1. `hidden` above 0
    adds as much of the distance between hidden states, `cosine` or `mse`, averaged over `hidden_layers`: pairs of the
    student's and the teacher's (0 the embeddings, n after layer n, -1 the last). The student's pass a linear map first,
    which learns with it, so that widths may differ; the teacher then says LAYERS.
    Gradient: in the student's logits tau (q - p) of the second part: tau^2 keeps its size as tau grows. In the limit it
    is the difference of the two sides' logits, each less its mean over the vocabulary, over the vocabulary's size.
    Source: Hinton et al., arXiv 1503.02531, section 2; for sequences Kim and Rush, arXiv 1606.07947, section 3.1; the
    share of one half is that of the code of MiniLLM, arXiv 2306.08543.
    Differs from the paper in: the KL where MiniLLM's code has the soft cross entropy, which is larger by the teacher's
    entropy and has the same gradient.
    """
    soft = Divergence("forward_kl", temperature=temperature, tau_squared=True)
    loss = (1 - share) * nll() + share * match(TEACHER, soft)
    inside = hidden * layers(TEACHER, hidden_layers, hidden_kind)
    return Method(speaks=one("data"), loss=loss + inside, goal="text")
