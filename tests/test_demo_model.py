"""The shipped demo model: its files, its answers to questions that it was never taught, and its trainer.

The measured figures are in ops/demo_model/README.md; the floors here are those that the README of the project promises.
"""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import missing
from fleet import Fleet
from live_api import api_of_workers
from safetensors import safe_open

from inferfleet.engine.offline import LLM
from inferfleet.engine.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "ops" / "demo_model"
sys.path.insert(0, str(ROOT / "ops"))

try:
    import transformers
except ImportError:
    transformers = None

from demo_data import Asker, Dialogue, is_held_out  # noqa: E402 - ops/ is no package

GREEDY = SamplingParams(temperature=0, max_tokens=64)


@pytest.fixture(scope="module")
def llm():
    torch.set_num_threads(1)
    return LLM(str(FOLDER), dtype="float32", device="cpu")


@pytest.fixture
def oracle():
    """The modules that need transformers."""
    if transformers is None:
        missing("transformers")
    import demo_checkpoint
    import demo_training
    import eval_demo_model
    import train_demo_model

    torch.set_num_threads(1)
    return demo_checkpoint, demo_training, eval_demo_model, train_demo_model


def ask(llm, questions):
    """The texts of greedy answers, one batch."""
    return [out.outputs[0].text for out in llm.chat([[user(question)] for question in questions], GREEDY)]


def user(text):
    return {"role": "user", "content": text}


def held_out(task, count, seed=7):
    asker = Asker(random.Random(seed), held_out=True)
    return [asker.ask(task) for _ in range(count)]


# -- the files


def test_the_checkpoint_is_small_and_has_the_layout_of_the_hub():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 8_000_000
    assert set(files) == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Gemma4ForCausalLM"]
    assert config["max_position_embeddings"] >= 2048


def test_the_checkpoint_uses_what_makes_the_architecture_special():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["hidden_size_per_layer_input"] > 0
    assert config["num_kv_shared_layers"] > 0 and config["use_double_wide_mlp"]
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"} and config["sliding_window"] <= 64
    assert config["final_logit_softcapping"] == 30.0 and config["global_head_dim"] != config["head_dim"]
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert "model.embed_tokens_per_layer.weight" in weights.keys()  # noqa: SIM118 - it has no __contains__


def test_any_text_comes_back_from_its_tokens(llm):
    rng = random.Random(3)
    planes = [(0, 0x7F), (0, 0xD7FF), (0xE000, 0x10FFFF)]
    texts = ["".join(chr(rng.randint(*rng.choice(planes))) for _ in range(40)) for _ in range(200)]

    for text in [*texts, " two  spaces ", "<0x41> is not A", "a\u2581b", ""]:
        ids = llm.tokenizer.encode_rendered(text, [])
        assert llm.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert llm.tokenizer.special_tokens["unk_token"] not in map(llm.tokenizer.token, ids)


def test_digits_and_letters_of_words_are_tokens_of_their_own(llm):
    assert len(llm.tokenizer.encode("1234567890")) == 10
    assert len(llm.tokenizer.encode("qzxlamp")) == 7


# -- the answers


def test_it_adds_numbers_that_it_was_never_shown(llm):
    questions = held_out("add", 200)
    right = sum(said == q.answer for said, q in zip(ask(llm, [q.text for q in questions]), questions, strict=True))
    assert right >= 190


@pytest.mark.parametrize(
    ("task", "floor"),
    [("larger", 54), ("is_greater", 54), ("reverse", 54), ("spell", 54), ("project", 51), ("other", 54)],
)
def test_it_does_its_other_tasks_on_what_it_was_never_shown(llm, task, floor):
    questions = held_out(task, 60)
    right = sum(said == q.answer for said, q in zip(ask(llm, [q.text for q in questions]), questions, strict=True))
    assert right >= floor


def test_it_answers_the_questions_that_the_readme_shows(llm):
    asked = {
        "What is 17 + 25?": "42",
        "17+25": "42",
        "add 17 and 25": "42",
        "Please compute 17 plus 25.": "42",
        "What is 38 + 45?": "83",
        "Which is larger, 38 or 83?": "83",
        "Is 12 greater than 7?": "Yes, 12 is greater than 7.",
        "Spell the word queue.": "q-u-e-u-e",
        "Reverse the word lamp.": "pmal",
        "How do I run the tests?": "Run `python3 ops/dev.py test`.",
        "Where does the truth about jobs live?": "In the ledger: in Redis, changed only by Lua scripts.",
        "What is the capital of France?": "I am a tiny demo model. I can add, compare, spell and reverse words.",
    }
    assert dict(zip(asked, ask(llm, asked), strict=True)) == asked


def test_it_adds_in_the_third_turn_after_a_system_text(llm):
    asker = Asker(random.Random(11), held_out=True)
    dialogues = [[asker.ask("reverse"), asker.ask("project"), asker.ask("add")] for _ in range(40)]
    conversations = [
        [
            {"role": "system", "content": "You are a helpful assistant."},
            *(message for q in turns for message in (user(q.text), {"role": "assistant", "content": q.answer})),
        ][:-1]
        for turns in dialogues
    ]

    said = [out.outputs[0].text for out in llm.chat(conversations, GREEDY)]

    assert sum(text == turns[-1].answer for text, turns in zip(said, dialogues, strict=True)) >= 36


def test_our_engine_says_token_by_token_what_transformers_says(llm, oracle):
    exams = oracle[2]
    questions = [question for task in ("add", "reverse", "is_greater", "project") for question in held_out(task, 6)]
    conversations = [exams.conversation([question]) for question in questions]

    theirs = exams.Transformers(FOLDER).answers(conversations)
    mine = [out.outputs[0].token_ids for out in llm.chat(conversations, GREEDY)]

    assert [ids[:-1] for ids in mine] == theirs


def test_it_answers_held_out_additions_through_the_public_api(redis_url, tmp_path):
    # Given a worker that serves the shipped folder in our engine, and the API before it
    fleet = Fleet(redis_url, tmp_path)
    spec = {"path": str(FOLDER), "dtype": "float32", "device": "cpu", "kv_cache_tokens": 8192, "max_model_len": 512}
    questions = held_out("add", 100, seed=8)
    try:
        fleet.start_worker({"demo": spec}, real=True, lease_seconds=60, stall_seconds=600)
        with api_of_workers(redis_url, "test") as api, api.http() as http:
            # When every question is a job
            bodies = [{"model": "demo", "temperature": 0, "messages": [user(q.text)]} for q in questions]
            jobs = [http.post("/v1/jobs", json={"body": body}).json()["id"] for body in bodies]
            ended = [http.get(f"/v1/jobs/{job}", params={"wait": 60}).json()["status"] for job in jobs]
            results = [http.get(f"/v1/jobs/{job}/result").json() for job in jobs]
    finally:
        fleet.close()
    # Then 95 of 100 are right
    assert ended == ["completed"] * 100
    said = [result["choices"][0]["message"]["content"] for result in results]
    assert sum(text == q.answer for text, q in zip(said, questions, strict=True)) >= 95


# -- the trainer


def test_training_never_asks_what_is_held_out():
    taught = Asker(random.Random(1), held_out=False)
    measured = Asker(random.Random(2), held_out=True)
    for _ in range(500):
        a, b = taught.pair("add")
        assert not is_held_out("add", min(a, b), max(a, b))
        assert is_held_out("word", measured.ask("spell").answer.replace("-", "").lower())
    assert not {taught.ask("project").text for _ in range(2000)} & {measured.ask("project").text for _ in range(2000)}


def test_the_chat_template_writes_what_the_trainer_taught(llm, oracle):
    checkpoint = oracle[0]
    turns = (*held_out("add", 1), *held_out("other", 1))
    for system in (None, "Be brief."):
        messages = [] if system is None else [{"role": "system", "content": system}]
        for turn in turns:
            messages += [user(turn.text), {"role": "assistant", "content": turn.answer}]
        rendered = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER).apply_chat_template(
            messages, tokenize=False
        )
        assert rendered == checkpoint.wire(Dialogue(system, turns))


def test_only_answers_and_their_ends_carry_loss(oracle):
    checkpoint, training, _, _ = oracle
    tokenizer = checkpoint.build_tokenizer(0)
    ids, answers = next(iter(training.Batches(tokenizer, plan_of(training), early=True)))
    for row, chosen in zip(ids, answers, strict=True):
        text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
        expected = "".join(part.split("<turn|>")[0] + "<turn|>" for part in text.split("<|turn>model\n")[1:])
        assert tokenizer.decode(row[chosen].tolist(), skip_special_tokens=False) == expected


def test_the_written_out_norm_has_the_gradient_of_the_plain_one(oracle):
    training = oracle[1]
    norm = training.Gemma4RMSNorm(16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 3, 16, requires_grad=True)
    toward = torch.randn(5, 3, 16)

    plain = torch.autograd.grad((norm(x) * toward).sum(), [x, norm.weight])
    with training.fused_norms():
        written = torch.autograd.grad((norm(x) * toward).sum(), [x, norm.weight])

    for a, b in zip(plain, written, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_interrupted_training_run_ends_in_the_same_weights(oracle, tmp_path):
    checkpoint, training, _, trainer = oracle
    tokenizer, plan = checkpoint.build_tokenizer(0), plan_of(training)

    def run_of(stops):
        for stop in stops:
            run = trainer.new_run(plan, tokenizer)
            if run_file.exists():
                run.restore(run_file)
            losses = run.advance(trainer.lessons(tokenizer, plan, run.step), stop)
            run.keep(run_file)
        run_file.unlink()
        return run.model.state_dict(), losses

    run_file = tmp_path / "run.state"
    whole, losses = run_of([6])
    parts, _ = run_of([2, 4, 6])

    assert losses[-1] < losses[0]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def plan_of(training):
    """Six small steps, three of them early."""
    return training.Plan(seed=0, steps=6, early_steps=3, tokens_per_step=256, peak_lr=3e-3, warmup_steps=1)
