"""What tasks of causal language models do alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hf_soup._util.text import first_line
from hf_soup.checkpoint import panics_as_errors
from hf_soup.errors import ScoringError
from hf_soup.evaluation.tasks.task import Task, donors_tokenizer
from hf_soup.recipe import Scoring

_USUAL_LONGEST = 2048


class LanguageTask(Task):
    """Texts through the donor's tokenizer, with the tokens that it adds, for models that predict the next token."""

    head: ClassVar[str] = "ForCausalLM"
    models: ClassVar[str] = "MODEL_FOR_CAUSAL_LM_MAPPING"
    chunk: ClassVar[int] = 200
    #: The metrics that there are, the usual one first.
    metrics: ClassVar[Sequence[str]]
    #: Keys of a recipe that say nothing to it.
    unread: ClassVar[Sequence[str]] = ("labels",)

    def __init__(self, scoring: Scoring, folder: Path, config: Mapping[str, Any]) -> None:
        self._reads = donors_tokenizer(folder)
        text = config.get("text_config")
        stated = text if isinstance(text, Mapping) else config
        positions = map(stated.get, ("n_positions", "max_position_embeddings", "n_ctx"))
        lengths = [*positions, self._reads.model_max_length]  # of a tokenizer that does not know, a huge one
        self.longest = next((each for each in lengths if isinstance(each, int) and 0 < each < 1 << 30), _USUAL_LONGEST)
        vocabulary = stated.get("vocab_size")
        self.vocabulary = vocabulary if isinstance(vocabulary, int) and vocabulary > 0 else len(self._reads)
        begins = self._reads.bos_token_id
        self.before = self._reads.eos_token_id if begins is None else begins
        if self.before is None:
            raise ScoringError(
                "The donor's tokenizer has no token that begins or ends texts, from which the first one is predicted.",
                hint="Name one as `bos_token` or `eos_token` in its tokenizer_config.json.",
            )
        self.depends_on = [type(self._reads).__name__, self.before, self.vocabulary]

    @classmethod
    def require(cls, scoring: Scoring, config: Mapping[str, Any]) -> None:
        """Refuse a metric that there is not, and keys that say nothing here."""
        if scoring.metric not in cls.metrics:
            raise ScoringError(
                f"`task: {scoring.task}` has no metric '{scoring.metric}'.", hint=f"It has {', '.join(cls.metrics)}."
            )
        if unread := next((key for key in cls.unread if getattr(scoring, key)), None):
            raise ScoringError(f"`task: {scoring.task}` does not look at `{unread}`.", hint="Leave it out.")

    def encode(self, title: str, texts: Sequence[str], **options: Any) -> list[list[int]]:
        """The token numbers of texts, all of which the model knows.

        Raises:
            ScoringError: It is not so, or the tokenizer fails.
        """
        try:
            with panics_as_errors():
                known = self._reads.decode([self.before])
                # A text that has the first token written out gets no second one.
                begun = {"add_special_tokens": False, **options}
                rows = [
                    self._reads.encode(text, verbose=False, **(begun if text.startswith(known) else options))
                    for text in texts
                ]
        except Exception as error:  # a stranger's file, and no common class; tokenizers raises Exception itself
            raise ScoringError(
                f"The donor's tokenizer cannot read {title}: {first_line(error)}",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            ) from error
        highest = max(self.before, max((max(row, default=0) for row in rows), default=0))
        if highest >= self.vocabulary:
            raise ScoringError(
                f"The donor's tokenizer gives token {highest} on {title}, and the model has {self.vocabulary} tokens.",
                hint="Tokenizer and weights do not belong together; use the model's own tokenizer.",
            )
        return rows
