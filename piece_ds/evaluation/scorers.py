"""The registry of scorers: how a task's answers are compared, and which scorer a task gets.

A scorer has two formulas. The clean one uses forgiving parsers and maintained libraries. The other is that of the
method's authors (`--scoring authors`), so that numbers can be compared with theirs. Scores are in [0, 1]; higher is
better.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

from piece_ds.config.output_arguments import SCORINGS
from piece_ds.evaluation import authors, captions, texts, vqa
from piece_ds.evaluation.answers import LETTER, NUMBER, TEXT, WORD, after_thinking, answer_kind, is_right
from piece_ds.evaluation.matrix import ACCURACY, LOSS
from piece_ds.runtime.errors import UserError, nearest

CLEAN, AUTHORS = SCORINGS

Texts = Sequence[str]
Golds = Sequence[str | list[str]]  # of each row one gold answer, or several
ManyFormula = Callable[[Texts, Sequence[Sequence[str]], Texts], dict[str, float]]
Formula = Callable[[Texts, Texts, Texts], dict[str, float]]  # outputs, golds, prompts -> measures, the score first


@dataclass(frozen=True)
class Scorer:
    """How the answers of a task are scored.

    Attributes:
        metric: name of the score.
        clean: the clean formula; None if nothing is generated.
        authors: the authors' formula; None if nothing is generated.
        is_short: whether the answer is in the first few tokens (--max_new_tokens; otherwise --max_new_tokens_text).
        is_short_for_authors: the same under --scoring authors.
        takes_many: whether the formulas get all gold answers of a row, as lists, and not only the most frequent one.
    """

    metric: str
    clean: Formula | ManyFormula | None
    authors: Formula | ManyFormula | None
    is_short: bool
    is_short_for_authors: bool
    takes_many: bool = False

    @property
    def generates(self) -> bool:
        """Whether there is anything to generate."""
        return self.clean is not None

    def score(self, outputs: Texts, golds: Golds, prompts: Texts, scoring: str = CLEAN) -> dict[str, float]:
        """Return measures by name; the first is the score. It is nan without rows.

        Args:
            outputs: what the model wrote, without the prompt. Text up to the last </think> is ignored.
            golds: gold answers of the same rows.
            prompts: prompts of the same rows.
            scoring: CLEAN or AUTHORS.
        Raises:
            ValueError: the lengths differ, the scoring is unknown, or the scorer generates nothing.
        """
        formula: Any = {CLEAN: self.clean, AUTHORS: self.authors}.get(scoring)
        if formula is None or not len(outputs) == len(golds) == len(prompts):
            raise ValueError(
                f"{len(outputs)} outputs, {len(golds)} golds and {len(prompts)} prompts for {scoring!r} "
                f"scoring of {self.metric}"
            )
        if not outputs:
            return {"score": nan}
        # The authors strip a whole output before they look for </think>; the rest keeps its white space.
        answers = [after_thinking(output.strip()) for output in outputs]
        chosen = [as_list(gold) for gold in golds] if self.takes_many else [one_of(gold) for gold in golds]
        return formula(answers, chosen, prompts)


def as_list(gold: str | list[str]) -> list[str]:
    """Return all gold answers of a row as a list."""
    return [gold] if isinstance(gold, str) else gold


def one_of(gold: str | list[str]) -> str:
    """Return the most frequent gold answer of a row, or the first of equals: the one that is trained."""
    return Counter(as_list(gold)).most_common(1)[0][0]


def scorer_names() -> list[str]:
    """Return every scorer that --scorers may name."""
    return list(_SCORERS)


def get_scorer(name: str) -> Scorer:
    """Return the scorer of that name. Raise UserError, with the nearest name, if there is none."""
    if name not in _SCORERS:
        raise UserError(f"--scorers: {name!r} is unknown; known: {', '.join(_SCORERS)}.{nearest(name, [*_SCORERS])}")
    return _SCORERS[name]


def parse_scorers(flag: str | None) -> dict[str, str]:
    """Return --scorers TASK=NAME,TASK=NAME as a mapping. Raise UserError for another form or an unknown scorer."""
    chosen: dict[str, str] = {}
    for item in (flag or "").split(",") if flag else []:
        task, equals, name = (part.strip() for part in item.rpartition("="))
        if not equals or not task or task in chosen:
            raise UserError(
                f"--scorers {flag!r}: expected TASK=NAME for each task once, separated by commas, got {item!r}"
            )
        get_scorer(name)
        chosen[task] = name
    return chosen


def choose_scorers(
    tasks: Iterable[tuple[str, Golds]], flag: str | None = None, about_images: Collection[str] = ()
) -> dict[str, str]:
    """Return task -> name of its scorer.

    --scorers decides first, then TRACE's own scorer if the task has a TRACE name, then the answers. If all answers are
    letters, numbers or words, those are compared; otherwise the task is text. For tasks about images: letter if all
    answers are letters, vqa if most are short, else caption.

    Args:
        tasks: (name, gold answers) of each.
        flag: --scorers.
        about_images: names of the tasks whose rows have images.
    Raises:
        UserError: the flag names no task, or no scorer.
    """
    golds = {name: [one_of(gold) for gold in of_task] for name, of_task in tasks}
    chosen = parse_scorers(flag)
    for task in chosen:
        if task not in golds:
            raise UserError(f"--scorers: no task {task!r}; tasks are {', '.join(golds)}.{nearest(task, [*golds])}")
    # A task's own answers decide only if neither the flag nor its name does.
    by_answers = {task: _by_answers(texts, task in about_images) for task, texts in golds.items()}
    return {task: chosen.get(task) or OF_TRACE.get(task) or by_answers[task] for task in golds}


def _by_answers(golds: list[str], about_images: bool) -> str:
    kind = answer_kind(golds)
    if not about_images or kind == LETTER:
        return _OF_KIND[kind]
    # Answers to questions about images are a few words, captions are sentences.
    short = sum(len(gold.split()) <= MAX_WORDS_OF_VQA for gold in golds)
    return "vqa" if 2 * short > len(golds) else "caption"


def _accuracy(is_correct: Callable[[str, str], bool]) -> Formula:
    def formula(outputs: Texts, golds: Texts, prompts: Texts) -> dict[str, float]:
        right = sum(is_correct(output, gold) for output, gold in zip(outputs, golds, strict=True))
        return {"score": right / len(golds)}

    return formula


def _of_kind(kind: str) -> Formula:
    return _accuracy(lambda output, gold: is_right(output, gold, kind))


def _same_choice(output: str, gold: str) -> bool:
    choice = authors.first_choice(output)
    return choice is not None and choice == authors.first_choice(gold)


def _same_stance(output: str, gold: str) -> bool:
    return authors.stance(output) == gold


def _same_number(output: str, gold: str) -> bool:
    return authors.first_number(output) == gold


def _same_text(output: str, gold: str) -> bool:
    return bool(output) and output == gold


def _same_text_at_all(output: str, gold: str) -> bool:
    return output.strip() == gold.strip()


def _text(outputs: Texts, golds: Texts, prompts: Texts) -> dict[str, float]:
    return _bleu_and_rouge(texts.bleu_4(outputs, golds), texts.rouge_l(outputs, golds))


def _text_authors(outputs: Texts, golds: Texts, prompts: Texts) -> dict[str, float]:
    return _bleu_and_rouge(authors.bleu_4(outputs, golds), authors.rouge_l(outputs, golds))


def _bleu_and_rouge(bleu: float, rouge: float) -> dict[str, float]:
    return {"score": (bleu + rouge) / 2, "bleu_4": bleu, "rouge_l": rouge}


def _simplification(outputs: Texts, golds: Texts, prompts: Texts) -> dict[str, float]:
    return {**_text(outputs, golds, prompts), "sari": texts.sari([_paragraph(p) for p in prompts], outputs, golds)}


def _simplification_authors(outputs: Texts, golds: Texts, prompts: Texts) -> dict[str, float]:
    """Return TRACE's measures with SARI, whose source is the whole prompt. PIECE's authors commented SARI out."""
    return {**_text_authors(outputs, golds, prompts), "sari": texts.sari(prompts, outputs, golds)}


def _paragraph(prompt: str) -> str:
    """Return the text to simplify, without the instruction around it."""
    found = re.search(r"Paragraph:\s*(.*?)\s*Simplification:\s*$", prompt, re.DOTALL)
    return found.group(1) if found else prompt


def _code(outputs: Texts, golds: Texts, prompts: Texts) -> dict[str, float]:
    """Return the similarity of the first line written and the gold line, without white space around them."""
    pairs = [[authors.with_literals(_first_line(text)) for text in column] for column in (outputs, golds)]
    return {"score": texts.edit_similarity(*pairs)}


def _code_authors(outputs: Texts, golds: Texts, prompts: Texts) -> dict[str, float]:
    lines = [authors.code_line(output) for output in outputs]
    return {"score": authors.edit_similarity(lines, [authors.with_literals(gold) for gold in golds])}


def _first_line(text: str) -> str:
    lines = (line.strip() for line in re.split(r"<EOL>|\n", text))
    return next((line for line in lines if line), "")


def _vqa(outputs: Texts, golds: Sequence[Sequence[str]], prompts: Texts) -> dict[str, float]:
    return {"score": vqa.soft_accuracy(outputs, golds), "exact_match": vqa.exact_match(outputs, golds)}


def _caption(outputs: Texts, golds: Sequence[Sequence[str]], prompts: Texts) -> dict[str, float]:
    return captions.measures(outputs, golds)


def _caption_authors(outputs: Texts, golds: Sequence[Sequence[str]], prompts: Texts) -> dict[str, float]:
    return captions.measures_of_authors(outputs, golds)


_BLEU_ROUGE, _EDIT = "(BLEU-4 + ROUGE-L) / 2", "edit similarity"
_SCORERS = {
    "letter": Scorer(ACCURACY, _of_kind(LETTER), _accuracy(_same_choice), True, True),
    "reasons": Scorer(ACCURACY, _of_kind(LETTER), _accuracy(_same_choice), True, False),  # a letter, then reasons
    "stance": Scorer(ACCURACY, _of_kind(LETTER), _accuracy(_same_stance), True, True),
    "number": Scorer(ACCURACY, _of_kind(NUMBER), _accuracy(_same_number), True, True),
    "word": Scorer(ACCURACY, _of_kind(WORD), _accuracy(_same_text), True, True),
    # All of a longer answer, without white space around it: JSON, SQL, a date.
    "exact": Scorer(ACCURACY, _accuracy(_same_text_at_all), _accuracy(_same_text_at_all), False, False),
    "text": Scorer(_BLEU_ROUGE, _text, _text_authors, False, False),
    "simplification": Scorer(_BLEU_ROUGE, _simplification, _simplification_authors, False, False),
    "code": Scorer(_EDIT, _code, _code_authors, False, False),
    # The authors' script for VQA accuracy is an empty file, so both formulas are the benchmark's.
    "vqa": Scorer(ACCURACY, _vqa, _vqa, True, True, takes_many=True),
    "caption": Scorer(_BLEU_ROUGE, _caption, _caption_authors, False, False, takes_many=True),
    "loss": Scorer(LOSS, None, None, True, True),
}
MAX_WORDS_OF_VQA = 4  # 99 % of VQA-v2's answers are no longer; a caption has about ten
_OF_KIND = {LETTER: "letter", NUMBER: "number", WORD: "word", TEXT: "text"}

# Names of the folders of the benchmark's tasks (arXiv 2310.06762).
OF_TRACE = {
    "C-STANCE": "stance",
    "FOMC": "letter",
    "MeetingBank": "text",
    "Py150": "code",
    "ScienceQA": "reasons",
    "NumGLUE-cm": "number",
    "NumGLUE-ds": "number",
    "20Minuten": "simplification",
}
