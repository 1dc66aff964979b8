"""The preparation of a measure of fidelity: documents, the model, the folder of its results."""

from collections.abc import Callable
from typing import NamedTuple

from ...chat import ChatTemplateError
from ...console.endings import blame
from ...console.streams import tell
from ...models import load_tokenizer
from ...models.common import DiffusionLM
from ...models.identity import files_digest
from ...models.loading import model_family
from ...ranks import Ranks
from ..folder import Folder, Record
from ..running import claimed, resumed, source, team_and_model, warn_of_length
from ..team import Team
from .arguments import TextArguments
from .documents import Document, check_ids, read_documents


class Work(NamedTuple):
    """The documents, what measures them, and where the results go.

    Args:
        documents: by the length at which they are measured.
        finished: the lines that the folder had, by their keys.
        told: whether this process shows its progress.
    """

    documents: dict[int, list[Document]]
    team: Team
    model: DiffusionLM
    folder: Folder
    finished: dict[tuple, Record]
    told: bool


def prepare(args: TextArguments, ranks: Ranks, settings: Record, identify: Callable[[Record], tuple | None]) -> Work:
    """Read the documents, load the model, claim the folder; wrong flags end with exit code 2.

    Args:
        ranks: all processes of this call.
        settings: what decides the results, in addition to the flags of `TextArguments`.
        identify: as in `Folder`.
    """
    option, path = source(args)
    with blame(args, option):
        model_family(path)  # refuses an unsupported model before its tokenizer is found missing
        tokenizer = load_tokenizer(path)
    with blame(args, "--texts", (ValueError, ChatTemplateError)):
        documents = read_documents(args.texts, tokenizer)
    with blame(args, "--leave_out"):
        documents = without(documents, args.leave_out)
    chosen, counts = choose(args, documents)
    team, model = team_and_model(args, ranks)
    with blame(args, "--texts"):
        check_ids(documents, model.config.vocab_size)
    told = team.leads and not args.quiet
    if told:
        warn_of_length(model, "documents", max(args.lengths))
        for length, count in counts.items():
            tell(f"{length} tokens: {count['measured']} documents; {count['too_short']} are too short")
    left_out = {"leave_out": sorted(args.leave_out)} if args.leave_out else {}
    shared = {"seq_len": args.seq_len, "backend": args.backend, "texts": files_digest(args.texts), **left_out}
    folder = claimed(args, team, model, settings | shared, identify, {"documents": counts})
    return Work(chosen, team, model, folder, resumed(args, team, folder, told), told)


def without(documents: list[Document], names: list[str]) -> list[Document]:
    """The documents except those of these names; ValueError if there is none of a name."""
    known = {document.name for document in documents}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no document of --texts is called {unknown[0]}")
    return [document for document in documents if document.name not in names]


def choose(args: TextArguments, documents: list[Document]) -> tuple[dict[int, list[Document]], Record]:
    """The documents that are measured at each length, and how many there are, and how many are too short."""
    chosen, counts = {}, {}
    for length in args.lengths:
        long_enough = [document for document in documents if len(document.tokens) >= length]
        if not long_enough:
            args.parser.error(f"argument --texts: no document of {length} tokens")
        chosen[length] = long_enough[: args.limit]
        counts[str(length)] = {"measured": len(chosen[length]), "too_short": len(documents) - len(long_enough)}
    return chosen, counts
