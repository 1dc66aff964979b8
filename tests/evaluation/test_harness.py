"""The model `sparsed` of lm-evaluation-harness: options, answers, scores, the harness' own command line."""

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sparsed import SparseDConfig, sampling
from sparsed.chat import stop_ids
from sparsed.models.loading import ModelTooLarge
from sparsed.prompts import demo_path
from tests.helpers.sampling_cases import GENERATE
from tests.helpers.tiny_folders import tiny_folder

pytest.importorskip("lm_eval", reason='needs lm-eval: pip install ".[harness]"')
harness = importlib.import_module("sparsed.evaluation.harness")

QUESTIONS = [
    ("Nils finds 3 eggs and then 9 more, but loses 2 of them. How many eggs are left?", "The answer is 10 eggs."),
    (
        "Linus starts with 8 apples, adds 4 and then another 4. How many apples are there in all?",
        "The answer is 16 apples.",
    ),
]
TASKS = {
    "local_answers": {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"max_gen_toks": 32, "until": ["\n"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_choices": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}

# what the model cannot do
REFUSED = {
    "local_beams": TASKS["local_answers"] | {"generation_kwargs": {"until": ["x"], "repetition_penalty": 1.2}},
    "local_whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: tiny_folder(root / family, family) for family in GENERATE}


@pytest.fixture
def make(folders, family):
    """A function from options to the harness' model, tiny and random."""
    return lambda **options: harness.SparseDLM(pretrained=str(folders[family]), device="cpu", **options)


def ask(lm, context, **settings):
    return lm.generate_until([SimpleNamespace(args=(context, settings))], disable_tqdm=True)[0]


def score(lm, context, target):
    return lm.loglikelihood([SimpleNamespace(args=(context, target))], disable_tqdm=True)[0]


def sampled(lm, context, length, **options):
    """The family's sampler alone: the new ids."""
    ids = torch.tensor([lm.tok_encode(context)])
    if lm.model.family == "llada":
        options.setdefault("block_length", 8)
    out = GENERATE[lm.model.family](lm.model, ids, gen_length=length, steps=length, **options)
    return out[0, ids.shape[1] :].tolist()


def test_an_answer_is_the_samplers_own(make):
    lm = make(select=0.5, block_size=16, block_length=8, backend="gather")
    context = "What is on the table in the kitchen? " * 3
    config = SparseDConfig(select=0.5, block_size=16)
    tokens = sampled(lm, context, 24, config=config)
    assert tokens != sampled(lm, context, 24)
    assert ask(lm, context, max_gen_toks=24, until=[]) == lm.tokenizer.decode(tokens, skip_special_tokens=True)


def test_an_answer_ends_at_the_first_stop(make, monkeypatch):
    lm = make()

    def write(text):
        new = torch.tensor([lm.tokenizer.encode(text)])
        monkeypatch.setattr(sampling, "generate", lambda model, ids, *_, **__: torch.cat((ids, new), 1))

    write("one two three<|endoftext|>four")
    assert ask(lm, "x", until=[]) == "one two three"
    assert ask(lm, "x", until="wo") == "one t"
    assert ask(lm, "x", until=["three", "two", "four", ""]) == "one "
    assert ask(lm, "x", until=[], max_gen_toks=5) == "one t"
    special = {"dream": "<|im_start|>", "llada": "<|start_header_id|>"}[lm.model.family]
    write(f"one{special}two")
    assert ask(lm, "x", until=[special]) == "one"


def test_an_answer_need_not_fill_lladas_blocks(make):
    lm = make(origin=True, block_length=8)
    longer = 24 if lm.model.family == "llada" else 20
    tokens = sampled(lm, "What?", longer)[:20]
    assert ask(lm, "What?", max_gen_toks=20, until=[]) == lm.tokenizer.decode(tokens, skip_special_tokens=True)


def test_settings_reach_the_sampler_or_are_refused(make):
    lm = make(origin=True, block_length=8)
    own = {"dream": {"alg": "entropy"}, "llada": {"logits_eos_inf": True}}[lm.model.family]
    expected = lm.tokenizer.decode(sampled(lm, "What?", 8, **own), skip_special_tokens=True)
    assert ask(lm, "What?", max_gen_toks=8, until=[], **own) == expected
    with pytest.raises(ValueError, match="num_beams"):
        ask(lm, "What?", until=[], num_beams=4)


def test_what_means_nothing_to_a_greedy_answer_is_accepted(make):
    lm = make(origin=True, block_length=8)
    expected = ask(lm, "What?", max_gen_toks=8, until=[])
    for settings in ({"num_beams": 1}, {"do_sample": False, "top_p": 0.5, "top_k": 3}, {"top_p": 0.01}):
        assert ask(lm, "What?", max_gen_toks=8, until=[], **settings) == expected


def test_caches_and_thresholds_reach_the_sampler_and_a_task_s_own_win(make):
    options = {"cache": "dual", "refresh": "2", "threshold": "0.9", "early_stop": "True", "block_length": "8"}
    lm = make(origin=True, **options)
    length, _, sampler = lm._settings({"max_gen_toks": 20, "until": [], "threshold": 0.5}, "here")
    assert (sampler.cache, sampler.refresh, sampler.threshold, sampler.early_stop) == ("dual", 2, 0.5, True)
    assert (length, sampler.gen_length, sampler.block_length) == (20, 24, 8), "up to the end of the last block"
    settings = {"cache": "dual", "refresh": 2, "threshold": 0.9, "early_stop": True, "block_length": 8}
    expected = sampled(lm, "What?", 24, **settings)[:20]
    real, seen = lm._generate, []
    lm._generate = lambda *given: seen.append(real(*given)) or seen[-1]
    ask(lm, "What?", max_gen_toks=20, until=[])
    assert seen[0][:20] == expected


def test_an_early_stop_knows_the_tokenizer_s_ends_and_the_task_s(make, monkeypatch):
    lm, given = make(origin=True, cache="dual", early_stop=True, block_length=8), []
    plain = harness.sampling.generate
    monkeypatch.setattr(
        harness.sampling,
        "generate",
        lambda *args, end_token_ids, **kw: given.append(end_token_ids) or plain(*args, **kw),
    )
    word, index = next(iter(lm.tokenizer.get_added_vocab().items()))
    ask(lm, "What?", max_gen_toks=8, until=[word])
    assert given == [stop_ids(lm.model.config, lm.tokenizer) | {index}]


@pytest.mark.parametrize("wrong", [{"cache": "both"}, {"refresh": 2}, {"threshold": 0.9, "factor": 1.0}, {"factor": 0}])
def test_wrong_caches_and_thresholds_are_named(folders, wrong):
    with pytest.raises(harness.OptionError, match=list(wrong)[-1]):
        harness.SparseDLM(pretrained=str(folders["llada"]), device="cpu", **wrong)


def test_an_early_stop_alone_makes_no_blocks(make):
    lm = make(origin=True, early_stop=True, block_length=8)
    if lm.model.family == "llada":  # which always has them
        assert lm._settings({"until": []}, "here")[2].early_stop
        return
    with pytest.raises(harness.OptionError, match="here: early_stop needs blocks.*a cache, threshold or factor$"):
        lm._settings({"until": []}, "here")
    assert lm._settings({"until": [], "cache": "dual"}, "here")[2].block_length == 8


def test_likelihoods_say_once_that_caches_do_not_apply_to_them(make, caplog):
    tasks = {"choices": SimpleNamespace(OUTPUT_TYPE="multiple_choice")}
    plain, other = make(origin=True, mc_num=1), make(origin=True, cache="dual", mc_num=1)
    other._rank = 1
    for lm in (plain, other):
        lm.check(tasks)
        score(lm, "Why?", " Because")
    assert not caplog.records
    lm = make(origin=True, cache="dual", mc_num=1)
    lm.check({"answers": SimpleNamespace(OUTPUT_TYPE="generate_until", get_config=lambda _: {"until": []})})
    assert not caplog.records
    for _ in range(2):
        lm.check(tasks)
        score(lm, "Why?", " Because")
    (record,) = caplog.records
    assert "do not apply" in record.message


def test_filters_reach_a_sampler_that_has_them(make):
    lm = make(origin=True, block_length=8)
    given = {"do_sample": True, "temperature": 1.0, "top_p": 0.5}
    if lm.model.family == "llada":
        with pytest.raises(harness.OptionError, match="llada's sampler has no 'top_p'"):
            ask(lm, "What?", until=[], **given)
    else:
        sampler = lm._settings(given, "here")[2]
        assert (sampler.temperature, sampler.top_p) == (1.0, 0.5)


WRONG = {
    "num_beams": (4, "no 'num_beams'"),
    "repetition_penalty": (1.2, "no 'repetition_penalty'"),
    "block_length": (16, "no 'block_length'"),
    "gen_length": (16, "no 'gen_length'"),
    "max_gen_toks": (0, "max_gen_toks"),
    "max_new_tokens": ("many", "many"),
    "temperature": (-1, "temperature"),
    "do_sample": ("maybe", "do_sample must be True or False, got 'maybe'"),
    "steps": (0, "steps"),
}
FAMILYS_WRONG = {
    "dream": {"alg": ("best", "alg"), "cfg_scale": (1.0, "no 'cfg_scale'")},
    "llada": {"remasking": ("best", "remasking"), "alg": ("entropy", "no 'alg'"), "logits_eos_inf": ("maybe", "True")},
}


def test_a_wrong_setting_is_one_line(make):
    lm = make(origin=True)
    for name, (value, says) in (WRONG | FAMILYS_WRONG[lm.model.family]).items():
        with pytest.raises(harness.OptionError, match=says) as error:
            ask(lm, "What?", **{"until": [], "do_sample": True, "temperature": 0.5, name: value})
        assert "\n" not in str(error.value)


def test_a_task_sets_its_steps(make, monkeypatch):
    lm, seen = make(block_length=8, steps=24, origin=True), []
    generate = sampling.generate
    monkeypatch.setattr(sampling, "generate", lambda *a, **k: seen.append(a[2].steps) or generate(*a, **k))
    for settings in ({"steps": 6}, {}):
        ask(lm, "Where is it?", max_gen_toks=24, until=[], **settings)
    assert seen == [6, 24]


def test_selecting_every_block_is_full_attention(make):
    context, target = "What is on the table in the kitchen? " * 3, "A red cup, two books"
    full, sparse = make(origin=True, mc_num=20), make(select=1, block_size=16, mc_num=20, backend="gather")
    assert ask(sparse, context, max_gen_toks=32, until=[]) == ask(full, context, max_gen_toks=32, until=[])
    assert score(sparse, context, target)[0] == pytest.approx(score(full, context, target)[0], rel=1e-5)
    fewer = make(select=0.3, block_size=16, mc_num=20, backend="gather")
    assert score(fewer, context, target)[0] != pytest.approx(score(full, context, target)[0], rel=1e-5)


def test_what_the_model_scores(make, monkeypatch):
    """A context's last spaces belong to the target, its line breaks do not; without context it is the first token."""
    lm, seen = make(origin=True, check_greedy=False), []
    monkeypatch.setattr(
        harness, "log_likelihood", lambda model, context, target, **_: seen.append((context, target)) or 0.0
    )
    texts = [("Why?\n\n", "Because"), ("Why? ", "Because"), ("", "Because")]
    for context, target in texts:
        score(lm, context, target)
    decoded = [tuple(map(lm.tokenizer.decode, pair)) for pair in seen]
    assert decoded == [("Why?\n\n", "Because"), ("Why?", " Because"), ("<|endoftext|>", "Because")]


def test_a_score_does_not_hang_on_what_came_before(make):
    lm = make(origin=True, mc_num=8)
    first = score(lm, "Why is it so?", " Because")
    score(lm, "And then?", " Nothing at all")
    assert score(lm, "Why is it so?", " Because") == first
    assert score(make(origin=True, mc_num=8, seed=1), "Why is it so?", " Because") != first


def test_chats_and_their_unfinished_answers(make):
    lm = make(origin=True)
    chat = [{"role": "user", "content": "Why?"}]
    asked = lm.apply_chat_template(chat)
    assert "assistant" in asked and "Why?" in asked
    begun = lm.apply_chat_template([*chat, {"role": "assistant", "content": "Because"}], add_generation_prompt=False)
    assert begun.startswith(asked.rstrip("\n")) and begun.endswith("\nBecause")


def test_add_bos_token_adds_one_where_there_is_none(make):
    lm = make(origin=True, add_bos_token=True)
    lm.tokenizer.bos_token = "<|endoftext|>"
    bos = lm.tokenizer.bos_token_id
    assert lm.tok_encode("ab") == [bos, *lm.tokenizer.encode("ab")] == lm.tok_encode("<|endoftext|>ab")
    assert lm.tok_encode("ab", add_special_tokens=False) == lm.tokenizer.encode("ab")
    other = make(origin=True)
    other.tokenizer.bos_token = "<|endoftext|>"
    assert other.tok_encode("ab") == lm.tokenizer.encode("ab")


def test_a_target_alone_needs_a_token_before_it(make):
    lm = make(origin=True)
    assert lm.prefix_token_id == lm.model.config.eos_token_id
    lm.model.config = dataclasses.replace(lm.model.config, eos_token_id=None)
    with pytest.raises(ValueError, match="bos_token, or an 'eos_token_id'"):
        lm.loglikelihood([SimpleNamespace(args=("", "ab"))], disable_tqdm=True)


def test_rolling_likelihoods_are_refused(make):
    with pytest.raises(NotImplementedError, match="whole documents"):
        make().loglikelihood_rolling([])


def test_options_may_be_strings():
    given = {"pretrained": "x", "origin": "False", "skip": "0.5", "block_size": "64", "steps": "None", "mc_num": 4}
    passed_on = {"trust_remote_code": True, "max_batch_size": None}
    options = harness.Options.parse(given | passed_on, harness.handle_arg_string)
    assert options.config == SparseDConfig(0.5, 0.3, 64) and options.steps is None
    assert harness.Options.parse(given | {"origin": "True"}, harness.handle_arg_string).config is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("selct", 0.3),
        ("origin", "maybe"),
        ("skip", 2),
        ("select", "0"),
        ("block_size", 20),
        ("backend", "fast"),
        ("steps", 0),
        ("max_gen_toks", 1.5),
        ("block_length", "x"),
        ("mc_num", -1),
        ("check_greedy", 1),
        ("seed", -1),
        ("batch_size", "auto"),
        ("device", "tpu"),
        ("dtype", "int8"),
    ],
)
def test_a_bad_option_is_named(folders, name, value):
    with pytest.raises(harness.OptionError, match=name):
        harness.SparseDLM(**{"pretrained": str(folders["dream"]), "device": "cpu"} | {name: value})


def test_a_model_that_is_too_large_is_one_line_without_what_the_harness_cannot_do(monkeypatch):
    def load_model(*_, **__):
        raise ModelTooLarge("the weights need 15.0 GiB", "2 GPUs can share it: torchrun --nproc_per_node 2")

    monkeypatch.setattr(harness, "load_model", load_model)
    with pytest.raises(harness.OptionError, match="^--model_args: the weights need 15.0 GiB$"):
        harness.SparseDLM(pretrained="x", device="cpu")


def test_the_command_line_ends_with_one_line_at_a_bad_option(monkeypatch, caplog):
    def cli(error):
        monkeypatch.setattr(harness, "cli_evaluate", lambda: harness.SparseDLM(**error))
        return harness.main()

    assert cli({"pretrained": "x", "selct": 1}) == 2 and "unknown option 'selct'" in caplog.text
    assert cli({}) == 2 and "pretrained is missing" in caplog.text


def test_model_args_win_over_the_harness_flags(folders, monkeypatch):
    seen = []
    monkeypatch.setattr(harness.SparseDLM, "__init__", lambda self, **options: seen.append(options))
    create = harness.SparseDLM.create_from_arg_obj
    create({"device": "cpu"}, {"device": "cuda:1", "batch_size": 1, "max_batch_size": None})
    create({}, {"device": "cuda:0"})  # what the harness says by default
    create({}, {"device": "cuda:1"})
    assert seen == [{"device": "cpu", "batch_size": 1}, {}, {"device": "cuda:1"}]


def test_the_package_does_not_import_the_harness():
    code = "import sys, sparsed, sparsed.evaluation; sys.exit(any(m.startswith('lm_eval') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks of the harness, as JSON, which is YAML, and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = [
        {"question": question, "answer": answer, "choices": ["The answer is 1.", answer], "label": 1}
        for question, answer in QUESTIONS
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
    shared = data | {"test_split": "test", "doc_to_text": "{{question}}"}
    for name, task in (TASKS | REFUSED).items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | shared | task))
    return folder


def records(folder, pattern):
    """The lines of the one file of that name in what the harness wrote."""
    (file,) = folder.rglob(pattern)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The harness with a cache of its own, and with no tasks but those that a call names."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # reading the thousands of its own tasks takes most of the time
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(manager, include_defaults=False))


@pytest.fixture
def run_here(offline, tasks, monkeypatch):
    """Run the harness' command line in this process, offline, with no tasks but these; returns the exit code."""
    monkeypatch.setattr("lm_eval.evaluator.evaluate", harness.evaluator.evaluate)  # puts back what main changes

    def run(options, *words):
        model_args = ",".join(f"{name}={value}" for name, value in options.items())
        command = ["lm_eval", "run", "--model", "sparsed", "--model_args", model_args, "--include_path", str(tasks)]
        monkeypatch.setattr(sys, "argv", [*command, *words])
        return harness.main()

    return run


@pytest.fixture
def evaluated(folders, run_here, monkeypatch, caplog):
    """Run the harness with a model that notes what it runs; returns (exit code, log, what ran)."""
    ran = []
    monkeypatch.setattr(harness, "log_likelihood", lambda model, context, target, **_: ran.append(target) or 0.0)
    monkeypatch.setattr(sampling, "generate", lambda model, ids, sampler, **_: ran.append(sampler) or ids)

    def run(*words):
        code = run_here({"pretrained": folders["llada"], "device": "cpu", "mc_num": 1}, *words)
        return code, caplog.text, ran

    return run


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "local_choices,local_answers", "--gen_kwargs", "alg=entropy"], ["local_answers", "no 'alg'"]),
        (["--tasks", "local_choices,local_beams"], ["local_beams", "no 'repetition_penalty'"]),
        (["--tasks", "local_choices,local_whole"], ["local_whole", "no likelihoods of whole documents"]),
    ],
    ids=["gen_kwargs", "task", "rolling"],
)
def test_what_a_task_wants_is_checked_before_any_runs(words, named, evaluated):
    code, log, ran = evaluated(*words)
    assert (code, ran) == (2, []) and all(part in log for part in named)
    (line,) = [line for line in log.splitlines() if "ERROR" in line]
    assert all(part in line for part in named)


def test_a_cached_model_is_checked_too(evaluated, tmp_path):
    assert evaluated("--tasks", "local_whole", "--use_cache", str(tmp_path / "cache"))[0] == 2


def test_the_harness_own_function_says_that_caches_do_not_apply(offline, folders, tasks, caplog):
    """`simple_evaluate`, which looks at no tasks before."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(tasks))
    options = {"pretrained": str(folders["llada"]), "threshold": 0.9, "mc_num": 1, "device": "cpu"}
    evaluate = importlib.import_module("lm_eval").simple_evaluate
    evaluate("sparsed", options, ["local_choices"], task_manager=manager, bootstrap_iters=0)
    assert sum("do not apply" in record.message for record in caplog.records) == 1


DEMO = ["--tasks", ",".join(TASKS), "--apply_chat_template", "--log_samples", "--output_path"]


def demo_options(family):
    # of larger blocks, the prompts of 34 and 43 tokens have too few to choose from
    return {"pretrained": str(demo_path(family)), "device": "cpu", "select": 0.5, "block_size": 16, "mc_num": 16}


def check_demo(family, out):
    """The right answers, and the scores that the class gives for the same texts."""
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    assert results["local_answers"]["exact_match,none"] == 1
    lm, accuracies = harness.SparseDLM(**demo_options(family)), []
    answers, choices = (records(out, f"samples_{name}_*.jsonl") for name in TASKS)
    assert len(answers) == len(choices) == len(QUESTIONS)
    for answer, choice in zip(answers, choices, strict=True):
        question = [{"role": "user", "content": answer["doc"]["question"]}]
        prompt = lm.apply_chat_template(question)
        assert answer["arguments"]["gen_args_0"]["arg_0"] == prompt
        expected = [score(lm, prompt, text)[0] for text in answer["doc"]["choices"]]
        assert [float(response[0][0]) for response in choice["resps"]] == pytest.approx(expected, rel=1e-4)
        accuracies.append(expected[1] > expected[0])
    assert results["local_choices"]["acc,none"] == sum(accuracies) / len(accuracies)


def test_both_tasks_with_the_demo(run_here, tmp_path):
    assert run_here(demo_options("llada"), *DEMO, str(tmp_path / "out")) == 0
    check_demo("llada", tmp_path / "out")


def test_the_example_runs_a_task_each_way(offline, tasks, folders, capsys):
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(tasks))
    example = importlib.import_module("examples.lm_eval_tasks")
    example.main(str(folders["llada"]), "local_answers", task_manager=manager, limit=1, bootstrap_iters=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if ": {" in line]
    assert [line.partition(":")[0] for line in lines] == list(example.WAYS)


# reading the harness' own thousands of tasks would take each process 15 seconds
WITHOUT_ITS_TASKS = """
from functools import partialmethod
from runpy import run_module
from lm_eval.tasks import TaskManager
TaskManager.__init__ = partialmethod(TaskManager.__init__, include_defaults=False)
run_module("sparsed.evaluation.harness", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_the_harness_own_command_line_in_two_processes(tasks, tmp_path):
    """The same as it is called, offline."""
    options = ",".join(f"{name}={value}" for name, value in demo_options("dream").items())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (tmp_path / "called.py").write_text(WITHOUT_ITS_TASKS)
    command = [*launch, str(tmp_path / "called.py"), "run", "--model", "sparsed", "--model_args", options]
    command += ["--include_path", str(tasks), *DEMO, str(tmp_path / "out")]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    # more threads would only wait for each other
    environment = os.environ | offline | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    check_demo("dream", tmp_path / "out")
