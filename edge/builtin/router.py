"""Trains the router of Skeleton-of-Thought: which questions are answered well as independent points.

    python -m edge.builtin.router --prompts DIR [--labelled FILE.csv ...] [--out router.npz]

The label of a question is its category's in Spec-Bench and Vicuna-80: suitable are those in which Skeleton-of-Thought
did not lose quality (arXiv 2307.15337, section 3.2.2: generic, knowledge, common-sense and counterfactual questions).
Prints accuracy on questions left out (ten folds), and on files of ``label;request`` lines that training never saw.
NumPy alone; same files, same weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.routing import N_BUCKETS, WEIGHTS, Classifier, features

SUITABLE = frozenset({"generic", "knowledge", "common-sense", "counterfactual", "stem", "humanities"})
FILES = ("spec-bench.jsonl", "vicuna-80.jsonl")
FOLDS, SEED = 10, 1234
#: How strongly weights are pulled towards zero.
PENALTY = 1 / 4
N_STEPS = 400

#: The benchmarks have six questions that do not suit for one that does, and few ways of asking; so the plainest ways
#: of asking either kind are added, filled with every subject.
SUBJECTS = (
    "exercise", "small businesses", "remote work", "a healthy diet", "public transport", "learning a language",
    "climate change", "the Roman Empire", "solar energy", "team work", "reading books", "keeping a dog", "social media",
    "inflation", "the immune system", "electric cars", "city life", "vaccines", "good leadership", "bees", "democracy",
    "the internet", "a job interview", "sleep", "tourism", "recycling", "machine learning", "photography", "gardening",
)  # fmt: skip
SUITABLE_FORMS = (
    "What are the benefits of {}?", "What are the main causes and effects of {}?", "How can I get better at {}?",
    "Give me some tips about {}.", "What are the advantages and disadvantages of {}?", "Why is {} important?",
    "What are the key facts about {}?", "How does {} affect people?", "What if {} did not exist?",
    "What are some common mistakes with {}?", "Explain the main aspects of {}.", "List some ideas for {}.",
    "What are the differences between {} and its alternatives?", "Describe the impact of {} on society.",
    "What are the pros and cons of {}?", "What should I know about {}?", "Discuss the role of {} in modern life.",
)  # fmt: skip
UNSUITABLE_FORMS = (
    "Write a poem about {}.", "Write a short story about {}.", "Write an email to my manager about {}.",
    "Write a Python function that stores data about {}.", "Translate this sentence about {} into French.",
    "How many people think about {} every day? Show your calculation.", "When did {} begin?", "Who invented {}?",
    "Summarize the following article about {}.", "If {} costs 12 dollars a week, what does it cost in 5 weeks?",
    "Act as an expert on {} and answer me in character.", "Pretend you are a pirate who loves {}.",
    "Fix the bug in this program about {}.", "Complete this sentence: {} is", "What is the definition of {}?",
    "Write an essay about {}.", "Create a web page about {} in HTML.", "Is {} older than 100 years?",
    "Rewrite this text about {} in a formal tone.", "Solve for x: 3x + 7 = 22, where x is the price of {}.",
)  # fmt: skip


@dataclass(frozen=True)
class Labelled:
    """Questions with 1 where they suit, 0 where they do not, and a weight each."""

    questions: list[str]
    labels: np.ndarray
    weights: np.ndarray

    def take(self, rows: np.ndarray) -> Labelled:
        return Labelled([self.questions[i] for i in rows], self.labels[rows], self.weights[rows])

    def __add__(self, other: Labelled) -> Labelled:
        return Labelled(
            self.questions + other.questions,
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.weights, other.weights]),
        )


def benchmarks(folder: Path) -> Labelled:
    """The first turns of FILES, labelled by category; both labels weigh the same together."""
    asked: dict[str, bool] = {}
    for name in FILES:
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            asked.setdefault(row["turns"][0], row["category"] in SUITABLE)
    return _balanced(list(asked), list(asked.values()), 1.0)


def forms() -> Labelled:
    """The plain questions; together they weigh half of what the benchmarks do."""
    asked = {form.format(s): True for form in SUITABLE_FORMS for s in SUBJECTS}
    asked |= {form.format(s): False for form in UNSUITABLE_FORMS for s in SUBJECTS}
    return _balanced(list(asked), list(asked.values()), 0.5)


def labelled_file(path: Path) -> Labelled:
    """Questions of a file of ``label;request`` rows under a header."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    return _balanced([row["request"] for row in rows], [row["label"] == "1" for row in rows], 1.0)


def _balanced(questions: list[str], suits: Sequence[bool], total: float) -> Labelled:
    labels = np.array(suits, dtype=np.float64)
    share = np.where(labels == 1, labels.sum(), (1 - labels).sum())
    return Labelled(questions, labels, total / (2 * share))


def train(data: Labelled) -> Classifier:
    """Minimises the weighted logistic loss + PENALTY / n |w|^2 by accelerated gradient steps (Nesterov)."""
    rows = np.zeros((len(data.questions), N_BUCKETS))
    for row, question in zip(rows, data.questions, strict=True):
        found = features(question)
        row[found] = len(found) ** -0.5
    share = data.weights / data.weights.sum()
    penalty = PENALTY / len(data.questions)
    weights = np.zeros(N_BUCKETS)
    ahead, bias, bias_ahead = weights, 0.0, 0.0
    # Rows have length 1, so the loss bends at most by 1/2 (the bias counted in).
    step = 1 / (0.5 + penalty)
    for number in range(N_STEPS):
        wrong = share * (1 / (1 + np.exp(-(rows @ ahead + bias_ahead))) - data.labels)
        new, new_bias = ahead - step * (rows.T @ wrong + penalty * ahead), bias_ahead - step * wrong.sum()
        speed = number / (number + 3)
        ahead, bias_ahead = new + speed * (new - weights), float(new_bias + speed * (new_bias - bias))
        weights, bias = new, float(new_bias)
    return Classifier(weights.astype(np.float32), bias)


def scores(data: Labelled, probabilities: np.ndarray) -> dict[str, float]:
    """Shares: of all decisions that are right, of suitable questions found, of found ones that suit."""
    chosen, suits = probabilities >= 0.5, data.labels == 1
    return {
        "questions": float(len(suits)),
        "suitable": float(suits.sum()),
        "accuracy": float((chosen == suits).mean()),
        "recall": float((chosen & suits).sum() / max(1, suits.sum())),
        "precision": float((chosen & suits).sum() / max(1, chosen.sum())),
    }


def _probabilities(classifier: Classifier, data: Labelled) -> np.ndarray:
    return np.array([classifier.probability(question) for question in data.questions])


def held_out(data: Labelled, extra: Labelled) -> dict[str, float]:
    """Scores on the benchmarks' questions, each by a classifier that was trained without it."""
    order = np.random.default_rng(SEED).permutation(len(data.questions))
    probabilities = np.empty(len(order))
    for fold in range(FOLDS):
        left_out = order[fold::FOLDS]
        kept = np.setdiff1d(order, left_out)
        probabilities[left_out] = _probabilities(train(data.take(kept) + extra), data.take(left_out))
    return scores(data, probabilities)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m edge.builtin.router", description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, help=f"folder of {' and '.join(FILES)}")
    parser.add_argument(
        "--labelled", type=Path, action="append", default=[], help="label;request rows to test on"
    )
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args(argv)
    data, extra = benchmarks(args.prompts), forms()
    classifier = train(data + extra)
    classifier.save(args.out)
    found = {"held out": held_out(data, extra)}
    for path in args.labelled:
        other = labelled_file(path)
        found[path.name] = scores(other, _probabilities(classifier, other))
    for name, one in found.items():
        print(
            f"{name}: {one['questions']:.0f} questions, {one['suitable']:.0f} suitable; accuracy "
            f"{one['accuracy']:.1%}, recall {one['recall']:.1%}, precision {one['precision']:.1%}"
        )
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
