"""Dream and LLaDA in EleutherAI's lm-evaluation-harness, as its model `sparsed`, with full attention or SparseD.

    python -m sparsed.evaluation.harness run --model sparsed --model_args pretrained=PATH,select=0.3 --tasks gsm8k

The harness has no plug-ins for models, so this module runs its own command line with an additional model. `torchrun
--nproc_per_node 4 -m sparsed.evaluation.harness ...`, or `accelerate launch`, spreads the requests over processes, each
with its own model. A process runs one request at a time: SparseD pays off with long prompts, and one fills a GPU.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from tqdm import tqdm

from .. import sampling
from ..chat import answer_length, decode, stop_ids
from ..config import check_numbers
from ..console.streams import tell
from ..models import load_model, load_tokenizer
from ..models.loading import ModelTooLarge
from ..sampling.likelihood import is_greedy, log_likelihood
from ..sampling.saving import OFF
from .harness_options import Options
from .team import leave_group

try:
    from lm_eval import evaluator
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import handle_arg_string
except ModuleNotFoundError as error:
    lacking = 'sparsed.evaluation.harness needs the package lm-eval: pip install ".[harness]"'
    if __name__ == "__main__":
        tell(lacking)
        sys.exit(2)
    raise ModuleNotFoundError(lacking) from error


class OptionError(ValueError):
    """The model cannot be made from the options of --model_args, or cannot do a task as it is set up."""


@register_model("sparsed")
class SparseDLM(TemplateLM):
    """The harness' view of a Dream or LLaDA model: answers by its sampler, log-likelihoods by Monte Carlo.

    Args:
        options: fields of `Options` by name.

    Raises:
        OptionError: an option is unknown or out of range, or nothing can be loaded from `pretrained`.
    """

    def __init__(self, **options: Any):
        super().__init__()
        try:
            self.options = Options.parse(options, handle_arg_string)
            self.processes = PartialState(cpu=not torch.cuda.is_available())
            self._rank, self._world_size = self.processes.process_index, self.processes.num_processes
            device = self.options.device if self.world_size == 1 else self.processes.device
            self.model = load_model(self.options.pretrained, device=device, dtype=self.options.dtype)
            self.tokenizer = load_tokenizer(self.options.pretrained)
        except ModelTooLarge as error:  # what would help is a model that processes share, which these do not
            raise OptionError(f"--model_args: {error.args[0]}") from error
        except ValueError as error:
            raise OptionError(f"--model_args: {error}") from error
        self.told = False  # that likelihoods know no caches
        self.generator = torch.Generator(self.model.device).manual_seed(self.options.seed + self.rank)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "SparseDLM":
        """The model of the harness' command line: --model_args win over its own flags."""
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if flags.get("device") == "cuda:0":  # the harness' default, even without a GPU
            del flags["device"]
        return cls(**(flags | arg_dict))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eot_token_id(self) -> int | None:
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a target that has no context."""
        bos = self.tokenizer.bos_token_id
        found = self.eot_token_id if bos is None else bos
        if found is None:
            raise ValueError("a target without a context needs the tokenizer's bos_token, or an 'eos_token_id'")
        return found

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of the harness' cache of requests."""
        return self.options.pretrained.replace("/", "__")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        gathered = gather_object([obj])
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        self.processes.wait_for_everyone()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text, ready for the answer, or for the rest of the last message."""
        how: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        how["continue_final_message"] = not add_generation_prompt
        return str(self.tokenizer.apply_chat_template(chat_history, **how))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text that holds its control tokens, such as a chat template's, written out."""
        bos = self.tokenizer.bos_token or ""
        if self.options.add_bos_token and add_special_tokens is not False and not string.startswith(bos):
            string = bos + string
        return self.tokenizer.encode(string, add_special_tokens=False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of its continuation; the context's last spaces move to the continuation.

        Unlike the harness, it leaves line breaks where they are. The models have never seen those at the end of a chat
        template masked: masking them would cost many nats.
        """
        head = self.tok_encode(context.rstrip(" "))
        return head, self.tok_encode(context + continuation)[len(head) :]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to requests (context, generation settings), up to their first stop string or end token.

        Raises:
            OptionError: a setting that the family's sampler does not have or cannot follow.
        """
        answers = []
        for request in self._progress(requests, "Generating", disable_tqdm):
            answers.append(self._answer(*request.args))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def check(self, tasks: dict[str, Any]) -> None:
        """Raise OptionError, which names the task, unless the model can do all of these tasks as they are set up."""
        if any(task.OUTPUT_TYPE != "generate_until" for task in tasks.values()):
            self._tell_of_likelihoods()
        for name, task in tasks.items():
            if task.OUTPUT_TYPE == "loglikelihood_rolling":
                raise OptionError(f"task {name}: sparsed has no likelihoods of whole documents, only of targets")
            if task.OUTPUT_TYPE == "generate_until":
                self._settings(task.get_config("generation_kwargs") or {}, f"task {name}, --gen_kwargs")

    def _tell_of_likelihoods(self) -> None:
        """Warn once, in one process, that caches and thresholds do not apply to likelihoods."""
        if self.options.saving != OFF and self.rank == 0 and not self.told:
            told = "likelihoods take a forward of all rows each: cache, threshold and the like do not apply to them"
            logging.getLogger(__name__).warning(told)
            self.told = True

    def _settings(self, given: dict[str, Any], where: str) -> tuple[int, list[str], sampling.Settings]:
        """Tokens of an answer, its stop strings, and the sampler's settings, from a request's settings."""
        options = self.options
        try:
            settings: dict[str, Any] = {**normalize_gen_kwargs(given, options.max_gen_toks)}
            length, until, sampled = (settings.pop(name) for name in ("max_gen_toks", "until", "do_sample"))
            check_numbers(max_gen_toks=length)
            if not isinstance(sampled, bool):
                raise ValueError(f"do_sample must be True or False, got {sampled!r}")
            # one beam changes nothing, nor do filters if nothing is drawn (the temperature is then 0)
            if settings.get("num_beams") == 1:
                del settings["num_beams"]
            for name in () if sampled else ("top_p", "top_k"):
                settings.pop(name, None)
            steps, settings = settings.pop("steps", options.steps), options.saving | settings
            sampler = sampling.settings_for_answer(self.model.family, length, steps, options.block_length, **settings)
        except (TypeError, ValueError) as error:
            raise OptionError(f"{where}: {error}") from error
        return length, [str(stop) for stop in until if stop], sampler

    def _answer(self, context: str, given: dict[str, Any]) -> str:
        length, until, sampler = self._settings(given, "generate_until")
        vocabulary = self.tokenizer.get_added_vocab()
        stops = stop_ids(self.model.config, self.tokenizer) | {vocabulary[stop] for stop in until if stop in vocabulary}
        token_ids = self._generate(self.tok_encode(context), sampler, stops)[:length]
        text = decode(self.tokenizer, token_ids[: answer_length(token_ids, stops)])
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]

    def _generate(self, context: list[int], sampler: sampling.Settings, stops: set[int]) -> list[int]:
        """The new ids of the family's sampler, which an early stop ends at one of `stops`."""
        ids = torch.tensor([context or [self.prefix_token_id]])
        attention = self.options.attention
        out = sampling.generate(self.model, ids, sampler, end_token_ids=stops, generator=self.generator, **attention)
        return out[0, ids.shape[1] :].tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is greedy) of each ((context, target), context ids, target ids)."""
        self._tell_of_likelihoods()  # to callers that have not had the tasks checked
        options, answers = self.options, []
        for texts, context, target in self._progress(requests, "Scoring", disable_tqdm):
            # the same draws for all targets of one length, so that they do not add to the differences
            generator = torch.Generator().manual_seed(options.seed)
            score = log_likelihood(
                self.model, context, target, samples=options.mc_num, generator=generator, **options.attention
            )
            greedy = options.check_greedy and is_greedy(self.model, context, target, **options.attention)
            answers.append((score, greedy))
            self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("sparsed estimates likelihoods of targets after a context, not of whole documents")

    def _progress(self, requests: list[Any], what: str, disable: bool) -> Iterable[Any]:
        return tqdm(requests, desc=what, disable=disable or self.rank != 0)


def _evaluate(lm: Any, task_dict: dict[str, Any], evaluate: Any = evaluator.evaluate, **how: Any) -> Any:
    """The harness' own evaluation, after a check of all tasks: none may fail after others have run."""
    getattr(lm, "check", lambda _: None)(task_dict["tasks"])  # the harness' own models have no such check
    return evaluate(lm=lm, task_dict=task_dict, **how)


def main() -> int:
    """The harness' own command line, with the model `sparsed` in it; returns the exit code."""
    evaluator.evaluate = _evaluate
    try:
        cli_evaluate()
    except OptionError as error:
        logging.getLogger(__name__).error(error)
        return 2
    leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
