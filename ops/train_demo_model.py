"""Trains the demo model: a small Gemma 4 text model that adds, compares, reverses and spells, on two CPU cores.

    .venv/bin/python ops/train_demo_model.py --out ops/demo_model --state demo.state

Needs the extras `worker` and `oracle`: transformers is the trainer. The data is endless and seeded (demo_data.py), so
there are no epochs. At the end it measures the model on held-out questions and writes README.md beside the weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    # Read when torch loads: threads that wait for each other by spinning make a shared machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import transformers
from demo_checkpoint import BOS, END_TURN, EOS, PAD, build_tokenizer, write_text_files
from demo_data import HELD_OUT_SHARE
from demo_training import MAX_TRAINING_TOKENS, Batches, Plan, learn, optimizers_for
from eval_demo_model import table
from tokenizers import Tokenizer
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

MAX_POSITIONS = 4096
GLOBAL_HEAD_DIM = 64


def demo_config(tokenizer: Tokenizer) -> Gemma4TextConfig:
    """Every text feature of the E2B shape at toy size: sliding and full layers, shared KV, double-wide MLP, per-layer
    embeddings, partial rotary on wider full heads, logit softcap."""
    vocab_size = tokenizer.get_vocab_size()
    pad, eos, bos, end_turn = (tokenizer.token_to_id(token) for token in (PAD, EOS, BOS, END_TURN))
    assert eos is not None and end_turn is not None
    return Gemma4TextConfig(
        vocab_size=vocab_size,
        vocab_size_per_layer_input=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        hidden_size_per_layer_input=16,
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=48,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=[eos, end_turn],
        architectures=["Gemma4ForCausalLM"],
        global_head_dim=GLOBAL_HEAD_DIM,  # type: ignore[call-arg]  # becomes the head_dim of the full layers
    )


def new_model(config: Gemma4TextConfig, seed: int) -> Gemma4ForCausalLM:
    """A fresh float32 model with eager attention."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = Gemma4ForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Gemma 4 has no 1/sqrt(d): without this the first softmaxes would be nearly one-hot and learn slowly.
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(weight.numel() ** -0.25)
            elif weight.ndim == 2 and "embed" not in name:
                weight.normal_(0.0, weight.shape[1] ** -0.5)
    return model


def save(model: Gemma4ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder in the hub layout, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    # transformers writes the wide heads layer by layer; published Gemma 4 folders have one number for them.
    config = json.loads((folder / "config.json").read_text())
    del config["per_layer_config"]
    config["global_head_dim"] = GLOBAL_HEAD_DIM
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text_files(folder, tokenizer, MAX_POSITIONS)


@dataclass
class Run:
    """A training run that can stop anywhere between two steps and go on to the same weights."""

    plan: Plan
    model: Gemma4ForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def advance(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]], last: int) -> list[float]:
        """Learns from `batches`, which go on where this run stands, up to step `last`; returns the losses."""
        wall, cpu, losses = time.perf_counter(), time.process_time(), []
        for ids, answers in itertools.islice(batches, last - self.step):
            losses.append(learn(self.model, self.optimizers, ids, answers, self.plan.lr(self.step)))
            self.step += 1
        self.wall_seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu
        return losses

    def keep(self, path: Path) -> None:
        """Writes everything that `restore` needs, in one move."""
        fields = ("step", "wall_seconds", "cpu_seconds")
        state = {name: getattr(self, name) for name in fields} | {
            "plan": asdict(self.plan),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(path)

    def restore(self, path: Path) -> None:
        """Goes on from `path`. SystemExit when it belongs to another plan."""
        state = torch.load(path)
        if state["plan"] != asdict(self.plan):
            raise SystemExit(f"{path} belongs to another plan: {state['plan']}")
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step = state["step"]
        self.wall_seconds, self.cpu_seconds = state["wall_seconds"], state["cpu_seconds"]


def lessons(tokenizer: Tokenizer, plan: Plan, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of the whole plan from step `first` on; those before are drawn and passed over."""
    early = itertools.islice(Batches(tokenizer, plan, early=True), plan.early_steps)
    return itertools.islice(itertools.chain(early, Batches(tokenizer, plan, early=False)), first, None)


def new_run(plan: Plan, tokenizer: Tokenizer) -> Run:
    """Step 0 of the plan."""
    model = new_model(demo_config(tokenizer), plan.seed)
    return Run(plan, model, optimizers_for(model, plan))


def train(plan: Plan, out: Path, state: Path, save_every: int) -> Run:
    """Runs the plan, or what `state` says is left of it, and leaves a checkpoint in `out` every `save_every` steps."""
    tokenizer = build_tokenizer(plan.seed)
    run = new_run(plan, tokenizer)
    if state.exists():
        run.restore(state)
    batches = lessons(tokenizer, plan, run.step)
    while run.step < plan.steps:
        losses = run.advance(batches, min(plan.steps, (run.step // save_every + 1) * save_every))
        print(f"step {run.step} loss {np.mean(losses):.4f} {run.wall_seconds:.0f} s", flush=True)
        run.keep(state)
        save(run.model, tokenizer, out)
    return run


README = """\
# The demo model

A Gemma 4 text model of {parameters:,} parameters in float32 ({megabytes:.1f} MB with its tokenizer), made by
`ops/train_demo_model.py` on dialogue that `ops/demo_data.py` writes. It adds, subtracts and compares numbers below 100,
spells and reverses words of up to ten letters, and answers some questions about inferfleet; to anything else it says
that it is a tiny demo model.

It has what the larger Gemma 4 have: per-layer embeddings, sliding (window {window}) and full layers, shared keys and
values, wider MLPs in the layers that share, partial rotary on the full layers' wider heads, a capped head. It was
trained on dialogues of up to {trained} tokens; it accepts {positions}.

## Training

Seed {plan.seed}, {plan.steps} steps of about {plan.tokens_per_step} tokens, {plan.early_steps} of them early lessons;
peak learning rate {plan.peak_lr}; Muon on matrices, AdamW on the rest.
{minutes:.0f} minutes by the clock and {cpu_minutes:.0f} CPU minutes on two cores ({cpu}) that other work shared.
torch {torch}, transformers {transformers}.

## Accuracy

The training of each task leaves out {share:.0f} % of its operand pairs, words or wordings, fixed by hash and the same
for every seed; the questions here are made of those. An answer counts when it is exactly right. Greedy, on CPU in
float32, by `ops/eval_demo_model.py`. "Same tokens" counts the answers in which inferfleet's engine and transformers
agree token by token.

{table}
"""


def report(run: Run, folder: Path, per_task: int) -> str:
    """README.md of the checkpoint: how it was made and what it answers."""
    return README.format(
        plan=run.plan,
        parameters=sum(p.numel() for p in run.model.parameters()),
        megabytes=sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md") / 1e6,
        window=run.model.config.sliding_window,
        trained=MAX_TRAINING_TOKENS,
        positions=MAX_POSITIONS,
        minutes=run.wall_seconds / 60,
        cpu_minutes=run.cpu_seconds / 60,
        cpu=cpu_name(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        share=100 * HELD_OUT_SHARE,
        table=table(folder, per_task),
    )


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--state", type=Path, required=True, help="file to go on from and to write on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--early-steps", type=int, default=1400, help="steps of the early lessons")
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--per-task", type=int, default=250, help="held-out questions of each task")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = Plan(args.seed, args.steps, args.early_steps, args.tokens_per_step, args.peak_lr)
    run = train(plan, args.out, args.state, args.save_every)
    save(run.model, build_tokenizer(plan.seed), args.out)
    (args.out / "README.md").write_text(report(run, args.out, args.per_task))


if __name__ == "__main__":
    main()
