"""What a comparison of arms says, in sentences chosen by what was measured: is it memory?

Two intervals decide, one over documents and one over seeds; a gain is only called one where both exclude 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .differences import Difference, Outcome, outcome, side, signed, span, value
from .verdict import MINUS, percent

Results = dict[str, Any]
LACKS = {  # what each control goes without
    "capacity_1": "looking up",
    "frozen_random": "learned rows",
    "shuffled": "the rows of its own text",
}
RIVALS = {
    "bigram": "the simplest memory, a hashed bigram embedding added at the input",
    "ffn": "the branch’s parameters in the feed-forward layers",
    "iso_flop": "the branch’s arithmetic in the feed-forward layers",
    "moe": "a mixture of experts with as many parameters",
}
SIZES = {"flops": "FLOPs", "active": "active parameters", "total": "total parameters"}
EQUAL = 0.01  # ratios this near 1 count as equal


def verdict(results: Results) -> list[str]:
    """Paragraphs: the effect, what the controls leave of it, what else would have done as well, and where it lies."""
    paragraphs = [effect(results), controls(results), rivals(results), *concentration(results)]
    return [paragraph for paragraph in paragraphs if paragraph]


def less(results: Results, arm: str, other: str) -> Difference | None:
    """An arm's loss less another's; arms that are the same model as another one stand for it. None for one and the same."""
    arm, other = (results["arms"][name].get("same_as") or name for name in (arm, other))
    return results["arms"][arm]["less"].get(other)


def helps(results: Results) -> bool:
    """Whether the memory's gain over base lies beyond its interval over documents, and over seeds where there are several."""
    return settled(_less(results, "engram", "base")) == "lower"


def settled(difference: Difference) -> Outcome:
    """Which side of 0 both intervals lie on; "same" where they do not agree. One seed has no interval to ask."""
    over_documents, over_seeds = outcome(difference), difference["seed_interval"]
    return over_documents if over_seeds is None or side(over_seeds) == over_documents else "same"


def equal_in(results: Results, arm: str) -> list[str]:
    """What an arm shares with engram within a hundredth, besides tokens."""
    ratios = results["arms"][arm]["against_engram"]
    return [name for key, name in SIZES.items() if abs(ratios[key] - 1) <= EQUAL]


def effect(results: Results) -> str:
    """What the memory does to the held-out loss."""
    difference = _less(results, "engram", "base")
    by, seeds = f"{abs(difference['difference']):.3f} nats a token", difference["seeds"]
    over = f"95 % interval over documents {span(difference['interval'])}" if difference["interval"] else "one document"
    match outcome(difference):
        case "same":
            return (
                f"This comparison shows no effect of the memory: held-out loss differs from base by {signed(difference)} nats a "
                "token, which is within its uncertainty."
            )
        case "higher":
            return f"The memory did not help: it raises held-out loss by {by} ({over})."
    lowers = f"The memory lowers held-out loss by {by} ({over}"
    if difference["seed_interval"] is None:
        return f"{lowers}). One seed was trained: how far another one would move this is not known."
    over_seeds = f"over {len(seeds)} seeds {span(difference['seed_interval'])}"
    if not helps(results):
        below = sum(one < 0 for one in seeds)
        return (
            f"{lowers}), but not reliably: {over_seeds}. {below} of {len(seeds)} seeds are lower; more would have to be "
            "trained to tell."
        )
    return f"{lowers}; {over_seeds}). Neither interval holds 0."


def controls(results: Results) -> str:
    """How much of the gain is left without addresses or without learned content, and what follows."""
    found = [name for name in LACKS if name in results["arms"]]
    if not found:
        return (
            "No control was trained: whether it is looking up that makes the difference cannot be said from these arms."
        )
    if not helps(results):
        differences = _listed([f"{name} {_shown(_less(results, name, 'base'))}" for name in found])
        return f"The controls differ from base by: {differences}."
    whole = _less(results, "engram", "base")["difference"]
    shares = {name: _less(results, name, "base")["difference"] / whole for name in found}
    sentences = [_left(results, name, shares[name]) for name in found]
    level = [name for name in found if settled(_less(results, "engram", name)) != "lower"]
    most = [name for name in found if shares[name] >= 0.5 and name not in level]
    if level:
        conclusion = (
            f"The memory is not below {_listed(level)}, so this comparison does not show that "
            f"{_listed([LACKS[name] for name in level])} made the difference."
        )
    elif most:
        conclusion = f"Most of the gain does without {_listed([LACKS[name] for name in most])}."
    else:
        conclusion = f"So most of the gain needs {_listed([LACKS[name] for name in found])}"
        conclusion += (
            ": that is memory, not the branch around it." if {"capacity_1", "frozen_random"} <= {*found} else "."
        )
    return " ".join([*sentences, conclusion])


def _left(results: Results, control: str, share: float) -> str:
    difference = _less(results, control, "base")
    without = f"Without {LACKS[control]} ({control})"
    match settled(difference):
        case "lower":
            return f"{without} {percent(share)} of the gain is left: {_shown(difference)}."
        case "higher":
            return f"{without} the model is worse than base: {_shown(difference)}."
        case "same":
            return f"{without} nothing measurable is left of the gain: {_shown(difference)}."


def rivals(results: Results) -> str:
    """Other uses of the same parameters or the same arithmetic."""
    sentences = []
    for name, what in RIVALS.items():
        difference = less(results, "engram", name) if name in results["arms"] else None
        if difference is None:
            continue
        said = {
            "lower": "the memory is lower",
            "higher": "the memory is higher, which speaks against it",
            "same": "the memory cannot be told apart from it",
        }[settled(difference)]
        equal = equal_in(results, name)
        at = f", at equal {_listed(equal)}" if equal else ""
        sentences.append(f"Against {what} ({name}{at}), {said}: {_shown(difference)}.")
    return " ".join(sentences)


def concentration(results: Results) -> list[str]:
    """Whether the gain lies where training had shown the n-gram that is looked up; nothing without a gain."""
    kinds = [kind for kind in results.get("slices", ()) if kind.startswith("seen ") and kind.endswith("-gram")]
    return [said for kind in kinds if (said := _concentration(results["slices"][kind], kind.removeprefix("seen ")))]


def _concentration(sliced: Results, ngram: str) -> str:
    own, labels, shares = sliced["arms"]["engram"], sliced["labels"], sliced["share"]
    seen = [row for row, label in enumerate(labels) if label not in ("start", "0") and own["less_base"][row]]
    unseen = own["less_base"][labels.index("0")] if "0" in labels else None
    if not seen or unseen is None or own["part"][seen[0]] is None:
        return ""
    share, part = (sum(values[row] for row in seen) for values in (shares, own["part"]))
    there = sum(shares[row] * own["less_base"][row]["difference"] for row in seen) / share
    said = (
        (
            f"{percent(share)} of the held-out tokens follow a {ngram} that training had shown, and hold "
            f"{percent(part)} of the gain: {there:+.3f} nats a token there, {signed(unseen)} where it had not been shown"
        )
        .replace("+-", "-")
        .replace(" -", f" {MINUS}")
    )
    return f"{said}. {_where(there, unseen, ngram)}"


def _where(there: float, unseen: Difference, ngram: str) -> str:
    """there: mean change where the n-gram was seen; unseen: the change where it was not."""
    low, high = unseen["interval"] or (float("-inf"), float("inf"))
    if there < low:
        return f"The gain is concentrated behind {ngram}s that were seen, as a memory’s should be."
    if there > high:
        return f"The gain is larger where the {ngram} was never seen: something other than memory is at work."
    return f"The gain is not measurably larger where the {ngram} was seen: this does not look like memory."


def _less(results: Results, arm: str, other: str) -> Difference:
    """`less` for arms that are there, and not the same."""
    difference = less(results, arm, other)
    return difference or {"difference": 0.0, "interval": None, "seeds": [], "seed_interval": None}


def _shown(difference: Difference) -> str:
    """A difference and its interval over documents, and over seeds where that is what leaves it open."""
    documents, seeds = difference["interval"], difference["seed_interval"]
    if not documents or not seeds or side(seeds) == side(documents):
        return signed(difference)
    return f"{value(difference)} (documents {span(documents)}, seeds {span(seeds)})"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
