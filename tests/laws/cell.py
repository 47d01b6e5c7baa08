"""One cell of a law matrix: a batch of one family with one method attached."""

from dataclasses import dataclass, fields

from tests.support import prompts


@dataclass(frozen=True)
class Cell:
    """A cell; subclasses add the run, and the hand reference of it.

    Attributes:
        attention: the attention kernel.
        kind: the name of a batch.
        policy: of positions.
        replayed: by hand, the recorded decisions of the method are replayed; else its rule by hand decides.
    """

    spec: str
    family: str
    attention: str = "sdpa"
    kind: str = "ragged"
    policy: str = "original"
    replayed: bool = False

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["replayed"] = "replayed" * self.replayed
        return "-".join(str(value) for value in values.values() if value)

    @property
    def samples(self) -> list[prompts.Sample]:
        return prompts.batch(self.family, self.kind)
